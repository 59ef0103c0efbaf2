"""Plots of the report as inline SVG: no external reference, colours that follow the page's light or dark theme."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Distinguishable with colour blindness, and on white as on near-black (after Okabe and Ito).
PALETTE = ("#8a8f98", "#d98a00", "#2f9fd8", "#00a37a", "#c46bae", "#7a6ff0", "#d1495b", "#4f7d75", "#a08a2e", "#5aa469")
_INK = "#010203"  # stands for the page's text colour until the SVG is inlined
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold dollar signs
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
}

Row = Mapping[str, Any]


def color_of(models: Sequence[str]) -> dict[str, str]:
    """The same colour for a model in every plot."""
    return {model: PALETTE[k % len(PALETTE)] for k, model in enumerate(models)}


def bars(rows: Sequence[Row], group: str, groups: Sequence[str], models: Sequence[str], title: str) -> str:
    """HR@10 with 95 % intervals: a cluster of bars for each value of ``group``, a bar for each model."""
    by_place = {(row[group], row["model"]): row for row in rows}
    groups = [name for name in groups if any((name, model) in by_place for model in models)]
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(9.0, 0.6 + 0.19 * len(groups) * (len(models) + 1.5))
        ticks = []
        for number, name in enumerate(groups):
            base = number * (len(models) + 1.5)
            ticks.append(base + (len(models) - 1) / 2)
            for place, model in enumerate(models):
                if row := by_place.get((name, model)):
                    value = row["hr_at_10"]
                    # An interval need not hold the mean (few users); a bar's whisker cannot be negative.
                    ends = [max(value - row["hr_at_10_low"], 0.0)], [max(row["hr_at_10_high"] - value, 0.0)]
                    color = color_of(models)[model]
                    axes.barh(base + place, value, 0.85, xerr=ends, color=color, ecolor=_INK, capsize=1.5)
        axes.set_yticks(ticks, groups)
        axes.invert_yaxis()
        axes.set_xlabel("HR@10")
        _finish(axes, "x")
        _legend(axes, color_of(models))
        return _svg(figure, title)


def tiers(rows: Sequence[Row], names: Sequence[str], models: Sequence[str], title: str) -> str:
    """HR@10 over popularity tiers, head on the left, a line for each model."""
    by_place = {(row["segment"], row["model"]): row for row in rows}
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(9.0, 3.6)
        for model in models:
            here = [k for k, name in enumerate(names) if (name, model) in by_place]
            found = [by_place[names[k], model] for k in here]
            color = color_of(models)[model]
            axes.plot(here, [r["hr_at_10"] for r in found], marker="o", markersize=4, color=color)
            low, high = [r["hr_at_10_low"] for r in found], [r["hr_at_10_high"] for r in found]
            axes.fill_between(here, low, high, color=color, alpha=0.12, linewidth=0)
        labels = [f"tier {k + 1}" + {0: "\n(head)", len(names) - 1: "\n(tail)"}.get(k, "") for k in range(len(names))]
        axes.set_xticks(range(len(names)), labels)
        axes.set_ylabel("HR@10")
        _finish(axes, "y")
        _legend(axes, color_of(models))
        return _svg(figure, title)


def scatter(rows: Sequence[Row], models: Sequence[str], title: str) -> str:
    """Accuracy against coverage: a point for each model."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(9.0, 3.8)
        for row in rows:
            axes.scatter(row["coverage_at_100"], row["hr_at_10"], s=60, color=color_of(models)[row["model"]])
        axes.margins(x=0.15, y=0.15)
        axes.set_xlabel("coverage@100: share of the catalogue that anyone is shown")
        axes.set_ylabel("HR@10")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _finish(axes, "both")
        _legend(axes, color_of(models))
        return _svg(figure, title)


def curve(epochs: Sequence[float], values: Sequence[float], ylabel: str, title: str) -> str:
    """A line over epochs."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(5.0, 2.6)
        axes.plot(epochs, values, marker="o", markersize=3, color=PALETTE[2])
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(ylabel)
        _finish(axes, "y")
        return _svg(figure, title)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Sizes in inches. Without pyplot: nothing global, nothing to close."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _finish(axes: Axes, grid: str) -> None:
    axes.grid(axis=grid, color=_INK, alpha=0.15, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def _legend(axes: Axes, colors: Mapping[str, str]) -> None:
    """Above the plot, so that it never covers data."""
    handles = [Patch(color=color) for color in colors.values()]
    axes.figure.legend(handles, list(colors), loc="outside upper left", ncols=min(max(len(colors), 1), 4), fontsize=9)


def _svg(figure: Figure, title: str) -> str:
    """The figure as an ``<svg>`` element that can stand in HTML: sized by the page, named for screen readers."""
    file = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title}):  # the same ids every time, others in every figure
        figure.savefig(file, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)  # not needed inside HTML
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same in every figure, and never referred to
    text = text.replace(_INK, "currentColor")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    name = _escape(title)
    return text.replace("<svg", f'<svg role="img" aria-label="{name}"', 1).replace(">", f"><title>{name}</title>", 1)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
