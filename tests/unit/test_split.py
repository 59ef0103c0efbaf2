"""Leave-one-out against an account of each user by hand and by brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_ray.config import SplitConfig
from recsys_ray.core.clock import DAY, calendar_end, is_leave_one_out
from recsys_ray.core.errors import DataError
from recsys_ray.data.split import END, TEST_FROM, VALID_FROM, logical_times, plan_split
from recsys_ray.data.tables import Catalogue, Events
from recsys_ray.evaluation.segments import find_queries

LIKED = {"stream"}
ITEMS = 8


def times_of(rows: list[tuple[int, int, str]]) -> list[int]:
    """``rows``: (uid, gid, event) in order."""
    uid, gid = (np.array([row[k] for row in rows], kind) for k, kind in ((0, np.int64), (1, np.int32)))
    return logical_times(uid, gid, np.array([row[2] in LIKED for row in rows], bool)).tolist()


def test_the_last_new_item_is_the_test_and_the_one_before_it_validation():
    assert times_of([(7, gid, "stream") for gid in (4, 2, 6, 1, 3)]) == [-3, -2, -1, VALID_FROM, TEST_FROM]


def test_each_user_has_an_own_split_and_who_has_two_items_only_trains():
    rows = [(1, 0, "stream"), (1, 1, "stream"), (2, 3, "stream"), (2, 2, "stream"), (2, 1, "stream"), (4, 5, "stream")]
    assert times_of(rows) == [-2, -1, -1, VALID_FROM, TEST_FROM, -1]


def test_items_that_are_used_again_are_not_new():
    rows = [(1, gid, "stream") for gid in (0, 1, 0, 2, 0, 3, 1)]
    assert times_of(rows) == [-3, -2, -1, VALID_FROM, VALID_FROM, TEST_FROM, TEST_FROM]


def test_an_item_is_new_at_the_first_event_of_any_kind():
    """Item 2 was previewed before item 3 came: asking for it when it is streamed would ask for a known item."""
    rows = [(1, 0, "stream"), (1, 1, "stream"), (1, 2, "preview"), (1, 3, "stream"), (1, 2, "stream")]
    assert times_of(rows) == [-2, -1, VALID_FROM, TEST_FROM, TEST_FROM]


def test_weak_events_alone_discover_nothing():
    rows = [(1, 5, "preview"), *((1, gid, "stream") for gid in (0, 1)), (1, 6, "preview"), (1, 2, "stream")]
    assert times_of(rows) == [-2, -1, VALID_FROM, VALID_FROM, TEST_FROM]
    assert times_of([(1, gid, "preview") for gid in range(5)]) == [-5, -4, -3, -2, -1]


def test_no_events():
    assert times_of([]) == []


rows = st.lists(st.tuples(st.integers(0, 3), st.integers(0, ITEMS - 1), st.sampled_from(["stream", "preview"])))


@given(rows)
@settings(max_examples=200, deadline=None)
def test_everyone_with_three_discoveries_is_asked_for_one_item_and_nobody_else_is(unordered):
    ordered = sorted(unordered, key=lambda row: row[0])  # stable: the order inside a user is as drawn
    time = np.array(times_of(ordered), np.int64)
    uid, gid = (np.array([row[k] for row in ordered], np.int64) for k in (0, 1))
    event = np.array([row[2] not in LIKED for row in ordered], np.int8)
    events = Events(uid, gid, event, time)
    catalogue = Catalogue(("x",), np.array([0, ITEMS]), np.ones(ITEMS, bool))
    asked = find_queries(events, catalogue, np.array([True, False]), TEST_FROM, END)
    found = dict(zip(asked.uid.tolist(), asked.truth_item.tolist(), strict=True))
    wanted = {}
    for user in set(uid.tolist()):
        mine = [(g, e) for u, g, e in ordered if u == user]
        liked = {g for g, e in mine if e in LIKED}
        discoveries = [g for g in dict.fromkeys(g for g, _ in mine) if g in liked]
        if len(discoveries) >= 3:
            wanted[user] = discoveries[-1]
    assert found == wanted
    checked = find_queries(events, catalogue, np.array([True, False]), VALID_FROM, TEST_FROM)
    assert (
        len(checked.truth_item) == len(checked) <= len(wanted)
    )  # at most one item, and none where it was only touched
    for user in set(uid.tolist()):
        mine = time[uid == user]
        training = mine[mine < VALID_FROM]
        assert (np.diff(mine) >= 0).all()
        assert training.tolist() == list(range(-len(training), 0))


def test_events_of_one_moment_cannot_be_split_by_time():
    with pytest.raises(DataError, match=r"same time, 2024-01-05 .*split.protocol=leave_one_out"):
        plan_split(SplitConfig(), [(19_727, 9)], (19_727 * DAY, 19_727 * DAY), 19_727 * DAY, ["stream"])
    two_days = [(19_727, 9), (19_728, 9)]
    with pytest.raises(DataError, match=r"split.valid_from and split.test_from to times inside that range"):
        plan_split(SplitConfig(), two_days, (19_727 * DAY, 19_728 * DAY), 19_728 * DAY, ["stream"])


def test_a_manifest_says_which_protocol_it_is_of():
    assert is_leave_one_out({"protocol": "leave_one_out"})
    assert not is_leave_one_out({"protocol": "time"}) and not is_leave_one_out({})
    assert calendar_end({"end": 2, "last_event": 99}) == 100
    assert calendar_end({"end": 100}) == 100
