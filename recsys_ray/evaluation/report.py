"""The results for people: tables on the terminal and one self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from recsys_ray.artifacts import software
from recsys_ray.config import Config
from recsys_ray.data.split import is_leave_one_out
from recsys_ray.evaluation import plots
from recsys_ray.evaluation.segments import TIERS

Row = Mapping[str, Any]

STAGES = ("ingest", "featurize", "graph", "hgnn", "two_tower", "index")
SEGMENT_NAMES = {
    "all": "all users",
    "warm": "warm users",
    "new_to_type": "new to the type",
    "cold": "cold users",
    "cold_items": "items unseen in training",
    **{f"tier{k + 1}": f"popularity tier {k + 1}" for k in range(TIERS)},
}
_TIER_NAMES = [f"tier{k + 1}" for k in range(TIERS)]
SHORT_NAMES = {
    "popularity": "pop.",
    "item_knn": "item-kNN",
    "llm_knn": "LLM-kNN",
    "ials": "iALS",
    "hgnn": "HGNN",
    "two_tower_text_only": "2T",
    "2t_hgnn": "2T-HGNN",
}
MODEL_NOTES = {
    "popularity": "Most positive events in the window before the test period.",
    "item_knn": "Cosine similarity of co-occurrence, summed over the user's items.",
    "llm_knn": "Nearest items to the mean text vector of the user's items.",
    "ials": "Implicit ALS, tuned on the validation period.",
    "hgnn": "Nearest items to the mean HGNN embedding of the user's items.",
    "two_tower_text_only": "The two-tower without the HGNN's embeddings.",
    "2t_hgnn": "HGNN and two-tower together: the model that is served.",
    "oracle": "The demo world's own ranking by true taste: no recommender can expect more.",
}


def print_table(metrics: Sequence[Row], console: Console) -> None:
    """Print the comparison for warm users over all types, then HR@10 by item type and by segment."""
    if not metrics:
        console.print("No user of the test period can be evaluated: there are no figures.")
        return
    main = _select(metrics, item_type="all", segment=_main_segment(metrics))
    with_oracle = any(row.get("share_of_oracle") is not None for row in metrics)
    of = f"{main[0]['users']:,} users{_seeds(main[0])}"
    title = f"{SEGMENT_NAMES[_main_segment(metrics)].capitalize()}, all item types ({of})"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    for name in ("model", "HR@10", "95 % interval", "NDCG@10", "MRR", "cov.@100"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    if with_oracle:
        table.add_column("oracle %", justify="right", no_wrap=True)
    best = max((row["hr_at_10"] for row in main if row["model"] != "oracle"), default=0.0)
    for row in main:
        cells = [_short(row["model"]), f"{row['hr_at_10']:.4f}", interval(row).replace(" to ", "-")]
        cells += [f"{row['ndcg_at_10']:.4f}", f"{row['mrr_at_100']:.4f}", f"{row['coverage_at_100']:.1%}"]
        if with_oracle:
            cells.append(percent(row.get("share_of_oracle")))
        table.add_row(*cells, style="bold" if row["hr_at_10"] == best and row["model"] != "oracle" else None)
    console.print(table)
    types = [name for name in _ordered(metrics, "item_type") if name != "all"]
    _small_table(metrics, console, "HR@10 by item type", "item_type", types, segment=_main_segment(metrics))
    _small_table(metrics, console, "HR@10 by segment", "segment", list(SEGMENT_NAMES), item_type="all")


def _small_table(
    metrics: Sequence[Row], console: Console, title: str, over: str, names: Sequence[str], **fixed: str
) -> None:
    rows = _select(metrics, **fixed)
    names = [name for name in names if any(row[over] == name for row in rows)]
    if not names:
        return
    models = _ordered(rows, "model")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column(over.replace("_", " "), no_wrap=True)
    for model in models:
        table.add_column(_short(model), justify="right", no_wrap=True)
    value = {(row["model"], row[over]): f"{row['hr_at_10']:.4f}".removeprefix("0") for row in rows}  # fits 80 columns
    for name in names:
        table.add_row(_plain(name), *(value.get((model, name), "-") for model in models))
    console.print(table)


def _seeds(row: Row) -> str:
    return f", mean of {len(row['seeds'])} seeds" if row.get("seeds") else ""


def _short(model: str) -> str:
    """A model's name where there is little room."""
    return SHORT_NAMES.get(model, _plain(model))


