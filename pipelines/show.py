"""Terminal output for a finished run: results, example users, and where report and bundle are."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from recsys_ray.config import Config
from recsys_ray.evaluation.results import DIFFERENCES
from recsys_ray.report.terminal import print_results
from recsys_ray.report.write import write_report
from recsys_ray.serving.recommender import Recommender
from recsys_ray.stages.chain import STAGES
from recsys_ray.storage.artifacts import read_json
from recsys_ray.storage.outputs import current_output

_HISTORY = 8  # events of a user that are shown


def show_results(config: Config, examples: int = 1) -> None:
    """The results of a finished run on one screen, where the report is and how to serve; then example users."""
    console, run_dir = Console(highlight=False), Path(config.run_dir)
    show_table(config)
    console.print(
        f"\nReport  {run_dir / STAGES['evaluate'].page}: by item type, user segment and popularity", soft_wrap=True
    )
    bundle = run_dir / "bundles"
    console.print(f"Serve   recsys-ray serve --bundle {bundle}", soft_wrap=True)
    if examples:
        recommender = Recommender.load(bundle, verify=False)
        for user_id in recommender.example_users(examples):
            console.print()
            print_user(recommender, user_id, console)


def show_table(config: Config) -> None:
    folder = current_output(config.run_dir, STAGES["evaluate"].folder).path
    metrics, differences = (read_json(folder / name) for name in ("metrics.json", DIFFERENCES))
    print_results(metrics, differences, Console(highlight=False))


def draw_report(config: Config, out: Path | None = None) -> Path:
    """Write the page from a finished evaluation; returns where it is. The stage's own page stays as it was published.

    Raises:
        ArtifactError: there is no finished evaluation.
    """
    run_dir = Path(config.run_dir)
    evaluation = current_output(run_dir, STAGES["evaluate"].folder).path
    path = out or run_dir / STAGES["evaluate"].page
    write_report(path, read_json(evaluation / "metrics.json"), config, run_dir)
    return path


def print_user(recommender: Recommender, user_id: str, console: Console, k: int = 10) -> None:
    """Print a user's latest events and the ``k`` items recommended next, one per line."""

    def line(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, no_wrap=True, overflow="ellipsis", crop=True)

    line(f"What user {user_id} did last", "bold")
    history = recommender.history(user_id, _HISTORY)
    for past in history:
        line(f"  {past.event:<8} {past.item_type}: {past.title or past.item_id}")
    if not history:
        line("  no events")
    line("What is recommended next", "bold")
    for place, item in enumerate(recommender.recommend(user_id=user_id, k=k), 1):
        line(f"  {place:>2}. {item.item_type}: {item.title or item.item_id}  ({item.reason})")
