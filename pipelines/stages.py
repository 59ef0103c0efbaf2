"""The stages in order, and how all of them or one is run."""

from __future__ import annotations

from pipelines import evaluate, featurize, graph, hgnn, index, ingest, two_tower
from pipelines.stage import Runner, Stage
from recsys_ray.config import Config
from recsys_ray.core.progress import Progress

STAGES: dict[str, Stage] = {
    module.STAGE.name: module.STAGE for module in (ingest, featurize, graph, hgnn, two_tower, index, evaluate)
}


def run_all(config: Config, progress: Progress, force: bool = False) -> None:
    """Every stage, skipping those that are up to date."""
    with Runner(config, STAGES, progress) as runner:
        runner.chain(list(STAGES), force)


def run_one(name: str, config: Config, progress: Progress, force: bool = False) -> None:
    """One stage, on its inputs as they lie in the run's folder."""
    with Runner(config, STAGES, progress) as runner:
        runner.run(name, force=force)
