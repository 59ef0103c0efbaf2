"""Rows of a store, checked as they are read: a damaged one costs itself and nothing else."""

from __future__ import annotations

import json
import logging
from typing import Any

from recsys_ray.serving.live import LiveVectors
from serve.store.interface import LiveEvent, LiveItem

EXACT = 2**53  # whole numbers below it are exact as floats, as which Redis keeps times and numbers of changes
_NAMED = 1_000  # damaged rows that are remembered; beyond, one is neither counted nor named
UNREADABLE = object()
_LOG = logging.getLogger("recsys_ray.serve")


class Rows:
    """Makes events and items of rows. A damaged row is counted and named in the log when it is first met, by its place
    or the number of its change: logs hold no ids."""

    def __init__(self) -> None:
        self._damaged: set[str] = set()

    @property
    def damaged(self) -> int:
        return len(self._damaged)

    def event(self, place: object, fields: Any) -> LiveEvent | None:
        """``fields``: all of an event, in their order. None: damaged."""
        try:
            _check(isinstance(fields, list | tuple) and len(fields) == 6, "an event has six fields")
            *names, moment, request = fields
            _check(all(map(_is_text, names)), "an id or an event's name is not text")
            _check(_is_whole(moment) and abs(moment) < EXACT, "its time is not a whole number of seconds")
            _check(request is None or _is_text(request), "its request id is not text")
        except ValueError as error:
            self.skip(f"event at {place}", error)
            return None
        return LiveEvent(*fields)

    def item(self, change: Any, name: Any, record: Any, vectors: Any) -> LiveItem | None:
        """Where the rest of a known item's row is damaged, nobody can say that it was not deleted or hidden, so it is
        a deleted one. None: nobody knows which item it was."""
        if not (_is_text(name) and _is_whole(change) and 0 < change < EXACT):
            number = change if isinstance(change, int | float) else "?"
            self.skip(f"item of change {number}", ValueError("its id is not text, or its change has no number"))
            return None
        try:
            _check_record(record)
            if vectors is not None:
                LiveVectors.unpack(vectors)
        except ValueError as error:
            self.skip(f"item of change {change}", error)
            return LiveItem(name, None, None, change)
        return LiveItem(name, record, vectors, change)

    def skip(self, row: str, why: ValueError) -> None:
        if row not in self._damaged and len(self._damaged) < _NAMED:
            self._damaged.add(row)
            _LOG.error("the store has a damaged row, which is left out: %s (%s)", row, why)


def parsed(told: Any) -> Any:
    """From JSON; what it is not is UNREADABLE, which no check lets pass."""
    try:
        return json.loads(told if isinstance(told, str) else told.decode())
    except (ValueError, AttributeError, RecursionError):  # a number in the column of texts has nothing to decode
        return UNREADABLE


def text(value: Any) -> Any:
    """Bytes as the text that they are; those that are none stay bytes, which no check lets pass."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value


def _check_record(record: Any) -> None:
    if record is None:
        return
    _check(isinstance(record, dict), "it has no columns")
    _check(_is_text(record.get("item_type")), "its item type is not text")
    texts = (record.get(name) for name in ("title", "description", "language"))
    _check(all(one is None or _is_text(one) for one in texts), "one of its texts is not text")
    categories = record.get("categories")
    _check(
        categories is None or (isinstance(categories, list) and all(map(_is_text, categories))),
        "its categories are not a list of texts",
    )
    moment = record.get("published_at")
    _check(moment is None or (_is_whole(moment) and abs(moment) < EXACT), "its date is not a whole number of seconds")
    states = (record.get("available", True), record.get("hidden", False))
    _check(all(isinstance(state, bool) for state in states), "its state is neither true nor false")


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _is_text(value: object) -> bool:
    """Half of a surrogate pair, which JSON can name, is none: no answer could contain it."""
    if not isinstance(value, str):
        return False
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
