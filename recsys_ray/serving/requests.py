"""What a request may ask for, and what an answer may hold.

Every value is checked here, so that the command line and HTTP refuse the same things in the same words.
"""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys_ray.core.clock import DAY
from recsys_ray.core.errors import UserError
from recsys_ray.serving.catalogue import Items

MAX_K = 500
_OLDEST = 130  # years


class RequestError(UserError):
    """A request that cannot be answered; ``field`` is the dotted name of what is wrong (``history.2.item_id``)."""

    def __init__(self, field: str, sentence: str) -> None:
        super().__init__(f"{field}: {sentence}")
        self.field, self.sentence = field, sentence


class UnknownItem(RequestError):
    """The item that the request is about does not exist."""


def check_k(k: int) -> int:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MAX_K:
        raise RequestError("k", f"must be a whole number from 1 to {MAX_K}, not {k!r}")
    return k


def check_types(wanted: Sequence[str] | None, known: Sequence[str]) -> list[int]:
    """Numbers of the wanted types, each once; all where None."""
    if wanted is None:
        return list(range(len(known)))
    if isinstance(wanted, str) or not len(wanted):
        raise RequestError("item_types", f"name at least one of {', '.join(known)}, or leave it out for all")
    for place, name in enumerate(wanted):
        if name not in known:
            raise RequestError(f"item_types.{place}", f"there is no item type {name!r}; known: {', '.join(known)}")
    return sorted({known.index(name) for name in wanted})


def check_history(
    history: Sequence[Mapping[str, Any]] | None, items: Items, events: Sequence[str], default_event: str, end: int
) -> list[tuple[int, int, int]]:
    """(timestamp, gid, event number), oldest first. Events without a timestamp are the newest, in the order given.

    Args:
        default_event: what an entry without an event means.
        end: the bundle's last moment, unix seconds. "Now" is counted from there and not from the clock: the data may
            be years old, and an event without a timestamp must not make the user's stored history look outdated.
    """
    checked: list[tuple[int | None, int, int]] = []
    for place, entry in enumerate(history or ()):
        unknown = set(entry) - {"item_id", "event", "timestamp"}
        if unknown or "item_id" not in entry:
            problem = f"{sorted(unknown)[0]!r} is not known" if unknown else "item_id is missing"
            raise RequestError(f"history.{place}", f"{problem}; an entry has item_id, event and timestamp")
        gid = items.find(str(entry["item_id"]))
        if gid is None:
            raise RequestError(f"history.{place}.item_id", f"there is no item {entry['item_id']!r}")
        event = entry.get("event") or default_event
        if event not in events:
            raise RequestError(f"history.{place}.event", f"there is no event {event!r}{_nearest(event, events)}")
        checked.append((_moment(entry.get("timestamp"), place, end), gid, list(events).index(event)))
    newest = max([end, *(moment for moment, _, _ in checked if moment is not None)])
    dated = [(newest if moment is None else moment, gid, event) for moment, gid, event in checked]
    return sorted(dated, key=lambda row: row[0])  # stable: equal moments stay in the order given


def _moment(timestamp: Any, place: int, end: int) -> int | None:
    if timestamp is None:
        return None
    now = max(int(time.time()), end)
    field = f"history.{place}.timestamp"
    if isinstance(timestamp, bool) or not isinstance(timestamp, int | float) or not math.isfinite(timestamp):
        raise RequestError(field, f"must be unix seconds, not {timestamp!r}")
    if timestamp > now + DAY:
        hint = "; it looks like milliseconds" if timestamp > 1e11 else ""
        raise RequestError(field, f"{timestamp!r} lies in the future{hint}; unix seconds are expected")
    return int(timestamp)


def check_age(age: float | None) -> float | None:
    if age is None:
        return None
    if isinstance(age, bool) or not isinstance(age, int | float) or not 0 <= age <= _OLDEST:
        raise RequestError("age", f"must be years from 0 to {_OLDEST}, not {age!r}")
    return float(age)


def check_tastes(
    tastes: Mapping[str, Sequence[float]] | None, sizes: Mapping[str, int]
) -> dict[str, npt.NDArray[np.float32]]:
    """Taste vectors by name; ``sizes`` are those that the user tower was trained with."""
    checked = {}
    for name, values in (tastes or {}).items():
        if name not in sizes:
            known = f"known: {', '.join(sizes)}" if sizes else "this bundle knows none"
            raise RequestError(f"tastes.{name}", f"there is no taste vector of this name; {known}")
        try:
            vector = np.asarray(values, np.float32)
        except (TypeError, ValueError):
            raise RequestError(f"tastes.{name}", "must be a list of numbers") from None
        if vector.shape != (sizes[name],):
            raise RequestError(f"tastes.{name}", f"must hold {sizes[name]} numbers, not {vector.size}")
        if not np.isfinite(vector).all():
            raise RequestError(f"tastes.{name}", "holds a number that is not finite")
        checked[name] = vector
    return checked


def forbidden(items: Items, seen: npt.NDArray[np.int64], exclude: Iterable[str]) -> npt.NDArray[np.int64]:
    """Sorted gids that must not be in the answer. An excluded id that the catalogue lacks cannot be there anyway."""
    if isinstance(exclude, str):
        raise RequestError("exclude", "must be a list of item ids, not one text")
    excluded = [gid for gid in (items.find(str(item_id)) for item_id in exclude) if gid is not None]
    return np.union1d(seen, np.asarray(excluded, np.int64))


def _nearest(name: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
