"""Whether the last item says more of the next one than the whole history: what nearest neighbours find."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkerboard import ITEMS, board_catalogue, board_task

from recsys_ray.ragged import offsets_of
from recsys_ray.two_tower.batches import ArrayFeatures, tables_for, user_inputs
from recsys_ray.two_tower.recency import last_items_tell, recent_weights
from recsys_ray.two_tower.towers import TwoTower

QUERIES, PLACES, KINDS = 300, 12, 20  # items of both types are of twenty kinds, which the text tells apart


def test_weights_halve_with_the_places():
    offsets = torch.tensor([0, 4, 4, 6])
    assert recent_weights(offsets, 1.0).tolist() == [0.125, 0.25, 0.5, 1.0, 0.5, 1.0]
    assert recent_weights(offsets, 2.0)[:4].tolist() == pytest.approx([0.5**1.5, 0.5, 0.5**0.5, 1.0])


def test_only_with_the_last_item_the_order_counts():
    task = board_task()
    for last_item in (False, True):
        torch.manual_seed(0)
        model = TwoTower(replace(task.spec, last_item=last_item)).eval()
        inputs = user_inputs(task.examples, np.array([200]), task.spec)
        gids, place = torch.unique(inputs.gids, return_inverse=True)
        tables = tables_for(task.source, task.spec, task.catalogue, "cut0", gids)
        there, back = (model.users(replace(inputs, gids=p), tables) for p in (place, place.flip(0)))
        assert len(gids) > 3
        assert torch.allclose(there, back, atol=1e-5) != last_item


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
def test_the_data_say_whether_the_last_item_tells(recent):
    task = board_task(with_hgnn=False)
    kinds = torch.eye(KINDS)[torch.arange(ITEMS) % KINDS]
    task = replace(task, source=ArrayFeatures(text=kinds), catalogue=board_catalogue(), queries=queries_of(recent))
    assert last_items_tell(task, seed=0) == last_items_tell(task, seed=0) == recent


def test_without_a_history_that_is_asked_for_the_last_item_tells_nothing():
    task = board_task()
    nobody = {"target": np.zeros(0, np.int32), "uid": np.zeros(0, np.int64)}
    assert not last_items_tell(replace(task, queries=nobody), seed=0)
    lonely = {**task.queries, "offsets": np.zeros_like(task.queries["offsets"])}
    assert not last_items_tell(replace(task, queries=lonely), seed=0)
