"""The stages in order, and how all of them or one is run."""

from __future__ import annotations

from recsys_ray.bundle.bundle import Bundle
from recsys_ray.config import Config
from recsys_ray.core.progress import Progress
from recsys_ray.stages import evaluate, featurize, graph, hgnn, index, ingest, two_tower
from recsys_ray.stages.runner import Runner, Stage

STAGES: dict[str, Stage] = {
    module.STAGE.name: module.STAGE for module in (ingest, featurize, graph, hgnn, two_tower, index, evaluate)
}


def run(config: Config, force: bool = False) -> Bundle:
    """Bring every stage up to date, from the tables to the evaluation, and open the bundle.

    Stages that are up to date are skipped; one that was interrupted goes on where it was. Progress goes to standard
    error. A local Ray is started where none is, and ended afterwards.

    Args:
        config: from :func:`recsys_ray.load_config`.
        force: run stages even where their output is up to date.

    Raises:
        UserError: a table, a setting or an earlier output that cannot be used; the message says what to do.
    """
    run_all(config, Progress(), force)
    return Bundle.open(config.run_dir)


def run_all(config: Config, progress: Progress, force: bool = False) -> None:
    """Every stage, skipping those that are up to date."""
    with Runner(config, STAGES, progress) as runner:
        runner.chain(list(STAGES), force)


def run_one(name: str, config: Config, progress: Progress, force: bool = False) -> None:
    """One stage, on its inputs as they lie in the run's folder."""
    with Runner(config, STAGES, progress) as runner:
        runner.run(name, force=force)
