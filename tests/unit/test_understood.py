"""What becomes of rows that are repeated, replaced, bad or doubtful, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_ray.config import DataConfig
from recsys_ray.core.clock import DAY
from recsys_ray.core.errors import DataError
from recsys_ray.data.understood import alike, describe
from recsys_ray.data.validate import Tally, check_leave_out, judge_rows, last_of_each, newest_of_each

COUNTS = {
    "users": 90, "item_types": ["film", "song"], "items_per_type": [7, 3], "countries": [], "languages": [],
    "categories": [], "last_event": 19_999 * DAY + 60,
}  # fmt: skip
CENSUS = {
    "events": 1_000, "first": 19_000 * DAY, "all_days": [*range(19_000, 19_500), *range(19_510, 20_000)], "of_1970": 0,
    "largest": [40, "ann"], "listed": 80, "active": 75, "examples": {"listed": "u1", "active": "1"}, "published": None,
    "published_at_0": 0,
}  # fmt: skip


def doubts(counts: dict[str, Any] | None = None, **census: Any) -> list[str]:
    lines = describe(COUNTS | (counts or {}), CENSUS | census)
    return [line.removeprefix("check: ") for line in lines if line.startswith("check: ")]


def test_facts() -> None:
    assert describe(COUNTS, CENSUS | {"published": [-DAY, 2 * DAY]}) == [
        '90 users, "ann" with the most events (40); 75 of 80 in the users table have events',
        "10 items: film 7, song 3; published 1969-12-31 to 1970-01-03",
        "1,000 events, 2022-01-08 to 2024-10-03 00:01:00; longest gap 10 days, 2023-05-22 to 2023-06-02",
    ]


def test_nothing_doubtful_nothing_said() -> None:
    assert doubts() == []
    assert doubts({"users": 2}, largest=[500, "ann"]) == []  # of two users one has at least half


@pytest.mark.parametrize(
    ("counts", "census", "sentence"),
    [
        ({"item_types": ["Film", "film"]}, {}, 'item types "Film", "film" differ only in spelling'),
        ({"countries": ["DE", "FR", "de"]}, {}, 'countries "DE", "de" differ'),
        ({"categories": [f"a{n}, b" for n in range(9)]}, {}, 'a comma or semicolon, such as "a0, b"'),
        (
            {},
            {"active": 0},
            'no id of the users table occurs in the interactions; its ids look like "u1", those of',
        ),
        ({}, {"largest": [300, "guest"]}, 'user "guest" has 30% of all events'),
        ({}, {"largest": [1, "ann"]}, "no user has two events"),
        ({}, {"of_1970": 12}, "12 of 1,000 events are in 1970"),
        ({}, {"of_1970": 1_000}, "all events are in 1970"),
        ({}, {"all_days": [11_000, 19_999, 20_000]}, "no event between 2000-02-13 and 2024-10-03"),
        ({}, {"published_at_0": 4}, "4 items have published_at 1970-01-01"),
    ],
)
def test_each_doubt_is_one_sentence(counts: dict[str, Any], census: dict[str, Any], sentence: str) -> None:
    (said,) = doubts(counts, **census)
    assert sentence in said


def test_names_that_are_spelt_differently() -> None:
    names = ["audio-book", "Audio Book", "audiobooks", "es", "e", "news", "new", "podcast"]
    (said,) = alike("item types", names, "so what")
    assert all(f'"{name}"' in said for name in names[:3])
    assert not list(alike("countries", ["A", "AS", "E", "ES"], "so what"))


def items(*rows: tuple[str, str, str, int, int]) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.table(dict(zip(("item_id", "item_type", "title", "file", "row"), map(pa.array, columns), strict=True)))


def test_the_newest_row_of_an_item_counts_and_an_item_has_one_type() -> None:
    rows = [
        ("a", "film", "old", 0, 1),
        ("b", "film", "b", 0, 2),
        ("a", "song", "other", 0, 3),
        ("a", "film", "new", 1, 1),
    ]
    kept, bad, tally = newest_of_each(items(*rows), {0: "one.csv", 1: "two.csv"})
    assert kept.select(["item_id", "title"]).to_pylist() == [
        {"item_id": "b", "title": "b"}, {"item_id": "a", "title": "new"},
    ]  # fmt: skip
    assert (tally.kept, tally.repeated, tally.quarantined) == (-2, 1, 1)
    assert [(row["file"], row["row"], row["reason"]) for row in bad.to_pylist()] == [
        ("one.csv", 3, 'row 1 of two.csv has the same item_id and item_type "film"; an item has one type')
    ]


@given(st.lists(st.integers(0, 5)))
@settings(deadline=None)
def test_last_of_each(codes: list[int]) -> None:
    wanted = [max(j for j, other in enumerate(codes) if other == code) for code in codes]
    assert last_of_each(np.array(codes, np.int64)).tolist() == wanted


KINDS = {"unknown item": [7, "i is unknown"], "missing user_id": [3, "none"]}


def judge(rules: DataConfig, kept: int = 85, dropped: Any = None) -> list[str]:
    rows = Tally(100, kept, repeated=5, kinds=KINDS, dropped=dropped or {}, taken={"timestamp in years": 3})
    return judge_rows("interactions", rows, rules, Path("q"))


def test_tallies_add_up() -> None:
    more = Tally(4, kinds={"unknown item": [2, "j is unknown"], "unknown event": [1, "e"]}, lengths={"t": {"8": 2}})
    both = Tally(3, kinds=KINDS, lengths={"t": {"8": 1, "9": 5}}) + more
    assert both.read == 7 and both.quarantined == 13 and both.lengths == {"t": {"8": 3, "9": 5}}
    assert both.kinds == {**KINDS, "unknown item": [9, "i is unknown"], "unknown event": [1, "e"]}
    assert KINDS["unknown item"] == [7, "i is unknown"]


def test_one_kind_of_bad_row_may_pass_and_the_others_may_not() -> None:
    with pytest.raises(DataError, match=r"10 of 100 rows.*Add rows for these items.*leave_out=.unknown item, missing"):
        judge(DataConfig())
    said = judge(DataConfig(leave_out=["unknown item"]))
    assert said[0] == (
        "  interactions: 100 rows read, 85 kept, 5 repeated (same user, item, event and second), counted once, "
        "10 to quarantine (unknown item 7, missing user_id 3)"
    )
    assert said[1] == "    timestamp in years: 3, read as such"
    with pytest.raises(DataError, match=r"10 of 100 rows.*\(2%\)\. missing user_id: 3"):
        judge(DataConfig(leave_out=["unknown item"], max_bad_share=0.02))
    with pytest.raises(DataError, match=r"none is left"):
        judge(DataConfig(leave_out=["unknown item"]), kept=0)


def test_values_that_cannot_be_used_cost_the_row_nothing_until_they_are_many() -> None:
    rules = DataConfig(leave_out=["unknown item"])
    few = {"unreadable published_at": [5, "row 9 of f"], "unreadable available": [1, "row 8 of f"]}
    assert judge(rules, dropped=few)[1:3] == [
        "    unreadable published_at: 5, left empty, as in row 9 of f",
        "    unreadable available: 1, read as false, as in row 8 of f",
    ]
    many = {"unreadable published_at": [6, "row 9 of f"]}
    with pytest.raises(DataError, match=r"6 of 100 rows.*cannot be used.*continue without these values: --set"):
        judge(rules, dropped=many)
    assert judge(DataConfig(leave_out=["unknown item", "unreadable published_at"]), dropped=many)


def test_leave_out_knows_its_kinds() -> None:
    check_leave_out(["unknown item", "missing user_id", "unreadable age", "music of wrong length"])
    with pytest.raises(DataError, match=r'"unknwon item" is not a kind of bad row .did you mean "unknown item"'):
        check_leave_out(["unknwon item"])
