"""Interactions and users, divided by user: no process ever holds all of either.

A map task checks one fragment and leaves each batch as one Arrow file that has one record batch per user shard. A
reduce task reads its shard's record batch of every file. Which shard a user is in depends on the id alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys_ray.core.clock import DAY
from recsys_ray.data.reading import Batch, Fragment, read_batches, replace_aside
from recsys_ray.data.split import TEST_FROM, logical_times
from recsys_ray.data.validate import (
    Catalogue,
    Checked,
    EventRules,
    check_interactions,
    check_items,
    check_users,
    last_of_each,
)

EVENTS = pa.schema([("uid", pa.int64()), ("gid", pa.int32()), ("event", pa.int8()), ("timestamp", pa.int64())])
OTHER_ITEMS = "other_items.parquet"  # in the scratch folder: ids that data.item_types leaves out
_ROW_GROUP = 1 << 20


@dataclass(frozen=True)
class Job:
    """What the tasks of one table share. ``parts``: the Arrow files that the map tasks left, in order of (file, row),
    with the number of the file that each came from."""

    out: Path
    scratch: Path
    shards: int
    fragments: Sequence[Fragment]
    parts: Sequence[tuple[str, int]] = ()

    def file_names(self) -> dict[int, str]:
        return {fragment.file_index: fragment.file for fragment in self.fragments}


@dataclass
class Tally:
    """What one task found, as JSON can hold it."""

    rows: int = 0
    kept: int = 0
    ignored: int = 0
    repeated: int = 0
    untitled: int = 0
    kinds: dict[str, list[Any]] = field(default_factory=dict)
    dropped: dict[str, list[Any]] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)

    def add(self, checked: Checked, batch: Batch) -> None:
        self.rows += len(batch.table) + len(batch.malformed)
        self.kept += len(checked.good)
        self.ignored += checked.ignored
        self.untitled += checked.untitled
        merge_kinds(self.kinds, checked.kinds)
        merge_kinds(self.dropped, checked.dropped)
        for what, count in checked.taken.items():
            self.taken[what] = self.taken.get(what, 0) + count
        for name, lengths in checked.lengths.items():
            mine = self.lengths.setdefault(name, {})
            for length, count in lengths.items():
                mine[length] = mine.get(length, 0) + count


def merge_kinds(into: dict[str, list[Any]], more: dict[str, list[Any]]) -> None:
    """Add up counts by kind; the first example stays."""
    for kind, (count, example) in more.items():
        into.setdefault(kind, [0, example])[0] += count


def shard_of(user_ids: pa.Array, shards: int) -> np.ndarray:
    """Shard of each user, int32 [rows]: CRC-32 of the id's UTF-8 bytes, the same in every process and release."""
    encoded = user_ids.dictionary_encode()
    hashes = (zlib.crc32(user.encode()) % shards for user in encoded.dictionary.to_pylist())
    return np.fromiter(hashes, np.int32, len(encoded.dictionary))[encoded.indices.to_numpy()]


# -- map -------------------------------------------------------------------------------------------------------------


def map_items(job: Job, i: int) -> dict[str, Any]:
    """Check a fragment of the catalogue; what is good goes to ``scratch/items``."""
    tally = Tally()
    goods = list(_check(job, i, check_items, tally))
    _write_parquet(pa.concat_tables(goods), job.scratch / "items" / f"{i:05d}.parquet", job.scratch)
    return vars(tally)


def map_users(job: Job, taste: Sequence[str], i: int) -> dict[str, Any]:
    tally = Tally()
    for number, good in enumerate(_check(job, i, lambda batch, file: check_users(batch, file, taste), tally)):
        tally.parts += _write_shards(job, "users", good, f"{i:05d}-{number:05d}.arrow")
    return vars(tally)


