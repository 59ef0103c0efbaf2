"""Exports item embeddings to one Parquet file of ids, types, titles and vectors, written in pieces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_ray.bundle.build import VARIANT
from recsys_ray.core.errors import ArtifactError, UserError
from recsys_ray.core.progress import Progress
from recsys_ray.data.tables import Tables
from recsys_ray.hgnn.outputs import load_embeddings
from recsys_ray.serving.catalogue import read_table
from recsys_ray.serving.histories import mapped_arrays
from recsys_ray.storage.artifacts import open_artifact, written_whole
from recsys_ray.storage.outputs import current_output, find_bundle
from recsys_ray.two_tower.towers import TowerSpec

VECTORS = ("text", "hgnn", "tower")
_ROWS = 16_384  # rows per row group, which bounds the memory used beyond the mapped tables
_TOWER_SNAPSHOTS = ("test", "serve")  # of which the two-tower stage writes item vectors


def export_run(run: Path, out: Path, snapshot: str, vectors: Sequence[str], progress: Progress) -> int:
    """Write the embeddings of a run's items as of a snapshot; returns the number of items.

    Raises:
        ArtifactError: a stage has not run.
        UserError: there is no such snapshot or kind of vector.
    """
    _check(vectors)
    items = Tables(current_output(run, "ingest").path).items("item_id", "item_type", "title")

    def text() -> np.ndarray:
        return mapped_arrays(current_output(run, "featurize").path / "text.safetensors")["vector"].numpy()

    def hgnn() -> np.ndarray:
        folder = current_output(run, "hgnn").path
        known = sorted(path.name for path in (folder / "embeddings").iterdir())
        if snapshot not in known:
            raise UserError(f"there is no snapshot {snapshot!r}; choose from {', '.join(known)}")
        return load_embeddings(folder, snapshot, len(items)).numpy()

    def tower() -> np.ndarray:
        if snapshot not in _TOWER_SNAPSHOTS:
            raise UserError(
                f"the item tower's vectors exist for {' and '.join(_TOWER_SNAPSHOTS)} only, not for {snapshot!r}; "
                "remove 'tower' from --vectors"
            )
        folder = current_output(run, "two_tower").path / VARIANT / "items"
        return mapped_arrays(folder / f"{snapshot}.safetensors")["vector"].numpy()

    return _write(items, {"text": text, "hgnn": hgnn, "tower": tower}, vectors, out, progress)


def export_bundle(bundle: str | Path, out: Path, vectors: Sequence[str], progress: Progress) -> int:
    """Write the embeddings of a bundle's items, including items added later; returns the number of items.

    Raises:
        ArtifactError: there is no whole bundle.
        UserError: there is no such kind of vector.
    """
    _check(vectors)
    made = open_artifact(find_bundle(bundle))
    table = read_table(made.path / "items.arrow")
    types = pa.array(made.counts["item_types"], pa.string()).take(table["ntype"].combine_chunks().cast(pa.int32()))
    items = pa.table({"item_id": table["item_id"], "item_type": types, "title": table["title"]})
    width = TowerSpec.load(made.path / "user_tower" / "spec.json").layers[
        -1
    ]  # without the extra column of the item terms
    files = {"text": ("text", "vector"), "hgnn": ("hgnn", "embedding"), "tower": ("vectors", "vector")}

    def reader(file: str, name: str) -> Callable[[], np.ndarray]:
        columns = width if file == "vectors" else None
        return lambda: mapped_arrays(made.path / f"{file}.safetensors")[name].numpy()[:, :columns]

    return _write(items, {kind: reader(*place) for kind, place in files.items()}, vectors, out, progress)


def _check(vectors: Sequence[str]) -> None:
    unknown = [name for name in vectors if name not in VECTORS]
    if unknown or not vectors:
        raise UserError(f"--vectors takes a comma-separated choice of {', '.join(VECTORS)}, not {','.join(unknown)!r}")


def _write(
    items: pa.Table,
    readers: Mapping[str, Callable[[], np.ndarray]],
    vectors: Sequence[str],
    out: Path,
    progress: Progress,
) -> int:
    """A column ``<kind>`` of list<float> for each kind of vector, row groups of ``_ROWS`` items, aside and renamed."""
    tables = {kind: readers[kind]() for kind in dict.fromkeys(vectors)}
    for kind, table in tables.items():
        if len(table) != len(items):
            raise ArtifactError(f"there are {len(table)} {kind} vectors for {len(items)} items; run the stages again")
    names = ("item_id", "item_type", "title")
    fields = [(name, pa.string()) for name in names] + [(kind, pa.list_(pa.float32())) for kind in tables]
    schema = pa.schema(fields)
    with (
        written_whole(out) as aside,
        pq.ParquetWriter(aside, schema, compression="zstd") as writer,
        progress.task("export", len(items), "items") as task,
    ):
        for start in range(0, len(items), _ROWS):
            piece = items.slice(start, _ROWS)
            columns = [piece[name].cast(pa.string()).combine_chunks() for name in names]
            columns += [_lists(table[start : start + _ROWS]) for table in tables.values()]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=_ROWS)
            task.advance(len(piece))
    return len(items)


def _lists(rows: np.ndarray) -> pa.Array:
    """[n, d] -> n lists of d float32."""
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(offsets, np.ascontiguousarray(rows, np.float32).reshape(-1))
