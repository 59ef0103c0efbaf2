"""Divides interactions and users by user, so that no process ever holds all of either.

A map task checks one fragment and writes each batch as one Arrow file with one record batch per user shard. A reduce
task reads its shard's record batch from every file. A user's shard depends on the id alone.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys_ray.core.clock import DAY
from recsys_ray.core.offsets import begins
from recsys_ray.data.reading import Batch, Fragment, read_batches
from recsys_ray.data.split import TEST_FROM, logical_times
from recsys_ray.data.validate import (
    Catalogue,
    Checked,
    EventRules,
    Tally,
    check_interactions,
    check_items,
    check_users,
    last_of_each,
)
from recsys_ray.storage.artifacts import write_parquet, written_whole

EVENTS = pa.schema([("uid", pa.int64()), ("gid", pa.int32()), ("event", pa.int8()), ("timestamp", pa.int64())])
OTHER_ITEMS = "other_items.parquet"  # in the scratch folder: ids that data.item_types leaves out


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


def shard_of(user_ids: pa.Array, shards: int) -> np.ndarray:
    """Shard of each user, int32 [rows]: CRC-32 of the id's UTF-8 bytes, the same in every process and release."""
    encoded = user_ids.dictionary_encode()
    hashes = (zlib.crc32(user.encode()) % shards for user in encoded.dictionary.to_pylist())
    return np.fromiter(hashes, np.int32, len(encoded.dictionary))[encoded.indices.to_numpy()]


# -- map -------------------------------------------------------------------------------------------------------------


def map_items(job: Job, i: int) -> dict[str, Any]:
    """Check a fragment of the catalogue; what is good goes to ``scratch/items``."""
    batches = list(_check(job, i, check_items))
    write_parquet(job.scratch / "items" / f"{i:05d}.parquet", pa.concat_tables(batch.good for batch in batches))
    tally = sum((batch.tally for batch in batches), Tally())
    return {"rows": tally.read, "tally": vars(tally)}


def map_users(job: Job, taste: Sequence[str], i: int) -> dict[str, Any]:
    """Check a fragment of the users table and divide it by user; taste columns are vectors."""
    return _divide(job, i, lambda batch, file: check_users(batch, file, taste))


def map_interactions(job: Job, rules: EventRules, type_names: Sequence[str], i: int) -> dict[str, Any]:
    """Check a fragment of the interactions against the catalogue and divide it by user."""
    table = pq.read_table(job.out / "items.parquet", columns=["item_id", "ntype"], use_threads=False)
    others = pq.read_table(job.scratch / OTHER_ITEMS, use_threads=False)["item_id"].combine_chunks()
    catalogue = Catalogue(table["item_id"].combine_chunks(), table["ntype"].to_numpy(), type_names, others)
    return _divide(job, i, lambda batch, file: check_interactions(batch, file, catalogue, rules))


def _check(job: Job, i: int, check: Callable[[Batch, str], Checked]) -> Iterator[Checked]:
    """The batches of fragment i; their bad rows are in quarantine when the last one is out."""
    fragment, bad = job.fragments[i], []
    for batch in read_batches(fragment):
        checked = check(batch, fragment.file)
        bad.append(checked.quarantine)
        yield checked
    write_quarantine(job, f"{fragment.table}-{i:05d}", bad)


def write_quarantine(job: Job, name: str, tables: Sequence[pa.Table]) -> None:
    """Write ``quarantine/<name>.parquet``, unless there are no bad rows."""
    if sum(map(len, tables)):
        write_parquet(job.out / "quarantine" / f"{name}.parquet", pa.concat_tables(tables))


