"""Plots the probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from recsys_ray.checks.similar import CUTOFFS
from recsys_ray.report.palette import PALETTE

_KINDS = ("text", "hgnn", "tower", "text+hgnn")  # always in the same colour
_WIDTH = 0.2  # of a bar; groups are one apart

Row = Mapping[str, Any]


def draw_probe(metrics: Mapping[str, Any], path: Path) -> None:
    """Macro-F1 by target on the left, recall by cut-off and segment on the right, with 95 % intervals, as PNG."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _bars(left, metrics["classification"], "target", "macro_f1")
    left.set_title("Predicting an item's label", loc="left")
    left.set_ylabel("macro-F1")
    near = [row for row in metrics["similar"] if row["item_type"] == "all"]
    flat = []
    for row in near:
        for k in CUTOFFS:
            values = {
                name: row[f"recall_at_{k}{end}"] for name, end in (("r", ""), ("r_low", "_low"), ("r_high", "_high"))
            }
            segment = "" if row["segment"] == "all" else "\nunseen items"
            flat.append({"vectors": row["vectors"], "place": f"recall@{k}{segment}", **values})
    _bars(right, flat, "place", "r")
    right.set_title("Finding items that users later share", loc="left")
    right.set_ylabel("recall")
    handles, labels = left.get_legend_handles_labels()
    if not handles:
        handles, labels = right.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=len(_KINDS), frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _bars(axes: Axes, rows: Sequence[Row], group: str, value: str) -> None:
    """A cluster for each ``group``, a bar for each kind of vectors."""
    groups = list(dict.fromkeys(row[group] for row in rows))
    for number, kind in enumerate(_KINDS):
        mine = [row for row in rows if row["vectors"] == kind]
        if not mine:
            continue
        at = np.array([groups.index(row[group]) for row in mine]) + (number - 1.5) * _WIDTH
        height = np.array([row[value] for row in mine])
        ends = [np.maximum(height - [row[f"{value}_low"] for row in mine], 0)]
        ends.append(np.maximum([row[f"{value}_high"] for row in mine] - height, 0))
        axes.bar(at, height, _WIDTH * 0.9, yerr=ends, color=PALETTE[number], label=kind, capsize=2, ecolor="#555555")
    axes.set_xticks(range(len(groups)), groups)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.2)
    axes.set_axisbelow(True)
    if not rows:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "nothing to probe", ha="center", transform=axes.transAxes)
