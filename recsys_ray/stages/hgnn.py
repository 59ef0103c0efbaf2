"""Stage 4: train the HGNN, or take trained weights, and embed every item on every snapshot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recsys_ray.config import Config
from recsys_ray.core.errors import ArtifactError
from recsys_ray.hgnn.stage import train_hgnn
from recsys_ray.stages.runner import Context, Stage
from recsys_ray.storage.artifacts import sha256


def _run(context: Context) -> dict[str, Any]:
    ingest, featurize, graph = (context.inputs[name] for name in ("ingest", "featurize", "graph"))
    return train_hgnn(
        context.config, ingest, featurize, graph, context.out, context.progress, context.cpus, context.hosts
    )


def _settings(config: Config) -> dict[str, Any]:
    """Given weights count by what they are, not by where they lie: the stage publishes them again in its own folder."""
    weights = config.hgnn.weights
    if weights and not Path(weights).is_file():
        raise ArtifactError(
            f"hgnn.weights: there is no file at {weights}; name the model.safetensors of an hgnn folder"
        )
    given = sha256(Path(weights)) if weights else None
    return {"hgnn": config.hgnn.model_dump() | {"weights": given}, "seed": config.seed}


STAGE = Stage(
    name="hgnn",
    folder="hgnn",
    summary="train the HGNN on the partitions, embed every item",
    inputs=("ingest", "featurize", "graph"),
    settings=_settings,
    run=_run,
    version=1,
)