def _divide(job: Job, i: int, check: Callable[[Batch, str], Checked]) -> dict[str, Any]:
    """The good rows of each batch of fragment i as an Arrow file, whose record batch s is for shard s."""
    folder, tally, parts = job.scratch / job.fragments[i].table, Tally(), list[str]()
    for number, checked in enumerate(_check(job, i, check)):
        tally += checked.tally
        if not len(checked.good):
            continue
        parts.append(f"{i:05d}-{number:05d}.arrow")
        shards = shard_of(checked.good["user_id"].combine_chunks(), job.shards)
        order = np.argsort(shards, kind="stable")
        bounds = np.searchsorted(shards[order], np.arange(job.shards + 1))
        (divided,) = checked.good.take(pa.array(order)).combine_chunks().to_batches()
        options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
        with (
            written_whole(folder / parts[-1]) as aside,
            pa.ipc.new_file(str(aside), divided.schema, options=options) as file,
        ):
            for begin, end in itertools.pairwise(bounds.tolist()):
                file.write_batch(divided.slice(begin, end - begin))
    return {"rows": tally.read, "tally": vars(tally), "parts": parts}


# -- reduce ----------------------------------------------------------------------------------------------------------


def _read_shard(job: Job, folder: str, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
    """A shard's rows of all parts, in order of (file, row), with a column ``file`` (int32)."""
    pieces = []
    for name, file_index in job.parts:
        with pa.memory_map(str(job.scratch / folder / name)) as source:
            table = pa.Table.from_batches([pa.ipc.open_file(source).get_batch(shard)])
        table = table.select(columns) if columns else table
        pieces.append(table.append_column("file", pa.array(np.full(len(table), file_index, dtype=np.int32))))
    return pa.concat_tables(pieces)


def reduce_users(events: Job, users: Job | None, taste: dict[str, int], shard: int) -> dict[str, Any]:
    """All users of a shard, sorted by id, to ``scratch/people``: those of the users table and those with an event.

    ``taste``: the length that each taste vector must have; one of another length is left out. ``listed`` and
    ``active`` of the result: users of the users table, and how many of them have an event.
    """
    kinds = {"age": pa.float32(), "country": pa.string(), **{name: pa.list_(pa.float32()) for name in taste}}
    known, tally = pa.schema({"user_id": pa.string(), **kinds}).empty_table(), Tally()
    if users and users.parts:
        known, tally = _known_users(users, _read_shard(users, "users", shard), taste)
    listed = known["user_id"].combine_chunks()
    active = pc.unique(_read_shard(events, "interactions", shard, ["user_id"])["user_id"])
    everyone = pc.unique(pa.concat_arrays([active, listed]))
    everyone = everyone.take(pc.sort_indices(everyone))
    where = pc.index_in(everyone, value_set=listed)
    columns = {"user_id": everyone, "shard": pa.array(np.full(len(everyone), shard, dtype=np.int32))}
    columns |= {name: known[name].combine_chunks().cast(kind).take(where) for name, kind in kinds.items()}
    write_parquet(events.scratch / "people" / f"{shard:05d}.parquet", pa.table(columns))
    return {
        "rows": len(everyone),
        "tally": vars(tally),
        "countries": sorted(pc.unique(columns["country"]).drop_null().to_pylist()),
        "listed": len(listed),
        "active": pc.sum(pc.is_in(listed, value_set=active)).as_py() or 0,
        "examples": {name: ids[:1].to_pylist() for name, ids in (("listed", listed), ("active", active))},
    }


def _known_users(job: Job, known: pa.Table, taste: dict[str, int]) -> tuple[pa.Table, Tally]:
    """The last row of each user, without vectors of another length than most."""
    files, rows, names, tally = known["file"].to_numpy(), known["row"].to_numpy(), job.file_names(), Tally()
    for name, length in taste.items():
        lengths = pc.list_value_length(known[name]).fill_null(length).to_numpy()
        if len(at := np.flatnonzero(lengths != length)):
            where = f"row {rows[at[0]]} of {names[int(files[at[0]])]}"
            sentence = f"{where}: {name} has {lengths[at[0]]} numbers, but most users have {length}"
            tally.dropped[f"{name} of wrong length"] = [len(at), sentence]
            places = pa.array(np.arange(len(known)), mask=lengths != length)
            known = known.set_column(known.schema.get_field_index(name), name, known[name].take(places))
    last = np.unique(last_of_each(known["user_id"].combine_chunks().dictionary_encode().indices.to_numpy()))
    tally.repeated = len(known) - len(last)
    tally.kept = -tally.repeated
    return known.take(pa.array(last)), tally


def reduce_events(
    job: Job, offsets: Sequence[int], names: Sequence[str], positives: Sequence[str], protocol: str, shard: int
) -> dict[str, Any]:
    """A shard's events with dense ids, sorted, each once, to ``interactions/shard-<shard>.parquet``.

    Sorted by (uid, timestamp, gid, event); with ``protocol`` leave_one_out by uid and the user's own order: the
    timestamps', and that of the rows of the source where these are equal.
    """
    table = _read_shard(job, "interactions", shard)
    users = pq.read_table(job.scratch / "people" / f"{shard:05d}.parquet", columns=["user_id"], use_threads=False)
    local = pc.index_in(table["user_id"], value_set=users["user_id"].combine_chunks())
    table = table.append_column("uid", pc.add(local.cast(pa.int64()), offsets[shard]))
    table = _sorted(table, "uid", "timestamp", "gid", "event", "file", "row")
    first = begins(*(table[key].to_numpy() for key in ("uid", "timestamp", "gid", "event")))
    repeated = int((~first).sum())
    table = table.filter(pa.array(first)) if repeated else table
    codes = [names.index(name) for name in positives]
    found = {"rows": len(table), "tally": vars(Tally(kept=-repeated, repeated=repeated)), **_census(table, codes)}
    schema = EVENTS
    if protocol == "leave_one_out":
        table = _in_own_order(table, codes)
        found["held_out"] = len(pc.unique(table["uid"].filter(pc.equal(table["timestamp"], TEST_FROM))))
        schema = EVENTS.append(pa.field("happened_at", pa.int64()))
    write_parquet(job.out / "interactions" / f"shard-{shard:05d}.parquet", table.select(schema.names).cast(schema))
    return found


def _sorted(table: pa.Table, *keys: str) -> pa.Table:
    return table.take(pa.array(np.lexsort([table[key].to_numpy() for key in reversed(keys)])))


def _in_own_order(table: pa.Table, positives: Sequence[int]) -> pa.Table:
    """Events with a logical time as ``timestamp`` and the real one as ``happened_at``, in each user's own order."""
    table = _sorted(table.select([*EVENTS.names, "file", "row"]), "uid", "timestamp", "file", "row")
    positive = np.isin(table["event"].to_numpy(), positives)
    times = logical_times(table["uid"].to_numpy(), table["gid"].to_numpy(), positive)
    table = table.append_column("happened_at", table["timestamp"])
    return table.set_column(table.schema.get_field_index("timestamp"), "timestamp", pa.array(times))


def _census(table: pa.Table, positives: Sequence[int]) -> dict[str, Any]:
    """What ingest adds up of the shards' events. ``days``: of each unix day its events, positive events, users who have
    one, and users who have their first one. ``span`` and ``positive_span``: the first and the last moment of all and of
    the positive ones. ``largest``: events and id of the user with the most.

    ``table`` is sorted by (uid, timestamp).
    """
    uid, moments = table["uid"].to_numpy(), table["timestamp"].to_numpy()
    days, place = np.unique(moments // DAY, return_inverse=True)
    positive = np.flatnonzero(np.isin(table["event"].to_numpy(), positives))
    visits = positive[begins(uid[positive], place[positive])]
    arrivals = positive[begins(uid[positive])]
    counted = [np.bincount(place[rows], minlength=len(days)) for rows in (slice(None), positive, visits, arrivals)]
    begin = np.flatnonzero(begins(uid))
    sizes = np.diff(np.append(begin, len(uid)))
    most = int(sizes.argmax()) if len(sizes) else None
    return {
        "days": np.stack([days, *counted], axis=1).tolist(),
        "span": _span(moments),
        "positive_span": _span(moments[positive]),
        "largest": [0, ""] if most is None else [int(sizes[most]), table["user_id"][int(begin[most])].as_py()],
    }


def _span(moments: np.ndarray) -> list[int]:
    return [int(moments.min()), int(moments.max())] if len(moments) else []
