"""The sharded counting of co-interactions against the obvious way to count them."""

from __future__ import annotations

from collections import defaultdict
from itertools import permutations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_ray.config import GraphConfig
from recsys_ray.core.errors import ConfigError
from recsys_ray.graph import pairs
from recsys_ray.graph.edges import EDGES, _is_done, count_shard, reduce_range, told_by_texts, with_texts
from recsys_ray.graph.edges import Edges as EdgeTable
from recsys_ray.graph.pairs import Counted, Window, keep_best
from recsys_ray.graph.snapshots import Fold
from recsys_ray.graph.texts import ALIKE, NearestTexts, TextPairs

WIDE = Window(0, 10_000)
Event = tuple[int, int, int]  # uid, gid, timestamp


HALF_LIFE = 3.0
Edges = dict[tuple[int, int], tuple[int, float]]  # (src, dst) -> (support, weight)


def brute_force(events: list[Event], window: Window, max_history: int, half_life: float | None = HALF_LIFE) -> Edges:
    """The way the formula of pairs.py reads, in 256ths."""
    latest: dict[int, dict[int, int]] = defaultdict(dict)
    for uid, gid, timestamp in events:
        if window.start <= timestamp < window.time:
            latest[uid][gid] = max(timestamp, latest[uid].get(gid, 0))
    edges: Edges = {}
    for items in latest.values():
        kept = sorted(items.items(), key=lambda item: (item[1], item[0]))[-max_history:]
        for (place_a, (a, _)), (place_b, (b, _)) in permutations(enumerate(kept), 2):
            weight = 1.0
            if half_life is not None:
                weight = 0.5 ** ((abs(place_b - place_a) - 1) / half_life) * (1 if place_a < place_b else 0.5)
            support, total = edges.get((a, b), (0, 0.0))
            edges[a, b] = (support + 1, total + round(256 * weight) / 256)
    return edges


def write_shard(path: Path, events: list[Event], event: int = 0) -> None:
    rows = sorted(events, key=lambda row: (row[0], row[2], row[1]))
    uid, gid, timestamp = (np.array([row[i] for row in rows], np.int64) for i in range(3))
    table = pa.table({"uid": uid, "gid": gid.astype(np.int32), "event": np.full(len(rows), event, np.int8),
                      "timestamp": timestamp})  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def sharded(
    folder: Path,
    events: list[Event],
    items: int,
    windows: dict[str, Window],
    shards: int = 3,
    ranges: int = 2,
    max_history: int = 100,
    ntype: np.ndarray | None = None,
    min_support: int = 1,
    max_neighbors: int = 1000,
    allowed: np.ndarray | None = None,
    half_life: float | None = HALF_LIFE,
) -> dict[str, Edges]:
    """The tasks of build_edges, without Ray: the edges of each snapshot."""
    bounds = [items * r // ranges for r in range(1, ranges + 1)]
    ntype = np.zeros(items, np.int16) if ntype is None else ntype
    allowed = np.ones((ntype.max() + 1,) * 2, bool) if allowed is None else allowed
    for shard in range(shards):
        file = folder / f"shard-{shard:05d}.parquet"
        write_shard(file, [row for row in events if row[0] % shards == shard])
        count_shard(file, folder / "scratch" / file.stem, windows, [0], bounds, max_history, half_life)
    found: dict[str, Edges] = {}
    for name in windows:
        found[name] = {}
        for r in range(ranges):
            out = folder / "out" / f"{name}-{r}.parquet"
            rules = GraphConfig(min_support=min_support, text_users=0)
            near = NearestTexts(np.zeros((0, ALIKE), np.int32), np.zeros((0, ALIKE), np.float32))
            reduce_range(
                folder / "scratch", name, r, ntype, rules, 0, {EDGES: out}, {EDGES: max_neighbors}, allowed, 0, near,
                np.zeros(items, np.int32),
            )  # fmt: skip
            src, dst, *values = (column.to_pylist() for column in pq.read_table(out).columns)
            assert list(zip(dst, src, strict=True)) == sorted(zip(dst, src, strict=True))
            found[name].update(zip(zip(src, dst, strict=True), zip(*values, strict=True), strict=True))
    return found


events_of_a_few = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 8), st.integers(0, 40)), min_size=0, max_size=80)


