"""What a request may ask for.

Every value is checked here, so that the command line and HTTP give the same errors in the same words.
"""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys_ray.core.clock import DAY
from recsys_ray.core.errors import UserError
from recsys_ray.serving.catalogue import Items
from recsys_ray.serving.filters import Filters
from recsys_ray.serving.live import LiveItems

MAX_K = 500
HistoryEntry = Mapping[str, Any]  # item_id, event (optional), timestamp (optional; unix seconds or ISO 8601)
_OLDEST = 130  # years


class RequestError(UserError):
    """A request that cannot be answered; ``field`` is the dotted name of what is wrong (``history.2.item_id``)."""

    def __init__(self, field: str, sentence: str) -> None:
        super().__init__(f"{field}: {sentence}")
        self.field, self.sentence = field, sentence


class UnknownItem(RequestError):
    """The item that the request is about does not exist."""


@dataclass(frozen=True)
class Question:
    """A request for one user's recommendations. All fields are optional.

    Args:
        user_id: a user of the bundle; an unknown id is a new user.
        history: events in addition to the bundle's. Unknown items are skipped and listed in the answer's ``ignored``.
        age, country, tastes: override what the bundle has; an unknown country counts as absent.
        item_types: what to recommend; None: every type.
        k: number of items, 1 to 500; fewer only if nothing else is allowed.
        quotas: a number per item type instead of the best ``k`` of all types.
        exclude: item ids to leave out.
        allow: the only item ids allowed; None: all.
        filters: conditions on the items.
        include_seen: also return items that the user has seen.
        diversity: 0 to 1: how much an item must differ from those above it (maximal marginal relevance).
        popularity: -1 to 1: how much popular items are raised; below 0 they are lowered.
    """

    user_id: str | None = None
    history: Sequence[HistoryEntry] | None = None
    age: float | None = None
    country: str | None = None
    tastes: Mapping[str, Sequence[float]] | None = None
    item_types: Sequence[str] | None = None
    k: int = 10
    quotas: Mapping[str, int] | None = None
    exclude: Sequence[str] = ()
    allow: Sequence[str] | None = None
    filters: Filters = field(default_factory=Filters)
    include_seen: bool = False
    diversity: float = 0.0
    popularity: float = 0.0


def check_k(k: int) -> int:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MAX_K:
        raise RequestError("k", f"must be a whole number from 1 to {MAX_K}, not {k!r}")
    return k


def check_types(wanted: Sequence[str] | None, known: Sequence[str]) -> list[int]:
    """Numbers of the wanted types, each once; all where None."""
    if wanted is None:
        return list(range(len(known)))
    names = check_list("item_types", wanted, "item types")
    if not names:
        raise RequestError("item_types", f"name at least one of {', '.join(known)}, or omit the field for all")
    for place, name in enumerate(names):
        if name not in known:
            raise RequestError(f"item_types.{place}", f"there is no item type {name!r}; known: {', '.join(known)}")
    return sorted({known.index(name) for name in names})


def check_quotas(quotas: Mapping[str, int] | None, known: Sequence[str]) -> dict[int, int] | None:
    """The number of items per type, by type number; None if not given."""
    if quotas is None:
        return None
    if not isinstance(quotas, Mapping) or not quotas:
        raise RequestError("quotas", "name at least one item type with a number, or omit the field")
    for name, count in quotas.items():
        if name not in known:
            raise RequestError(f"quotas.{name}", f"there is no item type {name!r}; known: {', '.join(known)}")
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_K:
            raise RequestError(f"quotas.{name}", f"must be a whole number from 1 to {MAX_K}, not {count!r}")
    return {known.index(name): count for name, count in quotas.items()}


def check_share(field: str, value: float, low: float) -> float:
    """A number from ``low`` to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= 1:
        raise RequestError(field, f"must be a number from {low:g} to 1, not {value!r}")
    return float(value)


def check_list(field: str, value: Any, of: str) -> list[Any]:
    """The entries of a list; ``of`` says of what."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise RequestError(field, f"must be a list of {of}, not {value!r}")
    return list(value)


