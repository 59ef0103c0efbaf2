"""When graphs are built, and which examples may use which."""

from __future__ import annotations

import itertools

import pytest

from recsys_ray.config import GraphConfig
from recsys_ray.errors import DataError
from recsys_ray.snapshots import DAY, as_records, plan_snapshots, snapshots_of

COUNTS = {
    "valid_from": 100 * DAY,
    "test_from": 110 * DAY,
    "end": 120 * DAY + 1,
    "days": [[day, 10] for day in range(120)],
}


def test_every_example_uses_a_graph_that_ends_before_it():
    plan = plan_snapshots(GraphConfig(window_days=30, cuts=4, first_cut=0.2), COUNTS)
    assert [s.name for s in plan] == ["cut0", "cut1", "cut2", "cut3", "valid", "test", "serve"]
    intervals = [s.examples for s in plan if s.name.startswith("cut")]
    assert intervals[-1][1] == COUNTS["valid_from"]
    for snapshot, following in itertools.pairwise(plan):
        assert snapshot.start == snapshot.time - 30 * DAY
        if snapshot.examples:
            assert snapshot.time == snapshot.examples[0]
        if snapshot.name.startswith("cut"):
            assert snapshot.examples[1] == following.time
    assert plan[0].time == 20 * DAY


def test_the_papers_way_uses_one_window_for_both():
    plan = plan_snapshots(GraphConfig(window_days=30, features_as_of="window"), COUNTS)
    assert plan[0].time == COUNTS["valid_from"]
    assert plan[0].examples == (70 * DAY, 100 * DAY)


def test_no_window_reaches_back_to_the_first_event():
    plan = plan_snapshots(GraphConfig(window_days=None), COUNTS)
    assert {s.start for s in plan} == {0}


def test_cuts_on_the_same_day_fall_together():
    counts = {**COUNTS, "days": [[50, 1000], [51, 1], [115, 5]]}
    plan = plan_snapshots(GraphConfig(cuts=4), counts)
    assert sum(s.name.startswith("cut") for s in plan) == 1
    assert plan[0].time == 51 * DAY


def test_records_survive_the_manifest():
    plan = plan_snapshots(GraphConfig(), COUNTS)
    assert snapshots_of({"snapshots": as_records(plan)}) == plan


def test_nothing_to_train_on_is_a_sentence():
    with pytest.raises(DataError, match="no positive event lies before"):
        plan_snapshots(GraphConfig(), {**COUNTS, "days": [[115, 5]]})
