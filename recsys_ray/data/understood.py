"""Summarises what ingest understood, with a sentence for anything that looks wrong."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from recsys_ray.core.clock import DAY
from recsys_ray.data.validate import utc

_LARGE_SHARE, _LARGE_MULTIPLE = 0.05, 4  # of all events, and of what a user has on average
_PLURAL_FROM = 4  # letters; shorter words are codes, and "es" is no plural of "e"


def describe(counts: Mapping[str, Any], census: Mapping[str, Any]) -> list[str]:
    """Lines to print: users, items and events, then what looks wrong.

    Args:
        counts: of ingest's manifest: users, item_types, items_per_type, countries, languages, categories, last_event.
        census: ``events`` (their number), ``first`` (unix seconds), ``all_days`` (unix days with any event, ascending),
            ``of_1970`` (events), ``largest`` (events and id of the user with most), ``listed`` and ``active`` (users of
            the users table, and those of them with an event), ``examples`` (an id of either), ``published`` (first and
            last, or None), ``published_at_0`` (items of 1 January 1970).
    """
    return [*_facts(counts, census), *(f"check: {sentence}" for sentence in _doubts(counts, census))]


def _facts(counts: Mapping[str, Any], census: Mapping[str, Any]) -> Iterator[str]:
    most, who = census["largest"]
    listed = (
        f"; {census['active']:,} of {census['listed']:,} in the users table have events" if census["listed"] else ""
    )
    yield f'{counts["users"]:,} users, "{who}" with the most events ({most:,}){listed}'
    sizes = zip(counts["item_types"], counts["items_per_type"], strict=True)
    published = census["published"]
    dates = f"; published {_date(published[0] // DAY)} to {_date(published[1] // DAY)}" if published else ""
    yield f"{sum(counts['items_per_type']):,} items: {', '.join(f'{name} {n:,}' for name, n in sizes)}{dates}"
    gap, begin, end = _longest_gap(census["all_days"])
    without = f"longest gap {gap:,} days, {_date(begin)} to {_date(end)}" if gap else "events on every day"
    yield f"{census['events']:,} events, {utc(census['first'])} to {utc(counts['last_event'])}; {without}"


def _doubts(counts: Mapping[str, Any], census: Mapping[str, Any]) -> Iterator[str]:
    yield from alike("item types", counts["item_types"], "each counts as a separate type, with its own index and lists")
    yield from alike("countries", counts["countries"], "each counts as a separate country")
    yield from alike("languages", counts["languages"], "each counts as a separate language")
    if census["listed"] and not census["active"]:
        examples = census["examples"]
        yield (
            f'no id of the users table occurs in the interactions; its ids look like "{examples["listed"]}", those of '
            f'the interactions like "{examples["active"]}": write them the same way, or age, country and tastes are '
            "ignored"
        )
    most, who = census["largest"]
    if most == 1:
        yield "no user has two events, so no two items share a user; does user_id identify a visit instead of a user?"
    share = most / max(census["events"], 1)
    if share > _LARGE_SHARE and share > _LARGE_MULTIPLE / max(counts["users"], 1):
        yield (
            f'user "{who}" has {share:.0%} of all events; if it stands for many people (guests, unknown), remove its '
            "rows or leave their user_id empty"
        )
    yield from _doubtful_times(census)
    divided = [name for name in counts["categories"] if re.search(r"[,;]", name)]
    if len(divided) > max(5, len(counts["categories"]) / 2):
        yield (
            f'most categories contain a comma or semicolon, such as "{divided[0]}"; if these are several '
            "categories, separate them with | or write lists"
        )


def _doubtful_times(census: Mapping[str, Any]) -> Iterator[str]:
    events, old = census["events"], census["of_1970"]
    if old == events:
        yield (
            "all events are in 1970: are the timestamps unix seconds? Only days and order matter, so times that start "
            "at 0 work, too"
        )
    elif old:
        yield (
            f"{old:,} of {events:,} events are in 1970; if 0 or a running number stands for an unknown time, remove "
            "these rows"
        )
    gap, begin, end = _longest_gap(census["all_days"])
    days = census["all_days"]
    if not old and gap > 30 and 2 * gap > days[-1] - days[0]:
        yield f"no event between {_date(begin)} and {_date(end)}; are the times on both sides correct?"
    if census["published_at_0"] > 1:
        yield (
            f"{census['published_at_0']:,} items have published_at 1970-01-01; if 0 stands for an unknown date, leave "
            "the cell empty"
        )


def alike(what: str, names: Sequence[str], consequence: str) -> Iterator[str]:
    """A sentence for each set of names that differ only by case, blanks, punctuation or a plural s."""
    for _, group in itertools.groupby(sorted(names, key=_bare), key=_bare):
        if len(same := sorted(group)) > 1:
            quoted = ", ".join(f'"{name}"' for name in same)
            said = f"the {what} {quoted} differ only in spelling, and {consequence}"
            yield f"{said}; if they are the same, use one spelling"


def _bare(name: str) -> str:
    letters = re.sub(r"[\W_]+", "", name.casefold())
    return letters[:-1] if len(letters) > _PLURAL_FROM and letters.endswith("s") else letters


def _longest_gap(days: Sequence[int]) -> tuple[int, int, int]:
    """Days without an event, and the unix days around them."""
    if len(days) < 2:
        return 0, 0, 0
    gaps = np.diff(days)
    at = int(gaps.argmax())
    return int(gaps[at]) - 1, days[at], days[at + 1]


def _date(day: int) -> str:
    return utc(day * DAY)
