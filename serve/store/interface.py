"""What happened since the bundle was built: user events, new and deleted items, and answers given.

One small interface for two stores: SQLite for servers on one machine, Redis for a cluster. An acknowledged call is on
disk (SQLite), or in Redis, whose durability depends on its ``appendonly`` setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from recsys_ray.core.errors import UserError


class StoreError(UserError):
    """The store does not answer, or is damaged. The message holds nothing of a user."""


@dataclass(frozen=True)
class LiveEvent:
    """Something that a user did."""

    event_id: str  # a second event of this id changes nothing
    user_id: str
    item_id: str
    event: str
    timestamp: int  # unix seconds
    request_id: str | None = None  # of the answer that it follows


@dataclass(frozen=True)
class LiveItem:
    """The latest state of an item added, changed or removed since the bundle was built."""

    item_id: str
    record: Mapping[str, Any] | None  # columns of the items table; None: deleted
    vectors: bytes | None = None  # its vectors from recsys_ray/bundle/embedder.py
    change: int = 0  # number of the change, given by the store: 1, 2, ...


@dataclass(frozen=True)
class GivenAnswer:
    """An answer, for the figures of variants."""

    request_id: str
    variant: str
    version: str
    timestamp: int


class Store(Protocol):
    """Safe to use from several threads, and from several processes at once. All methods raise StoreError.

    Each row is checked when it is read. A damaged one is left out, counted, and named once in the log. An item whose
    row is damaged counts as deleted where its id can still be read.
    """

    @property
    def damaged(self) -> int:
        """Rows found damaged so far, up to a thousand."""
        ...

    def add_events(self, events: Sequence[LiveEvent]) -> int:
        """Keep events, all of them or none; returns how many were new."""
        ...

    def events_of(self, user_ids: Sequence[str], since: int, limit: int) -> dict[str, list[LiveEvent]]:
        """The latest ``limit`` events of each user from ``since`` on, oldest first, those of one second in the order
        in which they came; users without any are left out."""
        ...

    def events_after(self, place: str, limit: int) -> tuple[list[LiveEvent], str]:
        """Events in the order in which they came, after ``place`` (at first: ``""``); and the place of the last."""
        ...

    def put_item(self, item: LiveItem) -> int:
        """Keep an item's state; returns the number of the change."""
        ...

    def put_vectors(self, item: LiveItem, vectors: bytes) -> bool:
        """Give an item that was read other vectors, which is a change. False: it has changed since, so nothing is
        done."""
        ...

    def last_change(self) -> int:
        """The number of the last change of an item; 0: none."""
        ...

    def items_after(self, change: int) -> list[LiveItem]:
        """The states of all items that changed after ``change``, in the order of their changes."""
        ...

    def add_answers(self, answers: Sequence[GivenAnswer]) -> None:
        """Remember answers that were given."""
        ...

    def outcomes(self, since: int, until: int, events: Sequence[str], window: int) -> dict[str, tuple[int, int]]:
        """For each variant the answers given in ``since <= timestamp < until``, and how many of them one of ``events``
        follows, by its request id, within ``window`` seconds."""
        ...

    def trim(self, before: int) -> int:
        """Forget events and answers from before a moment; returns how many events that were."""
        ...

    def forget_user(self, user_id: str) -> int:
        """Forget all events of a user; returns how many they were."""
        ...

    def close(self) -> None: ...
