"""How alive each item is at each snapshot: what its edges cannot say, since aggregation forgets how many there are.

Columns of the table (all at most a few units large, so that towers can read them as they are):

* ``log(1 + c / mean)`` of the positives ``c`` of the last 7, 30 and 90 days, and of all days; ``mean`` is over the
  items of the same type that are on the shelf (not published after the snapshot, as far as is known), so that a
  platform that doubles does not shift every item's value, and what is popular in a type that has only begun shows as
  in one that has long been there;
* the same of all events, weak signals included, of the last 30 days;
* ``log(1 + days)`` since the item's first event, and a flag for items that had none;
* ``log(1 + days)`` since publication, and a flag for items whose date is known (and not after the snapshot).

In leave-one-out times are logical (recsys_ray/data/split.py): all that came before lies a fraction of a day back. Every
window then holds everything, ages are about zero, and no date of publication is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from recsys_ray.config import Config
from recsys_ray.core.clock import DAY, is_leave_one_out
from recsys_ray.core.progress import Progress
from recsys_ray.core.snapshots import Fold, Snapshot
from recsys_ray.storage.artifacts import open_artifact, save_arrays

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
CHOSEN = 3  # column: positives of all days
UNTOUCHED = 6  # column: no event yet
_POSITIVE_DAYS = (7, 30, 90)
_ALL_DAYS = 30
NEVER = np.iinfo(np.int64).max
_SCALE = 3.0  # natural log of days, brought to about one

Counts = tuple[Int[np.ndarray, "5 items"], Int[np.ndarray, "items"]]  # the five counts; first event or NEVER


def write_activity(
    config: Config, ingest_dir: Path, snapshots: Sequence[Snapshot], out: Path, progress: Progress
) -> None:
    """Write ``out/activity.safetensors``: snapshot name -> float16 [items, COLUMNS]. One task a shard and snapshot."""
    if (out / ACTIVITY).exists():
        return
    facts = open_artifact(ingest_dir).counts
    published, ntype = read_published(ingest_dir, facts), read_types(ingest_dir)
    names = list(facts["events"])
    codes = [names.index(name) for name in config.events.positives if name in names]
    shards = sorted((ingest_dir / "interactions").glob("shard-*.parquet"))
    tables = {}
    with progress.task("counting activity", len(snapshots), "snapshots") as shown:
        for snapshot in snapshots:
            counts, first = add_counts(_count_all(shards, snapshot, codes, len(published)))
            tables[snapshot.name] = describe(counts, first, published, ntype, snapshot.time).astype(np.float16)
            shown.advance(1)
    save_arrays(out / ACTIVITY, tables)


def read_published(ingest_dir: Path, facts: Mapping[str, Any]) -> Int[np.ndarray, "items"]:
    """Unix seconds of each item's publication, NEVER where it is unknown or times are not the calendar's."""
    column = pq.read_table(ingest_dir / "items.parquet", columns=["published_at"]).column("published_at")
    published = column.cast(pa.int64()).fill_null(NEVER).to_numpy()
    return np.full_like(published, NEVER) if is_leave_one_out(facts) else published


def read_types(ingest_dir: Path) -> Int[np.ndarray, "items"]:
    """Number of each item's type."""
    return pq.read_table(ingest_dir / "items.parquet", columns=["ntype"])["ntype"].to_numpy()


def _count_all(shards: Sequence[Path], snapshot: Snapshot, codes: list[int], items: int) -> Iterator[Counts]:
    """Counts of each shard, as they come; no more tasks wait than the cluster can start soon."""
    import ray

    task: Any = ray.remote(num_cpus=1)(count_shard)
    limit = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting: list[Any] = []
    for shard in shards:
        waiting.append(task.remote(shard, snapshot.time, codes, items, snapshot.without))
        if len(waiting) >= limit:
            done, waiting = ray.wait(waiting)
            yield ray.get(done[0])
    for left in waiting:
        yield ray.get(left)


def add_counts(parts: Iterator[Counts]) -> Counts:
    """The counts of all shards together. There must be one."""
    counts, first = next(parts)
    counts, first = counts.copy(), first.copy()  # what comes out of Ray's store is read-only
    for more, earlier in parts:
        counts += more
        np.minimum(first, earlier, out=first)
    return counts, first


def count_shard(shard: Path, moment: int, positives: Sequence[int], items: int, without: Fold | None = None) -> Counts:
    """What one shard's users, but not those of ``without``, did with each item before ``moment``."""
    table = pq.read_table(shard, columns=["gid", "event", "timestamp"] + ["uid"] * (without is not None))
    gid, event, time = (table.column(i).to_numpy() for i in range(3))
    known = time < moment
    if without is not None:
        known &= ~without.has(table["uid"].to_numpy())
    return count_events(gid[known], event[known], time[known], moment, positives, items)


def count_events(
    gid: Int[np.ndarray, "n"],
    event: Int[np.ndarray, "n"],
    time: Int[np.ndarray, "n"],
    moment: int,
    positives: Sequence[int],
    items: int,
) -> Counts:
    """What happened to each item, of events that all lie before ``moment``."""
    positive = np.isin(event, np.asarray(positives, event.dtype))
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
