"""The reader of ingest's tables, on a folder written by hand."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_ray.core.clock import DAY, NEVER, days_before
from recsys_ray.core.errors import ArtifactError
from recsys_ray.data.tables import Events, Tables, traits_of, whole_users


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "interactions").mkdir()
    counts = {"item_types": ["book", "song"], "events": ["save", "play", "skip"], "protocol": "leave_one_out"}
    (tmp_path / "manifest.json").write_text(json.dumps({"counts": counts}))
    items = {
        "item_id": ["a", "b", "c"],
        "ntype": pa.array([0, 0, 1], pa.int16()),
        "published_at": pa.array([7, None, 9], pa.int64()),
        "available": [True, None, False],
    }
    pq.write_table(pa.table(items), tmp_path / "items.parquet")
    users = {
        "user_id": [f"u{k}" for k in range(6)],
        "age": pa.array([30, None, 50, None, None, 20], pa.float32()),
        "country": ["DE", None, "", "FR", "DE", None],
        "taste": pa.array([[1, 2], None, [3, 4], None, None, [5, 6]], pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(users), tmp_path / "users.parquet", row_group_size=2)
    for shard, uid in enumerate(([0, 0, 0, 1, 3], [4, 4, 5, 5, 5, 5])):
        columns = {
            "uid": pa.array(uid, pa.int64()),
            "gid": pa.array(np.arange(len(uid)) % 3, pa.int32()),
            "event": pa.array(np.arange(len(uid)) % 2, pa.int8()),
            "timestamp": pa.array(np.arange(len(uid)) - 9, pa.int64()),
            "happened_at": pa.array(np.arange(len(uid)) + 1000 * shard, pa.int64()),
        }
        pq.write_table(pa.table(columns), tmp_path / "interactions" / f"shard-{shard:05d}.parquet")
    return tmp_path


def test_events_are_read_whole_and_in_batches_of_whole_users(folder):
    shards = Tables(folder).shards
    events = Events.join([Events.read(shard) for shard in shards])
    assert events.uid.tolist() == [0, 0, 0, 1, 3, 4, 4, 5, 5, 5, 5]
    assert events.before(-6).timestamp.tolist() == [-9, -8, -7] * 2 and len(events.of([1])) == 5
    assert Tables(folder).num_events == len(events)
    for rows in (1, 2, 3, 100):
        batches = [batch for shard in shards for batch in whole_users(shard, rows)]
        joined = Events.join(batches)
        assert all(np.array_equal(getattr(joined, name), column) for name, column in vars(events).items())
        users = [uid for batch in batches for uid in np.unique(batch.uid).tolist()]
        assert users == [0, 1, 3, 4, 5]  # none of them twice
    calendar = Events.join(list(whole_users(shards[1], calendar=True)))
    assert calendar.timestamp.tolist() == [1000, 1001, 1002, 1003, 1004, 1005]


def test_events_become_codes_by_name(folder):
    assert Tables(folder).codes(["play", "save", "rent"]) == [1, 0]


def test_items_are_described_by_gid(folder):
    tables = Tables(folder)
    assert tables.item_ids.to_pylist() == ["a", "b", "c"] and tables.ntype.tolist() == [0, 0, 1]
    assert tables.published.tolist() == [7, NEVER, 9]
    assert tables.published_in_time.tolist() == [NEVER] * 3  # logical times are not the calendar's
    catalogue = tables.catalogue
    assert catalogue.types == ("book", "song") and catalogue.available.tolist() == [True, True, False]
    assert catalogue.range_of(1) == (2, 3) and catalogue.type_of(np.arange(3)).tolist() == [0, 0, 1]
    assert [row["item_id"] for batch in tables.items_in_batches("item_id", rows=2) for row in batch.to_pylist()] == [
        *"abc"
    ]


@pytest.mark.parametrize("uids", [[], [5], [1, 2], [0, 3, 4]])
def test_users_are_looked_up_by_uid(folder, uids):
    tables = Tables(folder)
    assert tables.num_users == 6 and tables.user_ids[3].as_py() == "u3"
    rows = tables.users(np.array(uids, np.int64))
    assert rows["user_id"].to_pylist() == [f"u{uid}" for uid in uids]
    traits, whole = traits_of(rows, {"taste": 2}), traits_of(tables.users(np.arange(6)), {"taste": 2})
    for name, column in traits.items():
        np.testing.assert_array_equal(column, whole[name][np.array(uids, np.int64)])
    assert whole["country"].tolist() == ["DE", "", "", "FR", "DE", ""]
    np.testing.assert_array_equal(whole["taste_taste"][:3], [[1, 2], [np.nan, np.nan], [3, 4]])
    assert [b.num_rows for b in tables.users_in_batches(4)] == [4, 2]


def test_what_is_missing_is_said_in_a_sentence(tmp_path):
    for ask in (lambda t: t.counts, lambda t: t.shards, lambda t: t.items("item_id")):
        with pytest.raises(ArtifactError, match="run ingest again"):
            ask(Tables(tmp_path))


def test_a_window_of_days_ends_at_a_moment():
    assert days_before(10 * DAY, 3) == 7 * DAY and days_before(10 * DAY, None, 5) == 5
