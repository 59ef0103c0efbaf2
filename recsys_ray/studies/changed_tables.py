"""Modified interactions tables for studies, derived from a run's clean tables, in the form that ingest reads.

A modification keeps users, items and the test period's rows comparable: it moves labels or removes rows, and depends
only on the tables and a seed.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_ray.core.clock import DAY
from recsys_ray.core.errors import DataError
from recsys_ray.data.tables import Events, Tables
from recsys_ray.storage.artifacts import Artifact, json_or_none, write_json

WEEK = 7 * DAY
FEW = 200  # rows of one type; a group of fewer is joined with the next week's
_DONE = "made.json"


@dataclass(frozen=True)
class Log:
    """All interactions of an ingest: columns of shape [events], shard after shard."""

    uid: np.ndarray  # int64
    gid: np.ndarray  # int32
    timestamp: np.ndarray  # int64, unix seconds
    ntype: np.ndarray  # int16 [events]: the item's type
    item_types: list[str]
    test_from: int


class TableChange(Protocol):
    """Gives the rows that are kept (bool [events]) and the item that each row is about (int32 [events], gid)."""

    def apply(self, log: Log, seed: int) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class ShuffledLabels:
    """Which item a row is about is shuffled among the rows of one item type and one week; of several weeks where there
    are few rows, which would hardly change places. No row moves over the beginning of the test period.

    Popularity over time, the users' activity, the types and the kinds of events stay; which user likes what goes.
    """

    def apply(self, log: Log, seed: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        group = self._groups(log)
        by_group = np.argsort(group, kind="stable")
        # The same rows again, in random order inside each group.
        shuffled = np.lexsort((rng.random(len(group)), group))
        gid = log.gid.copy()
        gid[by_group] = log.gid[shuffled]
        return np.ones(len(gid), dtype=bool), gid

    def _groups(self, log: Log) -> np.ndarray:
        """int64 [events]: the group that each row is shuffled in."""
        week = (log.timestamp - log.test_from) // WEEK
        periods, period = np.unique(
            np.stack([log.ntype.astype(np.int64), (week >= 0).astype(np.int64), week]), axis=1, return_inverse=True
        )
        rows = np.bincount(period.reshape(-1), minlength=periods.shape[1])
        group_of = np.zeros(periods.shape[1], np.int64)
        group, size = 0, 0
        for k in range(1, periods.shape[1]):
            size += rows[k - 1]
            new_part = (periods[:2, k] != periods[:2, k - 1]).any()
            if new_part or size >= FEW:
                group, size = group + 1, 0
            group_of[k] = group
        return group_of[period.reshape(-1)]


@dataclass(frozen=True)
class OnlyType:
    """The interactions of one item type alone."""

    item_type: str

    def apply(self, log: Log, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return log.ntype == _number(log, self.item_type), log.gid


@dataclass(frozen=True)
class NewType:
    """An item type that has just appeared: of its interactions before the test period, only the ``keep`` latest remain.
    Those of the test period stay, because they are the truths."""

    item_type: str
    keep: int

    def apply(self, log: Log, seed: int) -> tuple[np.ndarray, np.ndarray]:
        before = np.flatnonzero((log.ntype == _number(log, self.item_type)) & (log.timestamp < log.test_from))
        latest = before[np.argsort(log.timestamp[before], kind="stable")]
        kept = np.ones(len(log.gid), dtype=bool)
        kept[latest[: max(len(latest) - self.keep, 0)]] = False
        return kept, log.gid


@dataclass(frozen=True)
class Thinned:
    """Of the rows before the test period a random one in ``one_in``. A smaller sample is part of every larger one with
    the same seed, so that their results differ by the amount of data alone.

    The truths stay what they are: rows of the test period are kept, except those about an item that the user had before
    it. Where the earlier row is gone, these would count as new. Leave-one-out cannot be thinned like this: the last
    item of a user with few rows left would no longer be held out.
    """

    one_in: int

    def apply(self, log: Log, seed: int) -> tuple[np.ndarray, np.ndarray]:
        before = log.timestamp < log.test_from
        pair = log.uid * (np.int64(log.gid.max(initial=0)) + 1) + log.gid
        drawn = np.random.default_rng(seed).random(len(pair)) * self.one_in < 1
        return np.where(before, drawn, ~np.isin(pair, pair[before])), log.gid


def _number(log: Log, item_type: str) -> int:
    if item_type not in log.item_types:
        raise DataError(f"there is no item type {item_type!r} in the data; choose from {', '.join(log.item_types)}")
    return log.item_types.index(item_type)


def write_changed(change: Any, ingest: Artifact, out: Path, seed: int) -> Path:
    """Write the changed interactions of ``ingest`` into the folder ``out``, unless they are there already.

    Memory: 22 bytes an interaction, in this process, and what the change itself needs.
    """
    made = {"change": [type(change).__name__, asdict(change)], "seed": seed, "ingest": ingest.fingerprint}
    if json_or_none(out / f".{_DONE}") == made:
        return out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    tables = Tables(ingest.path)
    users, ids, names = tables.user_ids, tables.item_ids, pa.array(ingest.counts["events"])
    shards = [(events.uid, events.gid.astype(np.int32), events.timestamp) for events in map(Events.read, tables.shards)]
    uid, gid, timestamp = (np.concatenate(column) for column in zip(*shards, strict=True))
    log = Log(uid, gid, timestamp, tables.ntype[gid], list(ingest.counts["item_types"]), ingest.counts["test_from"])
    kept, gid = change.apply(log, seed)
    start = 0
    for shard in tables.shards:
        events = Events.read(shard)
        rows = slice(start, start := start + len(events))
        columns = {
            "user_id": users.take(events.uid),
            "item_id": ids.take(gid[rows]),
            "event": names.take(events.event),
            "timestamp": events.timestamp,
        }
        pq.write_table(pa.table(columns).filter(kept[rows]), out / shard.name)
    write_json(out / f".{_DONE}", made)  # last: now it is whole. Ingest passes over hidden files
    return out
