"""Writes the results as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from recsys_ray.config import Config
from recsys_ray.report import run_facts
from recsys_ray.report.data import headline, interval, page_data, percent, read_extras, safe_json
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
from recsys_ray.storage.artifacts import software

_SCRIPTS = ("core.js", "tables.js", "forest.js", "plots.js", "map.js", "examples.js", "start.js")


def write_report(
    path: Path,
    metrics: Sequence[Row],
    config: Config,
    run_dir: Path,
    evaluation: Path | None = None,
    spent: Callable[[], tuple[float, float]] | None = None,
) -> None:
    """Write the page. It shows whatever stage outputs exist below ``run_dir``.

    Args:
        metrics: rows of metrics.json, of one seed or pooled over several (``seeds``, ``per_seed``).
        evaluation: where examples, map and so on lie; default: the run's own evaluation.
        spent: seconds and peak MB of an evaluation that is still running.
    """
    evaluation = evaluation or run_facts.current(run_dir, "evaluation")
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
