"""Shuffled labels: a check that no model reads its answers from data that it must not see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from recsys_ray.evaluation.ranking import stranger_name
from recsys_ray.report.labels import name_of
from recsys_ray.studies.changed_tables import ShuffledLabels
from recsys_ray.studies.compare import sentence
from recsys_ray.studies.study import POPULARITY, Comparison, Expected, Facts, Outcome, Result, Side, Study, Variant

_OTHER = "another user's history"


def _judge(outcomes: Sequence[Outcome], results: Mapping[str, Result]) -> list[str]:
    """With shuffled labels nothing personal is left: no model may beat popularity *and* itself asked with
    another user's history. Beating popularity alone does not show taste: trends and several windows at once can."""
    above: dict[str, list[str]] = {}
    shuffled = [o for o in outcomes if o.comparison.ours.variant == "shuffled"]
    for outcome in shuffled:
        model = outcome.comparison.ours.model
        above.setdefault(model, [])
        if outcome.found is not None and outcome.found["low"] > 0:
            against = outcome.comparison.theirs.model
            above[model].append("popularity" if against.startswith(POPULARITY) else _OTHER)
    failed = [model for model, over in above.items() if len(over) == 2]
    lines = []
    if failed:
        names = ", ".join(name_of(model).full for model in failed)
        lines.append(f"FAILED: with shuffled labels {names} still predict personal choices: there is a leak.")
    elif above:
        lines.append("Passed: with shuffled labels no model predicts personal choices.")
    for model, over in above.items():
        if over and model not in failed:
            what = "it does not beat popularity" if over == [_OTHER] else "its gain is not personal"
            lines.append(f"{name_of(model).full} beats only {over[0]}: {what}.")
    for outcome in outcomes:
        if outcome.comparison.ours.variant != "shuffled" and outcome.found is not None:
            lines.append(f"{outcome.comparison.label}: {sentence(outcome)}")
    return lines


def _permutation_variants(facts: Facts) -> list[Variant]:
    asked = ("evaluate.popularity_days=[7, 14, 30, 90]", "evaluate.strangers=true")
    return [
        Variant("as-is", "original labels", asked, ablation=True),
        Variant("shuffled", "shuffled labels", (*asked, "data.oracle=null"), table=ShuffledLabels(), ablation=True),
    ]


def _permutation_comparisons(facts: Facts, models: Sequence[str]) -> list[Comparison]:
    personal = [
        name for name in models
        if not name.startswith(POPULARITY) and name != "oracle" and stranger_name(name) in models
    ]  # fmt: skip
    found = []
    expectations: dict[str, Expected | None] = {"as-is": None, "shuffled": "not above"}
    for variant, expected in expectations.items():
        for model in personal:
            for against in (f"{POPULARITY}*", stranger_name(model)):
                what = "the best popularity" if against.endswith("*") else _OTHER
                found.append(
                    Comparison(f"{variant}: {name_of(model).full} against {what}", Side(variant, model),
                               Side(variant, against), segments=("warm",), expected=expected, family=len(personal))
                )  # fmt: skip
    return found


PERMUTATION = Study(
    name="permutation",
    title="Shuffled labels",
    question="If it is shuffled which user chose which item, does every model fall to the level of popularity? A model "
    "that does not has access to its answers.",
    reported="Nothing: this checks the project's own figures.",
    how="The items of interactions are shuffled within each item type and week, before and during the test period. "
    "This keeps popularity over time, user activity and item types, and removes taste. Every model is compared with "
    "the best of popularity over 7, 14, 30, 90 days and the configured window, and with itself asked with another "
    "user's history. A model fails if it beats both. Intervals are widened by Bonferroni's correction.",
    variants=_permutation_variants,
    needs_dates=True,
    comparisons=_permutation_comparisons,
    judge=_judge,
    every_model=True,
)
