"""The chain of all stages.

    python -m pipelines.run --config configs/demo.yaml

is what ``recsys-ray run`` does, and what ``ray job submit -- python -m pipelines.run ...`` runs on a cluster.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pipelines import evaluate, featurize, graph, hgnn, index, ingest, two_tower
from pipelines.stage import Runner, Stage
from recsys_ray.config import Config
from recsys_ray.core.progress import Progress
from recsys_ray.evaluation.results import DIFFERENCES
from recsys_ray.report.terminal import print_results, print_user
from recsys_ray.serving.recommender import Recommender
from recsys_ray.storage.artifacts import open_artifact

STAGES: dict[str, Stage] = {
    module.STAGE.name: module.STAGE for module in (ingest, featurize, graph, hgnn, two_tower, index, evaluate)
}


def run_all(config: Config, progress: Progress, force: bool = False, examples: int = 1) -> None:
    """Every stage, skipping those that are up to date; then the results and some ``examples`` of users."""
    with Runner(config, STAGES, progress) as runner:
        runner.chain(list(STAGES), force)
    show_results(config, examples)


def run_one(name: str, config: Config, progress: Progress, force: bool = False) -> None:
    """One stage, on its inputs as they lie in the run's folder."""
    with Runner(config, STAGES, progress) as runner:
        runner.run(name, force=force)
    if name == "evaluate":
        show_table(config)


def show_results(config: Config, examples: int = 1) -> None:
    """The results of a finished run on one screen, where the report is and how to serve; then example users."""
    console, run_dir = Console(highlight=False), Path(config.run_dir)
    show_table(config)
    console.print(
        f"\nReport  {run_dir / 'evaluation' / 'report.html'}: by item type, kind of user, popularity", soft_wrap=True
    )
    bundle = run_dir / "bundles" / "current"
    console.print(f"Serve   recsys-ray serve --bundle {bundle}", soft_wrap=True)
    if examples:
        recommender = Recommender.load(bundle, verify=False)
        for user_id in recommender.example_users(examples):
            console.print()
            print_user(recommender, user_id, console)


def show_table(config: Config) -> None:
    folder = Path(config.run_dir) / "evaluation"
    metrics, differences = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("metrics.json", DIFFERENCES)
    )
    print_results(metrics, differences, Console(highlight=False))


def draw_report(config: Config, out: Path | None = None) -> Path:
    """Write the page from a finished evaluation; returns where it is. The stage's own page stays as it was published.

    Raises:
        ArtifactError: there is no finished evaluation.
    """
    from recsys_ray.report.write import write_report

    run_dir = Path(config.run_dir)
    evaluation = open_artifact(run_dir / STAGES["evaluate"].folder).path
    path = out or run_dir / "report.html"
    write_report(path, json.loads((evaluation / "metrics.json").read_text(encoding="utf-8")), config, run_dir)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """The same as ``recsys-ray run``."""
    from pipelines.cli import main as cli

    cli(["run", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    main()
