"""What evaluation makes of a trained two-tower."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys_ray.core.clock import DAY
from recsys_ray.evaluation.ranking import UserBatch
from recsys_ray.scoring.scorer import TrainedTower
from recsys_ray.two_tower.towers import TowerSpec, UserTower


def tower(**settings) -> TrainedTower:
    spec = TowerSpec(1, ["stream"], 1, 0, 0, 1, 0, 0, {"mood": 2}, [4], countries=["DE"], **settings)
    ntype, available = np.zeros(3, np.int64), np.ones(3, bool)
    return TrainedTower(np.zeros((3, 4)), UserTower(spec), np.zeros((3, 1)), None, ntype, available, None, 100 * DAY)


def batch(ages: list, countries: list, moods: list, days: list[list[int]]) -> UserBatch:
    table = pa.table({"age": pa.array(ages, pa.float32()), "country": pa.array(countries, pa.string()), "mood": moods})
    lengths, when = [len(own) for own in days], np.array([day * DAY for own in days for day in own], np.int64)
    gid, event = np.zeros(len(when), np.int64), np.zeros(len(when), np.int8)
    return UserBatch(np.arange(len(days)), np.cumsum([0, *lengths]), gid, event, when, table)


def test_unknown_is_who_has_neither_history_nor_a_trait_that_the_tower_knows():
    ages, countries = [None, None, 31, None, None, None], [None, None, None, "DE", "XX", None]
    moods = [None, None, None, None, None, [0.5, 0.0]]
    users = batch(ages, countries, moods, [[], [99], [], [], [], []])
    assert tower().unknown(users).tolist() == [True, False, False, False, True, False]


def test_trends_are_added_without_a_memory_too():
    users, scores = batch([30], ["DE"], [None], [[99]]), torch.zeros(1, 2)
    assert tower().remember(users, torch.zeros(1, 4)) is None
    add = replace(tower(), trend=np.array([0.1, 0.2, 0.3], np.float32)).remember(users, torch.zeros(1, 4))
    add(1, 3, scores)
    assert scores.tolist() == [pytest.approx([0.2, 0.3])]


def test_a_history_before_the_window_says_nothing():
    users = batch([None, None], [None, None], [None, None], [[10], [99]])
    assert tower(window_days=30).unknown(users).tolist() == [True, False]
    assert not tower().unknown(users).any()
