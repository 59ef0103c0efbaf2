"""Turns the co-interactions of all users into item-item edges, once per snapshot: sharded over users, merged by key.

One task per user shard counts the pairs of each snapshot and writes them in as many row groups as there are reducers,
each a range of destinations. One task per range then sums them and keeps the best. Memory is bounded in both: by
``pairs.HOLD`` in the first, by the number of ranges (``data.shards``) in the second.

Of snapshots after which somebody is answered many more pairs than the graph's edges are kept, for the co-interaction
memory (recsys_ray/scoring/ridge.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from recsys_ray.cluster.pool import in_parallel
from recsys_ray.config import Config
from recsys_ray.core.progress import Progress
from recsys_ray.data.tables import Tables, whole_users
from recsys_ray.graph import pairs
from recsys_ray.graph.pairs import Counted, PairCounter, Window
from recsys_ray.graph.snapshots import Snapshot
from recsys_ray.storage.artifacts import SCRATCH, json_or_none, write_json, write_parquet, written_whole

_COUNTED = pa.schema([(name, pa.int64() if name == "weight" else pa.int32()) for name in pairs.COLUMNS])
_EDGES = pa.schema([*((name, pa.int32()) for name in ("src", "dst", "support")), ("weight", pa.float32())])
_ROWS = 1_000_000  # edges that are read at a time
EDGES, PAIRS = "edges", "pairs"  # folders
PAIRED = ("valid", "test", "serve")  # snapshots whose pairs are kept
_PAIRS = 1 << 27  # that a snapshot keeps about at most: 16 bytes each in the tasks that read them
_FEWEST = 200  # of an item and type of neighbour, whatever the catalogue


class Edges(NamedTuple):
    """Of a snapshot; sorted by dst, src."""

    src: Int[np.ndarray, "n"]
    dst: Int[np.ndarray, "n"]
    support: Int[np.ndarray, "n"]  # users
    weight: Float[np.ndarray, "n"]


def build_edges(
    config: Config,
    ingest_dir: Path,
    snapshots: Sequence[Snapshot],
    ntype: np.ndarray,
    num_types: int,
    out: Path,
    progress: Progress,
) -> dict[str, dict[str, int]]:
    """Write ``out/edges/<snapshot>.parquet`` (src, dst, support, weight; sorted by dst, src) for every snapshot, and
    ``out/pairs/<snapshot>.parquet`` (likewise, with more neighbours of an item) for those of ``PAIRED``.

    An interrupted call's finished work is reused, down to single tasks (in ``out/_scratch``).

    Args:
        ntype: int16 [items], item type of each gid.

    Returns:
        Of each snapshot: relation ``t{i}_t{j}`` -> number of edges.

    Raises:
        ArtifactError: the ingest folder has no interactions.
        ConfigError: ``graph.relations`` names an unknown item type.
    """
    tables = Tables(ingest_dir)
    shards, codes = tables.shards, tables.codes(config.events.edges)
    most = {EDGES: config.graph.max_neighbors, PAIRS: most_pairs(len(ntype), num_types, config.graph.max_neighbors)}
    for kind in most:
        (out / kind).mkdir(parents=True, exist_ok=True)
    todo = [s for s in snapshots if not all((out / kind / f"{s.name}.parquet").exists() for kind in kinds_of(s.name))]
    if todo:
        scratch = out / SCRATCH / "pairs"
        ranges = min(max(1, config.data.shards), len(ntype))
        bounds = [len(ntype) * r // ranges for r in range(1, ranges + 1)]
        _count(config, shards, todo, codes, bounds, scratch, progress)
        allowed = pairs.allowed_relations(config.graph.relations, tables.counts["item_types"])
        _reduce(config, todo, ntype, len(bounds), scratch, out, progress, allowed, most)
        shutil.rmtree(scratch, ignore_errors=True)
    return {s.name: _relation_counts(out / EDGES / f"{s.name}.parquet", ntype, num_types) for s in snapshots}


def kinds_of(snapshot: str) -> tuple[str, ...]:
    """The folders that have a file of this snapshot."""
    return (EDGES, PAIRS) if snapshot in PAIRED else (EDGES,)


def most_pairs(items: int, types: int, max_neighbors: int) -> int:
    """How many pairs of an item with items of one type are kept: all of them in a small catalogue, fewer in a large
    one."""
    return max(max_neighbors, _FEWEST, _PAIRS // max(items * types, 1))


def read_edges(path: Path) -> Edges:
    """A file of :func:`build_edges`, edges or pairs."""
    return Edges(*(column.to_numpy() for column in pq.read_table(path, columns=list(Edges._fields)).columns))


def _count(
    config: Config,
    shards: Sequence[Path],
    snapshots: Sequence[Snapshot],
    codes: list[int],
    bounds: list[int],
    scratch: Path,
    progress: Progress,
) -> None:
    windows = {s.name: Window(s.start, s.time, s.without) for s in snapshots}
    work = [
        (shard, scratch / shard.stem, windows, codes, bounds, config.graph.max_history, config.graph.pair_half_life)
        for shard in shards
        if not _is_done(scratch / shard.stem, windows)
    ]
    _run(count_shard, work, progress, "counting pairs", "shards")


def _reduce(
    config: Config,
    snapshots: Sequence[Snapshot],
    ntype: np.ndarray,
    ranges: int,
    scratch: Path,
    out: Path,
    progress: Progress,
    allowed: np.ndarray,
    most: Mapping[str, int],
) -> None:
    import ray

    def part(snapshot: Snapshot, kind: str, r: int) -> Path:
        return scratch / snapshot.name / f"{kind}-{r:05d}.parquet"

    shared = ray.put(ntype)
    work = []
    for snapshot in snapshots:
        for r in range(ranges):
            files = {part(snapshot, kind, r): most[kind] for kind in kinds_of(snapshot.name)}
            if not all(file.exists() for file in files):
                work.append((scratch, snapshot.name, r, shared, config.graph.min_support, config.data_seed, files,
                             allowed))  # fmt: skip
    _run(reduce_range, work, progress, "merging pairs", "ranges")
    for snapshot in snapshots:
        for kind in kinds_of(snapshot.name):
            _join([part(snapshot, kind, r) for r in range(ranges)], out / kind / f"{snapshot.name}.parquet")


def _run(function: Callable[..., Any], work: list[tuple[Any, ...]], progress: Progress, title: str, unit: str) -> None:
    with progress.task(title, len(work), unit) as shown:
        for _ in in_parallel((function, *arguments) for arguments in work):
            shown.advance()


def count_shard(
    shard: Path, folder: Path, windows: dict[str, Window], codes: list[int], bounds: list[int], max_history: int,
    half_life: float | None,
) -> None:  # fmt: skip
    """Count the pairs of one shard's users in every window, into ``folder/<snapshot>-<n>.parquet``.

    Each file holds one row group per range of destinations (``bounds``: the ranges' ends), sorted by (dst, src).
    """
    shutil.rmtree(folder, ignore_errors=True)  # what a killed task left
    folder.mkdir(parents=True)
    items = bounds[-1]
    hold = pairs.HOLD // len(windows)
    counters = {name: PairCounter(items, window, max_history, half_life, hold) for name, window in windows.items()}
    files = dict.fromkeys(windows, 0)

    def write(name: str, counted: Counted) -> None:
        if len(counted):
            _write_ranges(counted, bounds, folder / f"{name}-{files[name]}.parquet")
            files[name] += 1

    for batch in whole_users(shard):
        events = batch.of(codes)
        for name, counter in counters.items():
            for full in counter.add(events.uid, events.gid, events.timestamp):
                write(name, full)
    for name, counter in counters.items():
        write(name, counter.flush())
    write_json(folder / "done.json", _described(windows))


def _write_ranges(counted: Counted, bounds: Sequence[int], path: Path) -> None:
    ends = np.searchsorted(counted.dst, bounds)
    with pq.ParquetWriter(path, _COUNTED, compression="zstd") as writer:
        begin = 0
        for end in ends.tolist():
            part = counted.take(slice(begin, end))
            table = pa.table(list(vars(part).values()), schema=_COUNTED)
            writer.write_table(table, row_group_size=max(1, len(part)))
            begin = end


def reduce_range(
    scratch: Path, snapshot: str, r: int, ntype: np.ndarray, min_support: int, seed: int, out: Mapping[Path, int],
    allowed: np.ndarray | None = None,
) -> None:  # fmt: skip
    """Merge range ``r`` of every shard's counts and keep the best edges of the allowed relations (bool [types, types];
    default: all). ``out``: files to write, each with the number of edges to keep of an item and type of src."""
    parts = [Counted.none()]
    for path in sorted(scratch.glob(f"shard-*/{snapshot}-*.parquet")):
        with pq.ParquetFile(path) as file:
            table = file.read_row_group(r)
        parts.append(Counted(*(table.column(name).to_numpy() for name in _COUNTED.names)))
    edges = pairs.merge(parts, len(ntype))
    if allowed is not None:
        edges = edges.take(allowed[ntype[edges.src], ntype[edges.dst]])
    for file, most in out.items():
        best = pairs.keep_best(edges, ntype, min_support, most, seed)
        weight = (best.weight / pairs.ONE).astype(np.float32)
        write_parquet(file, pa.table([best.src, best.dst, best.support.astype(np.int32), weight], schema=_EDGES))


def _join(parts: Sequence[Path], out: Path) -> None:
    """Concatenate ranges in order, a row group at a time."""
    with written_whole(out) as aside, pq.ParquetWriter(aside, _EDGES, compression="zstd") as writer:
        for part in parts:
            with pq.ParquetFile(part) as file:
                for group in range(file.num_row_groups):
                    writer.write_table(file.read_row_group(group))


def _relation_counts(path: Path, ntype: np.ndarray, num_types: int) -> dict[str, int]:
    totals = np.zeros(num_types * num_types, np.int64)
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS, columns=["src", "dst"]):
            src, dst = (batch.column(i).to_numpy() for i in range(2))
            totals += np.bincount(ntype[src].astype(np.int64) * num_types + ntype[dst], minlength=len(totals))
    return {f"t{k // num_types}_t{k % num_types}": int(n) for k, n in enumerate(totals) if n}


def _described(windows: dict[str, Window]) -> dict[str, dict[str, Any]]:
    return {name: asdict(window) for name, window in sorted(windows.items())}


def _is_done(folder: Path, windows: dict[str, Window]) -> bool:
    """Whether a shard has been counted for (at least) these snapshots."""
    done = json_or_none(folder / "done.json") or {}
    return all(done.get(name) == window for name, window in _described(windows).items())
