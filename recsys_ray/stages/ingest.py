"""Stage 1: tables in, clean and dense tables out."""

from __future__ import annotations

from typing import Any

from recsys_ray.config import Config
from recsys_ray.data.ingest import ingest
from recsys_ray.stages.runner import Context, Stage


def _settings(config: Config) -> dict[str, Any]:
    """Where the tables lie is none of it: ``source_fingerprint`` knows them by content."""
    data = config.data.model_dump(mode="json", exclude={"items", "interactions", "users", "oracle"})
    return {"data": data, "events": config.events.model_dump(), "split": config.split.model_dump(mode="json")}


def _run(context: Context) -> dict[str, Any]:
    return ingest(context.config, context.out, context.progress)


STAGE = Stage(
    name="ingest",
    folder="ingest",
    summary="validate the tables, put bad rows into quarantine, split by time",
    inputs=(),
    settings=_settings,
    run=_run,
    version=2,  # ids, times, lists, repeated rows and malformed records are read otherwise
    sources=lambda c: {"items": c.data.items, "interactions": c.data.interactions, "users": c.data.users},
)
