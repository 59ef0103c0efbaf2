"""Where the HGNN pays: its gain with fewer interactions, and with a shorter training of the two-tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from recsys_ray.evaluation.results import Row
from recsys_ray.report.palette import PALETTE
from recsys_ray.studies.changed_tables import Thinned
from recsys_ray.studies.parts import split_of
from recsys_ray.studies.study import TWO_TOWER, Comparison, Facts, Outcome, Result, Side, Study, Variant

_ONE_IN = (2, 4, 8)
_EPOCHS = (4, 2, 1)
_CHEAP = ("evaluate.baselines=popularity",)  # only the two-tower with and without HGNN is of interest

Points = Mapping[str, tuple[str, str]]  # variant -> its name in a sentence, and below the axis; the most comes first
_DATA: Points = {
    "all": ("all events", "all"),
    **{f"one-in-{n}": (f"1/{n} of the events", f"1/{n}") for n in _ONE_IN},
}
_TRAINING: Points = {
    "until-best": ("all epochs", "all"),
    **{f"epochs-{n}": (f"{n} epoch{'s' if n > 1 else ''}", str(n)) for n in _EPOCHS},
}
_CURVES = (_DATA, _TRAINING)
_SEGMENTS = {
    "warm users": "warm", "users new to a type": "new_to_type", "items unseen in training": "cold_items",
    "the least popular tier": "tier5",
}  # fmt: skip


def _variants(facts: Facts) -> list[Variant]:
    data = [Variant("all", "all events", _CHEAP, ablation=True)]
    for n in _ONE_IN:  # the periods depend on the number of events unless they are given
        name = f"one-in-{n}"
        data.append(Variant(name, _DATA[name][0], (*_CHEAP, *split_of(facts)), table=Thinned(n), ablation=True))
    alike = (*_CHEAP, "two_tower.refit=false")  # one more epoch with more examples
    training = [Variant("until-best", "all epochs", alike, ablation=True)]
    for n in _EPOCHS:
        name, limits = f"epochs-{n}", (f"two_tower.epochs={n}", f"two_tower.patience={n}")
        training.append(Variant(name, _TRAINING[name][0], (*alike, *limits), ablation=True))
    return [*data, *training]


def _comparisons(facts: Facts, models: Sequence[str]) -> list[Comparison]:
    return [
        Comparison(f"{who}, {label}", Side(variant), Side(variant, TWO_TOWER), segments=(segment,),
                   reported="not varied")
        for points in _CURVES for who, segment in _SEGMENTS.items() for variant, (label, _) in points.items()
    ]  # fmt: skip


def _curve(outcomes: Sequence[Outcome], points: Points, segment: str) -> dict[str, Row]:
    """Variant -> what was found, in the order of ``points``, for one segment."""
    found = {o.comparison.ours.variant: o.found for o in outcomes if o.comparison.segments == (segment,)}
    return {variant: row for variant in points if (row := found.get(variant)) is not None}


def _change(most: Row, least: Row) -> tuple[float, float, float]:
    """How much higher the gain is with the least than with the most, and its interval: MOVER, as if the two gains were
    independent. They may be of different queries, so they cannot be paired."""
    change = least["difference"] - most["difference"]
    low = np.hypot(least["difference"] - least["low"], most["high"] - most["difference"])
    high = np.hypot(least["high"] - least["difference"], most["difference"] - most["low"])
    return change, change - float(low), change + float(high)


def _judge(outcomes: Sequence[Outcome], results: Mapping[str, Result]) -> list[str]:
    """Of each curve: how the gain changes from its one end to the other, and where it is not zero."""
    lines = []
    for points in _CURVES:
        curves = {who: _curve(outcomes, points, segment) for who, segment in _SEGMENTS.items()}
        if said := _changes(points, curves):
            (begin, _), *_, (end, _) = points.values()
            lines.append(f"From {begin} to {end} the gain {said}. {_places(points, curves)}")
    return lines


def _changes(points: Points, curves: Mapping[str, Mapping[str, Row]]) -> str:
    """For whom the gain rises, falls, or does neither."""
    most, *_, least = points
    ways: dict[str, list[str]] = {"rises": [], "falls": [], "does not change significantly": []}
    for who, curve in curves.items():
        if most in curve and least in curve:
            change, low, high = _change(curve[most], curve[least])
            way = "rises" if low > 0 else "falls" if high < 0 else "does not change significantly"
            ways[way].append(f"for {who} ({change:+.4f}, {low:+.4f} to {high:+.4f})")
    return "; it ".join(f"{way} {_and(people)}" for way, people in ways.items() if people)


def _places(points: Points, curves: Mapping[str, Mapping[str, Row]]) -> str:
    """Where the gain's interval is above zero, and where below."""
    sure: dict[str, list[str]] = {"above": [], "below": []}
    for who, curve in curves.items():
        above = [points[variant][0] for variant, found in curve.items() if found["low"] > 0]
        below = [points[variant][0] for variant, found in curve.items() if found["high"] < 0]
        for side, places in (("above", above), ("below", below)):
            if places:
                sure[side].append(f"for {who} with {_and(places)}")
    where = "; it is ".join(f"{side} zero {_and(places)}" for side, places in sure.items() if places)
    return f"It is {where}." if where else "Its interval includes zero everywhere."


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _draw(path: Path, outcomes: Sequence[Outcome], results: Mapping[str, Result]) -> None:
    """The gain with its interval: a row for each curve, a column for each segment."""
    counts = results["all"].counts["ingest"][0]
    per_item = counts["rows"]["interactions"]["kept"] / sum(counts["items_per_type"])
    units = f"events (all: {per_item:.1f} an item)", "epochs of the two-tower"
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11.0, 5.6), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(_CURVES), len(_SEGMENTS), sharey="col")
        for unit, points, row in zip(units, _CURVES, panels, strict=True):
            for (who, segment), panel in zip(_SEGMENTS.items(), row, strict=True):
                curve = _curve(outcomes, points, segment)
                gain, low, high = (
                    np.array([found[n] for found in curve.values()]) for n in ("difference", "low", "high")
                )
                place = [list(points).index(variant) for variant in curve]
                ends = np.maximum([gain - low, high - gain], 0.0)
                panel.errorbar(place, gain, yerr=ends, fmt="o-", color=PALETTE[2], capsize=3)
                panel.axhline(0, color="black", linewidth=0.8)
                panel.set_xticks(range(len(points)), [tick for _, tick in points.values()])
                panel.set_xlim(-0.4, len(points) - 0.6)
                panel.set_xlabel(unit)
                panel.set_title(who, fontsize=9)
                panel.grid(axis="y", alpha=0.2)
            row[0].set_ylabel("gain in HR@10, 95 % interval")
        figure.suptitle("What the HGNN adds to the two-tower", x=0.01, ha="left")
        figure.savefig(path, dpi=130, metadata={"Software": None})


AMOUNT = Study(
    name="amount",
    title="Amount of data and of training",
    question="Does the HGNN add more to the two-tower where items have fewer interactions, or where training is short?",
    reported="Nothing: the papers vary neither.",
    how="The gain is HR@10 of 2T-HGNN minus HR@10 of the same two-tower without HGNN, trained on the same data.\n\n"
    "Fewer events: a random part of the rows before the test period; each smaller part lies inside the larger ones. "
    "The truths are the same everywhere, but not the segments: with fewer events fewer users are warm, and more users "
    "are new to a type and more items unseen. Validation decides how long each two-tower is trained.\n\n"
    "Fewer epochs: both two-towers are trained this long and keep their best epoch; with all epochs, until validation "
    "stops each of them. The final epoch with the validation period's examples is left out. The HGNN is the same.\n\n"
    "Changes from one end of a curve to the other: the two gains count as independent. Of so many intervals a few "
    "exclude zero by chance: one in twenty where nothing differs.",
    variants=_variants,
    comparisons=_comparisons,
    judge=_judge,
    draw=_draw,
    needs_dates=True,
)
