"""Training examples against a brute-force account of what was known at each moment: nothing of the future leaks in."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_ray.config import GraphConfig
from recsys_ray.core.clock import DAY
from recsys_ray.data.tables import Events, Tables, first_touches
from recsys_ray.graph.snapshots import Snapshot, plan_snapshots
from recsys_ray.two_tower.examples import (
    HistoryRules,
    build_examples,
    build_queries,
    histories,
    user_columns,
    validation_examples,
)
from recsys_ray.two_tower.rows import histories_of, take

POSITIVES = [0, 2]  # 1 is a weak signal
VALID, TEST = 20 * DAY, 26 * DAY
SNAPSHOTS = [
    Snapshot("cut0", 0, 8 * DAY, 0, (8 * DAY, 14 * DAY)),
    Snapshot("cut1", 3, 14 * DAY, 4 * DAY, (14 * DAY, VALID)),  # indices need not follow each other
    Snapshot("valid", 4, VALID, 0, None),
]


@st.composite
def worlds(draw):
    """Events of a few users on a few items, sorted as ingest leaves them; moments often fall together."""
    hours = st.integers(0, 30 * 4).map(lambda quarter: quarter * DAY // 4)
    row = st.tuples(st.integers(5, 8), hours, st.integers(0, 6), st.integers(0, 2))
    rows = sorted(draw(st.lists(row, max_size=60)))
    uid, moment, gid, event = (np.array([r[c] for r in rows], np.int64) for c in range(4))
    return Events(uid, gid.astype(np.int32), event.astype(np.int8), moment), rows


rules = st.builds(
    HistoryRules, st.integers(1, 6), st.one_of(st.none(), st.integers(1, 20)), st.sampled_from(["example", "window"])
)


def history_of(rows, user, moment, rules, without):
    """(gid, event) of what the user did in the window before ``moment``: the latest ``length`` of them."""
    since = moment - rules.window
    past = [(g, e) for u, t, g, e in rows if u == user and since <= t < moment]
    return [(g, e) for g, e in past[-rules.length :] if g != without]


def example_history(examples, row):
    mine = slice(*examples["offsets"][row : row + 2])
    return list(zip(examples["history"][mine].tolist(), examples["history_event"][mine].tolist(), strict=True))


def first_positives(rows):
    """The first positive event of each user and item, in order."""
    first = {}
    for user, moment, gid, event in rows:
        if event in POSITIVES:
            first.setdefault((user, gid), moment)
    return [(user, gid, moment) for (user, gid), moment in first.items()]


@given(worlds(), rules)
@settings(max_examples=150, deadline=None)
def test_examples_are_those_of_brute_force(world, rules):
    events, rows = world
    wanted = []
    for user, gid, moment in first_positives(rows):
        for snapshot in SNAPSHOTS:
            if snapshot.examples and snapshot.examples[0] <= moment < snapshot.examples[1]:
                until = moment if rules.as_of == "example" else snapshot.examples[1]
                wanted.append((user, gid, moment, snapshot.index, history_of(rows, user, until, rules, gid)))
    made = build_examples(events, POSITIVES, SNAPSHOTS, rules)
    columns = [made[name].tolist() for name in ("uid", "target", "timestamp", "snapshot")]
    found = [(*row, example_history(made, at)) for at, row in enumerate(zip(*columns, strict=True))]
    assert sorted(found) == sorted(wanted)
    assert {name: column.dtype.name for name, column in made.items()} == {
        "uid": "int64", "target": "int32", "timestamp": "int64", "snapshot": "int16", "history": "int32",
        "history_event": "int8", "offsets": "int64",
    }  # fmt: skip


@given(worlds(), st.integers(1, 6), st.one_of(st.none(), st.integers(1, 20)))
@settings(max_examples=100, deadline=None)
def test_an_example_does_not_change_when_the_future_does(world, length, window):
    events, _ = world
    rules = HistoryRules(length, window)
    made = build_examples(events, POSITIVES, SNAPSHOTS, rules)
    for row, moment in enumerate(made["timestamp"]):
        known = events.timestamp <= moment  # its own event is the last that it needs
        past = Events(*(column[known] for column in vars(events).values()))
        again = build_examples(past, POSITIVES, SNAPSHOTS, rules)
        (same,) = np.flatnonzero((again["uid"] == made["uid"][row]) & (again["target"] == made["target"][row]))
        mine, same = (take(made, np.array([row])), take(again, np.array([same])))
        assert {name: c.tolist() for name, c in same.items()} == {name: c.tolist() for name, c in mine.items()}


@given(worlds(), rules)
@settings(max_examples=100, deadline=None)
def test_no_event_of_a_history_is_at_or_after_its_moment(world, rules):
    events, _ = world
    chosen = first_touches(events, np.isin(events.event, POSITIVES))
    begin, length = histories(events, events.uid[chosen], events.timestamp[chosen], rules)
    assert (length <= rules.length).all()
    for row, first, count in zip(chosen, begin, length, strict=True):
        past, moment = slice(first, first + count), events.timestamp[row]
        assert (events.timestamp[past] < moment).all() and (events.timestamp[past] >= moment - rules.window).all()
        assert (events.uid[past] == events.uid[row]).all()


@given(worlds(), rules)
@settings(max_examples=100, deadline=None)
def test_queries_have_only_new_items_and_history_from_before_the_period(world, rules):
    events, rows = world
    touched = {(user, gid) for user, moment, gid, _ in rows if moment < VALID}
    wanted = [
        (user, gid, history_of(rows, user, VALID, rules, None))
        for user, gid, moment in first_positives(rows)
        if VALID <= moment < TEST and (user, gid) not in touched
    ]
    made = build_queries(events, POSITIVES, VALID, TEST, rules)
    columns = zip(made["uid"].tolist(), made["target"].tolist(), strict=True)
    found = [(*row, example_history(made, at)) for at, row in enumerate(columns)]
    assert sorted(found) == sorted(wanted)
    assert all(target not in dict(history) for _, target, history in found)


@given(worlds(), st.integers(1, 6))
def test_examples_of_the_refit_are_the_validation_periods_and_see_the_last_cut(world, length):
    events, rows = world
    rules, planned = HistoryRules(length, None), [*SNAPSHOTS[:2], Snapshot("valid", 4, VALID, 0, (VALID, TEST))]
    examples = validation_examples(events, POSITIVES, planned, TEST, rules)
    assert (examples["snapshot"] == 3).all()
    first: dict[tuple[int, int], int] = {}
    for user, moment, gid, event in rows:
        if event in POSITIVES:
            first.setdefault((user, gid), moment)
    found = {
        (int(u), int(g)): int(t) for u, g, t in zip(*(examples[k] for k in ("uid", "target", "timestamp")), strict=True)
    }
    assert found == {pair: moment for pair, moment in first.items() if VALID <= moment < TEST}
    for row, (user, gid) in enumerate(zip(examples["uid"].tolist(), examples["target"].tolist(), strict=True)):
        assert example_history(examples, row) == history_of(rows, user, examples["timestamp"][row], rules, gid)


def test_no_events_and_no_positives_make_no_examples():
    nothing = Events(*(np.zeros(0, kind) for kind in (np.int64, np.int32, np.int8, np.int64)))
    weak = Events(np.array([1]), np.array([3], np.int32), np.array([1], np.int8), np.array([10 * DAY]))
    for events in (nothing, weak):
        assert build_examples(events, POSITIVES, SNAPSHOTS, HistoryRules(4, 7))["offsets"].tolist() == [0]
        assert build_queries(events, POSITIVES, VALID, TEST, HistoryRules(4, 7))["offsets"].tolist() == [0]


def test_a_user_with_100_000_events_is_one_of_many():
    many = 8 * DAY + 10 * np.arange(100_000)
    events = Events(np.full(len(many), 2**40), np.arange(len(many), dtype=np.int32), np.zeros(len(many), np.int8), many)
    made = build_examples(events, POSITIVES, SNAPSHOTS, HistoryRules(50, 90))
    assert len(made["target"]) == 100_000
    history, _, offsets = histories_of(made, np.arange(60_000, 70_000))
    assert (np.diff(offsets) == 50).all() and (np.diff(made["offsets"])[:60] == np.minimum(np.arange(60), 50)).all()
    assert (history.reshape(-1, 50) == made["target"][60_000:70_000, None] - np.arange(50, 0, -1)).all()


@pytest.fixture
def users(tmp_path):
    table = {
        "user_id": [f"u{i}" for i in range(6)],
        "age": pl.Series([None, 20.0, None, 40.0, 50.0, 60.0], dtype=pl.Float32),
        "country": ["DE", None, "SE", "Øst", None, "US"],
        "music": pl.Series([None, None, [0.1, 0.2], None, [0.5, 0.6], None], dtype=pl.List(pl.Float32)),
        "books": pl.Series([None] * 6, dtype=pl.List(pl.Float32)),  # nobody has one
    }
    pl.DataFrame(table).write_parquet(tmp_path / "users.parquet")
    return Tables(tmp_path)


def test_user_columns_keep_order_repeats_and_nulls(users):
    found = user_columns(users, np.array([4, 1, 2, 4]), {"music": 2, "books": 3})
    assert np.array_equal(found["age"], np.array([50, 20, np.nan, 50], np.float32), equal_nan=True)
    assert found["country"].tolist() == ["", "", "SE", ""]
    taste = np.array([[0.5, 0.6], [np.nan, np.nan], [0.1, 0.2], [0.5, 0.6]], np.float32)
    assert np.array_equal(found["taste_music"], taste, equal_nan=True)
    assert found["taste_books"].shape == (4, 3)
    assert np.isnan(found["taste_books"]).all()


def test_user_columns_of_nobody_have_the_same_columns(users):
    nobody, somebody = (user_columns(users, np.array(uids, np.int64), {"music": 2}) for uids in ([], [3]))
    assert nobody.keys() == somebody.keys()
    for name, column in nobody.items():
        assert column.shape == (0, *somebody[name].shape[1:])
        assert column.dtype.kind == somebody[name].dtype.kind


def test_a_shard_is_read_as_it_was_written(tmp_path):
    table = {"uid": [1, 1], "gid": [4, 2], "event": [0, 1], "timestamp": [5, 9], "more": ["a", "b"]}
    pl.DataFrame(table).write_parquet(tmp_path / "shard.parquet")
    events = Events.read(tmp_path / "shard.parquet")
    assert [column.tolist() for column in vars(events).values()] == [[1, 1], [4, 2], [0, 1], [5, 9]]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 6), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_leave_one_out_predicts_each_event_from_those_before_it_by_a_graph_without_the_user(lengths, length, seed):
    uid = np.repeat(np.arange(len(lengths)), lengths)
    time = np.concatenate([np.arange(-n, 0) for n in lengths])
    gid = np.concatenate([np.random.default_rng(n).permutation(10)[:n] for n in lengths]).astype(np.int32)
    events = Events(uid, gid, np.zeros(len(uid), np.int8), time)
    counts = {"protocol": "leave_one_out", "valid_from": 0, "test_from": 1, "end": 2}
    cuts = plan_snapshots(GraphConfig(window_days=None, cuts=3), counts, seed)[:3]
    made = build_examples(events, POSITIVES, cuts, HistoryRules(length, None))
    assert np.array_equal(made["uid"], uid) and np.array_equal(made["target"], gid)
    for row, user in enumerate(uid.tolist()):
        (own,) = (s.index for s in cuts if s.without.has(uid[row : row + 1])[0])
        assert made["snapshot"][row] == own
        before = gid[(uid == user) & (time < time[row])].tolist()
        assert example_history(made, row) == [(g, 0) for g in before[-length:]]
