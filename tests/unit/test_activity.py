"""Activity of items: counted per shard, added, and never from the future."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_ray.core.clock import DAY
from recsys_ray.graph.activity import COLUMNS, add_counts, count_shard, describe
from recsys_ray.graph.snapshots import Fold, Snapshot

ITEMS, NOW = 6, 500 * DAY
TYPES = np.array([0, 0, 1, 1, 1, 1], np.int16)


@pytest.fixture
def shards(tmp_path):
    """Two shards of events of kinds 0 (positive) and 1; item 5 has none before NOW."""
    random = np.random.default_rng(0)
    paths = []
    for number in range(2):
        gid = random.integers(0, ITEMS - 1, 300).astype(np.int32)
        time = np.sort(random.integers(300 * DAY, NOW, 300))
        gid, time = np.append(gid, [5, 0]).astype(np.int32), np.append(time, [NOW, NOW + DAY])
        event = random.integers(0, 2, len(gid)).astype(np.int8)
        paths.append(tmp_path / f"shard-{number:05d}.parquet")
        pq.write_table(
            pa.table({"uid": np.zeros(len(gid), np.int64), "gid": gid, "event": event, "timestamp": time}), paths[-1]
        )
    return paths


def count(shard, moment, without=None):
    """Of one snapshot."""
    counts, first = count_shard(shard, [Snapshot("test", 0, moment, 0, None, without)], [0], ITEMS)
    return counts[0], first[0]


def test_one_pass_counts_what_a_pass_for_each_snapshot_counts(shards):
    snapshots = [
        Snapshot("cut0", 0, NOW - 50 * DAY, 0),
        Snapshot("cut1", 1, NOW, 0, None, Fold(0, 2, 7)),
        Snapshot("serve", 2, NOW + 2 * DAY, 0),
    ]
    counts, first = add_counts(count_shard(path, snapshots, [0], ITEMS) for path in shards)
    for place, snapshot in enumerate(snapshots):
        alone = add_counts(count(path, snapshot.time, snapshot.without) for path in shards)
        assert np.array_equal(counts[place], alone[0]) and np.array_equal(first[place], alone[1])


def test_counts_of_shards_add_up_to_those_of_all_events(shards):
    counts, first = add_counts(count(path, NOW) for path in shards)
    table = pa.concat_tables([pq.read_table(path) for path in shards])
    gid, event, time = (table[name].to_numpy() for name in ("gid", "event", "timestamp"))
    for item in range(ITEMS):
        mine = (gid == item) & (time < NOW)
        for row, days in enumerate((7, 30, 90, 10_000)):
            assert counts[row, item] == (mine & (event == 0) & (time >= NOW - days * DAY)).sum()
        assert counts[4, item] == (mine & (time >= NOW - 30 * DAY)).sum()
        assert first[item] == (time[mine].min() if mine.any() else np.iinfo(np.int64).max)


def test_what_happens_at_or_after_the_snapshot_does_not_enter(shards):
    published = np.array([NOW - 10 * DAY, NOW + DAY, np.iinfo(np.int64).max, 0, 0, 0])
    counts, first = add_counts(count(path, NOW) for path in shards)
    table = describe(counts, first, published, TYPES, NOW)
    assert table.shape == (ITEMS, COLUMNS)
    assert np.isfinite(table).all()
    assert table[5, :6].tolist() == [0] * 6
    assert table[5, 6] == 1  # nobody touched it yet
    assert table[:, 8].tolist() == [1, 0, 0, 1, 1, 1]  # one is published tomorrow, of one the date is unknown
    assert table[0, 7] == pytest.approx(np.log(11) / 3)


def test_a_platform_that_grows_does_not_shift_every_item(shards):
    counts, first = add_counts(count(path, NOW) for path in shards)
    published = np.zeros(ITEMS, np.int64)
    assert np.allclose(
        describe(counts, first, published, TYPES, NOW), describe(7 * counts, first, published, TYPES, NOW)
    )


def test_what_is_popular_in_a_type_that_has_only_begun_shows_as_in_an_old_one():
    """Type 1 has a hundredth of the events of type 0, shared in the same way between its items."""
    small, first = np.array([[4, 2, 0]] * 5), np.full(6, NOW - DAY)
    counts, ntype = np.concatenate([100 * small, small], axis=1), np.array([0, 0, 0, 1, 1, 1])
    table = describe(counts, first, np.zeros(6, np.int64), ntype, NOW)
    assert np.array_equal(table[:3], table[3:])
    assert (table[0, :5] > table[1, :5]).all()


@pytest.mark.parametrize(("published", "items"), [(0, 4), (np.iinfo(np.int64).max, 4), (NOW + DAY, 3)])
def test_the_mean_is_over_the_items_that_are_on_the_shelf(published, items):
    """One item is touched, two are out and untouched, the fourth may be: out, of unknown date, or of tomorrow."""
    counts, first = np.zeros((5, 4), np.int64), np.array([NOW - DAY, *[np.iinfo(np.int64).max] * 3])
    counts[:, 0] = 6
    table = describe(counts, first, np.array([0, 0, 0, published]), np.zeros(4, np.int16), NOW)
    assert np.allclose(table[0, :5], np.log1p(items))


def test_no_event_at_all_makes_zeros(tmp_path):
    kinds = {"uid": pa.int64(), "gid": pa.int32(), "event": pa.int8(), "timestamp": pa.int64()}
    empty = {name: pa.array([], kind) for name, kind in kinds.items()}
    pq.write_table(pa.table(empty), tmp_path / "shard.parquet")
    counts, first = count(tmp_path / "shard.parquet", NOW)
    table = describe(counts, first, np.zeros(ITEMS, np.int64), TYPES, NOW)
    assert not table[:, :6].any()
    assert table[:, 6].all()


def test_users_of_the_fold_do_not_count(tmp_path):
    random = np.random.default_rng(3)
    table = pa.table(
        {
            "uid": np.sort(random.integers(0, 40, 300)),
            "gid": random.integers(0, ITEMS, 300).astype(np.int32),
            "event": random.integers(0, 2, 300).astype(np.int8),
            "timestamp": random.integers(-50, 1, 300),
        }
    )
    fold = Fold(1, 3, 0)
    others = table.filter(pa.array(~fold.has(table["uid"].to_numpy())))
    assert 0 < len(others) < 300
    for name, part in (("all", table), ("others", others)):
        pq.write_table(part, tmp_path / f"{name}.parquet")
    found = count(tmp_path / "all.parquet", 0, fold)
    wanted = count(tmp_path / "others.parquet", 0)
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.array_equal(ours, theirs)
    assert (found[0][0] == found[0][3]).all()  # logical times: every window holds everything
