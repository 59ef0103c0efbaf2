"""The check for leaks finds each kind of leak in examples, queries and snapshots that were made to leak."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from recsys_ray.checks.finished_run import Words
from recsys_ray.checks.leaks import check_examples, check_plan, check_test, check_validation
from recsys_ray.checks.leaks_snapshots import check_activity, check_edges, check_users
from recsys_ray.config import GraphConfig
from recsys_ray.core.clock import DAY
from recsys_ray.core.errors import LeakError
from recsys_ray.data.tables import Catalogue, Events
from recsys_ray.evaluation.ranking import batch_of
from recsys_ray.evaluation.segments import find_queries
from recsys_ray.graph.activity import add_counts, count_shard, describe
from recsys_ray.graph.edges import EDGES, reduce_range
from recsys_ray.graph.edges import count_shard as count_pairs
from recsys_ray.graph.pairs import Window
from recsys_ray.graph.snapshots import Fold, Snapshot, plan_snapshots
from recsys_ray.graph.texts import NearestTexts, nearest_texts, text_pairs
from recsys_ray.graph.users import count_users
from recsys_ray.storage.artifacts import Artifact
from recsys_ray.two_tower.examples import HistoryRules, build_queries, training_examples

USERS, ITEMS = 30, 40
VALID, TEST, END = 70 * DAY, 85 * DAY, 100 * DAY
BY_TIME = {"valid_from": VALID, "test_from": TEST, "end": END, "days": [[day, 5] for day in range(100)]}
LEFT_OUT = {"protocol": "leave_one_out", "valid_from": 0, "test_from": 1, "end": 2}
RULES = HistoryRules(6, None)
GRAPH = GraphConfig(cuts=3, window_days=None, max_neighbors=5)
TEXT = np.random.default_rng(1).normal(size=(ITEMS, 8)).astype(np.float16)
NEAR = nearest_texts(TEXT, np.arange(ITEMS), TEXT, np.arange(ITEMS), threads=1)


@pytest.fixture(params=["time", "leave_one_out"])
def world(request, tmp_path):
    """Events of both protocols: the columns, the manifest's counts, the plan, words, and two shards on disk."""
    random = np.random.default_rng(0)
    uid = np.sort(random.integers(0, USERS, 700))
    gid = random.integers(0, ITEMS, 700).astype(np.int32)
    event = (random.random(700) < 0.2).astype(np.int8)  # 1 is a weak signal
    if request.param == "time":
        time, counts = random.integers(0, END, 700), BY_TIME
        order = np.lexsort((event, gid, time, uid))
        gid, event, time = gid[order], event[order], time[order]
    else:
        place = np.arange(700) - np.searchsorted(uid, uid) - np.bincount(uid)[uid] + 2
        time, counts = np.minimum(place, 1), LEFT_OUT
    counts = {**counts, "events": ["stream", "follow"]}
    pq.write_table(pa.table({"item_id": [f"i{g}" for g in range(ITEMS)]}), tmp_path / "items.parquet")
    pq.write_table(pa.table({"user_id": [f"u{u}" for u in range(USERS)]}), tmp_path / "users.parquet")
    table = pa.table({"uid": uid, "gid": gid, "event": event, "timestamp": time})
    for number, part in enumerate((table.filter(pa.array(uid < 12)), table.filter(pa.array(uid >= 12)))):
        pq.write_table(part, tmp_path / f"shard-{number:05d}.parquet")
    words = Words(Artifact(tmp_path, {"counts": counts}))
    return Events(uid, gid, event, time), counts, plan_snapshots(GRAPH, counts, seed=4), words, tmp_path


def examples_of(world):
    events, counts, plan, _, _ = world
    made = training_examples(events, [0], plan, counts["valid_from"], RULES)
    assert len(made["target"]) > 100
    return {name: column.copy() for name, column in made.items()}


def look(world, examples):
    events, counts, plan, words, _ = world
    check_examples(events, examples, np.arange(len(examples["target"])), plan, counts["valid_from"], words)


def test_examples_as_they_are_made_do_not_leak(world):
    look(world, examples_of(world))


def put_last(examples, row, gid, event):
    """In the place of the last event of a history."""
    assert examples["offsets"][row] < examples["offsets"][row + 1]
    examples["history"][examples["offsets"][row + 1] - 1] = gid
    examples["history_event"][examples["offsets"][row + 1] - 1] = event


def later_event(world, examples):
    """(row, position): an example and a later event of its user, on another item that the user had not touched."""
    events = world[0]
    for row in np.flatnonzero(np.diff(examples["offsets"])):
        mine = np.flatnonzero(events.uid == examples["uid"][row])
        past = set(events.gid[mine[events.timestamp[mine] < examples["timestamp"][row]]].tolist())
        for at in mine[events.timestamp[mine] > examples["timestamp"][row]]:
            if events.gid[at] not in past | {int(examples["target"][row])}:
                return row, at
    raise AssertionError("the world has no such example")


