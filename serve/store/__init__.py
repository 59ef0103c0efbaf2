"""The store of events and item changes since the bundle was built; interface.py describes it."""

from __future__ import annotations

from serve.store.interface import GivenAnswer, LiveEvent, LiveItem, Store, StoreError
from serve.store.redis import RedisStore
from serve.store.sqlite import SqliteStore

__all__ = ["GivenAnswer", "LiveEvent", "LiveItem", "Store", "StoreError", "open_store"]


def open_store(uri: str, make: bool = True, wait: bool = False) -> Store:
    """``sqlite:///folder/live.db`` or ``redis://host:port/0``.

    Args:
        make: begin an empty file where there is none.
        wait: a Redis that does not answer now is no error.

    Raises:
        StoreError: it cannot be opened, or the URI names neither.
    """
    if uri.startswith("sqlite:///"):
        return SqliteStore("/" + uri.removeprefix("sqlite:///").lstrip("/"), make)
    if uri.startswith(("redis://", "rediss://", "unix://")):
        return RedisStore(uri, wait)
    raise StoreError(
        f"{uri.partition('://')[0]}:// is not a supported store; use sqlite:///path/live.db or redis://host:port/0"
    )
