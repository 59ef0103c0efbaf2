"""A study's page (Markdown), its plot (PNG) and its figures (JSON)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from recsys_ray.evaluation.results import EVERY_TYPE, MAIN
from recsys_ray.report.palette import PALETTE
from recsys_ray.storage.artifacts import software, write_json
from recsys_ray.studies.compare import conclusions, overall, sign
from recsys_ray.studies.study import Facts, Outcome, Result, Study, Variant

_TRAINED = ("hgnn", "two-tower")


def write_page(
    out: Path,
    study: Study,
    facts: Facts,
    variants: Sequence[Variant],
    results: Mapping[str, Result],
    outcomes: Sequence[Outcome],
    seeds: Sequence[int],
    command: str,
    data: str,
) -> list[str]:
    """Write ``<name>.md``, ``<name>.png`` and ``<name>.json`` into ``out``; returns the verdict's lines."""
    out.mkdir(parents=True, exist_ok=True)
    verdict = conclusions(study, outcomes, results)
    if study.draw is None:
        draw(out / f"{study.name}.png", study, variants, results, outcomes)
    else:
        study.draw(out / f"{study.name}.png", outcomes, results)
    write_json(out / f"{study.name}.json", _figures(study, facts, variants, results, outcomes, seeds, verdict))
    minutes = sum(sum(each) for result in results.values() for each in result.seconds.values()) / 60
    parts = [
        f"# {study.title}",
        study.question,
        "## What the papers report",
        study.reported,
        f"## Results: {data}",
        "\n".join(f"- {line}" for line in verdict) or "Nothing could be compared.",
        f"![{study.title}]({study.name}.png)",
        _comparisons(outcomes),
        "Differences are paired: both sides answer the same queries. The 95 % intervals cover the sampling of users"
        f"{' and of training seeds' if len(seeds) > 1 else ', but not of training seeds: there was only one'}.",
        "## Variants",
        _variants(variants, results),
    ]
    notes = [text for text in (study.how, study.note(facts) and f"Not answered: {study.note(facts)}.") if text]
    if notes:
        parts += ["## How to read it", *notes]
    versions = ", ".join(f"{name} {version}" for name, version in software().items())
    parts += [
        "## How to reproduce",
        f"```\n{command}\n```",
        f"Seeds {', '.join(map(str, seeds))}; {minutes:,.0f} minutes of stage time (a shared stage counts each "
        f"time it is used). {versions}.",
    ]
    (out / f"{study.name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return verdict


def _comparisons(outcomes: Sequence[Outcome]) -> str:
    lines = [
        "| comparison | queries | HR@10 | against | difference | relative | the papers | same sign |",
        "|---|---:|---:|---:|---:|---:|---|---|",
    ]
    for outcome in outcomes:
        found, about = outcome.found, outcome.comparison
        if found is None:
            lines.append(f"| {about.label} | 0 | | | | | {about.reported} | |")
            continue
        relative = "" if found["relative"] is None else f"{found['relative']:+.1%}"
        of = "" if found["queries"] == found["asked_of_the_other"] else f" of {found['asked_of_the_other']:,}"
        lines.append(
            f"| {about.label} | {found['queries']:,}{of} | {found['hr_at_10']:.4f} | {found['hr_at_10_against']:.4f} | "
            f"{found['difference']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f}) | {relative} | "
            f"{about.reported} | {sign(outcome)} |"
        )
    return "\n".join(lines)


def _variants(variants: Sequence[Variant], results: Mapping[str, Result]) -> str:
    lines = [
        "| variant | what differs | 2T-HGNN, warm users: HR@10 | coverage@100 | HGNN minutes | two-tower minutes |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for variant in variants:
        if (result := results.get(variant.name)) is None:
            continue
        row = overall(result, MAIN)
        figures = ["", ""] if row is None else [f"{row['hr_at_10']:.4f}", f"{row['coverage_at_100']:.1%}"]
        minutes = [f"{fmean(result.seconds[name]) / 60:.1f}" if name in result.seconds else "" for name in _TRAINED]
        lines.append(f"| {variant.label} | {_changes(variant)} | {' | '.join([*figures, *minutes])} |")
    return "\n".join(lines)


def _changes(variant: Variant) -> str:
    changes = [f"`{override}`" for override in variant.overrides]
    if variant.ablation:
        changes.append("two-tower minutes include a second one without HGNN")
    if variant.table is not None:
        changes.append(f"table: `{variant.table}`")
    if variant.weights_of:
        changes.append(f"HGNN weights of `{variant.weights_of}`")
    return ", ".join(changes)


def _figures(
    study: Study,
    facts: Facts,
    variants: Sequence[Variant],
    results: Mapping[str, Result],
    outcomes: Sequence[Outcome],
    seeds: Sequence[int],
    verdict: Sequence[str],
) -> dict[str, Any]:
    asked = {(o.comparison.item_type, segment) for o in outcomes for segment in o.comparison.segments}
    asked.add((EVERY_TYPE, "warm"))
    return {
        "study": study.name,
        "seeds": list(seeds),
        "verdict": list(verdict),
        "config": facts.config.model_dump(mode="json"),
        "software": software(),
        "comparisons": [
            {
                "label": o.comparison.label,
                "ours": vars(o.comparison.ours),
                "theirs": vars(o.comparison.theirs),
                "item_type": o.comparison.item_type,
                "segments": list(o.comparison.segments),
                "reported": o.comparison.reported,
                "verdict": o.verdict,
                "same_sign": sign(o),
                "found": o.found,
            }
            for o in outcomes
        ],
        "variants": [
            {
                "name": variant.name,
                "label": variant.label,
                "overrides": list(variant.overrides),
                "seconds": {stage: list(each) for stage, each in results[variant.name].seconds.items()},
                "rows": [
                    [row for row in rows if (row["item_type"], row["segment"]) in asked]
                    for rows in results[variant.name].rows
                ],
            }
            for variant in variants
            if variant.name in results
        ],
    }


def draw(
    path: Path,
    study: Study,
    variants: Sequence[Variant],
    results: Mapping[str, Result],
    outcomes: Sequence[Outcome],
) -> None:
    """Differences with their intervals on the left, each variant's training minutes on the right."""
    shown = [outcome for outcome in outcomes if outcome.found is not None]
    trained = [v for v in variants if v.name in results and any(s in results[v.name].seconds for s in _TRAINED)]
    height = 1.3 + 0.34 * max(len(shown), len(trained), 2)
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11.0, height), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, width_ratios=(3, 1.3))
        for place, outcome in enumerate(shown):
            found = outcome.found or {}
            ends = [max(found["difference"] - found["low"], 0.0)], [max(found["high"] - found["difference"], 0.0)]
            sure = found["low"] > 0 or found["high"] < 0
            color = PALETTE[3] if sure and found["difference"] > 0 else PALETTE[6] if sure else PALETTE[0]
            left.errorbar(found["difference"], place, xerr=ends, fmt="o", color=color, capsize=3)
        left.axvline(0, color="black", linewidth=0.8)
        left.set_yticks(range(len(shown)), [outcome.comparison.label for outcome in shown])
        left.set_xlabel("difference in HR@10, 95 % interval")
        left.grid(axis="x", alpha=0.2)
        left.invert_yaxis()
        begin = [0.0] * len(trained)
        for number, stage in enumerate(_TRAINED):
            minutes = [fmean(results[v.name].seconds.get(stage, [0.0])) / 60 for v in trained]
            right.barh(range(len(trained)), minutes, 0.6, left=begin, color=PALETTE[1 + number], label=stage)
            begin = [a + b for a, b in zip(begin, minutes, strict=True)]
        right.set_yticks(range(len(trained)), [v.label for v in trained])
        right.set_xlabel("minutes")
        right.invert_yaxis()
        if trained:
            figure.legend(loc="outside upper right", ncols=2, frameon=False)
        figure.suptitle(study.title, x=0.01, ha="left")
        figure.savefig(path, dpi=130, metadata={"Software": None})
