"""Turns the co-interactions of all users into item-item edges, once per snapshot: sharded over users, merged by key.

One task per user shard counts the pairs of each snapshot and writes them in as many row groups as there are reducers,
each a range of destinations. One task per range then sums them and keeps the best. Memory is bounded in both: by
``pairs.HOLD`` in the first, by the number of ranges (``data.shards``) in the second.

An item that few users had has few edges, and these by chance. So the graph's edges are completed with what texts tell:
``graph.text_users`` = c makes the weight of an edge w_ij + c t_ij (recsys_ray/graph/texts.py). Edges that texts alone
tell have a support of 0, and are no supervision.

Of snapshots after which somebody is answered many more pairs than the graph's edges are kept, for the co-interaction
memory (recsys_ray/scoring/ridge.py), which adds what texts tell itself.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from recsys_ray.cluster.pool import in_parallel
from recsys_ray.config import Config, GraphConfig
from recsys_ray.core.progress import Progress
from recsys_ray.data.tables import Tables, whole_users
from recsys_ray.graph import pairs
from recsys_ray.graph.pairs import Counted, PairCounter, Window
from recsys_ray.graph.snapshots import Snapshot
from recsys_ray.graph.texts import NearestTexts, TextPairs, text_pairs
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
    support: Int[np.ndarray, "n"]  # users; 0: texts alone tell of the edge
    weight: Float[np.ndarray, "n"]

    @staticmethod
    def none() -> Edges:
        none = np.zeros(0, np.int32)
        return Edges(none, none, none, np.zeros(0, np.float32))


def build_edges(
    config: Config,
    ingest_dir: Path,
    snapshots: Sequence[Snapshot],
    ntype: np.ndarray,
    num_types: int,
    near: NearestTexts,
    users: Mapping[str, Int[np.ndarray, "items"]],
    out: Path,
    progress: Progress,
) -> dict[str, dict[str, int]]:
    """Write ``out/edges/<snapshot>.parquet`` (src, dst, support, weight; sorted by dst, src) for every snapshot, and
    ``out/pairs/<snapshot>.parquet`` (likewise, with more neighbours of an item) for those of ``PAIRED``.

    An interrupted call's finished work is reused, down to single tasks (in ``out/_scratch``).

    Args:
        ntype: int16 [items], item type of each gid.
        near: of every item.
        users: snapshot -> users of each item.

    Returns:
        Of each snapshot: relation ``t{i}_t{j}`` -> number of edges between items that share users.

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
        _reduce(config, todo, ntype, bounds, scratch, out, progress, allowed, most, near, users)
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


def told_by_texts(path: Path, items: int) -> Int[np.ndarray, "n"]:
    """Of an edge file, the edges that texts alone tell: ``dst * items + src``, ascending."""
    table = pq.read_table(path, columns=["src", "dst"], filters=[("support", "==", 0)])
    src, dst = (column.to_numpy() for column in table.columns)
    return dst.astype(np.int64) * items + src


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
    rules = config.graph
    work = [
        (count_shard, shard, scratch / shard.stem, windows, codes, bounds, rules.max_history, rules.pair_half_life)
        for shard in shards
        if not _is_done(scratch / shard.stem, windows)
    ]
    _run(work, progress, "counting pairs", "shards")


def _reduce(
    config: Config,
    snapshots: Sequence[Snapshot],
    ntype: np.ndarray,
    bounds: Sequence[int],
    scratch: Path,
    out: Path,
    progress: Progress,
    allowed: np.ndarray,
    most: Mapping[str, int],
    near: NearestTexts,
    users: Mapping[str, Int[np.ndarray, "items"]],
) -> None:
    import ray

    def part(snapshot: Snapshot, kind: str, r: int) -> Path:
        return scratch / snapshot.name / f"{kind}-{r:05d}.parquet"

    shared, rules, work = ray.put(ntype), config.graph, []
    for snapshot in snapshots:
        had = ray.put(users[snapshot.name])
        for r, (first, last) in enumerate(itertools.pairwise([0, *bounds])):
            files = {kind: part(snapshot, kind, r) for kind in kinds_of(snapshot.name)}
            if not all(file.exists() for file in files.values()):
                of_range = NearestTexts(*(rows[first:last] for rows in near))
                work.append((reduce_range, scratch, snapshot.name, r, shared, rules, config.data_seed, files, most,
                             allowed, first, of_range, had))  # fmt: skip
    _run(work, progress, "merging pairs", "ranges")
    for snapshot in snapshots:
        for kind in kinds_of(snapshot.name):
            _join([part(snapshot, kind, r) for r in range(len(bounds))], out / kind / f"{snapshot.name}.parquet")


