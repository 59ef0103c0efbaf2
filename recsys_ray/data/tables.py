"""Reads what the ingest stage wrote. No other module knows its layout (docs/architecture.md).

Imports neither Ray nor torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Int

from recsys_ray.core.clock import NEVER, is_leave_one_out
from recsys_ray.core.errors import ArtifactError
from recsys_ray.core.offsets import offsets_of
from recsys_ray.storage.artifacts import read_json

_COLUMNS = ("uid", "gid", "event", "timestamp")
_ROWS = 1_000_000  # events that are read at a time where not all of a shard is held


@dataclass(frozen=True)
class Events:
    """Interactions of whole users, sorted by (uid, timestamp)."""

    uid: Int[np.ndarray, "n"]
    gid: Int[np.ndarray, "n"]
    event: Int[np.ndarray, "n"]  # code: index into the manifest's events
    timestamp: Int[np.ndarray, "n"]  # unix seconds; in leave-one-out a logical time

    def __len__(self) -> int:
        return len(self.uid)

    def select(self, chosen: np.ndarray | slice) -> Events:
        """The events of a mask, a slice or ascending positions."""
        return Events(self.uid[chosen], self.gid[chosen], self.event[chosen], self.timestamp[chosen])

    def before(self, moment: int) -> Events:
        """The events with ``timestamp < moment``."""
        return self.select(self.timestamp < moment)

    def of(self, codes: Sequence[int]) -> Events:
        """The events with one of these codes."""
        return self.select(has_code(self.event, codes))

    @staticmethod
    def read(shard: str | Path) -> Events:
        """All of a shard."""
        return _events_of(pq.read_table(shard, columns=list(_COLUMNS)), _COLUMNS)

    @staticmethod
    def join(parts: Sequence[Events]) -> Events:
        """One after the other: shards hold users in ascending order, so that what they make is sorted again."""
        return Events(*(np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS))


def has_code(event: Int[np.ndarray, "n"], codes: Sequence[int]) -> Bool[np.ndarray, "n"]:
    """Which events have one of these codes."""
    return np.isin(event, np.asarray(codes, event.dtype))


def whole_users(shard: Path, rows: int = _ROWS, calendar: bool = False) -> Iterator[Events]:
    """A shard's events in batches of about ``rows``, of which none cuts a user in two.

    Args:
        calendar: with unix seconds under either protocol; in leave-one-out ``timestamp`` is a logical time otherwise.
    """
    rest: Events | None = None
    with pq.ParquetFile(shard) as file:
        logical = "happened_at" in file.schema_arrow.names
        columns = (*_COLUMNS[:-1], "happened_at") if calendar and logical else _COLUMNS
        for batch in file.iter_batches(rows, columns=list(columns)):
            events = _events_of(batch, columns)
            events = events if rest is None else Events.join([rest, events])
            cut = (
                int(np.searchsorted(events.uid, events.uid[-1])) if len(events) else 0
            )  # the last user may continue in the next batch
            if cut:
                yield events.select(slice(cut))
            rest = events.select(slice(cut, None))
    if rest is not None and len(rest):
        yield rest


def _events_of(table: pa.Table | pa.RecordBatch, columns: Sequence[str]) -> Events:
    uid, gid, event, timestamp = (table[name].to_numpy() for name in columns)
    return Events(uid.astype(np.int64, copy=False), gid.astype(np.int64), event, timestamp.astype(np.int64, copy=False))


@dataclass(frozen=True)
class Catalogue:
    """Items by ``gid``. The ingest stage sorts them by type, so a type is a range of gids."""

    types: tuple[str, ...]
    bounds: Int[np.ndarray, "types_plus_1"]  # type k holds bounds[k] <= gid < bounds[k + 1]
    available: Bool[np.ndarray, "items"]  # may be recommended

    @property
    def items(self) -> int:
        return len(self.available)

    def range_of(self, item_type: int) -> tuple[int, int]:
        return int(self.bounds[item_type]), int(self.bounds[item_type + 1])

    def type_of(self, gid: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
        """Number of the type of each item."""
        return np.searchsorted(self.bounds, gid, side="right") - 1


@dataclass(frozen=True)
class Tables:
    """The ingest stage's output in a local folder. Tables are read on first use."""

    folder: Path

    @cached_property
    def counts(self) -> Mapping[str, Any]:
        """The manifest's counts.

        Raises:
            ArtifactError: there is no manifest, or it is damaged.
        """
        try:
            counts: Mapping[str, Any] = read_json(self.folder / "manifest.json")["counts"]
        except (OSError, ValueError, KeyError) as error:
            raise ArtifactError(f"{self.folder} cannot be read ({error}); run ingest again") from error
        return counts

    def codes(self, names: Sequence[str]) -> list[int]:
        """The codes of these events, without those that the data does not know: events are configured by name
        (``config.events.positives``, ``edges``, ``weak``)."""
        events = list(self.counts["events"])
        return [events.index(name) for name in names if name in events]

    # -- interactions --------------------------------------------------------------------------------------------------

    @cached_property
    def shards(self) -> list[Path]:
        """Files of interactions, in the order of their users. All events of a user are in one.

        Raises:
            ArtifactError: there is none.
        """
        found = sorted((self.folder / "interactions").resolve().glob("shard-*.parquet"))
        if not found:
            raise ArtifactError(f"{self.folder} holds no interactions; run ingest again")
        return found

    @property
    def num_events(self) -> int:
        return sum(pq.read_metadata(shard).num_rows for shard in self.shards)

    # -- items ---------------------------------------------------------------------------------------------------------

    def items(self, *columns: str) -> pa.Table:
        """These columns of all items, row = gid: item_id, item_type, title, description, language, categories, ...

        Raises:
            ArtifactError: the table is missing or damaged.
        """
        try:
            return pq.read_table(self.folder / "items.parquet", columns=list(columns))
        except (OSError, pa.ArrowInvalid) as error:
            raise ArtifactError(f"{self.folder} cannot be read ({error}); run ingest again") from error

    def items_in_batches(self, *columns: str, rows: int = 1 << 16) -> Iterator[pa.RecordBatch]:
        """The same in batches."""
        with pq.ParquetFile(self.folder / "items.parquet") as file:
            yield from file.iter_batches(rows, columns=list(columns), use_threads=False)

    @property
    def item_ids(self) -> pa.ChunkedArray:
        return self.items("item_id")["item_id"]

    @property
    def ntype(self) -> Int[np.ndarray, "items"]:
        """Number of each item's type (int16); ascending."""
        return self.items("ntype")["ntype"].to_numpy().astype(np.int16, copy=False)

    @property
    def published(self) -> Int[np.ndarray, "items"]:
        """Unix seconds of each item's publication, NEVER where it is unknown."""
        return self.items("published_at")["published_at"].cast(pa.int64()).fill_null(NEVER).to_numpy()

    @property
    def published_in_time(self) -> Int[np.ndarray, "items"]:
        """The same in the time of the interactions: in leave-one-out, whose times are logical, none is known."""
        return np.full_like(self.published, NEVER) if is_leave_one_out(self.counts) else self.published

    @cached_property
    def catalogue(self) -> Catalogue:
        table, types = self.items("ntype", "available"), tuple(self.counts["item_types"])
        bounds = np.searchsorted(table["ntype"].to_numpy(), np.arange(len(types) + 1)).astype(np.int64)
        return Catalogue(types, bounds, pc.fill_null(table["available"], True).to_numpy())

    # -- users ---------------------------------------------------------------------------------------------------------

    @property
    def user_ids(self) -> pa.ChunkedArray:
        """The id of every user, row = uid."""
        return pq.read_table(self.folder / "users.parquet", columns=["user_id"])["user_id"]

    @property
    def num_users(self) -> int:
        return pq.read_metadata(self.folder / "users.parquet").num_rows

    def users(self, uids: Int[np.ndarray, "n"]) -> pa.Table:
        """The rows of these users (ascending, each once): user_id, age, country and each taste vector, with nulls.
        Row groups without any of them are not read."""
        with pq.ParquetFile(self.folder / "users.parquet") as file:
            sizes = [file.metadata.row_group(k).num_rows for k in range(file.metadata.num_row_groups)]
            begins = offsets_of(np.array(sizes))
            groups = [k for k in range(len(sizes)) if np.diff(np.searchsorted(uids, begins[k : k + 2]))[0]]
            spans = [np.arange(begins[k], begins[k + 1]) for k in groups]
            rows = np.concatenate([np.zeros(0, np.int64), *spans])
            return file.read_row_groups(groups).take(np.searchsorted(rows, uids))

    def users_in_batches(self, rows: int = 100_000) -> Iterator[pa.RecordBatch]:
        """All users in order of uid, with the columns of :meth:`users`."""
        with pq.ParquetFile(self.folder / "users.parquet") as file:
            yield from file.iter_batches(rows)


