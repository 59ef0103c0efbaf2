"""What the other stages wrote below a run's folder, for the report: data, training, cost, tuning, software.

Missing or damaged files are left out of the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recsys_ray.core.clock import DAY
from recsys_ray.report.labels import name_of
from recsys_ray.scoring.scorer import SCORE
from recsys_ray.storage.artifacts import json_or_none
from recsys_ray.storage.outputs import current_folder

STAGES = ("ingest", "featurize", "graph", "hgnn", "two_tower", "index", "evaluation")
_CURVES = {"hgnn": "HGNN", "two_tower/hgnn": "Two-tower of 2T-HGNN", "two_tower/text_only": "Two-tower without HGNN"}
_TITLES = {"valid_hr_at_10": "validation HR@10", "valid_ndcg_at_100": "validation NDCG@100"}
_BINS = 180  # bars of the plot of events over time, at most
_VOCABULARIES = ("languages", "countries", "categories")
_MOMENTS = ("valid_from", "test_from", "end")


def current(run_dir: Path, stage: str) -> Path:
    """The stage's current output, or a path where nothing is."""
    return current_folder(run_dir / stage) or run_dir / stage / "none"


def manifests(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Folder of a stage -> its manifest, in the order of the stages."""
    found = {stage: json_or_none(current(run_dir, stage) / "manifest.json") for stage in STAGES}
    return {stage: manifest for stage, manifest in found.items() if isinstance(manifest, dict)}


def costs(found: Mapping[str, Mapping[str, Any]], spent: tuple[float, float] | None) -> list[dict[str, Any]]:
    """Seconds and peak memory of each stage. ``spent``: those of an evaluation that is not published yet."""
    known = {stage: (manifest.get("seconds"), manifest.get("peak_memory_mb")) for stage, manifest in found.items()}
    if spent is not None:
        known["evaluation"] = spent
    return [{"stage": stage, "seconds": cost[0], "peak_mb": cost[1]} for stage, cost in known.items()]


def duration(seconds: float | None) -> str:
    """3 s, 4:05 min or 1:02:03 h."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d} h"
    return f"{minutes}:{rest:02d} min" if minutes else f"{whole} s"


def has_dates(counts: Mapping[str, Any]) -> bool:
    """Is the split one of time? In leave-one-out, moments only say what comes after what."""
    return "test_from" in counts and counts.get("protocol", "time") == "time"


def facts(counts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What ingest counted, as (name, value); the rows of its tables apart."""
    found: list[tuple[str, str]] = []
    for name, value in counts.items():
        if name in _MOMENTS:
            found += [(name, moment(value))] if has_dates(counts) else []
        elif name == "last_event":
            found.append((name, moment(value)))
        elif name in _VOCABULARIES:
            found.append((name, f"{len(value):,}"))
        elif name == "items_per_type":
            found += [(f"items: {t}", f"{n:,}") for t, n in zip(counts.get("item_types", []), value, strict=False)]
        elif name not in ("days", "rows", "item_types"):  # a plot, a table, and with the number of items
            found += _flatten(name, value)
    return found


def moment(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _flatten(name: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [fact for key, inner in value.items() for fact in _flatten(f"{name}: {key}", inner)]
    if isinstance(value, list):
        return [(name, ", ".join(str(part) for part in value[:20]) + (", ..." if len(value) > 20 else ""))]
    return [(name, f"{value:,}" if isinstance(value, int) else str(value))]


def timeline(counts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Positive events over time, in at most ``_BINS`` spans of whole days, and where the periods begin.

    Moments are unix seconds.
    """
    days = counts.get("days")
    if not days:
        return None
    first, last = days[0][0], days[-1][0]
    width = -(-(last - first + 1) // _BINS)
    totals = [0] * (-(-(last - first + 1) // width))
    for day, events in days:
        totals[(day - first) // width] += events
    periods = {name: counts[name] for name in _MOMENTS} if has_dates(counts) else {}
    return {"from": first * DAY, "days": width, "events": totals, **periods}


def training(run_dir: Path) -> list[dict[str, Any]]:
    """What each training recorded of its epochs: one plot for the losses, one for each other figure."""
    plots: list[dict[str, Any]] = []
    for place, name in _CURVES.items():
        stage, _, variant = place.partition("/")
        epochs = json_or_none(current(run_dir, stage) / variant / "metrics.json")
        if isinstance(epochs, dict):
            epochs = epochs.get("epochs")
        series: dict[str, list[tuple[float, float]]] = {}
        for number, epoch in enumerate(e for e in epochs or [] if isinstance(e, dict)):
            for key, value in epoch.items():
                if key not in ("epoch", "seconds", "steps") and _is_number(value):
                    series.setdefault(key, []).append((epoch.get("epoch", number) + 1, value))
        losses = {key: points for key, points in series.items() if "loss" in key}
        if losses:
            plots.append({"model": name, "title": "loss", "best": "low", "series": losses})
        others = {key: points for key, points in series.items() if key not in losses}
        plots += [
            {"model": name, "title": _TITLES.get(key, key.replace("_", " ")), "best": "high", "series": {key: p}}
            for key, p in others.items()
        ]
    return plots


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def tuning(evaluation: Path) -> list[dict[str, str]]:
    """What the tuning of the baselines chose (``tuning.json``: model -> params, hr_at_10, note, trials), a row a
    model."""
    found = json_or_none(evaluation / "tuning.json")
    rows = []
    for model, search in found.items() if isinstance(found, dict) else ():
        trials = search.get("trials") or []
        seconds = sum(trial.get("seconds") or 0 for trial in trials)
        hit = search.get("hr_at_10")
        rows.append(
            {
                "model": name_of(model).full,
                "chosen": _plain(search.get("params")),
                "hr_at_10": "-" if hit is None else f"{hit:.4f}",
                "trials": search.get("note") or f"{len(trials)}",
                "time": duration(seconds) if trials else "-",
            }
        )
    return rows


def told_by_data(run_dir: Path) -> list[tuple[str, str]]:
    """What the two-tower stage chose by the data, as (name, value): ``spec.json`` and ``score.json`` of 2T-HGNN."""
    folder = current(run_dir, "two_tower") / "hgnn"
    spec, score = json_or_none(folder / "spec.json"), json_or_none(folder / SCORE) or {}
    if not isinstance(spec, dict):
        return []

    def of_types(values: Any, form: str) -> str:
        named = zip(spec.get("item_types") or [], values or [], strict=False)
        return ", ".join(f"{name} {'from its own events' if v is None else format(v, form)}" for name, v in named)

    recent = _plain(spec.get("recent") or [])
    weight = (score.get("memory") or 0.0) / (score.get("temperature") or 1.0)
    ridge, half_life = _plain(score.get("ridge")), score.get("half_life")
    fades = "the whole history alike" if half_life is None else f"half-life {_plain(half_life)} places"
    memory = f"weight {weight:.2g}, ridge {ridge}, {fades}"
    if texts := score.get("text_users"):
        memory += f", a text stands for {_plain(texts)} users"
    found = {
        "User tower reads the last item": "yes" if spec.get("last_item") else "no",
        "and means over the latest events, half-lives in places": recent,
        "Share of learned item vectors hidden in training": _plain(spec.get("id_dropout")),
        "Co-interaction memory": memory if weight else "none",
        "Weight of trends": of_types(score.get("trends"), ".2g") or "none",
        "Share of choices given to unseen items in the test": of_types(score.get("unseen_share"), ".2%"),
    }
    return [(name, value) for name, value in found.items() if value]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(part) for part in value)
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def other_software(found: Mapping[str, Mapping[str, Any]], here: Mapping[str, str]) -> list[str]:
    """Sentences on stages that were run with other versions than those that drew the report."""
    told = []
    for stage, manifest in found.items():
        versions = manifest.get("software", {})
        apart = [f"{name} {version}" for name, version in versions.items() if here.get(name, version) != version]
        if apart:
            told.append(f"{stage} ran with {', '.join(apart)}")
    return told
