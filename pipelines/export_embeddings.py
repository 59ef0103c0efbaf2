"""``recsys-ray export-embeddings``: item embeddings into one Parquet file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recsys_ray.bundle.export import export_bundle, export_run
from recsys_ray.core.progress import Progress


def export_embeddings(
    run: Path, bundle: str | None, out: Path, snapshot: str, vectors: Sequence[str], progress: Progress
) -> None:
    """From a bundle where one is named, else from a run's folder as of a snapshot."""
    if bundle is not None:
        items = export_bundle(bundle, out, vectors, progress)
    else:
        items = export_run(run, out, snapshot, vectors, progress)
    progress.say(f"{items:,} items with {', '.join(vectors)} -> {out} ({out.stat().st_size / 1e6:,.1f} MB)")
