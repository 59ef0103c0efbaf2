"""The embedding study on the terminal, as a page (Markdown), a plot (PNG) and figures (JSON)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from recsys_ray.checks.similar import CUTOFFS
from recsys_ray.checks.style import BANDS, band_name
from recsys_ray.report.palette import PALETTE
from recsys_ray.storage.artifacts import software, write_json
from recsys_ray.studies import EMBEDDING
from recsys_ray.studies.embedding import LABELS, TITLE, Check

_QUESTION = (
    "Does the HGNN's embedding hold at least what anyone can make of the same data in a few lines: a factorisation of "
    "the interactions, the text vectors, the cosine between items?"
)
_HOW = """\
- **Simple vectors** have 64 numbers and are made from the interactions before the test period, of each user the latest
  `graph.max_history` items, as the graph itself. SVD: of the user-item matrix, each entry divided by the roots of its
  user's and its item's number of entries. PMI-SVD: of the items' positive pointwise mutual information. iALS: implicit
  ALS, not tuned. item2vec: skip-gram, all of a user's items being one sentence.
- **Style**: what users of the demo data like in an item and its text does not tell. R2 of ridge regression on
  standardised vectors in five folds, for items with few, some and many users. Target: the best of SVD, PMI-SVD, iALS.
- **Similar items**: the task of `recsys-ray probe`. Two items of a type that a user first had both of in the test
  period: is one among the nearest neighbours of the other? Target: the best of item2vec, SVD, PMI-SVD and text.
- **Category and language**: logistic regression, as in `recsys-ray probe`; the text's accuracy minus .02 is the target.
- **HR@10**: the HGNN alone for warm users, from the run's evaluation. LLM-kNN and the HGNN have tuned histories there.
  Cosine kNN is not tuned: the cosine of two items' users, summed over the user's items. Unseen items: without any event
  before the validation period.
- Figures have no interval unless one is given; it is of the difference from the target, 95 %."""


@dataclass(frozen=True)
class Findings:
    """All that the study found."""

    checks: Sequence[Check]
    explained: Mapping[str, Sequence[float | None]]  # vectors -> R2 of the style by band; empty without a style
    similar: Sequence[Mapping[str, Any]]  # rows of the probe, of every kind of vectors
    labels: Sequence[Mapping[str, Any]]  # rows of the probe


_COLUMNS = ("check", "where", "target", "reached", "difference", "holds")


def cells(check: Check) -> list[str]:
    """A check as a line of the table, by ``_COLUMNS``."""
    if check.target is None or check.reached is None:
        return [check.what, check.where, "", "", "", f"{check.verdict}: {check.absent}"]
    apart = f"{check.reached - check.target:+.3f}"
    if check.interval:
        apart += " ({:+.3f} to {:+.3f})".format(*check.interval)
    target = f"{'above' if check.above else 'at least'} {check.target:.3f} ({check.of})"
    return [check.what, check.where, target, f"{check.reached:.3f}", apart, check.verdict]


def print_checks(checks: Sequence[Check], console: Console) -> None:
    """One table of at most 80 columns, and why a check could not be made; the intervals are on the page."""
    table = Table(title=TITLE, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="underline")
    for name in ("check", "target", "reached", "holds"):
        table.add_column(name, justify="right" if name == "reached" else "left", no_wrap=True)
    for check in checks:
        what, where, target, reached, *_ = cells(check)
        style = "bold" if check.holds is False else None
        table.add_row(f"{what}, {where}", target, reached, check.verdict, style=style)
    console.print(table)
    for what, reason in dict.fromkeys((check.what, check.absent) for check in checks if check.absent):
        console.print(f"{what}: not checked, {reason}", markup=False, soft_wrap=True)


def write_study(out: Path, found: Findings, run: Mapping[str, Any], data: str, command: str) -> None:
    """Write ``embedding.md``, ``embedding.png`` and ``embedding.json`` into ``out``.

    Args:
        run: what the run was made of, for the figures.
        data: what the page calls the data.
    """
    out.mkdir(parents=True, exist_ok=True)
    figures = {
        "study": EMBEDDING,
        "checks": [vars(check) | {"holds": check.holds} for check in found.checks],
        "style": {name: list(values) for name, values in found.explained.items()},
        "similar": list(found.similar),
        "labels": list(found.labels),
        **run,
        "software": software(),
    }
    write_json(out / f"{EMBEDDING}.json", figures)
    _draw(out / f"{EMBEDDING}.png", found.checks)
    versions = ", ".join(f"{name} {version}" for name, version in software().items())
    judged = [check.holds for check in found.checks if check.holds is not None]
    parts = [
        f"# {TITLE}",
        _QUESTION,
        f"## Results: {data}",
        f"{sum(judged)} of {len(judged)} targets are reached.",
        _markdown(_COLUMNS, [cells(check) for check in found.checks], "---|---|---|---:|---:|---"),
        f"![{TITLE}]({EMBEDDING}.png)",
        "## All vectors",
        *_details(found),
        "## How to read it",
        _HOW,
        "## How to reproduce",
        f"```\n{command}\n```",
        f"{versions}.",
    ]
    (out / f"{EMBEDDING}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _details(found: Findings) -> list[str]:
    parts = []
    if found.explained:
        head = ["style R2", *map(band_name, BANDS)]
        lines = [
            [LABELS[name], *("" if value is None else f"{value:.3f}" for value in values)]
            for name, values in found.explained.items()
        ]
        parts.append(_markdown(head, lines, "---|" + "|".join(["---:"] * len(BANDS))))
    rows = [row for row in found.similar if row["segment"] == "all"]
    if rows:
        places = list(dict.fromkeys((row["item_type"], k) for row in rows for k in CUTOFFS))
        head = ["similar items", *(f"{kind}, recall@{k}" for kind, k in places)]
        figures = {(row["vectors"], row["item_type"], k): row[f"recall_at_{k}"] for row in rows for k in CUTOFFS}
        kinds = dict.fromkeys(row["vectors"] for row in rows)
        lines = [[LABELS[name], *(f"{figures[name, *place]:.3f}" for place in places)] for name in kinds]
        parts.append(_markdown(head, lines, "---|" + "|".join(["---:"] * len(places))))
    return parts


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]], rule: str) -> str:
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)])


def _draw(path: Path, checks: Sequence[Check]) -> None:
    """What was reached, against the target, a line for each check."""
    shown = [(c, c.target, c.reached) for c in checks if c.target is not None and c.reached is not None]
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9.0, 1.2 + 0.32 * max(len(shown), 2)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for place, (check, target, reached) in enumerate(shown):
            color = PALETTE[3] if check.holds else PALETTE[6]
            axes.plot([target, reached], [place, place], color=color, linewidth=2, zorder=1)
            axes.plot(target, place, "|", color="black", markersize=11, label="" if place else "target")
            axes.plot(reached, place, "o", color=color, label="" if place else "reached")
        names = [f"{check.what}, {check.where} ({check.of})" for check, _, _ in shown]
        axes.set_yticks(range(len(shown)), names)
        axes.grid(axis="x", alpha=0.2)
        axes.invert_yaxis()
        if shown:
            figure.legend(loc="outside upper right", ncols=2, frameon=False)
        figure.suptitle(TITLE, x=0.01, ha="left")
        figure.savefig(path, dpi=130, metadata={"Software": None})
