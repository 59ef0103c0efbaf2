"""``recsys-ray check-leaks``: runs :mod:`recsys_ray.checks.leaks` on the stages of a finished run."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from recsys_ray.checks.finished_run import FinishedRun
from recsys_ray.checks.leaks import check_run
from recsys_ray.config import Config
from recsys_ray.core.progress import Progress
from recsys_ray.stages.chain import STAGES
from recsys_ray.stages.runner import check_kinship
from recsys_ray.storage.artifacts import Artifact
from recsys_ray.storage.outputs import current_folder, current_output

_OPTIONAL = ("hgnn", "two-tower")


def check(config: Config, progress: Progress, sample: int) -> None:
    """Print what was looked at.

    Raises:
        LeakError: a feature looks past its time.
        ArtifactError: ingest, featurize or graph has not run, or the stages are of different runs.
    """
    found: dict[str, Artifact] = {}
    for name in ("ingest", "featurize", "graph", *_OPTIONAL):
        folder = STAGES[name].folder
        if name not in _OPTIONAL or current_folder(Path(config.run_dir) / folder):
            found[name] = current_output(config.run_dir, folder)
    check_kinship(found)
    run = FinishedRun(
        found["ingest"], found["featurize"], found["graph"], found.get("hgnn"), found.get("two-tower"), config
    )
    console = Console(highlight=False)
    for line in check_run(run, sample, progress):
        console.print(f"checked {line}", markup=False, soft_wrap=True)
    for name in _OPTIONAL:
        if name not in found:
            console.print(f"not checked: {name} has not run", markup=False, soft_wrap=True)
    console.print("no leak found: no feature looks past its time", markup=False)