def traits_of(users: pa.Table | pa.RecordBatch, tastes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """age float32 [n] (NaN: absent), country (string, "": absent) and ``taste_<name>`` float32 [n, length] (NaN rows:
    absent) of users as :meth:`Tables.users` gives them.

    Args:
        tastes: name -> length of each vector.
    """
    columns = {
        "age": users["age"].cast(pa.float32()).to_numpy(zero_copy_only=False),
        "country": users["country"].fill_null("").to_numpy(zero_copy_only=False).astype(str),
    }
    for name, length in tastes.items():
        lists, table = users[name], np.full((len(users), length), np.nan, np.float32)
        vectors = pc.list_flatten(lists.drop_null()).to_numpy(zero_copy_only=False)
        table[lists.is_valid().to_numpy(zero_copy_only=False)] = vectors.reshape(-1, length)
        columns[f"taste_{name}"] = table
    return columns


def first_touches(events: Events, positive: Bool[np.ndarray, "n"]) -> Int[np.ndarray, "m"]:
    """Positions of the first positive event of each (user, item), in order."""
    where = np.flatnonzero(positive)
    if not len(where):
        return where
    pairs = events.uid[where].astype(np.int64) * (int(events.gid.max()) + 1) + events.gid[where]
    _, first = np.unique(pairs, return_index=True)
    return where[np.sort(first)]