def map_interactions(job: Job, rules: EventRules, type_names: Sequence[str], i: int) -> dict[str, Any]:
    tally, catalogue = Tally(), _catalogue(job, type_names)
    check = lambda batch, file: check_interactions(batch, file, catalogue, rules)  # noqa: E731
    for number, good in enumerate(_check(job, i, check, tally)):
        tally.parts += _write_shards(job, "interactions", good, f"{i:05d}-{number:05d}.arrow")
    return vars(tally)


def _catalogue(job: Job, type_names: Sequence[str]) -> Catalogue:
    table = pq.read_table(job.out / "items.parquet", columns=["item_id", "ntype"], use_threads=False)
    others = pq.read_table(job.scratch / OTHER_ITEMS, use_threads=False)["item_id"].combine_chunks()
    return Catalogue(table["item_id"].combine_chunks(), table["ntype"].to_numpy(), type_names, others)


def _check(job: Job, i: int, check: Callable[[Batch, str], Checked], tally: Tally) -> Iterator[pa.Table]:
    """The good rows of each batch of fragment i; the bad ones are in quarantine when the last one is out."""
    fragment, bad = job.fragments[i], []
    for batch in read_batches(fragment):
        checked = check(batch, fragment.file)
        tally.add(checked, batch)
        bad.append(checked.quarantine)
        yield checked.good
    write_quarantine(job, f"{fragment.table}-{i:05d}", bad)


def write_quarantine(job: Job, name: str, tables: Sequence[pa.Table]) -> None:
    """``quarantine/<name>.parquet``, unless there is nothing to tell."""
    if sum(map(len, tables)):
        _write_parquet(pa.concat_tables(tables), job.out / "quarantine" / f"{name}.parquet", job.scratch)


def _write_parquet(table: pa.Table, target: Path, scratch: Path) -> None:
    def write(aside: Path) -> None:
        pq.write_table(table, aside, row_group_size=_ROW_GROUP, compression="zstd")

    replace_aside(write, target, scratch / "aside")


def _write_shards(job: Job, folder: str, good: pa.Table, name: str) -> list[str]:
    """One Arrow file with record batch s for shard s; its name, or nothing where there are no rows."""
    if not len(good):
        return []
    shards = shard_of(good["user_id"].combine_chunks(), job.shards)
    order = np.argsort(shards, kind="stable")
    bounds = np.searchsorted(shards[order], np.arange(job.shards + 1))
    divided = good.take(pa.array(order)).combine_chunks()

    def write(aside: Path) -> None:
        options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
        with pa.ipc.new_file(str(aside), divided.schema, options=options) as file:
            for shard in range(job.shards):
                piece = divided.slice(bounds[shard], bounds[shard + 1] - bounds[shard])
                batches = piece.to_batches()
                file.write_batch(batches[0] if batches else pa.RecordBatch.from_pylist([], schema=divided.schema))

    replace_aside(write, job.scratch / folder / name, job.scratch / "aside")
    return [name]


def _read_shard(job: Job, folder: str, shard: int, columns: Sequence[str] | None = None) -> pa.Table | None:
    """A shard's rows of all parts, in order of (file, row), with a column ``file`` (int32); None if there are no
    parts."""
    pieces = []
    for name, file_index in job.parts:
        with pa.memory_map(str(job.scratch / folder / name)) as source:
            table = pa.Table.from_batches([pa.ipc.open_file(source).get_batch(shard)])
        table = table.select(columns) if columns else table
        pieces.append(table.append_column("file", pa.array(np.full(len(table), file_index, dtype=np.int32))))
    return pa.concat_tables(pieces) if pieces else None


# -- reduce ----------------------------------------------------------------------------------------------------------


