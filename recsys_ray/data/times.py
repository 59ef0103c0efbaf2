"""Converts every accepted representation of a time to unix seconds.

Numbers are seconds, or milli-, micro- or nanoseconds, which are distinguishable by size from 1973 on. Numbers that look
like dates (20240131, a year) could be seconds in 1970: they are read as dates if most of a batch's numbers look so.
"""

from __future__ import annotations

import functools
import re
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.core.clock import DAY

# What whole numbers may be in: (name, from, parts of a second). The least is a moment of March 1973.
_UNITS = (("nanoseconds", 10**17, 10**9), ("microseconds", 10**14, 10**6), ("milliseconds", 10**11, 10**3))
# Dates without separators: (name, digits, first year). Seconds with as many digits are of 1970, 1976 or 2032 and later.
_COMPACT = (
    ("years", 4, 1000),
    ("dates as YYYYMM", 6, 1000),
    ("dates as YYYYMMDD", 8, 1000),
    ("dates as YYYYMMDDHH", 10, 1970),
    ("dates as YYYYMMDDHHMM", 12, 1970),
    ("dates as YYYYMMDDHHMMSS", 14, 1970),
)
_LAST_YEAR = 2100
_WHOLE = r"^-?(\d{1,18}|[0-8]\d{18})(\.\d*)?$"  # fits int64; a fraction is cut off
_UTC_SUFFIX = r"(?i)\s*(utc|gmt|z|\+00(:?00)?)$"
_CLOCK = re.compile(
    r"(?:^|[\sT])(\d{1,2}):(\d\d)(?::(\d\d)(?:[.,]\d+)?)?\s*([AP]M)?\s*([+-]\d\d:?(?:\d\d)?)?(?=\s|Z|UTC|GMT|$)", re.I
)
_NOISE = re.compile(r"^(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*\.?(?=[\s,])|\b(?:utc|gmt)$|(?<=\d)z$|,", re.I)
_MONTHS = ("january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
           "december")  # fmt: skip
_YEAR_FIRST = re.compile(r"(\d{4})[-/.](\d{1,2})(?:[-/.](\d{1,2}))?")
_DAY_FIRST = re.compile(r"(\d{1,2})(?:st|nd|rd|th)?[\s-]+([a-z]{3,9})\.?[\s-]+(\d{4})", re.I)
_MONTH_FIRST = re.compile(r"([a-z]{3,9})\.?(?:\s+(\d{1,2})(?:st|nd|rd|th)?)?\s+(\d{4})", re.I)


