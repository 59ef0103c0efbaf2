"""The items' own vectors: who has one, and how many a training step does without."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkerboard import ITEMS, board_task, board_trainer

from recsys_ray.graph.activity import UNTOUCHED
from recsys_ray.two_tower.batches import tables_for
from recsys_ray.two_tower.towers import ItemVectors, TwoTower
from recsys_ray.two_tower.training import share_unknown, start, train_epochs


def test_with_vectors_of_their_own_items_are_told_apart_where_nothing_else_does():
    loss = []
    for id_dim in (0, 8):
        task = board_task("nowhere", id_dim=id_dim)
        trainer, optimizer = board_trainer(task)
        if id_dim:
            trainer.model.ids.assign(torch.ones(ITEMS))
        loss.append(train_epochs(trainer, optimizer, {})["history"][-1]["loss"])
    assert loss[1] < loss[0] - 0.5


def test_only_items_of_examples_have_vectors_and_the_most_frequent_come_first():
    spec = replace(board_task(with_hgnn=False).spec, id_dim=3, id_rows=2)
    ids = ItemVectors(spec).eval()
    counts = torch.zeros(ITEMS)
    counts[[4, 9, 7]] = torch.tensor([5.0, 2.0, 8.0])
    ids.assign(counts)
    vectors = ids(torch.arange(ITEMS), None)
    assert vectors.abs().sum(1).nonzero().squeeze(1).tolist() == [4, 7]
    assert not ids(torch.tensor([-1, ITEMS]), None).any()


def test_a_vector_is_what_the_graph_says_plus_what_the_item_learned():
    task = board_task(id_dim=4)
    vectors = ItemVectors(task.spec).eval()
    vectors.assign((torch.arange(ITEMS) < 5).double())
    hgnn = task.source.features("hgnn_cut0", torch.arange(ITEMS))
    made = vectors(torch.arange(ITEMS), hgnn)
    graph = (hgnn @ vectors.map.weight.T + vectors.map.bias) * hgnn.shape[1] ** 0.5
    assert torch.allclose(made[5:], graph[5:], atol=1e-6)  # no examples: what the graph says alone
    assert ((made - graph)[:5].norm(dim=1) > 1e-3).all()
    assert torch.allclose(vectors(torch.tensor([ITEMS]), hgnn[:1]), graph[:1], atol=1e-6)  # it came after training
    assert not vectors(torch.tensor([-1]), hgnn[:1]).any(), "nobody had it"
    vectors.train().dropout = 1 - 1e-9
    assert torch.allclose(vectors(torch.arange(ITEMS), hgnn), graph, atol=1e-6)


def test_training_moves_the_map_from_the_graph():
    task = board_task("hgnn", id_dim=4)
    trainer, optimizer = board_trainer(task)
    start(trainer.model, task, seed=0)
    before = trainer.model.ids.map.weight.detach().clone()
    assert torch.allclose(before @ before.T, torch.eye(4), atol=1e-4), "it starts at principal directions"
    train_epochs(trainer, optimizer, {})
    assert (trainer.model.ids.map.weight - before).abs().max() > 1e-3


def test_an_item_that_nobody_had_touched_shows_no_vector_of_its_own():
    task = board_task(id_dim=4)
    task.catalogue.activity["cut0"][3, UNTOUCHED] = 1
    gids = torch.tensor([2, 3])
    assert tables_for(task.source, task.spec, task.catalogue, "cut0", gids).owners.tolist() == [2, -1]
    assert tables_for(task.source, task.spec, task.catalogue, "cut1", gids).owners.tolist() == [2, 3]
    features = task.source.features("text", gids)
    assert task.catalogue.rows(gids, "cut0", features, None).owners.tolist() == [2, -1]


def test_training_does_without_some_vectors_and_keeps_their_mean():
    ids = ItemVectors(replace(board_task(with_hgnn=False).spec, id_dim=3, id_dropout=0.5))
    ids.assign(torch.ones(ITEMS))
    gids = torch.zeros(4000, dtype=torch.int64)
    torch.manual_seed(0)
    drawn, whole = ids(gids, None), ids.eval()(gids[:1], None)
    assert set((drawn / whole).round(decimals=3).unique().tolist()) == {0.0, 2.0}
    assert torch.allclose(drawn.mean(0), whole[0], atol=0.1)


def test_the_share_of_vectors_to_do_without_follows_from_how_often_items_occur():
    task = board_task(id_dim=3)
    task.spec = replace(task.spec, id_dropout=None)
    model = TwoTower(task.spec)
    start(model, task, seed=0)
    counts = np.bincount(task.examples["target"], minlength=ITEMS)
    each = 12 / (counts[task.examples["target"]] - 1 + 12)
    assert model.ids.dropout == pytest.approx(each.mean())
    assert share_unknown(torch.full((5,), 1000.0)) < 0.02
    assert share_unknown(torch.tensor([1.0, 1.0, 0.0])) == 1.0
    assert share_unknown(torch.zeros(3)) == 0.0
    task.spec = replace(task.spec, id_dropout=0.4)
    given = TwoTower(task.spec)
    start(given, task, seed=0)
    assert given.ids.dropout == 0.4
