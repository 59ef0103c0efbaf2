"""When graphs are built, and which examples may use which."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest

from recsys_ray.config import GraphConfig
from recsys_ray.core.clock import DAY
from recsys_ray.core.errors import DataError
from recsys_ray.graph.snapshots import earlier_snapshot, plan_snapshots, snapshots_of, training_snapshot

COUNTS = {
    "valid_from": 100 * DAY,
    "test_from": 110 * DAY,
    "end": 120 * DAY + 1,
    "days": [[day, 10] for day in range(120)],
}
LEFT_OUT = {"protocol": "leave_one_out", "valid_from": 0, "test_from": 1, "end": 2, "days": []}


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
    for counts in (COUNTS, LEFT_OUT):
        plan = plan_snapshots(GraphConfig(window_days=None), counts, seed=3)
        stored = json.loads(json.dumps({"snapshots": [asdict(s) for s in plan]}))
        assert snapshots_of(stored) == plan


def test_records_from_before_there_were_folds_are_read():
    records = [{name: value for name, value in r.items() if name != "without"} for r in [asdict(s) for s in plan()]]
    assert snapshots_of({"snapshots": records}) == plan()


def test_nothing_to_train_on_is_a_sentence():
    with pytest.raises(DataError, match="no positive event lies before"):
        plan_snapshots(GraphConfig(), {**COUNTS, "days": [[115, 5]]})


def plan():
    return plan_snapshots(GraphConfig(window_days=30), COUNTS)


def test_the_hgnn_learns_what_the_newest_cut_has_and_the_one_before_lacks():
    assert (earlier_snapshot(plan()).name, training_snapshot(plan()).name) == ("cut3", "cut4")
    one = plan_snapshots(GraphConfig(window_days=30, cuts=1), COUNTS)
    assert (earlier_snapshot(one).name, training_snapshot(one).name) == ("cut0", "cut0")


def test_leave_one_out_has_a_fold_of_users_for_each_cut():
    plan = plan_snapshots(GraphConfig(window_days=None, cuts=3), LEFT_OUT, seed=1)
    assert [s.name for s in plan] == ["cut0", "cut1", "cut2", "valid", "test", "serve"]
    assert [s.time for s in plan] == [0, 0, 0, 0, 1, 2]
    cuts, users = plan[:3], np.arange(20_000)
    inside = np.stack([s.without.has(users) for s in cuts])
    assert (inside.sum(0) == 1).all()
    assert (np.abs(inside.mean(1) - 1 / 3) < 0.02).all()
    assert all(s.without is None for s in plan[3:])
    assert all(s.examples[1] == LEFT_OUT["valid_from"] for s in cuts)
    other = plan_snapshots(GraphConfig(window_days=None, cuts=3), LEFT_OUT, seed=2)
    assert not np.array_equal(other[0].without.has(users), inside[0])


def test_leave_one_out_trains_the_hgnn_on_all_training_events():
    plan = plan_snapshots(GraphConfig(window_days=None), LEFT_OUT)
    assert (earlier_snapshot(plan).name, training_snapshot(plan).name) == ("cut0", "valid")
    papers = plan_snapshots(GraphConfig(window_days=None, features_as_of="window"), LEFT_OUT)
    assert [s.name for s in papers] == ["cut0", "valid", "test", "serve"]
    assert training_snapshot(papers).name == earlier_snapshot(papers).name == "cut0" and papers[0].without is None
