"""Row checks, without Ray: every wrong cell has its reason, every accepted representation is read."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys_ray.config import SplitConfig
from recsys_ray.core.errors import DataError
from recsys_ray.data.convert import convert
from recsys_ray.data.reading import Batch
from recsys_ray.data.schema import match_columns
from recsys_ray.data.shuffle import shard_of
from recsys_ray.data.split import plan_split
from recsys_ray.data.validate import (
    Catalogue,
    Checked,
    EventRules,
    check_interactions,
    check_items,
    check_users,
)

NOW = 1_700_000_000
RULES = EventRules(["stream", "follow"], ["heartbeat"], NOW)
CATALOGUE = Catalogue(pa.array(["a", "b"]), np.array([0, 1], dtype=np.int16), ["audio book: 日/é", "podcast"])


def batch_of(rows: list[dict[str, Any]] | pa.Table) -> Batch:
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    return Batch(table, np.arange(1, len(table) + 1, dtype=np.int64))


def reasons(checked: Checked) -> dict[int, str]:
    return {row["row"]: row["reason"] for row in checked.quarantine.to_pylist()}


def event(**changes: Any) -> dict[str, Any]:
    return {"user_id": "u", "item_id": "a", "event": "stream", "timestamp": NOW - 5, "item_type": None} | changes


def test_interactions_row_by_row() -> None:
    rows = [
        event(),
        event(user_id=None),
        event(user_id="  "),
        event(item_id=None),
        event(event=None),
        event(event="strem"),
        event(event="heartbeat", item_id="nowhere"),
        event(timestamp=None),
        event(timestamp=NOW * 1000),
        event(timestamp=NOW + 1),
        event(timestamp=-1),
        event(item_id="zz"),
        event(item_type="podcast"),
        event(item_type="audio book: 日/é", item_id="a"),
    ]
    checked = check_interactions(batch_of(rows), "logs/x.parquet", CATALOGUE, RULES)
    assert checked.good["row"].to_pylist() == [1, 9, 14]
    assert checked.good.column_names == ["row", "user_id", "gid", "event", "timestamp"]
    assert checked.tally.ignored == 1
    found = reasons(checked)
    assert set(found) == set(range(2, 14)) - {7, 9}
    assert found[2] == found[3] == "user_id is missing"
    assert found[4] == "item_id is missing"
    assert found[5] == "event is missing"
    assert found[6] == 'event "strem" is in none of the lists in the events section (did you mean "stream"?)'
    assert found[8] == "timestamp is missing"
    assert checked.good["timestamp"][1].as_py() == NOW
    assert checked.tally.taken == {"timestamp in milliseconds": 1}
    assert found[10].startswith(f"timestamp is {NOW + 1}, later than 2023-11-14 22:13:20")
    assert found[11] == "timestamp is -1, before 1970"
    assert found[12] == 'item_id "zz" is not among the items kept'
    assert found[13] == 'item_type is "podcast", but the catalogue has "audio book: 日/é"'
    assert checked.tally.kinds["missing user_id"][0] == 2
    first = checked.quarantine.to_pylist()[0]
    assert (first["file"], first["table"]) == ("logs/x.parquet", "interactions")
    assert json.loads(first["record"]) == rows[1]


def test_items_row_by_row() -> None:
    base = {"item_id": "x", "item_type": "book", "title": "T", "published_at": "2024-02-01", "available": None}
    rows = [
        base | {"title": " Tom &amp; J&eacute;r&ocirc;me "},
        base | {"title": None},
        base | {"item_type": None},
        base | {"item_id": ""},
        base | {"published_at": "the other day"},
        base | {"available": "perhaps"},
        base | {"available": "FALSE", "item_id": "7"},
    ]
    checked = check_items(batch_of(rows), "f")
    good = checked.good.to_pylist()
    assert [row["row"] for row in good] == [1, 2, 5, 6, 7]
    assert good[0]["title"] == "Tom & Jérôme" and good[1]["title"] == ""
    assert checked.tally.untitled == 1
    assert [row["available"] for row in good] == [True, True, True, False, False]
    assert good[0]["published_at"] == int(datetime(2024, 2, 1, tzinfo=UTC).timestamp())
    assert good[0]["categories"] == [] and good[0]["language"] is None
    found = reasons(checked)
    assert found[3] == "item_type is missing" and found[4] == "item_id is missing"
    assert good[2]["published_at"] is None
    assert checked.tally.dropped == {
        "unreadable published_at": [1, 'row 5 of f: published_at is "the other day", not a time (write unix seconds or '
                                       "an ISO date such as 2024-01-31)"],
        "unreadable available": [1, 'row 6 of f: available is "perhaps", neither true nor false'],
    }  # fmt: skip


def test_users_row_by_row() -> None:
    table = pa.table(
        {
            "user_id": [1, 2, 3, 4, 5],
            "age": pa.array(["34", "old", "131", None, "-1"]),
            "music": pa.array([[0.0, 1.0], [1.0, 1.0], None, [float("nan"), 0.0], [1.0, 2.0]]),
        }
    )
    checked = check_users(batch_of(table), "f", ["music"])
    assert checked.good["user_id"].to_pylist() == ["1", "2", "3", "4", "5"] and not len(checked.quarantine)
    assert checked.good["age"].to_pylist() == [34.0, None, None, None, None]
    assert checked.good["music"].to_pylist() == [[0.0, 1.0], [1.0, 1.0], None, None, [1.0, 2.0]]
    assert checked.tally.dropped == {
        "unreadable age": [1, 'row 2 of f: age is "old", not a number'],
        "age out of range": [2, 'row 3 of f: age is "131", outside 0 to 130'],
        "unreadable music": [1, "row 4 of f: music is [nan, 0.0], not a list of finite numbers"],
    }
    assert checked.tally.lengths == {"music": {"2": 3}}


MOMENT = datetime(2024, 3, 1, 12, 30, 15, tzinfo=UTC)
SECONDS = int(MOMENT.timestamp())


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([SECONDS]), SECONDS),
        (pa.array([SECONDS], pa.int32()), SECONDS),
        (pa.array([float(SECONDS) + 0.9]), SECONDS),
        *(
            (pa.array([MOMENT], pa.timestamp(unit, zone)), SECONDS)
            for unit in ("s", "ms", "ns")
            for zone in ("UTC", "")
        ),
        (pa.array([MOMENT], pa.timestamp("us", "Asia/Tokyo")), SECONDS),
        (pa.array([date(2024, 3, 1)]), SECONDS - 45_015),
        (pa.array([date(2024, 3, 1)], pa.date64()), SECONDS - 45_015),
        (pa.array([str(SECONDS)]), SECONDS),
        (pa.array(["2024-03-01 12:30:15"]), SECONDS),
        (pa.array(["2024-03-01T12:30:15.75Z"]), SECONDS),
        (pa.array(["2024-03-01T21:30:15+09:00"]), SECONDS),
        (pa.array(["2024-03-01"]), SECONDS - 45_015),
        (pa.array(["2024-03-01", "x"])[:1].dictionary_encode(), SECONDS - 45_015),
    ],
)
def test_times_in_every_representation(array: pa.Array, expected: int) -> None:
    converted = convert(array, "seconds", 1)
    assert converted.values.to_pylist() == [expected]
    assert not converted.bad.any()


def test_mixed_texts_are_read_one_by_one() -> None:
    texts = pa.array(["2024-03-01", str(SECONDS), "nonsense", None, "", "2024-03-01T12:30:15Z"])
    converted = convert(texts, "seconds", len(texts))
    assert converted.values.to_pylist() == [SECONDS - 45_015, SECONDS, None, None, None, SECONDS]
    assert converted.bad.tolist() == [False, False, True, False, False, False]


def test_ids_and_labels() -> None:
    assert convert(pa.array([1.0, None, 2.5]), "id", 3).values.to_pylist() == ["1", None, None]
    assert convert(pa.array([1.0, None, 2.5]), "id", 3).bad.tolist() == [False, False, True]
    assert convert(pa.array(["a| b |a||", None]), "labels", 2).values.to_pylist() == [["a", "b"], []]
    assert convert(pa.array([["ä", None], None]), "labels", 2).values.to_pylist() == [["ä"], []]
    assert convert(pa.array(["[1, 2]", "[1, x]", None]), "vector", 3).bad.tolist() == [False, True, False]


def test_missing_column_names_file_and_nearest() -> None:
    schema = pa.schema(
        [("user", pa.string()), ("item_id", pa.string()), ("event", pa.string()), ("timestamp", "int64")]
    )
    with pytest.raises(DataError, match=r"f\.parquet .*no column 'user_id'.*user, item_id.*rename 'user' to 'user_id'"):
        match_columns("interactions", schema, "f.parquet")
    wrong = pa.schema([("user_id", pa.string()), ("age", pa.list_(pa.string()))])
    with pytest.raises(DataError, match=r"'age' of f .*has the type list"):
        match_columns("users", wrong, "f")


def test_shards_depend_on_the_id_alone() -> None:
    users = pa.array([f"u{i}" for i in range(4000)])
    shards = shard_of(users, 8)
    assert shards[:6].tolist() == shard_of(users.take(pa.array(range(5, -1, -1))), 8)[::-1].tolist()
    assert np.bincount(shards, minlength=8).min() > 350


def test_split_is_derived_or_refused() -> None:
    day = 86_400
    days = [(d, 1) for d in range(100, 200)]
    span = (100 * day + 5, 199 * day + 5)
    assert plan_split(SplitConfig(test_days=10, valid_days=20), days, span, span[1], ["stream"]) == (
        170 * day,
        190 * day,
    )
    cases: list[tuple[SplitConfig, str]] = [
        (SplitConfig(test_days=95, valid_days=10), "training"),
        (SplitConfig(test_from=datetime(1970, 1, 1) + timedelta(days=300), valid_days=5), "validation"),
        (SplitConfig(test_from=datetime(1970, 1, 1) + timedelta(days=200), valid_days=5), "test"),
    ]
    for config, period in cases:
        with pytest.raises(DataError, match=f"{period} period.*from 1970-04-11 00:00:05 to 1970-07-19"):
            plan_split(config, days, span, span[1], ["stream"])


def test_periods_are_as_long_as_it_takes_to_tell_something() -> None:
    def planned(days: list[tuple[int, int]], config: SplitConfig | None = None) -> tuple[float, float]:
        day = 86_400
        span = (days[0][0] * day, days[-1][0] * day + 7)
        valid, test = plan_split(config or SplitConfig(), days, span, span[1], ["stream"])
        end = days[-1][0] + 1
        return (test - valid) / day, end - test / day

    assert planned([(d, 1000) for d in range(100, 500)]) == (14, 14)
    assert planned([(d, 20) for d in range(100, 2000)]) == (50, 50)  # 1,000 days of users
    assert planned([(d, 1) for d in range(100, 1100)]) == (30, 30)  # 3 % of 1,000
    assert planned([(d, 900) for d in range(100, 130)]) == (3, 3)  # 10 % of 30 days
    assert planned([(d, 900) for d in range(100, 103)]) == (1, 1)  # never less than a day
    assert planned([(100, 5000), (101, 5000), (1000, 400)]) == (886, 14)  # days without any event count
    assert planned([(d, 20) for d in range(100, 2000)], SplitConfig(valid_days=7)) == (7, 50)
    noon = SplitConfig(test_from=datetime(1970, 1, 1) + timedelta(days=1000.5))
    assert planned([(d, 20) for d in range(100, 2000)], noon)[0] == 50


def test_interactions_of_items_that_are_left_out_are_ignored_and_not_quarantined() -> None:
    catalogue = Catalogue(CATALOGUE.item_ids, CATALOGUE.ntypes, CATALOGUE.type_names, pa.array(["c", "7"]))
    rows = [event(), event(item_id="c", timestamp=None), event(item_id=" 7 "), event(item_id="d")]
    checked = check_interactions(batch_of(rows), "f", catalogue, RULES)
    assert checked.good["row"].to_pylist() == [1] and checked.tally.ignored == 2
    assert list(reasons(checked)) == [4]
