"""Counts how many users had each item at each snapshot, by the events that make edges."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from recsys_ray.cluster.pool import in_parallel
from recsys_ray.config import Config
from recsys_ray.core.progress import Progress
from recsys_ray.data.tables import Events, Tables
from recsys_ray.graph.pairs import Window, latest_items
from recsys_ray.graph.snapshots import Snapshot
from recsys_ray.storage.artifacts import load_arrays, save_arrays

USERS = "users.safetensors"  # of the graph stage


def count_users(
    events: Events, snapshot: Snapshot, codes: Sequence[int], max_history: int, items: int
) -> Int[np.ndarray, "items"]:
    """How many users had each item, by the events that make the snapshot's edges (``codes``)."""
    made = events.of(codes)
    window = Window(snapshot.start, snapshot.time, snapshot.without)
    _, latest, _ = latest_items(made.uid, made.gid, made.timestamp, window, max_history, items)
    return np.bincount(latest, minlength=items)


def write_users(
    config: Config, ingest_dir: Path, snapshots: Sequence[Snapshot], out: Path, progress: Progress
) -> dict[str, Int[np.ndarray, "items"]]:
    """Write the users of each snapshot's items into the graph stage's folder ``out``, and return them; what is there is
    kept. One task a shard.

    Memory: 8 bytes an item and snapshot, here and in each task.
    """
    if not (out / USERS).exists():
        tables = Tables(ingest_dir)
        arguments = list(snapshots), tables.codes(config.events.edges), config.graph.max_history, len(tables.ntype)
        users = np.zeros((len(snapshots), len(tables.ntype)), np.int64)
        with progress.task("counting users", len(tables.shards), "shards") as shown:
            for counted in in_parallel((_count_shard, shard, *arguments) for shard in tables.shards):
                users += counted
                shown.advance()
        save_arrays(out / USERS, {s.name: row for s, row in zip(snapshots, users.astype(np.int32), strict=True)})
    return load_users(out)


def _count_shard(
    shard: Path, snapshots: Sequence[Snapshot], codes: Sequence[int], max_history: int, items: int
) -> Int[np.ndarray, "snapshots items"]:
    events = Events.read(shard)
    return np.stack([count_users(events, snapshot, codes, max_history, items) for snapshot in snapshots])


def load_users(graph: Path) -> dict[str, Int[np.ndarray, "items"]]:
    """Snapshot -> users of each item, int32; ``graph``: the graph stage's folder."""
    return load_arrays(graph / USERS)
