"""Activity of each item at each snapshot. Edges do not show it, because aggregation loses the number of neighbours.

Columns of the table (all at most a few units large, so that towers can read them directly):

* ``log(1 + c / mean)`` of the positives ``c`` of the last 7, 30 and 90 days, and of all days. ``mean`` is over the
  published items of the same type (items without a known later date), so that a growing platform does not shift every
  item's value, and popularity shows in a new type as it does in an old one;
* the same for all events, weak signals included, of the last 30 days;
* ``log(1 + days)`` since the item's first event, and a flag for items without events;
* ``log(1 + days)`` since publication, and a flag for items whose date is known (and not after the snapshot).

In leave-one-out times are logical (recsys_ray/data/split.py): all earlier events lie a fraction of a day back. Every
window then holds everything, ages are about zero, and no publication date is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from recsys_ray.cluster.pool import in_parallel
from recsys_ray.config import Config
from recsys_ray.core.clock import DAY, NEVER
from recsys_ray.core.progress import Progress
from recsys_ray.data.tables import Events, Tables, has_code
from recsys_ray.graph.snapshots import Snapshot
from recsys_ray.storage.artifacts import save_arrays

ACTIVITY = "activity.safetensors"
COLUMN_NAMES = (
    "positives of 7 days",
    "positives of 30 days",
    "positives of 90 days",
    "positives of all days",
    "events of 30 days",
    "days since the first event",
    "no event yet",
    "days since publication",
    "published",
)
COLUMNS = len(COLUMN_NAMES)
UNTOUCHED = 6  # column: no event yet
_POSITIVE_DAYS = (7, 30, 90)
_ALL_DAYS = 30
_SCALE = 3.0  # natural log of days, brought to about one

# The five counts; first event or NEVER. Of several snapshots these are the first axis.
Counts = tuple[Int[np.ndarray, "*snapshots 5 items"], Int[np.ndarray, "*snapshots items"]]


def write_activity(
    config: Config, ingest_dir: Path, snapshots: Sequence[Snapshot], out: Path, progress: Progress
) -> None:
    """Write ``out/activity.safetensors``: snapshot name -> float16 [items, COLUMNS]. One task a shard.

    Memory: 48 bytes an item and snapshot here, 28 in each task.
    """
    import ray

    if (out / ACTIVITY).exists():
        return
    tables = Tables(ingest_dir)
    published, ntype = tables.published_in_time, tables.ntype
    arguments = ray.put(list(snapshots)), tables.codes(config.events.positives), len(ntype)
    calls = [(count_shard, shard, *arguments) for shard in tables.shards]
    with progress.task("counting activity", len(calls), "shards") as shown:

        def parts() -> Iterator[Counts]:
            for part in in_parallel(calls):
                shown.advance(1)
                yield part

        made = zip(*add_counts(parts()), snapshots, strict=True)
        described = {s.name: describe(counts, first, published, ntype, s.time) for counts, first, s in made}
    save_arrays(out / ACTIVITY, {name: table.astype(np.float16) for name, table in described.items()})


def add_counts(parts: Iterator[Counts]) -> Counts:
    """The counts of all shards together. There must be one."""
    counts, first = next(parts)
    counts, first = counts.astype(np.int64), first.copy()  # what comes out of Ray's store is read-only
    for more, earlier in parts:
        counts += more
        np.minimum(first, earlier, out=first)
    return counts, first


def count_shard(shard: Path, snapshots: Sequence[Snapshot], positives: Sequence[int], items: int) -> Counts:
    """What one shard's users did with each item before each of the snapshots, those of its ``without`` left out."""
    events, made = Events.read(shard), []
    for snapshot in snapshots:
        known = events.before(snapshot.time)
        if snapshot.without is not None:
            known = known.select(~snapshot.without.has(known.uid))
        counts, first = count_events(known.gid, known.event, known.timestamp, snapshot.time, positives, items)
        made.append((counts.astype(np.int32), first))
    of_all, firsts = zip(*made, strict=True)
    return np.stack(of_all), np.stack(firsts)


def count_events(
    gid: Int[np.ndarray, "n"],
    event: Int[np.ndarray, "n"],
    time: Int[np.ndarray, "n"],
    moment: int,
    positives: Sequence[int],
    items: int,
) -> Counts:
    """Counts per item, from events before ``moment`` only."""
    positive = has_code(event, positives)
    chosen = [positive & (time >= moment - days * DAY) for days in _POSITIVE_DAYS]
    chosen += [positive, time >= moment - _ALL_DAYS * DAY]
    first = np.full(items, NEVER)
    np.minimum.at(first, gid, time)
    return np.stack([np.bincount(gid[rows], minlength=items) for rows in chosen]), first


def describe(
    counts: Int[np.ndarray, "5 items"],
    first: Int[np.ndarray, "items"],
    published: Int[np.ndarray, "items"],
    ntype: Int[np.ndarray, "items"],
    moment: int,
) -> Float[np.ndarray, "items columns"]:
    """The table of one snapshot, float32. Nothing that happened at or after ``moment`` enters."""
    touched = first < moment
    out = published <= moment
    items = np.maximum(np.bincount(ntype, touched | out | (published == NEVER)), 1)
    mean = np.stack([np.bincount(ntype, row) / items for row in counts])
    columns = list(np.log1p(counts / np.maximum(mean, 1e-9)[:, ntype]))
    age, shelf_life = np.where(touched, _log_days(moment, first), 0), np.where(out, _log_days(moment, published), 0)
    return np.stack([*columns, age, ~touched, shelf_life, out], axis=1).astype(np.float32)


def _log_days(moment: int, since: Int[np.ndarray, "items"]) -> Float[np.ndarray, "items"]:
    return np.log1p(np.maximum(moment - since.astype(np.float64), 0) / DAY) / _SCALE
