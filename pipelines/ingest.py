"""Stage 1: tables in, clean and dense tables out."""

from __future__ import annotations

from typing import Any

from pipelines.stage import Context, Stage
from recsys_ray.config import Config
from recsys_ray.data.ingest import ingest


def _settings(config: Config) -> dict[str, Any]:
    """Fields that came later are left out at their defaults: what was made before them is what they would make."""
    data = config.data.model_dump(mode="json", exclude={"oracle"})
    split = config.split.model_dump(mode="json")
    if config.data.item_types is None:
        del data["item_types"]
    if config.split.protocol == "time":
        del split["protocol"]
    return {"data": data, "events": config.events.model_dump(), "split": split}


def _run(context: Context) -> dict[str, Any]:
    return ingest(context.config, context.out, context.progress)


STAGE = Stage(
    name="ingest",
    folder="ingest",
    summary="validate the tables, put bad rows into quarantine, split by time",
    inputs=(),
    settings=_settings,
    run=_run,
    sources=lambda c: {"items": c.data.items, "interactions": c.data.interactions, "users": c.data.users},
)
