"""A study: a question of the papers, the variants to run, and the comparisons between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import polars as pl

from recsys_ray.config import Config
from recsys_ray.evaluation.results import EVERY_TYPE, MAIN, Hits, Row
from recsys_ray.studies.changed_tables import TableChange

TWO_TOWER = "two_tower_text_only"  # the two-tower without the HGNN
POPULARITY = "popularity"
Expected = Literal["above", "below", "not above"]


@dataclass(frozen=True)
class Facts:
    """What the variants of a study depend on besides its definition."""

    config: Config
    counts: Mapping[str, Any]  # of the ingest stage

    @property
    def types(self) -> list[str]:
        return list(self.counts["item_types"])


@dataclass(frozen=True)
class Variant:
    """The configuration with some settings changed."""

    name: str  # of its folder
    label: str  # in the tables
    overrides: tuple[str, ...] = ()
    table: TableChange | None = None  # another interactions table than the configured one
    weights_of: str | None = None  # HGNN weights of this variant, of the same seed, instead of training
    ablation: bool = False  # the two-tower without HGNN is of interest too
    until: Literal["hgnn", "evaluate"] = "evaluate"


@dataclass(frozen=True)
class Side:
    """A model in a variant. ``popularity*``: the best of those whose names begin so."""

    variant: str
    model: str = MAIN


@dataclass(frozen=True)
class Comparison:
    """HR@10 of one side minus that of the other on the same queries, and what the papers report of it."""

    label: str
    ours: Side
    theirs: Side
    item_type: str = EVERY_TYPE
    segments: tuple[str, ...] = ("warm",)
    expected: Expected | None = None  # what the papers report of ours against theirs
    reported: str = ""  # their figure
    as_share: bool = False  # instead: reported as the share of theirs that ours reaches
    at_least: float | None = None  # the share that is wanted
    family: int = 1  # comparisons of which none may be wrong: the interval is wider (Bonferroni)


@dataclass(frozen=True)
class Result:
    """The results of a variant, over the seeds."""

    hits: Sequence[Hits]
    rows: Sequence[Sequence[Row]]
    user_ids: pl.Series  # of str, by uid
    seconds: Mapping[str, Sequence[float]]  # stage -> of each seed
    counts: Mapping[str, Sequence[Mapping[str, Any]]]  # stage -> manifest counts of each seed


@dataclass(frozen=True)
class Outcome:
    """A comparison and its result; ``found`` is None if no query is in both sides."""

    comparison: Comparison
    found: Row | None
    verdict: str


@dataclass(frozen=True)
class Study:
    """An experiment that anyone can repeat: ``recsys-ray study NAME --config ...``."""

    name: str
    title: str
    question: str
    reported: str  # what the papers report, with the table's number
    variants: Callable[[Facts], list[Variant]]
    comparisons: Callable[[Facts, Sequence[str]], list[Comparison]]  # facts, the models that were evaluated
    judge: Callable[[Sequence[Outcome], Mapping[str, Result]], list[str]] | None = None  # lines; default: by outcome
    draw: Callable[[Path, Sequence[Outcome], Mapping[str, Result]], None] | None = None  # default: every difference
    needs_dates: bool = False  # not possible with leave-one-out, whose times are positions in a user's order
    every_model: bool = False  # rank with all configured baselines, not with those alone that need no tuning
    how: str = ""  # what a reader must know to read the figures
    note: Callable[[Facts], str] = field(default=lambda facts: "")  # what these data cannot answer