def reduce_users(events: Job, users: Job | None, taste: dict[str, int], shard: int) -> dict[str, Any]:
    """All users of a shard, sorted by id, to ``scratch/people``: those of the users table and those with an event.

    ``taste``: the length that each taste vector must have; one of another length is left out. ``listed`` and
    ``active`` of the result: users of the users table, and how many of them have an event.
    """
    ids = [pa.array([], pa.string())]
    seen = _read_shard(events, "interactions", shard, ["user_id"])
    if seen is not None:
        ids.append(pc.unique(seen["user_id"]))
    tally, known = Tally(), _read_shard(users, "users", shard) if users else None
    if users and known is not None:
        known = _known_users(users, known, taste, tally)
        ids.append(known["user_id"].combine_chunks())
    everyone = pc.unique(pa.concat_arrays(ids))
    everyone = everyone.take(pc.sort_indices(everyone))
    columns: dict[str, pa.Array] = {
        "user_id": everyone,
        "shard": pa.array(np.full(len(everyone), shard, dtype=np.int32)),
    }
    where = pc.index_in(everyone, value_set=known["user_id"].combine_chunks()) if known is not None else None
    kinds = {"age": pa.float32(), "country": pa.string(), **{name: pa.list_(pa.float32()) for name in taste}}
    for name, kind in kinds.items():
        found = known[name].combine_chunks().cast(kind).take(where) if known is not None else None
        columns[name] = pa.nulls(len(everyone), kind) if found is None else found
    _write_parquet(pa.table(columns), events.scratch / "people" / f"{shard:05d}.parquet", events.scratch)
    countries = sorted(pc.unique(columns["country"]).drop_null().to_pylist())
    listed, active = (pa.array([], pa.string()) if t is None else t["user_id"].unique() for t in (known, seen))
    both = pc.sum(pc.is_in(listed, value_set=active)).as_py() or 0
    examples = {name: ids[0].as_py() if len(ids) else None for name, ids in (("listed", listed), ("active", active))}
    found = {"countries": countries, "listed": len(listed), "active": both, "examples": examples}
    return {**vars(tally), "rows": len(everyone), **found}


def _known_users(job: Job, known: pa.Table, taste: dict[str, int], tally: Tally) -> pa.Table:
    """The last row of each user, without vectors of another length than most."""
    files, rows, names = known["file"].to_numpy(), known["row"].to_numpy(), job.file_names()
    for name, length in taste.items():
        lengths = pc.list_value_length(known[name]).fill_null(length).to_numpy()
        if len(at := np.flatnonzero(lengths != length)):
            where = f"row {rows[at[0]]} of {names[int(files[at[0]])]}"
            sentence = f"{where}: {name} has {lengths[at[0]]} numbers, most users' have {length}"
            tally.dropped[f"{name} of wrong length"] = [len(at), sentence]
            places = pa.array(np.arange(len(known)), mask=lengths != length)
            known = known.set_column(known.schema.get_field_index(name), name, known[name].take(places))
    last = np.unique(last_of_each(known["user_id"].combine_chunks().dictionary_encode().indices.to_numpy()))
    tally.repeated = len(known) - len(last)
    tally.kept = -tally.repeated
    return known.take(pa.array(last))


