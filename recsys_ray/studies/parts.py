"""Studies of the method's parts and settings: ablation (paper A, Table 1), sampler cost, cadence, window."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import fmean

from recsys_ray.core.clock import DAY
from recsys_ray.evaluation.results import MAIN
from recsys_ray.scoring.scorer import MEMORY, TRENDS, UNSEEN, without
from recsys_ray.studies.compare import sentence
from recsys_ray.studies.study import TWO_TOWER, Comparison, Facts, Outcome, Result, Side, Study, Variant


def _as_list(values: Sequence[str]) -> str:
    return json.dumps(list(values))


# -- parts: Table 1 ----------------------------------------------------------------------------------------------------


WITHOUT_SAMPLER = Variant("no-sampler", "without the balanced sampler", ("hgnn.balanced=false",))


def without_weak_signals(facts: Facts) -> Variant:
    events = facts.config.events
    edges = [name for name in events.edges if name not in events.weak] or events.positives
    left_out = (
        "events.weak=[]",
        f"events.edges={_as_list(edges)}",
        f"events.ignore={_as_list([*events.ignore, *events.weak])}",
    )
    return Variant("no-weak", "without weak signals", left_out)


def _part_variants(facts: Facts) -> list[Variant]:
    variants = [
        Variant("full", "full model", ablation=True),
        WITHOUT_SAMPLER,
        without_weak_signals(facts),
        Variant("no-same-type", "without edges within a type", ("graph.relations=cross_type",)),
        Variant("no-cross-type", "without edges across types", ("graph.relations=same_type",)),
        Variant("no-text", "with random text vectors", ("text.model=random",)),
    ]
    left_out = {"no-weak"} if not facts.config.events.weak else set()
    if len(facts.types) == 1:
        left_out |= {"no-same-type", "no-cross-type"}
    return [variant for variant in variants if variant.name not in left_out]


def _part_comparisons(facts: Facts, models: Sequence[str]) -> list[Comparison]:
    reported = {
        "no-sampler": "-5.9 % (0.332 of 0.353)",
        "no-weak": "-24 % (0.267)",
        "no-same-type": "-5.7 % without podcast-podcast (0.333), -12 % without audiobook-audiobook (0.312)",
        "no-cross-type": "not reported alone; audiobook-audiobook edges only: -6.8 % (0.329)",
        "no-text": "not reported",
    }
    models_of_full = {
        "without the memory (the same towers)": (without(MAIN, MEMORY), "ours, not the papers'"),
        "without the trends (the same towers)": (without(MAIN, TRENDS), "ours, not the papers'"),
        "without the share of unseen items (the same towers)": (without(MAIN, UNSEEN), "ours, not the papers'"),
        "without the HGNN": (TWO_TOWER, "-35 % (0.231)"),
    }
    own = [
        Comparison(label, Side("full", model), Side("full"), expected="below" if model == TWO_TOWER else None,
                   reported=reported)
        for label, (model, reported) in models_of_full.items() if model in models
    ]  # fmt: skip
    return own + [
        Comparison(v.label, Side(v.name), Side("full"), expected=None if v.name == "no-text" else "below",
                   reported=reported[v.name])
        for v in _part_variants(facts) if v.name != "full"
    ]  # fmt: skip


def _part_note(facts: Facts) -> str:
    missing = [] if facts.config.events.weak else ["these data have no weak signals"]
    if len(facts.types) == 1:
        missing.append("these data have only one item type, so no edges across types")
    return "; ".join(missing)


PARTS = Study(
    name="parts",
    title="What each part contributes",
    question="How much HR@10 do warm users lose when one part of the method is removed?",
    reported="Paper A, Table 1 (audiobooks, warm users, HR@10; the full model has 0.353): without HGNN (the two-tower) "
    "0.231, without the balanced sampler 0.332, without weak signals 0.267, without podcast-podcast edges 0.333, "
    "without audiobook-audiobook 0.312, audiobook-audiobook edges alone 0.329, podcast-podcast edges alone 0.294.",
    how="Without weak signals: their events are removed from the tables, so an item that was only previewed counts as "
    "new. With random text vectors: each item has a random vector, which identifies it but says nothing about it. HGNN "
    "and two-tower are trained again for each variant, except for the lines marked (the same towers) and without the "
    "HGNN, which are models of the full run. The memory uses the same edges as the graph.",
    variants=_part_variants,
    comparisons=_part_comparisons,
    note=_part_note,
)


# -- sampler-cost ------------------------------------------------------------------------------------------------------


def _sampler_variants(facts: Facts) -> list[Variant]:
    whole = ("hgnn.max_steps=null",)  # a cap of the steps would hide what is to be measured
    return [
        Variant("balanced", "balanced sampler", whole),
        Variant("every-edge", "every edge, every epoch", (*whole, "hgnn.balanced=false")),
    ]


def _sampler_comparisons(facts: Facts, models: Sequence[str]) -> list[Comparison]:
    return [
        Comparison("every edge against the balanced sampler", Side("every-edge"), Side("balanced"), expected="below",
                   reported="-5.9 % (0.332 of 0.353)")
    ]  # fmt: skip


def _judge_cost(outcomes: Sequence[Outcome], results: Mapping[str, Result]) -> list[str]:
    lines = [f"{outcome.comparison.label}: {sentence(outcome)}" for outcome in outcomes]
    if {"balanced", "every-edge"} <= results.keys():
        made = [results[name].counts["hgnn"] for name in ("balanced", "every-edge")]
        balanced, every = (fmean([counts["training_seconds"] for counts in seeds]) for seeds in made)
        epochs = [fmean([counts["epochs"] for counts in seeds]) for seeds in made]
        saved = f"{1 - balanced / every:.0%}" if every else "-"
        lines.append(
            f"Training took {balanced:,.1f} s with the balanced sampler ({epochs[0]:.1f} epochs) and {every:,.1f} s "
            f"over every edge ({epochs[1]:.1f} epochs), without start-up, validation and embedding: {saved} saved. "
            "The paper reports about 60 %."
        )
    return lines


SAMPLER_COST = Study(
    name="sampler-cost",
    title="What the balanced sampler saves",
    question="How much training time does the balanced sampler save, and how does it affect HR@10?",
    reported="Paper A, section 3.2: training time about 60 % lower; Table 1: HR@10 0.332 without it, 0.353 with it.",
    how="Epochs are complete (no hgnn.max_steps), and both trainings stop by themselves. The seconds cover the epochs' "
    "steps only. Run nothing else on the machine meanwhile.",
    variants=_sampler_variants,
    comparisons=_sampler_comparisons,
    judge=_judge_cost,
)


# -- cadence -----------------------------------------------------------------------------------------------------------


_DAYS = (3, 6)


def split_of(facts: Facts, day: int = 0) -> tuple[str, ...]:
    """Overrides that set the split's moments as they are, or ``day`` days later."""
    test = int(facts.counts["test_from"]) + day * DAY
    valid = test - (int(facts.counts["test_from"]) - int(facts.counts["valid_from"]))
    moments = (datetime.fromtimestamp(moment, UTC).isoformat() for moment in (valid, test))
    return tuple(f"split.{name}='{moment}'" for name, moment in zip(("valid_from", "test_from"), moments, strict=True))


