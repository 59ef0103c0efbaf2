"""Turns the hits of a study's variants into paired differences and verdicts. No Ray in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from recsys_ray.evaluation.results import EVERY_TYPE, Hits, Row, difference
from recsys_ray.studies.study import Comparison, Outcome, Result, Side, Study

_LEVEL = 0.95
_IN_TAILS = 20  # resamples outside an interval at least: a wide one needs more of them


def judge(comparisons: Sequence[Comparison], results: Mapping[str, Result], resamples: int, seed: int) -> list[Outcome]:
    """Compare where both sides were run and evaluated. For example, a memory of weight 0 is not evaluated as a separate
    model."""
    outcomes = []
    for comparison in comparisons:
        if all(_evaluated(side, results) for side in (comparison.ours, comparison.theirs)):
            found = compare(comparison, results, resamples, seed)
            outcomes.append(Outcome(comparison, found, _verdict(comparison, found)))
    return outcomes


def _evaluated(side: Side, results: Mapping[str, Result]) -> bool:
    return side.variant in results and bool(_models(side, results[side.variant].hits[0]))


def _models(side: Side, hits: Hits) -> list[str]:
    """Those that the side's name stands for and that were evaluated."""
    if not side.model.endswith("*"):
        return [side.model] if side.model in hits.hit else []
    return [name for name in hits.hit if name.startswith(side.model[:-1])]


def compare(comparison: Comparison, results: Mapping[str, Result], resamples: int, seed: int) -> Row | None:
    """The paired difference on the queries that both sides answered: same user, item type and truths. The other side
    determines a query's segment."""
    ours, theirs = results[comparison.ours.variant], results[comparison.theirs.variant]
    reference, hits = theirs.hits[0], ours.hits[0]
    seeds = min(len(ours.hits), len(theirs.hits))
    segments = comparison.segments
    rows, others = _common(ours, theirs)
    chosen = np.isin(others, reference.chosen(comparison.item_type, segments))
    rows, others = rows[chosen], others[chosen]
    our_model = _resolve(comparison.ours, hits, segments, rows)
    their_model = _resolve(comparison.theirs, reference, segments, others)
    if our_model is None or their_model is None or not len(rows):
        return None
    asked = hits.asked.get(our_model, np.ones(len(hits), bool))[rows]
    asked &= reference.asked.get(their_model, np.ones(len(reference), bool))[others]
    rows, others = rows[asked], others[asked]
    if not len(rows):
        return None
    a = np.stack([h.hit_in(our_model, segments)[rows] for h in ours.hits[:seeds]])
    b = np.stack([h.hit_in(their_model, segments)[others] for h in theirs.hits[:seeds]])
    level = 1 - (1 - _LEVEL) / comparison.family
    resamples = max(resamples, int(_IN_TAILS / (1 - level)))
    found = difference(a, b, reference.uid[others], resamples, seed, level)
    return found | {"model": our_model, "against": their_model, "asked_of_the_other": _asked(comparison, reference)}


def _asked(comparison: Comparison, reference: Hits) -> int:
    return len(reference.chosen(comparison.item_type, comparison.segments))


def _resolve(side: Side, hits: Hits, segments: Sequence[str], rows: np.ndarray) -> str | None:
    """A model's name; for ``name*`` the best on these queries, so that the comparison is never with a weaker
    baseline."""
    names = _models(side, hits)
    if len(names) == 1:
        return names[0]
    return max(names, key=lambda name: hits.hit_in(name, segments)[rows].mean(), default=None)


def _common(ours: Result, theirs: Result) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the queries that are in both, with the same truths: in ours, in theirs (in order of theirs)."""
    a, b = _keys(ours), _keys(theirs)
    both = b.join(a, on=["user", "type", "truths"], suffix="_ours").sort("row")
    return both["row_ours"].to_numpy(), both["row"].to_numpy()


def _keys(result: Result) -> pl.DataFrame:
    hits = result.hits[0]
    return pl.DataFrame(
        {
            "user": result.user_ids[hits.uid],
            "type": pl.Series(list(hits.types), dtype=pl.String)[hits.item_type.astype(np.int64)],
            "truths": hits.truths,
        },
        schema={"user": pl.String, "type": pl.String, "truths": pl.UInt64},
    ).with_row_index("row")


def _verdict(comparison: Comparison, found: Row | None) -> str:
    if found is None:
        return "nothing to compare"
    if comparison.as_share:
        if not found["hr_at_10_against"]:
            return "no share: the other side has no hits"
        share = found["hr_at_10"] / found["hr_at_10_against"]
        if comparison.at_least is None:
            return f"reaches {share:.0%} of it"
        word = "met" if share >= comparison.at_least else "missed"
        return f"reaches {share:.0%} of it: target {word} (at least {comparison.at_least:.0%})"
    direction = "above" if found["low"] > 0 else "below" if found["high"] < 0 else ""
    seen = {"above": "higher", "below": "lower", "": "no significant difference"}[direction]
    if comparison.expected is None:
        return seen
    if comparison.expected == "not above":
        return f"{seen}: as required" if direction != "above" else f"{seen}: must not happen"
    if direction == comparison.expected:
        return f"{seen}: as the papers report"
    if not direction:
        return f"{seen}, where the papers report one"
    return f"{seen}: contrary to the papers"


def sign(outcome: Outcome) -> str:
    """Whether the difference has the sign that the papers report: yes or no, and whether it is not significant; empty
    if they report none."""
    found, expected = outcome.found, outcome.comparison.expected
    if found is None or expected not in ("above", "below"):
        return ""
    same = found["difference"] > 0 if expected == "above" else found["difference"] < 0
    sure = found["low"] > 0 or found["high"] < 0
    return ("yes" if same else "no") + ("" if sure else ", n.s.")


def conclusions(study: Study, outcomes: Sequence[Outcome], results: Mapping[str, Result]) -> list[str]:
    """The verdict, in lines, computed from the numbers."""
    if study.judge is not None:
        return study.judge(outcomes, results)
    return [f"{outcome.comparison.label}: {sentence(outcome)}" for outcome in outcomes]


def sentence(outcome: Outcome) -> str:
    if outcome.found is None:
        return outcome.verdict
    return f"{signed(outcome.found)}, {outcome.verdict}"


def signed(found: Mapping[str, Any]) -> str:
    """A difference with its interval, and relative to what it is a difference from."""
    relative = "" if found["relative"] is None else f", {found['relative']:+.1%}"
    return f"{found['difference']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f}){relative}"


def overall(result: Result, model: str, segment: str = "warm") -> Row | None:
    """A model's pooled row over all types, means over the seeds without interval."""
    rows = [
        next((r for r in table if (r["model"], r["item_type"], r["segment"]) == (model, EVERY_TYPE, segment)), None)
        for table in result.rows
    ]
    known = [row for row in rows if row is not None]
    if not known:
        return None
    means = {name: float(np.mean([row[name] for row in known])) for name in ("hr_at_10", "coverage_at_100")}
    return means | {"queries": known[0]["queries"]}
