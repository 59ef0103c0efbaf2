"""Whether the last items say more of the next one than the whole history: what neighbours and the memory find."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkerboard import ITEMS, board_catalogue, board_task, board_trainer

from recsys_ray.core.offsets import offsets_of
from recsys_ray.scoring.choose import Moment, first_as_good
from recsys_ray.scoring.memory import HALF_LIVES, RIDGES, Memory
from recsys_ray.scoring.scorer import ScoreSpec
from recsys_ray.two_tower.batches import ArrayFeatures, tables_for, user_inputs
from recsys_ray.two_tower.recency import (
    last_items_tell,
    memory_half_life,
    with_recency,
)
from recsys_ray.two_tower.towers import TwoTower, recent_weights
from recsys_ray.two_tower.training import TowerTask

QUERIES, PLACES, KINDS = 300, 12, 20  # items of both types are of twenty kinds, which the text tells apart


def test_weights_halve_with_the_places():
    offsets = torch.tensor([0, 4, 4, 6])
    assert recent_weights(offsets, 1.0).tolist() == [0.125, 0.25, 0.5, 1.0, 0.5, 1.0]
    assert recent_weights(offsets, 2.0)[:4].tolist() == pytest.approx([0.5**1.5, 0.5, 0.5**0.5, 1.0])


@pytest.mark.parametrize(("last_item", "recent"), [(False, []), (True, []), (False, [4.0])])
def test_the_order_counts_with_the_last_item_or_means_of_the_latest(last_item, recent):
    task = board_task()
    torch.manual_seed(0)
    model = TwoTower(replace(task.spec, last_item=last_item, recent=recent)).eval()
    inputs = user_inputs(task.examples, np.array([200]), task.spec)
    gids, place = torch.unique(inputs.gids, return_inverse=True)
    tables = tables_for(task.source, task.spec, task.catalogue, "cut0", gids)
    there, back = (model.users(replace(inputs, gids=p), tables) for p in (place, place.flip(0)))
    assert len(gids) > 3
    assert torch.allclose(there, back, atol=1e-5) == (not last_item and not recent)


@pytest.mark.parametrize(("places", "wanted"), [(15, []), (16, [4.0]), (63, [4.0]), (64, [4.0, 16.0])])
def test_means_of_the_latest_where_histories_are_long_and_the_last_item_tells(places, wanted):
    task = board_task()
    task = replace(task, queries={**task.queries, "offsets": np.arange(len(task.queries["target"]) + 1) * places})
    for last_item, recent in ((True, wanted), (False, [])):
        spec = replace(task.spec, last_item=last_item)
        assert with_recency(replace(task, spec=spec), seed=0).spec == replace(spec, recent=recent)


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


def task_with_memory(recent: bool) -> TowerTask:
    """Items of one kind and type bring each other to mind; nothing else tells anything."""
    gids, catalogue = np.arange(ITEMS), board_catalogue()
    src, dst = np.nonzero((gids % KINDS)[:, None] == gids % KINDS)
    near = src != dst
    made = np.full((near.sum(), len(RIDGES)), 0.1)
    memory = Memory.of_edges(src[near], dst[near], made, np.ones(ITEMS, int), catalogue.ntype.numpy())
    moment = Moment(catalogue.ntype.numpy(), memory)
    return replace(board_task("nowhere"), catalogue=catalogue, queries=queries_of(recent), moment=moment)


@pytest.mark.parametrize("recent", [True, False])
def test_the_data_say_how_fast_the_memory_forgets(recent):
    task = task_with_memory(recent)
    memory = task.moment.memory
    found = memory_half_life(task, memory, seed=0)
    assert found == memory_half_life(task, memory, seed=0)
    assert found in (HALF_LIVES[:1] if recent else HALF_LIVES[-2:])
    undecided = replace(task, spec=replace(task.spec, last_item=None))
    told = with_recency(undecided, seed=0)
    assert told.spec == replace(task.spec, last_item=False) and told.score == ScoreSpec(half_life=found)
    without = replace(task, moment=replace(task.moment, memory=None))
    assert with_recency(without, seed=0).score == ScoreSpec()


@pytest.mark.parametrize("recent", [True, False])
def test_validation_recalls_with_the_half_life_of_the_spec(recent, monkeypatch):
    monkeypatch.setattr("recsys_ray.scoring.choose._TOP", 3)  # of the four of a kind and type
    task, found = task_with_memory(recent), []
    nobody = {"age": np.full(QUERIES, np.nan, np.float32), "country_index": np.full(QUERIES, -1)}
    task.queries.update(nobody, taste_music=np.full((QUERIES, 3), np.nan, np.float32))
    for half_life in HALF_LIVES:
        trainer, _ = board_trainer(replace(task, score=ScoreSpec(half_life=half_life)))
        found.append(trainer.validate().hit_rate)
    assert found == sorted(found, reverse=recent) and abs(found[0] - found[-1]) > 0.1


def test_the_first_choice_that_is_not_clearly_worse():
    """Of 1,000 queries and three choices; the third is the best, with 140 hits that gain .5 each."""
    hits = torch.zeros(1000, 3, dtype=torch.float64)
    hits[:140, 2] = hits[:120, 1] = 1
    hits[140:270, 0] = 1  # others altogether: 10 fewer of 270, .6 standard errors

    def chosen() -> int:
        gains = hits / 2
        return first_as_good(gains.sum(0), gains.T @ gains)

    assert chosen() == 0
    hits[250:270, 0] = 0  # 30 fewer: 1.9 errors; of the second choice 20 are missing, 4.5 errors
    assert chosen() == 2
    hits[200:219, 1] = 1  # 1 fewer, and 39 that one of the two has alone: .2
    assert chosen() == 1


def test_without_a_history_that_is_asked_for_the_last_item_tells_nothing():
    task = board_task()
    nobody = {"target": np.zeros(0, np.int32), "uid": np.zeros(0, np.int64)}
    assert not last_items_tell(replace(task, queries=nobody), seed=0)
    lonely = {**task.queries, "offsets": np.zeros_like(task.queries["offsets"])}
    assert not last_items_tell(replace(task, queries=lonely), seed=0)
