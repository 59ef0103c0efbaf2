"""Stage 4: train the HGNN on the first snapshot, embed every item on every snapshot."""

from __future__ import annotations

from typing import Any

from pipelines.stage import Context, Stage
from recsys_ray.hgnn.job import train_hgnn


def _run(context: Context) -> dict[str, Any]:
    ingest, featurize, graph = (context.inputs[name] for name in ("ingest", "featurize", "graph"))
    return train_hgnn(
        context.config, ingest, featurize, graph, context.out, context.progress, context.cpus, context.hosts
    )


STAGE = Stage(
    name="hgnn",
    folder="hgnn",
    summary="train the HGNN on the partitions, embed every item",
    inputs=("ingest", "featurize", "graph"),
    settings=lambda config: {"hgnn": config.hgnn.model_dump(), "seed": config.seed},
    run=_run,
)