@settings(max_examples=60, deadline=None)
@given(events_of_a_few, st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_sharded_counts_equal_brute_force(
    tmp_path_factory: pytest.TempPathFactory, events: list[Event], max_history: int, shards: int, ranges: int
) -> None:
    windows = {"early": Window(0, 20), "late": Window(10, 41), "never": Window(100, 200)}
    folder = tmp_path_factory.mktemp("pairs")
    found = sharded(folder, events, 9, windows, shards, ranges, max_history)
    for name, window in windows.items():
        assert found[name] == brute_force(events, window, max_history)


def test_window_is_half_open(tmp_path: Path) -> None:
    events = [(0, 0, 10), (0, 1, 20), (1, 0, 9), (1, 1, 15), (2, 2, 19), (2, 3, 10)]
    found = sharded(tmp_path, events, 4, {"w": Window(10, 20)})
    assert found["w"] == {(3, 2): (1, 1.0), (2, 3): (1, 0.5)}  # item 3 came first


@settings(max_examples=40, deadline=None)
@given(events_of_a_few, st.integers(0, 3))
def test_a_fold_makes_no_edge_of_the_graph_without_it(
    tmp_path_factory: pytest.TempPathFactory, events: list[Event], seed: int
) -> None:
    folds = {f"cut{k}": Fold(k, 3, seed) for k in range(3)}
    windows = {name: Window(0, 41, fold) for name, fold in folds.items()}
    found = sharded(tmp_path_factory.mktemp("folds"), events, 9, windows)
    for name, fold in folds.items():
        others = [row for row in events if not fold.has(np.array([row[0]]))[0]]
        assert found[name] == brute_force(others, WIDE, 100)


def test_an_interrupted_count_is_kept_for_the_same_fold_only(tmp_path: Path) -> None:
    write_shard(tmp_path / "shard-00000.parquet", [(uid, gid, 1) for uid in range(9) for gid in range(3)])
    windows = [{"w": Window(0, 2, Fold(k, 2, 0))} for k in range(2)]
    count_shard(tmp_path / "shard-00000.parquet", tmp_path / "s", windows[0], [0], [3], 10, None)
    assert [_is_done(tmp_path / "s", each) for each in windows] == [True, False]


def test_pairs_of_a_window_without_beginning_are_equally_recent() -> None:
    """Logical times of leave-one-out: only support and chance may choose among the edges of different users."""
    uid, gid = np.repeat([0, 1], [2, 1000]), np.r_[0, 1, np.arange(1000)].astype(np.int32)
    times = np.r_[-1, 1, np.arange(-998, 2)]
    for items in (1000, 2**22):
        keys = np.concatenate(list(pairs.pair_keys(uid, gid, times, Window(-(1 << 40), 2), items)))
        recency = pairs.count_keys(keys, items, None).recency
        assert len(set(recency.tolist())) == 1


def test_only_the_latest_items_of_a_user_make_pairs(tmp_path: Path) -> None:
    events = [(0, gid, 100 + gid) for gid in range(10)] + [(0, 2, 500)]  # an old item that was used again
    found = sharded(tmp_path, events, 10, {"w": WIDE}, max_history=3)
    assert {gid for edge in found["w"] for gid in edge} == {2, 8, 9}


def test_a_user_with_100_000_events_costs_its_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys_ray.graph.edges._ROWS", 7_000)  # so that the user spans many batches
    rng = np.random.default_rng(0)
    heavy = list(zip([1] * 100_000, rng.integers(0, 5_000, 100_000).tolist(), range(100_000), strict=True))
    events = [(0, 1, 1), (0, 2, 2), *heavy, (2, 1, 3), (2, 2, 4)]
    found = sharded(tmp_path, events, 5_000, {"w": Window(0, 200_000)}, shards=1, max_history=50)
    assert len(found["w"]) in {50 * 49, 50 * 49 + 2}
    assert found["w"][1, 2][0] >= 2


def test_spilling_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    events = [tuple(row) for row in np.stack([rng.integers(0, 60, 900), rng.integers(0, 40, 900),
                                              rng.integers(0, 99, 900)], axis=1).tolist()]  # fmt: skip
    whole = sharded(tmp_path / "whole", events, 40, {"w": WIDE})
    monkeypatch.setattr(pairs, "HOLD", 50)
    monkeypatch.setattr(pairs, "PAIRS_AT_ONCE", 20)
    monkeypatch.setattr("recsys_ray.graph.edges._ROWS", 37)
    pieces = sharded(tmp_path / "pieces", events, 40, {"w": WIDE})
    assert len(list((tmp_path / "pieces" / "scratch").rglob("w-*.parquet"))) > 6
    assert pieces == whole


def test_other_events_make_no_edges(tmp_path: Path) -> None:
    write_shard(tmp_path / "shard-00000.parquet", [(0, 0, 1), (0, 1, 2)], event=1)
    count_shard(tmp_path / "shard-00000.parquet", tmp_path / "s" / "shard-00000", {"w": WIDE}, [0, 2], [2], 10, None)
    assert not list((tmp_path / "s").rglob("w-*.parquet"))


def test_min_support(tmp_path: Path) -> None:
    events = [(0, 0, 1), (0, 1, 2), (1, 0, 1), (1, 1, 2), (2, 1, 1), (2, 2, 2)]
    found = sharded(tmp_path, events, 3, {"w": WIDE}, min_support=2)["w"]
    assert {edge: support for edge, (support, _) in found.items()} == {(0, 1): 2, (1, 0): 2}


@pytest.mark.parametrize("half_life", [None, 0.5, 24.0])
def test_pairs_further_apart_weigh_less_and_backwards_half(tmp_path: Path, half_life: float | None) -> None:
    events = [(user, gid, 10 * place) for user in range(3) for place, gid in enumerate([7, 2, 5, 0, 9])]
    found = sharded(tmp_path, events, 10, {"w": WIDE}, half_life=half_life)["w"]
    assert found == brute_force(events, WIDE, 100, half_life)
    weight = {edge: weight for edge, (_, weight) in found.items()}
    if half_life is None:
        assert set(weight.values()) == {3.0}
    else:
        assert weight[7, 2] == 3.0 == 2 * weight[2, 7]
        assert weight[7, 0] == pytest.approx(3 * 0.5 ** (2 / half_life), rel=0.03)


def test_what_came_just_before_is_kept_rather_than_what_more_people_had_long_before(tmp_path: Path) -> None:
    """Before item 2: item 0 of five users, twenty places back, and item 1 of three users, at once."""
    rows = []
    for user in range(5):
        others = [100 + 20 * user + k for k in range(20)]
        rows += [(user, gid, place) for place, gid in enumerate([0, *others, *([1] if user < 3 else []), 2])]
    for half_life, best in ((None, 0), (4.0, 1)):
        found = sharded(tmp_path / str(best), rows, 200, {"w": WIDE}, max_neighbors=1, half_life=half_life)["w"]
        assert [src for src, dst in found if dst == 2] == [best]


def counted(rows: list[tuple[int, int, int, int]]) -> Counted:
    """Rows (src, dst, support, recency); weights are the supports."""
    src, dst, support, recency = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    return Counted(src, dst, support, support.astype(np.int64) * pairs.ONE, recency)


def kept(edges: Counted) -> set[tuple[int, int]]:
    return set(zip(edges.src.tolist(), edges.dst.tolist(), strict=True))


def test_the_best_neighbours_of_each_type_are_kept() -> None:
    ntype = np.array([0, 0, 0, 0, 1, 1, 1], np.int16)
    edges = counted([(1, 0, 5, 1), (2, 0, 4, 9), (3, 0, 4, 8), (4, 0, 1, 0), (5, 0, 1, 7), (6, 0, 1, 3), (0, 1, 1, 1)])
    best = keep_best(edges, ntype, 1, 2, seed=0)
    assert kept(best) == {(1, 0), (2, 0), (5, 0), (6, 0), (0, 1)}
    assert kept(keep_best(edges, ntype, 2, 2, seed=0)) == {(1, 0), (2, 0)}


def test_ties_depend_on_the_seed_and_on_nothing_else() -> None:
    ntype = np.zeros(200, np.int16)
    rows = [(src, 0, 1, 1) for src in range(1, 200)]
    first = kept(keep_best(counted(rows), ntype, 1, 10, seed=1))
    assert kept(keep_best(counted(rows[::-1]), ntype, 1, 10, seed=1)) == first
    assert kept(keep_best(counted(rows), ntype, 1, 10, seed=2)) != first
    assert len(first) == 10


@pytest.mark.parametrize("items", [3, 1_000, 2**23, 2**30])
def test_keys_hold_every_pair(items: int) -> None:
    uid = np.zeros(3, np.int64)
    gid = np.array([0, items - 2, items - 1], np.int32)
    keys = np.concatenate(list(pairs.pair_keys(uid, gid, np.array([5, 6, 9_999]), WIDE, items)))
    pair, support, forth, back, recency = pairs.count_keys(keys, items, 8.0)
    assert (np.abs(forth - 2 * back) <= 1).all() and forth[0] == forth[2] == pairs.ONE > forth[1]
    assert [divmod(p, items) for p in pair.tolist()] == [(0, items - 2), (0, items - 1), (items - 2, items - 1)]
    assert support.tolist() == [1, 1, 1]
    assert recency[1] == recency[2] >= recency[0] >= 0


@pytest.mark.parametrize(
    ("relations", "kept"),
    [
        ("all", {(0, 1), (0, 2), (1, 2), (2, 3), (0, 3), (1, 3)}),
        ("same_type", {(0, 1), (2, 3)}),
        ("cross_type", {(0, 2), (1, 2), (0, 3), (1, 3)}),
        ([("song", "book"), ("song", "song")], {(0, 2), (1, 2), (0, 3), (1, 3), (2, 3)}),
    ],
)
def test_only_the_wanted_relations_make_edges(tmp_path: Path, relations: object, kept: set[tuple[int, int]]) -> None:
    """One user, books 0 and 1, songs 2 and 3. The other relations are what they would be anyway."""
    config = GraphConfig.model_validate({"relations": relations})
    allowed = pairs.allowed_relations(config.relations, ["book", "song"])
    events, ntype = [(0, gid, gid) for gid in range(4)], np.array([0, 0, 1, 1], np.int16)
    found = sharded(tmp_path, events, 4, {"w": WIDE}, ntype=ntype, allowed=allowed)["w"]
    assert set(found) == kept | {(b, a) for a, b in kept}


def test_an_unknown_type_among_the_relations_is_named() -> None:
    with pytest.raises(ConfigError, match="'film', but the item types are book, song"):
        pairs.allowed_relations([("book", "film")], ["book", "song"])


def table_of(*edges: tuple[int, int, int, float]) -> EdgeTable:
    """src, dst, support, weight."""
    src, dst, support, weight = zip(*edges, strict=True)
    whole = (np.array(column, np.int32) for column in (src, dst, support))
    return EdgeTable(*whole, np.array(weight, np.float32))


def test_texts_complete_the_edges_of_the_allowed_relations(tmp_path: Path) -> None:
    edges = table_of((2, 0, 3, 1.5), (3, 0, 1, 1.0), (0, 2, 3, 0.75))
    texts = TextPairs(np.array([1, 2, 3, 0]), np.array([2, 0, 1, 3]), np.array([0.5, 0.25, 1, 2], np.float32))
    ntype, allowed = np.array([0, 0, 0, 1], np.int16), np.array([[True, True], [False, True]])
    found = with_texts(edges, texts, 2.0, ntype, allowed)
    told = table_of((2, 0, 3, 2.0), (3, 0, 1, 1.0), (0, 2, 3, 0.75), (1, 2, 0, 1.0), (0, 3, 0, 4.0))
    for column, wanted in zip(found, told, strict=True):
        np.testing.assert_array_equal(column, wanted)
        assert column.dtype == wanted.dtype
    assert with_texts(edges, texts, 0.0, ntype, allowed) is edges
    pq.write_table(pa.table(found._asdict()), tmp_path / "edges.parquet")
    assert told_by_texts(tmp_path / "edges.parquet", 4).tolist() == [2 * 4 + 1, 3 * 4 + 0]
