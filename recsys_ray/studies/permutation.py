"""The check that nothing reads its answers from where it should not look: shuffled labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from recsys_ray.evaluation.labels import name_of
from recsys_ray.evaluation.ranking import stranger_name
from recsys_ray.studies.changed_tables import ShuffledLabels
from recsys_ray.studies.compare import sentence
from recsys_ray.studies.study import POPULARITY, Comparison, Expected, Facts, Outcome, Result, Side, Study, Variant


def _judge(outcomes: Sequence[Outcome], results: Mapping[str, Result]) -> list[str]:
    """With shuffled labels nothing personal may be left: no model may be above popularity *and* above itself asked with
    a stranger's history. Above popularity alone is not taste: trends and several windows at once do that."""
    above: dict[str, list[str]] = {}
    shuffled = [o for o in outcomes if o.comparison.ours.variant == "shuffled"]
    for outcome in shuffled:
        model = outcome.comparison.ours.model
        above.setdefault(model, [])
        if outcome.found is not None and outcome.found["low"] > 0:
            against = outcome.comparison.theirs.model
            above[model].append("popularity" if against.startswith(POPULARITY) else "a stranger's history")
    failed = [model for model, over in above.items() if len(over) == 2]
    lines = []
    if failed:
        names = ", ".join(name_of(model).full for model in failed)
        lines.append(f"FAILED: with shuffled labels {names} still know something personal: there is a leak.")
    elif above:
        lines.append("Passed: with shuffled labels no model knows anything personal.")
    for model, over in above.items():
        if over and model not in failed:
            what = "what it knows beyond one window of popularity is not personal"
            if over == ["a stranger's history"]:
                what = "it is no better than popularity"
            lines.append(f"{name_of(model).full} is above {over[0]} only: {what}.")
    for outcome in outcomes:
        if outcome.comparison.ours.variant != "shuffled" and outcome.found is not None:
            lines.append(f"{outcome.comparison.label}: {sentence(outcome)}")
    return lines


def _permutation_variants(facts: Facts) -> list[Variant]:
    asked = ("evaluate.popularity_days=[7, 14, 30, 90]", "evaluate.strangers=true")
    return [
        Variant("as-is", "labels as they are", asked, ablation=True),
        Variant("shuffled", "labels shuffled", (*asked, "data.oracle=null"), table=ShuffledLabels(), ablation=True),
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
                what = "the best popularity" if against.endswith("*") else "a stranger's history"
                found.append(
                    Comparison(f"{variant}: {name_of(model).full} against {what}", Side(variant, model),
                               Side(variant, against), segments=("warm",), expected=expected, family=len(personal))
                )  # fmt: skip
    return found


PERMUTATION = Study(
    name="permutation",
    title="Shuffled labels",
    question="When which user touched what is shuffled away, does every model fall to popularity? One that does not "
    "reads its answers from somewhere it should not see.",
    reported="Nothing: it is a check of this project's own figures.",
    how="Which item an interaction is about is shuffled among the rows of one item type and one week, before and in "
    "the test period alike: popularity over time, activity and types stay, taste goes. Every model is compared with "
    "the best of popularity over 7, 14, 30, 90 days and the configured window, and with itself asked with another "
    "user's history. A model fails where it is above both. Intervals are wider by Bonferroni's rule.",
    variants=_permutation_variants,
    needs_dates=True,
    comparisons=_permutation_comparisons,
    judge=_judge,
    every_model=True,
)
