"""The papers' own experiment, with their settings (``configs/paper.yaml``): every comparison of paper A's tables that
two item types allow, audiobooks and podcasts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from recsys_ray.evaluation.results import EVERY_TYPE, MAIN
from recsys_ray.report.labels import name_of
from recsys_ray.studies.compare import sign
from recsys_ray.studies.parts import WITHOUT_SAMPLER, without_weak_signals
from recsys_ray.studies.study import (
    POPULARITY,
    TWO_TOWER,
    Comparison,
    Expected,
    Facts,
    Outcome,
    Result,
    Side,
    Study,
    Variant,
)

_NEW, _OLD = "audiobook", "podcast"  # the type that the papers recommend, and the one that was there before
_HGNN, _LLM = "hgnn", "llm_knn"
_CHEAP = ("evaluate.baselines=popularity",)  # only the served model of these variants is of interest

# model, the one it is compared with, HR@10 of both (Table 2: audiobooks, warm users)
_TABLE_2 = (
    (_HGNN, POPULARITY, 0.258, 0.150),
    (MAIN, _HGNN, 0.353, 0.258),
    (MAIN, TWO_TOWER, 0.353, 0.231),
    (_HGNN, _LLM, 0.258, 0.164),
    (_HGNN, TWO_TOWER, 0.258, 0.231),
    (TWO_TOWER, POPULARITY, 0.231, 0.150),
    (_LLM, POPULARITY, 0.164, 0.150),
)
# users without an event on an audiobook
_TABLE_3 = (
    (MAIN, POPULARITY, 0.200, 0.161),
    (MAIN, TWO_TOWER, 0.200, 0.135),
    (TWO_TOWER, POPULARITY, 0.135, 0.161),
)
# podcasts, all users
_TABLE_4 = (
    (MAIN, TWO_TOWER, 0.123, 0.114),
    (MAIN, POPULARITY, 0.123, 0.059),
    (TWO_TOWER, POPULARITY, 0.114, 0.059),
)
# Table 1: HR@10 of each variant, of 0.353
_FULL = 0.353
_TABLE_1 = {
    "no-sampler": 0.332, "no-weak": 0.267, "no-old-old": 0.333, "no-new-new": 0.312, "new-new": 0.329, "old-old": 0.294,
}  # fmt: skip


def _has_both(facts: Facts) -> bool:
    return {_NEW, _OLD} <= set(facts.types)


def _variants(facts: Facts) -> list[Variant]:
    new, old, across = (_NEW, _NEW), (_OLD, _OLD), (_NEW, _OLD)
    edges = {
        "no-old-old": (f"without {_OLD}-{_OLD} edges", [new, across]),
        "no-new-new": (f"without {_NEW}-{_NEW} edges", [old, across]),
        "new-new": (f"{_NEW}-{_NEW} edges only", [new]),
        "old-old": (f"{_OLD}-{_OLD} edges only", [old]),
    }
    parts = [WITHOUT_SAMPLER, *([without_weak_signals(facts)] if facts.config.events.weak else [])]
    if _has_both(facts):
        parts += [
            Variant(name, label, (f"graph.relations={json.dumps(kept)}",)) for name, (label, kept) in edges.items()
        ]
    parts.append(Variant("printed-loss", "with the two-tower's loss as printed", ("two_tower.loss=paper",)))
    cheap = [replace(part, overrides=(*part.overrides, *_CHEAP)) for part in parts]
    return [Variant("full", "full model", ablation=True), *cheap]


def _comparisons(facts: Facts, models: Sequence[str]) -> list[Comparison]:
    places = [_NEW, EVERY_TYPE] if _has_both(facts) else [EVERY_TYPE]
    found = []
    for place in places:
        found += [_of_models("Table 2", place, ("warm",), *row) for row in _TABLE_2]
    for place in places:
        for variant in _variants(facts)[1:]:
            reported = _TABLE_1.get(variant.name)
            said = "not reported" if reported is None else _relative(reported, _FULL)
            expected: Expected | None = None if reported is None else "below"
            label = f"Table 1, {_name(place)}: {variant.label}"
            found.append(Comparison(label, Side(variant.name), Side("full"), place, ("warm",), expected, said))
    for place in places:
        found += [_of_models("Table 3", place, ("new_to_type", "cold"), *row) for row in _TABLE_3]
    if _has_both(facts):
        found += [_of_models("Table 4", _OLD, ("all",), *row) for row in _TABLE_4]
        tail = _of_models("long tail", _NEW, ("tier3", "tier4", "tier5"), MAIN, TWO_TOWER, 2.18, 1.0)
        found.append(replace(tail, reported="+118 %"))
    return found


def _of_models(
    table: str, place: str, segments: tuple[str, ...], model: str, against: str, ours: float, theirs: float
) -> Comparison:
    label = f"{table}, {_name(place)}: {name_of(model).full} against {name_of(against).full}"
    expected: Expected = "above" if ours > theirs else "below"
    sides = Side("full", model), Side("full", against)
    return Comparison(label, *sides, place, segments, expected, _relative(ours, theirs))


def _name(place: str) -> str:
    return "all types" if place == EVERY_TYPE else f"{place}s"


def _relative(ours: float, theirs: float) -> str:
    return f"{ours / theirs - 1:+.0%} ({ours:.3f} against {theirs:.3f})".replace("%", " %")


def _judge(outcomes: Sequence[Outcome], results: Mapping[str, Result]) -> list[str]:
    """Of each table and place: how many signs are those of the paper, and which are not."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if sign(outcome):
            groups.setdefault(outcome.comparison.label.split(":")[0], []).append(outcome)
    lines = []
    for name, group in groups.items():
        same = [outcome for outcome in group if sign(outcome).startswith("yes")]
        sure = sum(sign(outcome) == "yes" for outcome in same)
        line = f"{name}: {len(same)} of {len(group)} signs are those of the paper, {sure} of them significantly."
        others = [f"{o.comparison.label.split(': ')[1]} ({sign(o)})" for o in group if o not in same]
        lines.append(line + (f" Not: {'; '.join(others)}." if others else ""))
    return lines


PAPER = Study(
    name="paper",
    title="The papers' own setting",
    question="With the papers' inputs, sizes, windows and epochs, do the models stand in paper A's order?",
    reported="Paper A, HR@10. Table 2 (audiobooks, warm users): popularity 0.150, LLM-kNN 0.164, HGNN 0.258, HGNN with "
    "users as nodes 0.238, two-tower 0.231, 2T-HGNN 0.353. Table 1: what 2T-HGNN has without one part. Table 3 (users "
    "without an event on an audiobook): popularity 0.161, two-tower 0.135, 2T-HGNN 0.200. Table 4 (podcasts, all "
    "users): popularity 0.059, two-tower 0.114, 2T-HGNN 0.123.",
    how="Run it with `configs/paper.yaml`; [method.md](../method.md), section 7, says what these settings are and what "
    "they keep of ours. *Same sign*: yes or no; n.s. where the interval includes 0. The HGNN alone, LLM-kNN and "
    "popularity are tuned on the validation period, which the papers do not report. The two-tower without HGNN knows "
    "age, country and taste vector of a user and nothing of the history, because the papers feed no more.",
    variants=_variants,
    comparisons=_comparisons,
    judge=_judge,
    needs_dates=True,
    note=lambda facts: "; ".join(
        text
        for text, said in (
            (f"the data need the item types {_NEW} and {_OLD} for the papers' audiobooks", not _has_both(facts)),
            ("the settings are not the papers': use configs/paper.yaml", facts.config.two_tower.inputs != "paper"),
        )
        if said
    ),
)