def check_flag(field: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError(field, f"must be true or false, not {value!r}")
    return value


def check_id(field: str, value: Any) -> str:
    """An id as text; a number stands for its digits."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RequestError(field, f"must be a string or a whole number, not {value!r}")
    return str(value)


def check_history(
    history: Sequence[HistoryEntry] | None, items: Items, events: Sequence[str], default_event: str, end: int
) -> tuple[list[tuple[int, int, int]], list[str]]:
    """(timestamp, gid, event number), oldest first, and the ids that the bundle does not know. Events without a
    timestamp are the newest, in the order given.

    Args:
        default_event: what an entry without an event means.
        end: the bundle's last moment, unix seconds. "Now" is counted from there and not from the clock: the data may
            be years old, and an event without a timestamp must not make the user's stored history look outdated.
    """
    checked: list[tuple[int | None, int, int]] = []
    ignored: list[str] = []
    for place, entry in enumerate(check_list("history", history or (), "events")):
        if not isinstance(entry, Mapping):
            raise RequestError(f"history.{place}", f"must have item_id, event and timestamp, not be {entry!r}")
        unknown = set(entry) - {"item_id", "event", "timestamp"}
        if unknown or "item_id" not in entry:
            problem = f"{sorted(unknown)[0]!r} is not known" if unknown else "item_id is missing"
            raise RequestError(f"history.{place}", f"{problem}; an entry has item_id, event and timestamp")
        item_id = check_id(f"history.{place}.item_id", entry["item_id"])
        event = entry.get("event") or default_event
        if event not in events:
            raise RequestError(f"history.{place}.event", f"there is no event {event!r}{_nearest(event, events)}")
        moment = check_moment(entry.get("timestamp"), f"history.{place}.timestamp", end)
        gid = items.find(item_id)
        if gid is None:
            ignored.append(item_id)
        else:
            checked.append((moment, gid, list(events).index(event)))
    newest = max([end, *(moment for moment, _, _ in checked if moment is not None)])
    dated = [(newest if moment is None else moment, gid, event) for moment, gid, event in checked]
    return sorted(dated, key=lambda row: row[0]), ignored  # stable: equal moments stay in the order given


def check_moment(timestamp: Any, field: str, end: int) -> int | None:
    """Unix seconds of a time in a request; none where it has none. It may not lie a day after now and ``end``."""
    if timestamp is None:
        return None
    now = max(int(time.time()), end)
    if isinstance(timestamp, str):
        try:
            timestamp = iso_seconds(timestamp)
        except (ValueError, OverflowError):
            wanted = "unix seconds or a time like 2024-05-01T12:00:00Z"
            raise RequestError(field, f"must be {wanted}, not {timestamp!r}") from None
    if isinstance(timestamp, bool) or not isinstance(timestamp, int | float) or not math.isfinite(timestamp):
        raise RequestError(field, f"must be unix seconds, not {timestamp!r}")
    if timestamp > now + DAY:
        hint = "; it looks like milliseconds" if timestamp > 1e11 else ""
        raise RequestError(field, f"{timestamp!r} is in the future{hint}; unix seconds are expected")
    return int(timestamp)


def iso_seconds(text: str) -> float:
    """Unix seconds of an ISO 8601 time; one without a zone is of UTC."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def check_age(age: float | None) -> float | None:
    if age is None:
        return None
    if isinstance(age, bool) or not isinstance(age, int | float) or not 0 <= age <= _OLDEST:
        raise RequestError("age", f"must be a number of years from 0 to {_OLDEST}, not {age!r}")
    return float(age)


def check_tastes(
    tastes: Mapping[str, Sequence[float]] | None, sizes: Mapping[str, int]
) -> dict[str, npt.NDArray[np.float32]]:
    """Taste vectors by name; ``sizes`` are those that the user tower was trained with."""
    checked = {}
    if tastes is not None and not isinstance(tastes, Mapping):
        raise RequestError("tastes", f"must map names to lists of numbers, not be {tastes!r}")
    for name, values in (tastes or {}).items():
        if name not in sizes:
            known = f"known: {', '.join(sizes)}" if sizes else "this bundle knows none"
            raise RequestError(f"tastes.{name}", f"there is no taste vector with this name; {known}")
        numbers = check_list(f"tastes.{name}", values, "numbers")
        if any(isinstance(number, bool) or not isinstance(number, Real) for number in numbers):
            raise RequestError(f"tastes.{name}", "must be a list of numbers")
        vector = np.asarray(numbers, np.float32)
        if vector.shape != (sizes[name],):
            raise RequestError(f"tastes.{name}", f"must contain {sizes[name]} numbers, not {vector.size}")
        if not np.isfinite(vector).all():
            raise RequestError(f"tastes.{name}", "contains a number that is not finite")
        checked[name] = vector
    return checked


def check_items(field: str, items: Items, ids: Iterable[str], live: LiveItems) -> npt.NDArray[np.int64]:
    """Ascending gids of these ids, in the bundle and among new items; an id that is in neither is passed over."""
    listed = check_list(field, ids, "item ids")
    names = [check_id(f"{field}.{place}", item_id) for place, item_id in enumerate(listed)]
    found = [items.find(name) for name in names] + [live.find(name) for name in names]
    gids = np.array([gid for gid in found if gid is not None], np.int64)
    return np.unique(gids) if len(gids) else gids


def _nearest(name: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
