"""Moments as tables of all kinds hold them."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from recsys_ray.data.convert import convert
from recsys_ray.data.times import parse

NOON = int(datetime(2021, 9, 5, 12, 30, 15, tzinfo=UTC).timestamp())
MIDNIGHT = NOON - 45_015


@pytest.mark.parametrize(
    "text",
    [
        "2021-09-05 12:30:15 UTC", "2021-09-05T12:30:15 gmt", "2021-09-05 12:30:15Z", "2021-09-05 12:30:15+00",
        "2021-09-05 12:30:15 +0000 UTC", "2021-09-05 14:30:15 +0200", "2021-09-05T12:30:15.123456789Z",
        "20210905T123015Z", "2021/09/05 12:30:15", "2021-9-5 12:30:15", "Sun, 05 Sep 2021 12:30:15 GMT",
        "Sun Sep 05 12:30:15 +0000 2021", "Sep 5, 2021 12:30:15 PM", "5 September 2021 12:30:15",
    ],
)  # fmt: skip
def test_unambiguous_texts(text: str) -> None:
    assert parse(text) == NOON
    assert convert(pa.array([text, None]), "seconds", 2).values.to_pylist() == [NOON, None]


@pytest.mark.parametrize("text", ["2021-09-05", "2021/9/5", "2021.09.05", "Sep 5, 2021", "5 Sep 2021", "5th Sept 2021"])
def test_dates(text: str) -> None:
    assert parse(text) == MIDNIGHT
    assert parse("Sept 2021") == parse("2021-09") == MIDNIGHT - 4 * 86_400


@pytest.mark.parametrize(
    "text", ["05/09/2021", "5.9.21", "0000-00-00", "2021-13-01", "12:30", "2021-09-05 12:30:15 EST", "Septober 5, 2021",
             "2021-09-05 25:00", "5 Sep", "2021-09-05 13:00 PM"]
)  # fmt: skip
def test_what_has_no_certain_meaning_does_not_fit(text: str) -> None:
    assert parse(text) is None
    converted = convert(pa.array([text, "2021-09-05"]), "seconds", 2)
    assert converted.values.to_pylist() == [None, MIDNIGHT] and converted.bad.tolist() == [True, False]


@pytest.mark.parametrize(
    ("factor", "what"), [(1, None), (10**3, "milliseconds"), (10**6, "microseconds"), (10**9, "nanoseconds")]
)
def test_units_by_size(factor: int, what: str | None) -> None:
    number = NOON * factor
    columns = [pa.array([number, None]), pa.array([str(number), ""]), pa.array([f"{number}.0", None])]
    columns += [pa.array([float(number), np.nan]), pa.array([Decimal(number), None], pa.decimal128(30, 2))]
    for column in columns:
        converted = convert(column, "seconds", 2)
        assert converted.values.to_pylist() == [NOON, None]
        assert dict(converted.taken) == ({what: 1} if what else {})


def test_units_may_differ_from_row_to_row() -> None:
    numbers = pa.array([NOON, NOON * 10**3, NOON * 10**9, 0, -5])
    assert convert(numbers, "seconds", 5).values.to_pylist() == [NOON, NOON, NOON, 0, -5]


@pytest.mark.parametrize(
    ("number", "what", "moment"),
    [
        (2021, "years", "2021-01-01"),
        (202109, "dates as YYYYMM", "2021-09-01"),
        (20210905, "dates as YYYYMMDD", "2021-09-05"),
        (2021090512, "dates as YYYYMMDDHH", "2021-09-05 12:00"),
        (202109051230, "dates as YYYYMMDDHHMM", "2021-09-05 12:30"),
        (20210905123015, "dates as YYYYMMDDHHMMSS", "2021-09-05 12:30:15"),
    ],
)
def test_numbers_that_are_dates(number: int, what: str, moment: str) -> None:
    expected = int(datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp())
    for column in (
        pa.array([number] * 3 + [0]),
        pa.array([str(number)] * 3 + ["0"]),
        pa.array([float(number)] * 3 + [0]),
    ):
        converted = convert(column, "seconds", 4)
        assert converted.values.to_pylist() == [expected] * 3 + [None]
        assert converted.bad.tolist() == [False] * 3 + [True] and dict(converted.taken) == {what: 3}


def test_a_day_that_is_not_in_the_calendar_does_not_fit() -> None:
    converted = convert(pa.array([20210228, 20210301, 20210302, 20210229, 20211301]), "seconds", 5)
    assert converted.bad.tolist() == [False, False, False, True, True]


def test_dates_before_1970_and_after_today_are_dates() -> None:
    years = convert(pa.array([1861, 1999, 2031]), "seconds", 3).values.to_pylist()
    assert [datetime.fromtimestamp(year, UTC).year for year in years[1:]] == [1999, 2031] and years[0] < -(10**9)


@pytest.mark.parametrize("last", [10**4, 10**6, 10**7, 40_000_000])
def test_times_that_count_from_zero_stay_seconds(last: int) -> None:
    """Some of them look like dates, most do not."""
    seconds = np.random.default_rng(0).integers(0, last, 5_000)
    converted = convert(pa.array(seconds), "seconds", len(seconds))
    assert (converted.values.to_numpy() == seconds).all() and not converted.taken


def test_words_for_nothing_are_missing() -> None:
    converted = convert(pa.array(["NaT", "NULL", "NA", "\\N", "2021-09-05"]), "seconds", 5)
    assert converted.values.to_pylist() == [None] * 4 + [MIDNIGHT] and not converted.bad.any()