def write_report(path: Path, metrics: Sequence[Row], config: Config, run_dir: Path) -> None:
    """Write the page. What the other stages left below ``run_dir`` is shown as far as it is there."""
    environment = Environment(
        loader=PackageLoader("recsys_ray.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    manifests = {stage: found for stage in STAGES if (found := _read(run_dir / stage / "manifest.json"))}
    models = _ordered(metrics, "model")
    segment = _main_segment(metrics)
    page = environment.get_template("report.html").render(
        models=[(model, MODEL_NOTES.get(model, "")) for model in models],
        main=_select(metrics, item_type="all", segment=segment),
        segment=SEGMENT_NAMES[segment],
        figures=_figures(metrics, models, segment),
        curves=_training_curves(run_dir),
        rows=metrics,
        segment_names=SEGMENT_NAMES,
        facts=_facts(manifests.get("ingest", {})),
        stages=_stages(manifests),
        config=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        software=software(),
        seed=config.seed,
        with_oracle=any(row.get("share_of_oracle") is not None for row in metrics),
        interval=interval,
        percent=percent,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def interval(row: Row) -> str:
    """The 95 % interval of HR@10."""
    return f"{row['hr_at_10_low']:.4f} to {row['hr_at_10_high']:.4f}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _select(metrics: Sequence[Row], **fixed: str) -> list[Row]:
    return [row for row in metrics if all(row[name] == value for name, value in fixed.items())]


def _ordered(metrics: Sequence[Row], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in metrics))


def _main_segment(metrics: Sequence[Row]) -> str:
    """Warm users, or everyone where nobody is warm."""
    return "warm" if any(row["segment"] == "warm" for row in metrics) or not metrics else "all"


def _plain(text: str) -> str:
    """Rich reads square brackets as markup."""
    return text.replace("[", r"\[")


def _figures(metrics: Sequence[Row], models: list[str], segment: str) -> list[tuple[str, str, Markup]]:
    """(heading, explanation, plot)"""
    if not metrics:
        return []
    types = [name for name in _ordered(metrics, "item_type") if name != "all"]
    named = [{**row, "segment_name": SEGMENT_NAMES[row["segment"]]} for row in _select(metrics, item_type="all")]
    shown = [SEGMENT_NAMES[name] for name in SEGMENT_NAMES if name not in _TIER_NAMES]
    of_segment = _select(metrics, segment=segment)
    drawn = [
        (
            "By item type",
            f"HR@10 for {SEGMENT_NAMES[segment]}, with 95 % intervals.",
            plots.bars(of_segment, "item_type", ["all", *types], models, "HR@10 by item type"),
        ),
        (
            "By segment",
            "HR@10 over all item types. New to the type: users known from other types only. Cold users have no "
            "earlier event at all. Items unseen in training: only such items count as relevant, for warm users.",
            plots.bars(named, "segment_name", shown, models, "HR@10 by segment"),
        ),
        (
            "Popularity tiers",
            "Each type's items, ranked by popularity and cut so that every tier holds a fifth of the earlier events. "
            "Only items of the tier count as relevant, for warm users.",
            plots.tiers(_select(metrics, item_type="all"), _TIER_NAMES, models, "HR@10 by popularity tier"),
        ),
        (
            "Accuracy against coverage",
            "Up: more users find something among ten. Right: more of the catalogue is shown to someone among a "
            "hundred. A recommender of popular items is far left.",
            plots.scatter(_select(of_segment, item_type="all"), models, "HR@10 against coverage@100"),
        ),
    ]
    return [(heading, text, Markup(svg)) for heading, text, svg in drawn]


def _training_curves(run_dir: Path) -> list[tuple[str, Markup]]:
    """(heading, plot) for what training recorded: loss, and each validation figure, over epochs."""
    places = {"HGNN": "hgnn", "two-tower (2T-HGNN)": "two_tower/hgnn", "two-tower (text only)": "two_tower/text_only"}
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for name, place in places.items():
        epochs = _read(run_dir / place / "metrics.json")
        if isinstance(epochs, dict):
            epochs = epochs.get("epochs", [])
        for number, epoch in enumerate(e for e in epochs or [] if isinstance(e, dict)):
            for key, value in epoch.items():
                if (
                    key in ("epoch", "seconds", "steps")
                    or isinstance(value, bool)
                    or not isinstance(value, int | float)
                ):
                    continue
                at, values = found.setdefault(key, {}).setdefault(name, ([], []))
                at.append(epoch.get("epoch", number))
                values.append(value)
    # Losses of different models are on different scales: a plot for each model and figure.
    return [
        (f"{name}: {key}", Markup(plots.curve(*line, key, f"{name}: {key}")))
        for key in sorted(found, key=lambda key: ("loss" not in key, key))
        for name, line in found[key].items()
    ]


def _facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was read, from the counts of the ingest stage."""
    counts = manifest.get("counts", {})
    facts: list[tuple[str, str]] = []
    for name in ("last_event",) if is_leave_one_out(counts) else ("valid_from", "test_from", "end"):
        if name in counts:
            facts.append((name, datetime.fromtimestamp(counts[name], UTC).strftime("%Y-%m-%d %H:%M UTC")))
    for name, value in counts.items():
        if name in ("valid_from", "test_from", "end", "last_event", "days", "languages", "countries", "categories"):
            continue
        facts += _flatten(name, value)
    return facts


def _flatten(name: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [fact for key, inner in value.items() for fact in _flatten(f"{name}: {key}", inner)]
    if isinstance(value, list):
        return [(name, ", ".join(str(part) for part in value[:20]) + (", ..." if len(value) > 20 else ""))]
    return [(name, f"{value:,}" if isinstance(value, int) else str(value))]


def _stages(manifests: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """(stage, time, peak memory) as far as the manifests tell."""
    rows = []
    for stage, manifest in manifests.items():
        seconds, peak = manifest.get("seconds"), manifest.get("peak_memory_mb")
        time = "-" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
        rows.append((stage, time, "-" if peak is None else f"{peak:,.0f} MB"))
    return rows


def _read(path: Path) -> Any:
    """JSON, or nothing where there is none: the report shows what there is."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
