"""A small random world on disk, as the ingest and featurize stages leave it, and what its graph must be."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_ray.config import Config, DataConfig, GraphConfig
from recsys_ray.storage.artifacts import publish, save_arrays

DAY = 86_400
DAYS = 100
TEXT_DIM = 8


def write_world(
    root: Path, sizes: tuple[int, ...] = (40, 25, 3), users: int = 60, events: int = 1500, shards: int = 3
) -> tuple[Path, Path]:
    """Folders of ingest and featurize for items of ``sizes`` (by type) and random events over 100 days."""
    rng = np.random.default_rng(5)
    items = sum(sizes)
    uid = np.sort(rng.integers(0, users, events))
    gid = rng.integers(0, items, events).astype(np.int32)
    timestamp = rng.integers(0, DAYS * DAY, events)
    event = (rng.random(events) < 0.2).astype(np.int8)  # 0 stream, 1 follow
    order = np.lexsort((event, gid, timestamp, uid))
    table = pa.table({"uid": uid[order], "gid": gid[order], "event": event[order], "timestamp": timestamp[order]})
    ingest = root / "ingest"
    (ingest / "interactions").mkdir(parents=True, exist_ok=True)
    edges = np.searchsorted(uid, np.linspace(0, users, shards + 1).astype(int))
    for shard in range(shards):
        part = table.slice(edges[shard], edges[shard + 1] - edges[shard])
        pq.write_table(part, ingest / "interactions" / f"shard-{shard:05d}.parquet")
    ntype = np.repeat(np.arange(len(sizes)), sizes).astype(np.int16)
    published = pa.nulls(len(ntype), pa.int64())
    pq.write_table(pa.table({"ntype": ntype, "published_at": published}), ingest / "items.parquet")
    days = np.bincount(timestamp[event == 0] // DAY, minlength=DAYS)
    counts = {
        "item_types": [f"type{i}" for i in range(len(sizes))],
        "events": ["stream", "follow"],
        "valid_from": 70 * DAY,
        "test_from": 85 * DAY,
        "end": int(timestamp.max()) + 1 if events else DAYS * DAY,
        "days": [[day, int(n)] for day, n in enumerate(days.tolist()) if n],
    }
    publish(ingest, "ingest", "0" * 16, counts=counts)
    vectors = rng.normal(size=(items, TEXT_DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    (root / "featurize").mkdir()
    save_arrays(root / "featurize" / "text.safetensors", {"vector": vectors.astype(np.float16)})
    return ingest, root / "featurize"


def small_config(**graph: object) -> Config:
    """Two cuts, a window of 30 days."""
    return Config(data=DataConfig(shards=3), graph=GraphConfig(**{"cuts": 2, "window_days": 30, **graph}))


def shared_pairs(graph: Path, snapshot: str) -> set[tuple[int, int]]:
    """(src, dst) of a snapshot's edges between items that share users."""
    table = pq.read_table(graph / "edges" / f"{snapshot}.parquet", columns=["src", "dst", "support"])
    return {(row["src"], row["dst"]) for row in table.to_pylist() if row["support"]}


def true_edges(graph: Path, snapshot: str) -> dict[tuple[int, int], float]:
    """(src, dst) of a snapshot's edge file -> what a message counts: its weight, over the square root of both ends'
    sums of weights."""
    table = pq.read_table(graph / "edges" / f"{snapshot}.parquet", columns=["src", "dst", "weight"])
    strength: dict[int, float] = defaultdict(float)
    edges = {(row["src"], row["dst"]): row["weight"] for row in table.to_pylist()}
    for (_, dst), weight in edges.items():
        strength[dst] += weight
    return {(src, dst): weight / ((strength[src] * strength[dst]) or 1) ** 0.5 for (src, dst), weight in edges.items()}
