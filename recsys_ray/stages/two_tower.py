"""Stage 5: train the two-tower, and the one without HGNN as its baseline."""

from __future__ import annotations

from typing import Any

from recsys_ray.config import Config
from recsys_ray.stages.runner import Context, Stage
from recsys_ray.two_tower.stage import train_two_tower


def _settings(config: Config) -> dict[str, Any]:
    return {
        "two_tower": config.two_tower.model_dump(),
        "window_days": config.graph.window_days,
        "positives": config.events.positives,
        "seed": config.seed,
    }


def _run(context: Context) -> dict[str, Any]:
    ingest, featurize, graph, hgnn = (context.inputs[name] for name in STAGE.inputs)
    return train_two_tower(
        context.config, ingest, featurize, graph, hgnn, context.out, context.progress, context.cpus, context.hosts
    )


STAGE = Stage(
    name="two-tower",
    folder="two_tower",
    summary="train the user tower and the item tower",
    inputs=("ingest", "featurize", "graph", "hgnn"),
    settings=_settings,
    run=_run,
    version=2,
)
