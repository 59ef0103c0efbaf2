"""What evaluation makes of a trained two-tower."""

import numpy as np
import pyarrow as pa
import torch

from recsys_ray.core.clock import DAY
from recsys_ray.evaluation.ranking import UserBatch
from recsys_ray.evaluation.towers import TrainedTowers
from recsys_ray.scoring.memory import SMALL, Memory
from recsys_ray.scoring.scorer import Scorer
from recsys_ray.two_tower.towers import TowerSpec, UserTower


def tower(memory: Memory | None = None, **settings) -> TrainedTowers:
    spec = TowerSpec(1, ["stream"], 1, 0, 0, 1, 0, 0, {"mood": 2}, [4], countries=["DE"], **settings)
    bias = np.array([0.1, 0.2, 0.3], np.float32)
    score = Scorer(np.column_stack([np.zeros((3, 4), np.float32), bias]), memory, 0.5, 1.0)
    torch.manual_seed(0)
    return TrainedTowers(UserTower(spec).eval(), score, np.zeros((3, 1)), None, np.zeros(3, np.int64), None, 100 * DAY)


def batch(ages: list, countries: list, moods: list, days: list[list[int]]) -> UserBatch:
    columns = {
        "age": (ages, pa.float32()),
        "country": (countries, pa.string()),
        "mood": (moods, pa.list_(pa.float32())),
    }
    table = pa.table({name: pa.array(*column) for name, column in columns.items()})
    lengths, when = [len(own) for own in days], np.array([day * DAY for own in days for day in own], np.int64)
    gid, event = np.zeros(len(when), np.int64), np.zeros(len(when), np.int8)
    return UserBatch(np.arange(len(days)), np.cumsum([0, *lengths]), gid, event, when, table)


def test_unknown_is_who_has_neither_history_nor_a_trait_that_the_tower_knows():
    ages, countries = [None, None, 31, None, None, None], [None, None, None, "DE", "XX", None]
    moods = [None, None, None, None, None, [0.5, 0.0]]
    users = batch(ages, countries, moods, [[], [99], [], [], [], []])
    assert tower().unknown(users).tolist() == [True, False, False, False, True, False]


def test_scores_are_those_of_the_users_latest_events_inside_the_window():
    """Item 0 brings item 2 to mind; the second user's event with it lies before the window."""
    one = np.array([[0.4]])
    memory = Memory.of_edges(np.array([0]), np.array([2]), one, np.ones(3, int), np.zeros(3, int))
    users = batch([30, 31], ["DE", None], [None, None], [[99], [10]])
    found = tower(memory, window_days=30).scorer(users)(1, 3)
    raised = 0.5 * np.log1p(0.4 / SMALL)
    np.testing.assert_allclose(found.numpy(), [[0.2, 0.3 + raised], [0.2, 0.3]], rtol=1e-6)


def test_a_history_before_the_window_says_nothing():
    users = batch([None, None], [None, None], [None, None], [[10], [99]])
    assert tower(window_days=30).unknown(users).tolist() == [True, False]
    assert not tower().unknown(users).any()
