"""Display names of models and segments, and the models' roles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from recsys_ray.baselines import BASELINES
from recsys_ray.evaluation.results import MAIN
from recsys_ray.evaluation.segments import TIERS
from recsys_ray.scoring.scorer import MEMORY, TRENDS, UNSEEN, without

Row = Mapping[str, Any]
Role = Literal["served", "part", "baseline", "control", "oracle"]

_STRANGER = "_for_a_stranger"


@dataclass(frozen=True)
class ModelName:
    """A model's names and what it is: the ``served`` one, a ``part`` of it that is trained alone, a ``baseline``, a
    ``control`` that is not meant to recommend well, or the ``oracle``."""

    short: str  # for columns of a terminal
    full: str
    role: Role
    note: str


_BASELINES = {
    "popularity": ("pop.", "Popularity"),
    "item_knn": ("item-kNN", "Item-kNN"),
    "llm_knn": ("LLM-kNN", "LLM-kNN"),
    "ease": ("EASE", "EASE^R"),
    "ials": ("iALS", "iALS"),
    "lightgcn": ("LightGCN", "LightGCN"),
    "sasrec": ("SASRec", "SASRec"),
    "hgnn": ("HGNN", "HGNN alone"),
    "hgnn_w_users": ("HGNN-wu", "HGNN with users"),
}
MODELS: dict[str, ModelName] = {
    **{
        name: ModelName(short, full, "part" if name == "hgnn" else "baseline", BASELINES[name].note)
        for name, (short, full) in _BASELINES.items()
    },
    "two_tower_text_only": ModelName("2T", "2T without HGNN", "part", "The two-tower without HGNN embeddings."),
    **{
        without(MAIN, term): ModelName(
            f"no {short}", f"2T-HGNN without {short}", "part", f"The served model without {what}."
        )
        for term, short, what in (
            (MEMORY, "memory", "its co-interaction memory"),
            (TRENDS, "trends", "its correction for recent trends"),
            (UNSEEN, "unseen", "its calibrated share of unseen items"),
        )
    },
    MAIN: ModelName("2T-HGNN", "2T-HGNN", "served", "HGNN and two-tower together: the served model."),
    "oracle": ModelName(
        "oracle", "Oracle", "oracle", "Ranking by the demo data's true tastes: the best that can be expected."
    ),
}

SEGMENT_NAMES = {
    "all": "all users",
    "warm": "warm users",
    "new_to_type": "new to the type",
    "cold": "cold users",
    "cold_items": "items unseen in training",
    **{f"tier{k + 1}": f"popularity tier {k + 1}" for k in range(TIERS)},
}
SEGMENT_NOTES = {
    "all": "Every list of the test period.",
    "warm": "Users with any event before the test period.",
    "new_to_type": "Warm users with events on other item types only.",
    "cold": "Users without any event before the test period.",
    "cold_items": "Warm users; only items without any event before validation count as relevant.",
    **{f"tier{k + 1}": f"Warm users; only items of popularity tier {k + 1} count as relevant." for k in range(TIERS)},
}


def name_of(model: str) -> ModelName:
    """Names of a model; a model missing in the table is a baseline under its own name."""
    if model in MODELS:
        return MODELS[model]
    if model.endswith(_STRANGER):
        known = name_of(model.removesuffix(_STRANGER))
        note = f"{known.full}, queried with another user's history: its hits that are not personal."
        return ModelName(f"{known.short}*", f"{known.full}, another user's history", "control", note)
    if model.startswith("popularity_") and model.removeprefix("popularity_").isdigit():
        days = model.removeprefix("popularity_")
        return ModelName(f"pop.{days}", f"Popularity, {days} days", "baseline", f"Popularity over {days} days.")
    return ModelName(model, model, "baseline", "")


def select(metrics: Sequence[Row], **fixed: str) -> list[Row]:
    """The rows with these values."""
    return [row for row in metrics if all(row[name] == value for name, value in fixed.items())]


def ordered(metrics: Sequence[Row], name: str) -> list[str]:
    """The values of a column, each once, in the order of the rows."""
    return list(dict.fromkeys(row[name] for row in metrics))


def main_segment(metrics: Sequence[Row]) -> str:
    """Warm users, or everyone if there are no warm users."""
    return "warm" if any(row["segment"] == "warm" for row in metrics) or not metrics else "all"


def contest(metrics: Sequence[Row]) -> tuple[str | None, str | None]:
    """(the served model, or else the best model that is not a baseline; the best baseline), by headline HR@10."""
    main = select(metrics, item_type="all", segment=main_segment(metrics))
    ranked = sorted(main, key=lambda row: -row["hr_at_10"])
    roles = [(row["model"], name_of(row["model"]).role) for row in ranked]
    ours = [model for model, role in roles if role == "served"] or [model for model, role in roles if role == "part"]
    rivals = [model for model, role in roles if role == "baseline"]
    return (ours[0] if ours else None), (rivals[0] if rivals else None)
