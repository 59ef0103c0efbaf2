"""Data of the report's page: the figures of metrics.json, and what is shown beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys_ray.evaluation.results import DIFFERENCES
from recsys_ray.report.examples import EXAMPLES, POPULARITY
from recsys_ray.report.item_map import MAP
from recsys_ray.report.labels import (
    SEGMENT_NAMES,
    SEGMENT_NOTES,
    Row,
    contest,
    main_segment,
    name_of,
    ordered,
    select,
)
from recsys_ray.storage.artifacts import json_or_none

_COLUMNS = (
    "model", "item_type", "segment", "users", "queries", "hr_at_10", "hr_at_10_low", "hr_at_10_high", "ndcg_at_10",
    "mrr_at_100", "mrr_at_100_hits", "coverage_at_100", "share_of_oracle", "per_seed",
)  # fmt: skip
_DIFFERENCE_COLUMNS = ("model", "against", "item_type", "segment", "difference", "low", "high", "relative", "per_seed")


def read_extras(evaluation: Path) -> dict[str, Any]:
    """What the evaluation wrote in addition to metrics.json; None for missing files."""
    files = {"examples": EXAMPLES, "popularity": POPULARITY, "map": MAP, "differences": DIFFERENCES}
    return {name: json_or_none(evaluation / file) for name, file in files.items()}


def page_data(
    metrics: Sequence[Row], curves: list[dict[str, Any]], timeline: dict[str, Any] | None, extras: Mapping[str, Any]
) -> dict[str, Any]:
    """All that the page's scripts draw from, for JSON."""
    served, rival = contest(metrics)
    models = [
        {"id": model, "name": name_of(model).full, "note": name_of(model).note, "role": name_of(model).role}
        for model in ordered(metrics, "model")
    ]
    present = ordered(metrics, "segment")
    return {
        "models": models,
        "served": served,
        "rival": rival,
        "types": ordered(metrics, "item_type"),
        "segment": main_segment(metrics),
        "segments": [
            {"id": name, "name": SEGMENT_NAMES[name], "note": SEGMENT_NOTES[name]}
            for name in SEGMENT_NAMES
            if name in present
        ],
        "columns": _COLUMNS,
        "rows": [[_rounded(row.get(name)) for name in _COLUMNS] for row in metrics],
        "differenceColumns": _DIFFERENCE_COLUMNS,
        "differences": [
            [_rounded(row.get(name)) for name in _DIFFERENCE_COLUMNS] for row in extras.get("differences") or []
        ],
        "curves": curves,
        "timeline": timeline,
        **{name: extras.get(name) for name in ("popularity", "map", "examples")},
    }


def _rounded(value: Any) -> Any:
    """Six digits are more than is ever shown."""
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 6) if isinstance(value, float) else value


def safe_json(value: Any) -> str:
    """JSON that can stand in a ``<script>`` element: no title can end it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@dataclass(frozen=True)
class Headline:
    """The result in a sentence or two, and the two rows that it is about."""

    verdict: str
    detail: str
    best: Row
    served: Row | None
    rival: Row | None


def headline(metrics: Sequence[Row], differences: Sequence[Row]) -> Headline | None:
    """The main result, worded as cautiously as the intervals require; None without figures."""
    segment = main_segment(metrics)
    main = {row["model"]: row for row in select(metrics, item_type="all", segment=segment)}
    scored = [row for model, row in main.items() if name_of(model).role != "oracle"]
    if not scored:
        return None
    best = max(scored, key=lambda row: row["hr_at_10"])
    ours, theirs = contest(metrics)
    served, rival = main.get(ours or ""), main.get(theirs or "")
    if served is None or rival is None:
        verdict = f"{name_of(best['model']).full} has a hit in {percent(best['hr_at_10'])} of lists."
        return Headline(verdict, "", best, served, rival)
    names = name_of(served["model"]).full, name_of(rival["model"]).full
    paired = next(
        iter(select(differences, model=ours or "", against=theirs or "", item_type="all", segment=segment)), None
    )
    if paired is not None:
        low, high = paired["low"], paired["high"]
        detail = f"Difference on the same lists: {signed(paired['difference'])} ({signed(low)} to {signed(high)})."
    else:
        low, high = served["hr_at_10_low"] - rival["hr_at_10_high"], served["hr_at_10_high"] - rival["hr_at_10_low"]
        detail = "Their intervals do not overlap." if low > 0 or high < 0 else "Their intervals overlap."
    if low > 0:
        verdict = f"{names[0]} leads the best baseline, {names[1]}"
    elif high < 0:
        verdict = f"{names[0]} is behind the best baseline, {names[1]}"
    else:
        verdict = f"{names[0]} and the best baseline, {names[1]}, do not differ clearly"
    verdict += f": a hit in {percent(served['hr_at_10'])} of lists against {percent(rival['hr_at_10'])}."
    return Headline(verdict, detail, best, served, rival)


def interval(row: Row) -> str:
    """The 95 % interval of HR@10."""
    return f"{row['hr_at_10_low']:.4f} to {row['hr_at_10_high']:.4f}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "\u2212")