def test_a_history_that_is_one_event_too_long(world):
    examples = examples_of(world)
    row, at = later_event(world, examples)
    events, words = world[0], world[3]
    put_last(examples, row, events.gid[at], events.event[at])
    named = rf'user "u{examples["uid"][row]}" for item "i{examples["target"][row]}".*item "i{events.gid[at]}", which '
    with pytest.raises(LeakError, match=named + rf"happened at {words.time(events.timestamp[at])}"):
        look(world, examples)


def test_a_history_with_the_target_or_with_an_event_of_someone_else(world):
    examples = examples_of(world)
    row = int(np.diff(examples["offsets"]).argmax())
    put_last(examples, row, examples["target"][row], 0)
    with pytest.raises(LeakError, match="contains the target itself"):
        look(world, examples)
    examples = examples_of(world)
    touched = world[0].gid[world[0].uid == examples["uid"][row]]
    stranger = next(g for g in range(ITEMS) if g not in touched)
    put_last(examples, row, stranger, 0)
    with pytest.raises(LeakError, match="no event of the user"):
        look(world, examples)


def test_an_event_that_counts_twice(world):
    examples = examples_of(world)
    full = int(np.flatnonzero(np.diff(examples["offsets"]) == RULES.length)[0])
    for name in ("history", "history_event"):
        mine = examples[name][slice(*examples["offsets"][full : full + 2])]
        mine[:] = mine[-1]
    with pytest.raises(LeakError, match=r"which (happened|is no event)"):
        look(world, examples)


def test_a_snapshot_that_the_example_may_not_see(world):
    events, counts, plan, words, _ = world
    examples = examples_of(world)
    if plan[0].without is None:
        late = [replace(plan[0], time=plan[0].time + DAY), *plan[1:]]
        sentence = "embeddings and activity of snapshot cut0, which ends at 1970"
    else:
        late = [replace(plan[0], without=plan[1].without), *plan[1:]]
        sentence = "snapshot cut0, which contains the user's events"
    with pytest.raises(LeakError, match=sentence):
        check_examples(events, examples, np.arange(len(examples["target"])), late, counts["valid_from"], words)


def test_the_papers_own_way_leaks(world):
    events, counts, _, words, _ = world
    graph = GRAPH.model_copy(update={"features_as_of": "window"})
    plan = plan_snapshots(graph, counts)
    rules = replace(RULES, as_of="window")
    examples = training_examples(events, [0], plan, counts["valid_from"], rules)
    with pytest.raises(LeakError, match="the training example of"):
        check_examples(events, examples, np.arange(len(examples["target"])), plan, counts["valid_from"], words)


def test_validation_queries(world):
    events, counts, _, words, _ = world
    valid, test = counts["valid_from"], counts["test_from"]
    queries = build_queries(events, [0], valid, test, RULES)
    rows = np.arange(len(queries["target"]))
    assert len(rows) > 3
    check_validation(events, queries, rows, valid, words)
    late = build_queries(events, [0], valid, test, RULES)
    row = int(np.diff(late["offsets"]).argmax())
    put_last(late, row, late["target"][row], 0)
    with pytest.raises(LeakError, match=r"the validation query of user .*target itself"):
        check_validation(events, late, rows, valid, words)


def test_histories_of_the_test(world):
    events, counts, _, words, _ = world
    log = Events(events.uid, events.gid.astype(np.int64), events.event, events.timestamp)
    catalogue = Catalogue(("x",), np.array([0, ITEMS]), np.ones(ITEMS, bool))
    queries = find_queries(log, catalogue, np.array([True, False]), counts["test_from"], counts["end"])
    uids = np.unique(queries.uid)
    assert len(uids) > 3
    past = log.select(log.timestamp < counts["test_from"])
    check_test(queries, batch_of(uids, past), counts["test_from"], words)
    one_more = log.select(log.timestamp <= counts["test_from"] + 5 * DAY)
    with pytest.raises(LeakError, match=r"the test queries of user .* not before"):
        check_test(queries, batch_of(uids, one_more), counts["test_from"], words)
    forged = Events(past.uid, past.gid.copy(), past.event, past.timestamp)
    forged.gid[past.uid == queries.uid[0]] = queries.truth_item[0]
    with pytest.raises(LeakError, match="their own truth"):
        check_test(queries, batch_of(uids, forged), counts["test_from"], words)


def test_plans_that_see_past_their_periods(world):
    _, counts, plan, words, _ = world
    check_plan(plan, counts, words)
    names = [s.name for s in plan]
    for name, what in (("valid", "validation uses"), ("test", "the test uses")):
        late = list(plan)
        late[names.index(name)] = replace(plan[names.index(name)], time=counts["end"])
        with pytest.raises(LeakError, match=what):
            check_plan(late, counts, words)


