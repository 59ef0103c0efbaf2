"""The chain of all stages.

    python -m pipelines.run --config configs/demo.yaml

is what ``recsys-ray run`` does, and what ``ray job submit -- python -m pipelines.run ...`` runs on a cluster.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pipelines import evaluate, featurize, graph, hgnn, index, ingest, two_tower
from pipelines.stage import Runner, Stage
from recsys_ray.config import Config
from recsys_ray.core.progress import Progress
from recsys_ray.evaluation.labels import name_of
from recsys_ray.evaluation.results import DIFFERENCES
from recsys_ray.serving.recommender import Recommender
from recsys_ray.storage.artifacts import open_artifact

STAGES: dict[str, Stage] = {
    module.STAGE.name: module.STAGE for module in (ingest, featurize, graph, hgnn, two_tower, index, evaluate)
}
_EXAMPLES = 5
_SHOWN_HISTORY = 8


def run_all(config: Config, progress: Progress, force: bool = False) -> None:
    """Every stage, skipping those that are up to date; then what came out."""
    with Runner(config, STAGES, progress) as runner:
        runner.chain(list(STAGES), force)
    show_results(config)


def run_one(name: str, config: Config, progress: Progress, force: bool = False) -> None:
    """One stage, on its inputs as they lie in the run's folder."""
    with Runner(config, STAGES, progress) as runner:
        runner.run(name, force=force)
    if name == "evaluate":
        show_table(config)


def show_results(config: Config) -> None:
    """The table, the report's path, example users, and how to serve."""
    console = Console(highlight=False)
    show_table(config)
    bundle = Path(config.run_dir) / "bundles" / "current"
    recommender = Recommender.load(bundle, verify=False)
    for user_id in recommender.example_users(_EXAMPLES):
        show_user(recommender, user_id, console)
    console.print(f"\nReport   {Path(config.run_dir) / 'evaluation' / 'report.html'}", soft_wrap=True)
    console.print(f"Serve    recsys-ray serve --bundle {bundle}", soft_wrap=True)


def show_table(config: Config) -> None:
    from recsys_ray.report.write import print_table

    console, folder = Console(highlight=False), Path(config.run_dir) / "evaluation"
    print_table(json.loads((folder / "metrics.json").read_text(encoding="utf-8")), console)
    show_differences(json.loads((folder / DIFFERENCES).read_text(encoding="utf-8")), console)


def show_differences(differences: Sequence[Mapping[str, Any]], console: Console) -> None:
    """What 2T-HGNN is ahead of each other model, for warm users over all types, on the same queries."""
    shown = [row for row in differences if (row["item_type"], row["segment"]) == ("all", "warm")]
    if not shown:
        return
    table = Table(
        title="2T-HGNN minus each other model, HR@10 on the same queries", title_justify="left", box=SIMPLE_HEAD
    )
    for name in ("model", "difference", "95 % interval", "relative"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for row in shown:
        relative = "-" if row["relative"] is None else f"{row['relative']:+.1%}"
        interval = f"{row['low']:+.4f} to {row['high']:+.4f}"
        name = name_of(row["against"]).short
        table.add_row(name, f"{row['difference']:+.4f}", interval, relative)
    console.print(table)


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


def show_user(recommender: Recommender, user_id: str, console: Console, k: int = 10) -> None:
    """What a user touched, and what comes next."""
    console.print(f"\nuser {user_id}", style="bold", markup=False, soft_wrap=True)
    history = recommender.history(user_id, _SHOWN_HISTORY)
    for past in history:
        console.print(f"  - {past.event} {past.item_type}: {past.title or past.item_id}", markup=False, soft_wrap=True)
    if not history:
        console.print("  no history in the window", markup=False)
    for place, item in enumerate(recommender.recommend(user_id=user_id, k=k), 1):
        line = f"  {place:>2}. {item.item_type}: {item.title or item.item_id}"
        console.print(f"{line}  ({item.reason})", markup=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The same as ``recsys-ray run``."""
    from pipelines.cli import main as cli

    cli(["run", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    main()