def reduce_events(
    job: Job, offsets: Sequence[int], names: Sequence[str], positives: Sequence[str], protocol: str, shard: int
) -> dict[str, Any]:
    """A shard's events with dense ids, sorted, each once, to ``interactions/shard-<shard>.parquet``.

    Sorted by (uid, timestamp, gid, event); with ``protocol`` leave_one_out by uid and the user's own order: the
    timestamps', and that of the rows of the source where these are equal.
    """
    target = job.out / "interactions" / f"shard-{shard:05d}.parquet"
    tally, table = Tally(), _read_shard(job, "interactions", shard)
    if table is None or not len(table):
        _write_parquet(EVENTS.empty_table(), target, job.scratch)
        nothing = {"days": [], "last": None, "positive": None, "held_out": 0, "largest": [0, ""], "all_days": []}
        return {**vars(tally), **nothing, "first": None, "of_1970": 0, "events": 0}
    users = pq.read_table(job.scratch / "people" / f"{shard:05d}.parquet", columns=["user_id"], use_threads=False)
    local = pc.index_in(table["user_id"], value_set=users["user_id"].combine_chunks())
    table = table.append_column("uid", pc.add(local.cast(pa.int64()), offsets[shard]))
    keys = [table[key].to_numpy() for key in ("row", "file", "event", "gid", "timestamp", "uid")]
    table = table.take(pa.array(np.lexsort(keys)))
    same = np.ones(len(table), dtype=bool)
    same[0] = False
    for key in ("uid", "timestamp", "gid", "event"):
        column = table[key].to_numpy()
        same[1:] &= column[1:] == column[:-1]
    if same.any():
        tally.repeated, tally.kept = int(same.sum()), -int(same.sum())
        table = table.filter(pa.array(~same))
    codes = [names.index(name) for name in positives]
    found = {**vars(tally), "rows": len(table), **_history(table, codes), **_census(table), "held_out": 0}
    table, schema = table.select([*EVENTS.names, "file", "row"]), EVENTS
    if protocol == "leave_one_out":
        table = _in_own_order(table, codes)
        found["held_out"] = len(pc.unique(table["uid"].filter(pc.equal(table["timestamp"], TEST_FROM))))
        schema = EVENTS.append(pa.field("happened_at", pa.int64()))
    _write_parquet(table.select(schema.names).cast(schema), target, job.scratch)
    return found


def _in_own_order(table: pa.Table, positives: Sequence[int]) -> pa.Table:
    """Events with a logical time as ``timestamp`` and the real one as ``happened_at``, in each user's own order."""
    keys = [table[key].to_numpy() for key in ("row", "file", "timestamp", "uid")]
    table = table.take(pa.array(np.lexsort(keys)))
    positive = np.isin(table["event"].to_numpy(), positives)
    times = logical_times(table["uid"].to_numpy(), table["gid"].to_numpy(), positive)
    table = table.append_column("happened_at", table["timestamp"])
    return table.set_column(table.schema.get_field_index("timestamp"), "timestamp", pa.array(times))


def _census(table: pa.Table) -> dict[str, Any]:
    """What a reader wants to know of a shard's events: their number and the first moment, the unix days that have any,
    how many are of 1970, and the user with the most. ``table`` is sorted by uid."""
    moments, uid = table["timestamp"].to_numpy(), table["uid"].to_numpy()
    begin = np.flatnonzero(np.r_[True, uid[1:] != uid[:-1]])
    sizes = np.diff(np.r_[begin, len(uid)])
    most = begin[sizes.argmax()]
    return {
        "events": len(table),
        "first": int(moments.min()),
        "all_days": np.unique(moments // DAY).tolist(),
        "of_1970": int((moments < 365 * DAY).sum()),
        "largest": [int(sizes.max()), table["user_id"][int(most)].as_py()],
    }


def _history(table: pa.Table, positives: Sequence[int]) -> dict[str, Any]:
    """By unix day: positive events, users who have one, and users who have their first one; the first and last moment
    of these, and the last of all.

    ``table`` is sorted by (uid, timestamp).
    """
    positive = np.isin(table["event"].to_numpy(), positives)
    moments = table["timestamp"].to_numpy()
    wanted, uid = moments[positive], table["uid"].to_numpy()[positive]
    day = wanted // DAY
    days, counts = np.unique(day, return_counts=True)
    first = np.ones(len(day), dtype=bool)  # of a user on a day
    first[1:] = (day[1:] != day[:-1]) | (uid[1:] != uid[:-1])
    users = np.bincount(np.searchsorted(days, day[first]), minlength=len(days))
    new = np.r_[True, uid[1:] != uid[:-1]][: len(uid)]
    arrived = np.bincount(np.searchsorted(days, day[new]), minlength=len(days))
    return {
        "days": np.stack([days, counts, users, arrived], axis=1).tolist(),
        "last": int(moments.max()),
        "positive": [int(wanted.min()), int(wanted.max())] if len(wanted) else None,
    }