def write_edges(folder: Path, shards: list[Path], snapshot: Snapshot) -> Path:
    """The file of a snapshot, as the graph stage makes it."""
    windows = {snapshot.name: Window(snapshot.start, snapshot.time, snapshot.without)}
    for shard in shards:
        count_pairs(shard, folder / shard.stem, windows, [0], [ITEMS], GRAPH.max_history, GRAPH.pair_half_life)
    out = folder / f"{snapshot.name}.parquet"
    ntype, users = np.zeros(ITEMS, np.int16), users_of(shards, snapshot)
    files, most, allowed = {EDGES: out}, {EDGES: GRAPH.max_neighbors}, np.ones((1, 1), bool)
    reduce_range(folder, snapshot.name, 0, ntype, GRAPH, 0, files, most, allowed, 0, NEAR, users)
    return out


def users_of(shards: list[Path], snapshot: Snapshot) -> np.ndarray:
    counted = [count_users(Events.read(shard), snapshot, [0], GRAPH.max_history, ITEMS) for shard in shards]
    return np.sum(counted, axis=0).astype(np.int32)


def wrong_ways(snapshot: Snapshot, counts: dict) -> list[Snapshot]:
    """What a mistake may make of a snapshot."""
    if "protocol" not in counts:
        return [replace(snapshot, time=snapshot.time + DAY), replace(snapshot, time=counts["end"])]
    wrong = [replace(snapshot, time=snapshot.time + 1)]
    if snapshot.without is not None:
        wrong += [replace(snapshot, without=None), replace(snapshot, without=Fold(2, 3, seed=9))]
    return wrong


@pytest.mark.parametrize("name", ["cut0", "valid", "test"])
def test_users_of_other_events(world, name):
    _, counts, plan, words, folder = world
    snapshot = next(s for s in plan if s.name == name)
    shards = sorted(folder.glob("shard-*.parquet"))
    check_users(shards, snapshot, users_of(shards, snapshot), [0], GRAPH.max_history, words)
    for wrong in wrong_ways(snapshot, counts):
        with pytest.raises(LeakError, match=rf'snapshot {name}, before .*: \d+ users had item "i\d+", but \d+ by'):
            check_users(shards, snapshot, users_of(shards, wrong), [0], GRAPH.max_history, words)


@pytest.mark.parametrize("name", ["cut0", "valid", "test"])
def test_edges_of_other_events(world, name):
    _, counts, plan, words, folder = world
    snapshot = next(s for s in plan if s.name == name)
    shards = sorted(folder.glob("shard-*.parquet"))
    some, ntype = np.arange(0, ITEMS, 2), np.zeros(ITEMS, np.int16)

    texts = text_pairs(NearestTexts(*(rows[some] for rows in NEAR)), users_of(shards, snapshot), some)

    def look(path: Path) -> int:
        return check_edges(
            shards, snapshot, {EDGES: path}, {EDGES: GRAPH.max_neighbors}, some, ntype, [0], GRAPH,
            np.ones((2, 2), bool), texts, 0, words,
        )  # fmt: skip

    right = write_edges(folder / "right", shards, snapshot)
    assert look(right) > 50
    table = pq.read_table(right)  # the right users, in an order that they had at another time
    changed = table.set_column(3, table.schema.field(3), pc.multiply(table["weight"], pa.scalar(2, pa.float32())))
    pq.write_table(changed, folder / "order.parquet")
    with pytest.raises(LeakError, match=r"has (\d+) users and weight .*, but \1 and"):
        look(folder / "order.parquet")
    for number, wrong in enumerate(wrong_ways(snapshot, counts)):
        stored = write_edges(folder / f"wrong-{number}", shards, wrong)
        with pytest.raises(LeakError, match=rf'snapshot {name}, before .*: the edge from item "i\d+" to item "i\d+"'):
            look(stored)


@pytest.mark.parametrize("name", ["cut0", "valid", "test"])
def test_activity_of_other_events(world, name):
    _, counts, plan, words, folder = world
    snapshot = next(s for s in plan if s.name == name)
    shards = sorted(folder.glob("shard-*.parquet"))
    published, ntype = np.full(ITEMS, np.iinfo(np.int64).max), np.zeros(ITEMS, np.int16)

    def table(of: Snapshot) -> np.ndarray:
        counts, first = add_counts(count_shard(shard, [of], [0], ITEMS) for shard in shards)
        return describe(counts[0], first[0], published, ntype, of.time).astype(np.float16)

    check_activity(shards, snapshot, table(snapshot), published, ntype, [0], words)
    for wrong in wrong_ways(snapshot, counts):
        with pytest.raises(LeakError, match=rf'snapshot {name}, before .*: the activity of item "i\d+" \('):
            check_activity(shards, snapshot, table(wrong), published, ntype, [0], words)
