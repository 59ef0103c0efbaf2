"""Writes the results of finished runs to a Markdown page, from the runs' outputs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys_ray.core.errors import ArtifactError
from recsys_ray.evaluation.results import DIFFERENCES, EVERY_TYPE, MAIN
from recsys_ray.report import run_facts
from recsys_ray.report.labels import Row, main_segment, name_of, select
from recsys_ray.report.terminal import in_order
from recsys_ray.storage.artifacts import read_json
from recsys_ray.storage.outputs import current_output

START, END = "<!-- recsys-ray results: begin -->", "<!-- recsys-ray results: end -->"
_HEAD = "# Results\n"


@dataclass(frozen=True)
class Results:
    """What a finished run says of its models."""

    name: str  # of the run's folder
    metrics: Sequence[Row]
    differences: Sequence[Mapping[str, Any]]
    data: Mapping[str, Any]  # ingest's counts
    made_by: Mapping[str, Any]  # version, commit and command of the evaluation


def read_results(run_dir: str | Path) -> Results:
    """Read the evaluation of a finished run.

    Raises:
        ArtifactError: there is no finished evaluation, or no ingest, in this folder.
    """
    run = Path(run_dir)
    evaluation, ingest = current_output(run, "evaluation"), current_output(run, "ingest")
    metrics, differences = (read_json(evaluation.path / name) for name in ("metrics.json", DIFFERENCES))
    if not metrics:
        raise ArtifactError(
            f"the evaluation in {run} has no results: its test period has no user that can be evaluated"
        )
    return Results(run.resolve().name, metrics, differences, ingest.counts, evaluation.manifest.get("made_by", {}))


def write_page(page: Path, runs: Sequence[Results]) -> None:
    """Write the runs' tables into a Markdown page, between two markers. An existing page keeps what is outside them."""
    tables = "\n\n".join([START, *(_section(run) for run in runs), END])
    text = page.read_text(encoding="utf-8") if page.exists() else _HEAD
    before, mark, rest = text.partition(START)
    after = rest.partition(END)[2] if mark else "\n"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text((before if mark else f"{before}\n") + tables + after, encoding="utf-8")


def protocol(data: Mapping[str, Any]) -> str:
    """How the test items were chosen, from ingest's counts."""
    if data["protocol"] == "leave_one_out":
        return "leave-one-out: each user's last item is the test, the one before it the validation"
    moments = (run_facts.moment(data[name]) for name in ("valid_from", "test_from", "end"))
    return "split by time: validation from {}, test from {}, end {}".format(*moments)


def _section(run: Results) -> str:
    rows = select(run.metrics, item_type=EVERY_TYPE, segment=main_segment(run.metrics))
    ahead = select(run.differences, model=MAIN, item_type=EVERY_TYPE, segment=main_segment(run.metrics))
    by_model = {row["against"]: row for row in ahead}
    items = sum(run.data["items_per_type"])
    seeds = f"; mean of {len(rows[0]['seeds'])} training seeds" if rows[0].get("seeds") else "; one training seed"
    lines = [
        f"### {run.name}",
        "",
        f"- Data: {items:,} items ({', '.join(run.data['item_types'])}), {run.data['users']:,} users, "
        f"{run.data['rows']['interactions']['kept']:,} interactions.",
        f"- Protocol: {protocol(run.data)}; full ranking, items already seen excluded{seeds}.",
        f"- Test: {rows[0]['users']:,} users with a history, {rows[0]['queries']:,} lists (one per user and type).",
        f"- Code: {code(run.made_by)}.",
        f"- Command: `{run.made_by.get('command') or 'not recorded'}`",
        "",
        "| model | HR@10 (95 %) | NDCG@10 (95 %) | coverage@100 | 2T-HGNN ahead by, HR@10 (95 %) |",
        "|---|---|---|---|---|",
    ]
    for row in in_order(rows):
        name = name_of(row["model"]).full.replace("|", r"\|")
        cells = [f"**{name}**" if row["model"] == MAIN else name, _share(row, "hr_at_10"), _share(row, "ndcg_at_10")]
        cells += [f"{row['coverage_at_100']:.3f}", _apart(by_model.get(row["model"]))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def code(made_by: Mapping[str, Any]) -> str:
    """Version and commit that made an output."""
    commit = made_by.get("commit")
    return f"recsys-ray {made_by.get('version') or '(version unknown)'}" + (f", commit {commit}" if commit else "")


def _share(row: Row, name: str) -> str:
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    return f"{row[name]:.4f}" + ("" if low is None or high is None else f" ({low:.4f} to {high:.4f})")


def _apart(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"
