"""Stage 2: a text vector for every item."""

from __future__ import annotations

from typing import Any

from recsys_ray.stages.runner import Context, Stage
from recsys_ray.text.featurize import featurize


def _run(context: Context) -> dict[str, Any]:
    ingest, cache = context.inputs["ingest"].path, context.cache / "text"
    return featurize(context.config, ingest, context.out, cache, context.progress, context.cpus)


STAGE = Stage(
    name="featurize",
    folder="featurize",
    summary="encode titles, descriptions and categories",
    inputs=("ingest",),
    settings=lambda config: {"text": config.text.model_dump(exclude={"workers"})},
    run=_run,
    version=1,
)
