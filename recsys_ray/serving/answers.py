"""Questions and answers, in numbers as the recommender works with them, and in words."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys_ray.serving.histories import Profile
from recsys_ray.serving.live import LiveItems
from recsys_ray.serving.requests import Question


@dataclass(frozen=True)
class Recommendation:
    """``score`` as in recsys_ray/scoring/scorer.py; for an answer by popularity the share of users."""

    item_id: str
    item_type: str
    title: str
    score: float
    reason: str
    because: str | None = None  # item of the user's history that speaks most for it


@dataclass(frozen=True)
class Answer:
    version: str
    known: bool  # the user is in the bundle
    items: list[Recommendation]
    ignored: list[str]  # ids of the question's history that the bundle does not know
    cold: bool  # nothing is known about the user, so the answer is what is popular


@dataclass(frozen=True)
class PastEvent:
    item_id: str
    item_type: str
    title: str
    event: str
    timestamp: int


@dataclass(frozen=True)
class FoundItem:
    item_id: str
    item_type: str
    title: str
    available: bool


@dataclass(frozen=True)
class Asked:
    """A question in numbers."""

    question: Question
    profile: Profile  # what makes the user's features
    known: bool
    types: list[int]
    quotas: dict[int, int] | None
    barred: npt.NDArray[np.int64]  # gids that must not come, ascending
    allow: npt.NDArray[np.int64] | None  # gids, ascending; None: all
    ignored: list[str]
    live: LiveItems

    def wanted(self, kind: int) -> int:
        """How many items of a type the answer may need."""
        return self.quotas.get(kind, 0) if self.quotas else self.question.k

    @property
    def reranked(self) -> bool:
        return bool(self.question.diversity or self.question.popularity)

    @property
    def likeness(self) -> Hashable:
        """Questions that have this in common are ranked together."""
        listed = None if self.allow is None else self.allow.tobytes()
        quotas = tuple((self.quotas or {}).items())
        return tuple(self.types), self.question.k, quotas, self.reranked, self.question.filters, listed, id(self.live)


@dataclass(frozen=True)
class Listed:
    """An answer in numbers, which the recommender puts into words."""

    asked: Asked
    gids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.floating]
    by_country: npt.NDArray[np.bool_] | None = None  # of an answer by popularity: whether the country made it

    @property
    def known(self) -> bool:
        return self.asked.known

    @property
    def cold(self) -> bool:
        return self.by_country is not None