def _cadence_variants(facts: Facts) -> list[Variant]:
    variants = [Variant("day-0", "day 0, both trained", split_of(facts))]
    for day in _DAYS:
        variants.append(Variant(f"day-{day}-daily", f"day {day}, both trained", split_of(facts, day)))
        variants.append(
            Variant(f"day-{day}-weekly", f"day {day}, day-0 HGNN", split_of(facts, day), weights_of="day-0")
        )
    return variants


def _cadence_comparisons(facts: Facts, models: Sequence[str]) -> list[Comparison]:
    return [
        Comparison(f"day {day}: day-0 HGNN against both trained", Side(f"day-{day}-weekly"),
                   Side(f"day-{day}-daily"), reported="suggested, not tested")
        for day in _DAYS
    ]  # fmt: skip


CADENCE = Study(
    name="cadence",
    title="A weekly HGNN with a daily two-tower",
    question="How much HR@10 is lost if the HGNN keeps its weights for some days while graph, embeddings and two-tower "
    "are updated daily?",
    reported="Paper A, section 3.4, suggests this schedule but does not test it.",
    how="The split moves by a day at a time. The day-0 variants embed the current graph with the weights of day 0.",
    variants=_cadence_variants,
    needs_dates=True,
    comparisons=_cadence_comparisons,
)


# -- window ------------------------------------------------------------------------------------------------------------


_WINDOWS: tuple[int | None, ...] = (30, 60, 90, 180, None)


def _window_name(days: int | None) -> str:
    return "all" if days is None else str(days)


WINDOW = Study(
    name="window",
    title="Length of the history window",
    question="Are 90 days of history better than a shorter or a longer window?",
    reported="Paper A uses 90 days for graph, user features and targets, and compares no other window.",
    how="The window applies to the graph, the users' histories and the popularity baseline. The queries are the same.",
    needs_dates=True,
    variants=lambda facts: [
        Variant(f"window-{_window_name(d)}", "all days" if d is None else f"{d} days",
                (f"graph.window_days={'null' if d is None else d}",))
        for d in _WINDOWS
    ],
    comparisons=lambda facts, models: [
        Comparison("all days against 90" if d is None else f"{d} days against 90",
                   Side(f"window-{_window_name(d)}"), Side("window-90"), reported="not reported")
        for d in _WINDOWS if d != 90
    ],
)  # fmt: skip
