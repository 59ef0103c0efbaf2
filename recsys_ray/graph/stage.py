"""The graph stage: snapshots, their co-interaction edges, and one heterograph of all of them in DGL partitions."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from recsys_ray.cluster.pool import alone, cpus_of_one_host
from recsys_ray.config import Config
from recsys_ray.core.errors import DataError
from recsys_ray.core.progress import Progress
from recsys_ray.data.tables import Tables
from recsys_ray.graph.activity import write_activity
from recsys_ray.graph.dgl.partition import partition_graph
from recsys_ray.graph.dgl.sampling import GRAPH_JSON
from recsys_ray.graph.edges import build_edges
from recsys_ray.graph.snapshots import plan_snapshots, training_snapshot
from recsys_ray.graph.texts import TEXTS, NearestTexts, load_nearest_texts, nearest_texts
from recsys_ray.graph.users import write_users
from recsys_ray.storage.artifacts import load_arrays, save_arrays


def build_graph(
    config: Config, ingest_dir: Path, featurize_dir: Path, out: Path, progress: Progress, cpus: int, num_hosts: int
) -> dict[str, Any]:
    """Write the graph stage's output into ``out``; an interrupted call's finished work is reused.

    Args:
        cpus: of the cluster.
        num_hosts: hosts of the cluster: the number of partitions, unless ``graph.partitions`` says otherwise.

    Returns:
        The manifest's counts: ``snapshots`` (records), ``edges`` (snapshot -> relation ``t{i}_t{j}`` -> number),
        ``partitions``, ``partition_method``, ``nodes_per_partition``.

    Raises:
        DataError: there is nothing to train on, no two items share a user, or fewer items than partitions.
    """
    tables = Tables(ingest_dir)
    counts, ntype = tables.counts, tables.ntype
    parts = config.graph.partitions or num_hosts
    if len(ntype) < parts:
        raise DataError(f"{len(ntype)} items cannot be split into {parts} partitions; lower graph.partitions")
    snapshots = plan_snapshots(config.graph, counts, config.data_seed)
    users = write_users(config, ingest_dir, snapshots, out, progress)
    near = _find_nearest_texts(featurize_dir / "text.safetensors", users, out, progress, cpus)
    edges = build_edges(config, ingest_dir, snapshots, ntype, len(counts["item_types"]), near, users, out, progress)
    if not edges[training_snapshot(snapshots).name]:
        names, least = ", ".join(config.events.edges), config.graph.min_support
        raise DataError(
            f"the graph has no edges: before the validation period no two items share {least} user(s) with events "
            f"in events.edges ({names}). Check whether each user has only one event, or each visit its own user_id; "
            "otherwise check events.edges, graph.min_support, graph.relations and graph.window_days"
        )
    write_activity(config, ingest_dir, snapshots, out, progress)
    cut = _partition(config, snapshots, ntype, featurize_dir, out, parts, progress)
    return {
        "snapshots": [asdict(snapshot) for snapshot in snapshots],
        "edges": edges,
        "partitions": parts,
        "partition_method": cut["method"],
        "nodes_per_partition": cut["nodes_per_part"],
    }


def _find_nearest_texts(
    text: Path, users: Mapping[str, np.ndarray], out: Path, progress: Progress, cpus: int
) -> NearestTexts:
    """The nearest texts of every item, among those of items that somebody had before any of the snapshots."""
    if not (out / TEXTS).exists():
        known, threads = np.flatnonzero(np.max(list(users.values()), axis=0)), cpus_of_one_host(cpus)
        with progress.task("nearest texts", 1) as task:
            near: NearestTexts = alone(_nearest_of_all, text, known, threads, cpus=threads)
            save_arrays(out / TEXTS, near._asdict())
            task.advance()
    return load_nearest_texts(out)


def _nearest_of_all(file: Path, known: np.ndarray, threads: int) -> NearestTexts:
    text = load_arrays(file)["vector"]
    return nearest_texts(text, known, text, np.arange(len(text)), threads)


def _partition(
    config: Config,
    snapshots: Any,
    ntype: np.ndarray,
    featurize_dir: Path,
    out: Path,
    parts: int,
    progress: Progress,
) -> dict[str, Any]:
    """Partition the graph from scratch: the step is short and never resumed half-way; its JSON is written last."""
    shutil.rmtree((out / GRAPH_JSON).parent, ignore_errors=True)
    files = [(snapshot.index, out / "edges" / f"{snapshot.name}.parquet") for snapshot in snapshots]
    with progress.task(f"splitting the graph into {parts} partition(s)", parts, "partitions") as shown:
        cut = partition_graph(files, ntype, featurize_dir / "text.safetensors", out, parts, config.data_seed)
        shown.update(parts)
    return cut
