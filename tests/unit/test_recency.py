"""The recent mean of a history: its weights, and the half-life that nearest neighbours choose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkerboard import ITEMS, board_catalogue, board_task

from recsys_ray.two_tower.batches import ArrayFeatures, tables_for, user_inputs
from recsys_ray.two_tower.recency import HALF_LIVES, choose_half_life
from recsys_ray.two_tower.rows import offsets_of
from recsys_ray.two_tower.towers import TwoTower, recent_weights

QUERIES, PLACES, KINDS = 300, 12, 20  # items of both types are of twenty kinds, which the text tells apart


def test_weights_halve_with_the_places():
    offsets = torch.tensor([0, 4, 4, 6])
    assert recent_weights(offsets, 1.0).tolist() == [0.125, 0.25, 0.5, 1.0, 0.5, 1.0]
    assert recent_weights(offsets, 2.0)[:4].tolist() == pytest.approx([0.5**1.5, 0.5, 0.5**0.5, 1.0])
    assert recent_weights(torch.tensor([0, 20]), 1.0).count_nonzero() == 13


def test_only_with_a_half_life_the_order_counts():
    task = board_task()
    for half_life in (0.0, 0.5):
        torch.manual_seed(0)
        model = TwoTower(replace(task.spec, half_life=half_life)).eval()
        inputs = user_inputs(task.examples, np.array([200]), task.spec)
        gids, place = torch.unique(inputs.gids, return_inverse=True)
        tables = tables_for(task.source, task.spec, task.catalogue, "cut0", gids)
        there, back = (model.users(replace(inputs, gids=p), tables) for p in (place, place.flip(0)))
        assert len(gids) > 3
        assert torch.allclose(there, back, atol=1e-5) == (half_life == 0)


def queries_of(recent: bool):
    """Queries whose target is of the kind of the last event, or of the kind that half of the history is of."""
    random = np.random.default_rng(0)
    kind = np.arange(ITEMS) % KINDS
    history = random.integers(0, ITEMS, (QUERIES, PLACES))
    wanted = kind[history[:, -1]] if recent else random.integers(0, KINDS, QUERIES)
    target = random.integers(0, ITEMS // KINDS, QUERIES) * KINDS + wanted
    if not recent:
        same = random.integers(0, ITEMS // KINDS, (QUERIES, PLACES)) * KINDS + wanted[:, None]
        history[:, ::2] = same[:, ::2]  # not the last
    apart = history != target[:, None]
    return {
        "uid": np.arange(QUERIES),
        "target": target.astype(np.int32),
        "history": history[apart].astype(np.int32),
        "history_event": np.zeros(apart.sum(), np.int8),
        "offsets": offsets_of(apart.sum(1)),
    }


@pytest.mark.parametrize("recent", [True, False])
def test_the_half_life_is_the_datas(recent):
    task = board_task(with_hgnn=False)
    kinds = torch.eye(KINDS)[torch.arange(ITEMS) % KINDS]
    task = replace(task, source=ArrayFeatures(text=kinds), catalogue=board_catalogue(), queries=queries_of(recent))
    chosen = choose_half_life(task, seed=0)
    assert chosen == choose_half_life(task, seed=0)
    assert chosen in ((0.25, 1.0) if recent else (0.0,))


def test_without_a_query_there_is_no_recent_mean():
    task = board_task()
    nobody = {"target": np.zeros(0, np.int32), "uid": np.zeros(0, np.int64)}
    assert choose_half_life(replace(task, queries=nobody), seed=0) == 0.0
    lonely = {**task.queries, "offsets": np.zeros_like(task.queries["offsets"])}  # nobody has a history
    assert choose_half_life(replace(task, queries=lonely), seed=0) == 0.0
    assert set(HALF_LIVES) >= {0.0, 0.25}
