"""Stage 6: item vectors into FAISS, and the bundle that serving needs."""

from __future__ import annotations

from typing import Any

from recsys_ray.bundle.build import VERSION, build_bundle, find_bundle
from recsys_ray.config import Config
from recsys_ray.core.errors import UserError
from recsys_ray.stages.runner import Context, Stage
from recsys_ray.storage.artifacts import Artifact, open_artifact


def _settings(config: Config) -> dict[str, Any]:
    return {"index": config.index.model_dump(), "positives": config.events.positives, "seed": config.seed}


def _run(context: Context) -> dict[str, Any]:
    ingest, featurize, hgnn, two_tower = (context.inputs[name].path for name in STAGE.inputs)
    out = context.run_dir / "bundles"
    bundle = build_bundle(context.config, ingest, featurize, hgnn, two_tower, out, context.progress)
    return {"bundle": bundle.path.name, "recall_at_10": bundle.counts["recall_at_10"]}


def _is_whole(config: Config, artifact: Artifact) -> bool:
    """The bundle lies outside the stage's folder: it must still be there, and live, or one that extends it must be."""
    try:
        live = open_artifact(find_bundle(f"{config.run_dir}/bundles"))
    except UserError:
        return False
    return live.counts["base"] == artifact.counts["bundle"]


STAGE = Stage(
    name="index",
    folder="index",
    summary="index the item vectors, publish the bundle",
    inputs=("ingest", "featurize", "hgnn", "two-tower"),
    settings=_settings,
    run=_run,
    version=VERSION,
    is_whole=_is_whole,
    shared=False,
)