def _run(work: list[tuple[Any, ...]], progress: Progress, title: str, unit: str) -> None:
    with progress.task(title, len(work), unit) as shown:
        for _ in in_parallel(work):
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
    scratch: Path, snapshot: str, r: int, ntype: np.ndarray, rules: GraphConfig, seed: int, files: Mapping[str, Path],
    most: Mapping[str, int], allowed: np.ndarray, first: int, near: NearestTexts, users: np.ndarray,
) -> None:  # fmt: skip
    """Merge range ``r`` of every shard's counts, keep the best edges of the allowed relations, and complete them with
    what texts tell.

    Args:
        files: kind (edges, pairs) -> file to write.
        most: kind -> number of edges to keep of an item and type of src.
        allowed: bool [types, types].
        first: of the range's items.
        near: of the range's items.
        users: of all items at the snapshot.
    """
    parts = [Counted.none()]
    for path in sorted(scratch.glob(f"shard-*/{snapshot}-*.parquet")):
        with pq.ParquetFile(path) as file:
            table = file.read_row_group(r)
        parts.append(Counted(*(table.column(name).to_numpy() for name in _COUNTED.names)))
    counted = pairs.merge(parts, len(ntype))
    counted = counted.take(allowed[ntype[counted.src], ntype[counted.dst]])
    for kind, file in files.items():
        edges = as_edges(pairs.keep_best(counted, ntype, rules.min_support, most[kind], seed))
        if kind == EDGES:
            texts = text_pairs(near, users, np.arange(first, first + len(near.gid)))
            edges = with_texts(edges, texts, rules.text_users, ntype, allowed)
        write_parquet(file, pa.table(list(edges), schema=_EDGES))


def as_edges(counted: Counted) -> Edges:
    """Counted pairs, with the weights as they are stored."""
    weight = (counted.weight / pairs.ONE).astype(np.float32)
    return Edges(counted.src, counted.dst, counted.support.astype(np.int32), weight)


def with_texts(edges: Edges, texts: TextPairs, text_users: float, ntype: np.ndarray, allowed: np.ndarray) -> Edges:
    """The same with ``text_users`` x t more weight, in the allowed relations; sorted by dst, src."""
    if not text_users:
        return edges
    chosen = allowed[ntype[texts.src], ntype[texts.dst]]
    own = edges.dst.astype(np.int64) * len(ntype) + edges.src
    told = texts.dst[chosen] * len(ntype) + texts.src[chosen]
    both = np.union1d(own, told)
    support, weight, place = np.zeros(len(both), np.int32), np.zeros(len(both), np.float32), np.searchsorted(both, own)
    support[place], weight[place] = edges.support, edges.weight
    weight[np.searchsorted(both, told)] += np.float32(text_users) * texts.users[chosen]
    src, dst = (part.astype(np.int32) for part in (both % len(ntype), both // len(ntype)))
    return Edges(src, dst, support, weight)


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
        for batch in file.iter_batches(_ROWS, columns=["src", "dst", "support"]):
            src, dst, support = (column.to_numpy() for column in batch.columns)
            src, dst = src[support > 0], dst[support > 0]
            totals += np.bincount(ntype[src].astype(np.int64) * num_types + ntype[dst], minlength=len(totals))
    return {f"t{k // num_types}_t{k % num_types}": int(n) for k, n in enumerate(totals) if n}


def _described(windows: dict[str, Window]) -> dict[str, dict[str, Any]]:
    return {name: asdict(window) for name, window in sorted(windows.items())}


def _is_done(folder: Path, windows: dict[str, Window]) -> bool:
    """Whether a shard has been counted for (at least) these snapshots."""
    done = json_or_none(folder / "done.json") or {}
    return all(done.get(name) == window for name, window in _described(windows).items())
