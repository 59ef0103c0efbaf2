"""The results for people: tables on the terminal and one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from recsys_ray.config import Config
from recsys_ray.evaluation.labels import (
    SEGMENT_NAMES,
    SEGMENT_NOTES,
    Row,
    contest,
    main_segment,
    name_of,
    ordered,
    select,
)
from recsys_ray.report import run_facts
from recsys_ray.report.data import headline, interval, page_data, percent, read_extras, safe_json
from recsys_ray.storage.artifacts import software

_SCRIPTS = ("core.js", "tables.js", "forest.js", "plots.js", "map.js", "examples.js", "start.js")


def print_table(metrics: Sequence[Row], console: Console) -> None:
    """Print the comparison for warm users over all types, then HR@10 by item type and by segment."""
    if not metrics:
        console.print("No user of the test period can be evaluated: there are no figures.")
        return
    segment = main_segment(metrics)
    main = select(metrics, item_type="all", segment=segment)
    with_oracle = any(row.get("share_of_oracle") is not None for row in metrics)
    of = f"{main[0]['users']:,} users{_mean_of(main[0])}"
    title = f"{SEGMENT_NAMES[segment].capitalize()}, all item types ({of})"
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
    types = [name for name in ordered(metrics, "item_type") if name != "all"]
    _small_table(metrics, console, "HR@10 by item type", "item_type", types, segment=segment)
    _small_table(metrics, console, "HR@10 by segment", "segment", list(SEGMENT_NAMES), item_type="all")


def _small_table(
    metrics: Sequence[Row], console: Console, title: str, over: str, names: Sequence[str], **fixed: str
) -> None:
    rows = select(metrics, **fixed)
    names = [name for name in names if any(row[over] == name for row in rows)]
    if not names:
        return
    models = ordered(rows, "model")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column(over.replace("_", " "), no_wrap=True)
    for model in models:
        table.add_column(_short(model), justify="right", no_wrap=True)
    value = {(row["model"], row[over]): f"{row['hr_at_10']:.4f}".removeprefix("0") for row in rows}  # fits 80 columns
    for name in names:
        table.add_row(_plain(name), *(value.get((model, name), "-") for model in models))
    console.print(table)


def _mean_of(row: Row) -> str:
    return f", mean of {len(row['seeds'])} seeds" if row.get("seeds") else ""


def _short(model: str) -> str:
    """A model's name where there is little room."""
    return _plain(name_of(model).short)


def _plain(text: str) -> str:
    """Rich reads square brackets as markup."""
    return text.replace("[", r"\[")


def write_report(
    path: Path,
    metrics: Sequence[Row],
    config: Config,
    run_dir: Path,
    evaluation: Path | None = None,
    spent: Callable[[], tuple[float, float]] | None = None,
) -> None:
    """Write the page. What the stages left below ``run_dir`` is shown as far as it is there.

    Args:
        metrics: rows of metrics.json, of one seed or pooled over several (``seeds``, ``per_seed``).
        evaluation: where examples, map and so on lie; default: the run's own evaluation.
        spent: seconds and peak MB of an evaluation that is still at work.
    """
    evaluation = evaluation or run_dir / "evaluation"
    found = run_facts.manifests(run_dir)
    counts = found.get("ingest", {}).get("counts", {})
    segment = main_segment(metrics)
    extras = read_extras(evaluation)
    data = page_data(metrics, run_facts.training(run_dir), run_facts.timeline(counts), extras)
    data["dated"] = run_facts.has_dates(counts)
    served, rival = contest(metrics)
    versions = software()
    page = (
        _environment()
        .get_template("report.html")
        .render(
            data=Markup(safe_json(data)),
            headline=headline(metrics, extras.get("differences") or []),
            main=sorted(select(metrics, item_type="all", segment=segment), key=lambda row: -row["hr_at_10"]),
            rows=metrics,
            segment=segment,
            served=served,
            rival=rival,
            models=ordered(metrics, "model"),
            types=ordered(metrics, "item_type"),
            name_of=name_of,
            segment_names=SEGMENT_NAMES,
            segment_notes=SEGMENT_NOTES,
            seeds=_seeds(metrics, config),
            extras=extras,
            curves=data["curves"],
            facts=run_facts.facts(counts),
            counts=counts,
            moment=run_facts.moment,
            dated=run_facts.has_dates(counts),
            costs=run_facts.costs(found, spent() if spent else None),
            duration=run_facts.duration,
            tuning=run_facts.tuning(evaluation),
            told=run_facts.told_by_data(run_dir),
            config=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
            software=versions,
            other_software=run_facts.other_software(found, versions),
            run_name=Path(config.run_dir).name,
            with_oracle=any(row.get("share_of_oracle") is not None for row in metrics),
            interval=interval,
            percent=percent,
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _environment() -> Environment:
    loader = PackageLoader("recsys_ray.report", "page")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )

    def source(name: str) -> Markup:
        return Markup(loader.get_source(environment, name)[0])

    environment.globals["style"] = lambda: source("style.css")
    environment.globals["script"] = lambda: Markup("\n").join(source(name) for name in _SCRIPTS)
    return environment


def _seeds(metrics: Sequence[Row], config: Config) -> list[Any]:
    """The training seeds behind the figures."""
    seeds = metrics[0].get("seeds") if metrics else None
    if seeds is None:
        return [config.seed]
    return list(seeds) if isinstance(seeds, list) else [f"{seeds} seeds"]
