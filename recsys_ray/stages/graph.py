"""Stage 3: co-interactions become a heterogeneous item graph in DGL partitions."""

from __future__ import annotations

from typing import Any

from recsys_ray.config import Config
from recsys_ray.graph.stage import build_graph
from recsys_ray.stages.runner import Context, Stage


def _settings(config: Config) -> dict[str, Any]:
    return {"graph": config.graph.model_dump(), "edges": config.events.edges, "seed": config.data_seed}


def _run(context: Context) -> dict[str, Any]:
    ingest, featurize = context.inputs["ingest"].path, context.inputs["featurize"].path
    return build_graph(context.config, ingest, featurize, context.out, context.progress, context.hosts)


STAGE = Stage(
    name="graph",
    folder="graph",
    summary="count co-interactions, cut the item graph into partitions",
    inputs=("ingest", "featurize"),
    settings=_settings,
    run=_run,
    version=1,
)