def of_numbers(numbers: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Unix seconds (int64 [n]), which numbers fit nothing (bool [n]), and how many were taken for something else than
    seconds, by what they were.

    Args:
        numbers: int64 [n].
        present: bool [n], false where the cell is missing.
    """
    seconds, bad, taken = numbers.copy(), np.zeros(len(numbers), dtype=bool), dict[str, int]()
    rest = present
    for name, digits, first_year in _COMPACT:
        dates, fits = _of_compact(numbers, digits, first_year)
        fits &= present
        if 2 * fits.sum() > present.sum():
            seconds[fits] = dates[fits]
            taken[name] = int(fits.sum())
            bad = present & ~fits & (numbers < 10**8)  # among dates, a small number such as 0 is not a time in 1970
            rest = present & ~fits & ~bad
            break
    for name, least, parts in _UNITS:
        these = rest & (numbers >= least)
        if these.any():
            seconds[these] = numbers[these] // parts
            taken[name] = int(these.sum())
            rest = rest & ~these
    return seconds, bad, taken


def _of_compact(numbers: np.ndarray, digits: int, first_year: int) -> tuple[np.ndarray, np.ndarray]:
    """Unix seconds of numbers as YYYY, YYYYMM, ...; and which are such a date."""

    def part(end: int, default: int) -> np.ndarray:
        """The two digits that end at place ``end`` from the left."""
        return numbers // 10 ** (digits - end) % 100 if digits >= end else np.full(len(numbers), default)

    year, month, day = numbers // 10 ** (digits - 4), part(6, 1), part(8, 1)
    clock = [part(10, 0), part(12, 0), part(14, 0)]
    fits = (year >= first_year) & (year <= _LAST_YEAR) & (month >= 1) & (month <= 12) & (day >= 1)
    fits &= (clock[0] < 24) & (clock[1] < 60) & (clock[2] < 60)
    begin = (np.where(fits, (year - 1970) * 12 + month - 1, 0)).astype("datetime64[M]")
    date = begin.astype("datetime64[D]") + np.where(fits, day - 1, 0)
    fits &= date.astype("datetime64[M]") == begin
    return date.astype(np.int64) * DAY + clock[0] * 3600 + clock[1] * 60 + clock[2], fits


def of_texts(cells: pa.Array) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """As :func:`of_numbers`, for trimmed texts: numbers, ISO dates, and dates that name the month or begin with the
    year. The order of 01/02/2024 is ambiguous, so it is refused."""
    numeric = pc.match_substring_regex(cells, _WHOLE).fill_null(False)
    is_number = numeric.to_numpy(zero_copy_only=False)
    seconds, bad, taken = np.zeros(len(cells), np.int64), np.zeros(len(cells), dtype=bool), dict[str, int]()
    if is_number.any():
        digits = pc.replace_substring_regex(pc.if_else(numeric, cells, "0"), r"\.\d*$", "")
        seconds, bad, taken = of_numbers(digits.cast(pa.int64()).to_numpy(), is_number)
    rest = pc.if_else(numeric, None, cells)
    there = rest.is_valid().to_numpy(zero_copy_only=False)
    if there.any():
        try:  # the usual forms at once, others one by one
            read = pc.replace_substring_regex(rest, _UTC_SUFFIX, "").cast(pa.timestamp("us")).cast(pa.int64())
            found = read.fill_null(0).to_numpy(zero_copy_only=False) // 10**6
        except pa.ArrowInvalid:
            parsed = [None if text is None else parse(text) for text in rest.to_pylist()]
            found = np.array([moment or 0 for moment in parsed], np.int64)
            bad |= there & np.array([moment is None for moment in parsed], dtype=bool)
        seconds = np.where(there, found, seconds)
    return seconds, bad, taken


@functools.lru_cache(1 << 16)
def parse(text: str) -> int | None:
    """Unix seconds of one text, without a zone in UTC; None where it cannot be read for certain."""
    try:
        return _seconds(datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text)))
    except ValueError:
        pass
    clock = _CLOCK.search(text)
    date = text if clock is None else f"{text[: clock.start()]} {text[clock.end() :]}"
    found = _date(_NOISE.sub(" ", " ".join(date.split())).strip())
    try:
        return None if found is None else _seconds(_at(datetime(*found), clock))
    except ValueError:
        return None


def _seconds(moment: datetime) -> int:
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1)


def _at(day: datetime, clock: re.Match[str] | None) -> datetime:
    if clock is None:
        return day
    hour, minute, second, half, zone = clock.groups()
    at = int(hour)
    if half:
        if not 1 <= at <= 12:
            raise ValueError(half)
        at = at % 12 + 12 * (half.lower() == "pm")
    moment = day.replace(hour=at, minute=int(minute), second=int(second or 0))
    if zone:
        minutes = int(zone[1:3]) * 60 + int(zone[3:].lstrip(":") or 0)
        moment = moment.replace(tzinfo=timezone(timedelta(minutes=-minutes if zone[0] == "-" else minutes)))
    return moment


def _date(text: str) -> tuple[int, int, int] | None:
    text = " ".join(text.split())
    if match := _YEAR_FIRST.fullmatch(text):
        return int(match[1]), int(match[2]), int(match[3] or 1)
    if match := _DAY_FIRST.fullmatch(text):
        day, name, year = match.groups()
    elif match := _MONTH_FIRST.fullmatch(text):
        name, day, year = match.groups()
    else:
        return None
    months = [number for number, month in enumerate(_MONTHS, 1) if month.startswith(name.lower())]
    return (int(year), months[0], int(day or 1)) if months else None  # three letters name one month
