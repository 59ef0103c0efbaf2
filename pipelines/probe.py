"""``recsys-ray probe``: a stage that measures how useful the embeddings are for other tasks; not part of ``run``."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from recsys_ray.bundle.build import VARIANT
from recsys_ray.checks.probe import print_probe, probe
from recsys_ray.config import Config
from recsys_ray.core.progress import Progress
from recsys_ray.stages.chain import STAGES
from recsys_ray.stages.runner import Context, Runner, Stage
from recsys_ray.storage.artifacts import read_json


def _settings(config: Config) -> dict[str, Any]:
    return {
        "probe": config.probe.model_dump(),
        "edges": config.events.edges,
        "max_history": config.graph.max_history,
        "bootstrap": config.evaluate.bootstrap,
        "seed": config.seed,
    }


def _run(context: Context) -> dict[str, Any]:
    ingest, featurize, hgnn, two_tower = context.inputs.values()
    return probe(context.config, ingest, featurize, hgnn, two_tower, VARIANT, context.out, context.progress)


STAGE = Stage(
    name="probe",
    folder="probe",
    summary="predict labels and find similar items from the embeddings",
    inputs=("ingest", "featurize", "hgnn", "two-tower"),
    settings=_settings,
    run=_run,
    version=1,
)


def run_probe(config: Config, progress: Progress, force: bool = False) -> None:
    """Bring the probe up to date and show it."""
    with Runner(config, {**STAGES, STAGE.name: STAGE}, progress) as runner:
        made = runner.run(STAGE.name, force=force)
    console = Console(highlight=False)
    print_probe(read_json(made.path / "metrics.json"), console)
    console.print(f"Picture  {made.path / 'probe.png'}", soft_wrap=True)
