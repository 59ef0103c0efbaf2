"""The score: what a user's list is ranked by, written once.

    score(u, j) = <[u, 1], [v_j, b_j]> + sum of sparse terms
    b_j = sum of item terms

u and v_j are the towers' unit vectors. A term is one of two kinds. An **item term** is a number for each item: what
the last weeks tell of it (trends.py), what unseen items are given (unseen.py). It joins b_j, so that the index ranks by
it. A **sparse term** raises a few thousand items at most, those that the user's history brings to mind (memory.py). It
never lowers a score.

:meth:`Scorer.dense` scores whole ranges of items, for validation and evaluation. :meth:`Scorer.candidates` asks an
index: an item that no sparse term raises has ``k`` items before it by the index already, if it is not among the index's
first ``k``; so these and the raised items hold the exact list. The two are the same function, and a test holds them
together (tests/unit/test_scorer.py). No term passes over the catalogue for a request.

Imports neither dgl nor transformers: it is used in a serving replica.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor

from recsys_ray.core.errors import ArtifactError
from recsys_ray.scoring.memory import Memory, Recalled

SCORE = "score.json"
MEMORY, TRENDS, UNSEEN = "memory", "trends", "unseen"
TERMS = (MEMORY, TRENDS, UNSEEN)  # beside the towers; each can be left out
ITEM_TERMS = (TRENDS, UNSEEN)
VECTOR = "vector"  # beside the item terms in the two-tower's files of items


def without(model: str, term: str) -> str:
    """What a model is called where ``term`` is left out of its score."""
    return f"{model}_without_{term}"


@dataclass(frozen=True)
class ScoreSpec:
    """What validation chose of the terms."""

    temperature: float = 0.1  # of the softmax that the towers were trained in
    half_life: float = 4.0  # of the history in the memory, places
    memory: float = 0.0  # weight of the memory; 0: none
    ridge: float = 0.0  # its ridge; 0: nothing was validated
    trends: list[float] = field(default_factory=list)  # weight of each item type; empty: none
    unseen_share: list[float | None] = field(default_factory=list)  # of each type, as of the test; None: no examples

    def save(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=1)
        (folder / SCORE).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> ScoreSpec:
        try:
            return ScoreSpec(**json.loads((folder / SCORE).read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise ArtifactError(f"{folder / SCORE} is no description of a score: {error}") from error


@runtime_checkable
class Index(Protocol):
    """The items of one type that may be recommended, by inner product with [v_j, b_j]."""

    def search(
        self, query: Float32[np.ndarray, "wide"], k: int, forbidden: Int64[np.ndarray, "f"]
    ) -> tuple[Float32[np.ndarray, "m"], Int64[np.ndarray, "m"]]:
        """Scores and gids of the best ``k`` items that are not ``forbidden`` (ascending gids), best first."""
        ...


@dataclass(frozen=True)
class Scorer:
    """The only place where terms meet. Arrays may be memory maps."""

    wide: Float32[np.ndarray, "N wide"]  # [v_j, b_j] of each item, row = gid
    memory: Memory | None = None  # of one ridge
    weight: float = 0.0  # of the memory
    half_life: float = 1.0

    @staticmethod
    def of_items(
        items: Mapping[str, Float32[np.ndarray, "N *d"]], spec: ScoreSpec, memory: Memory | None, left_out: str = ""
    ) -> Scorer:
        """Of the towers' vectors and the item terms as the two-tower stage wrote them.

        Args:
            items: ``VECTOR`` [N, d] and item terms [N].
            memory: of the spec's ridge; None: there is none.
            left_out: a term that is not part of the score.
        """
        kept = memory if spec.memory and left_out != MEMORY else None
        return Scorer(with_item_terms(items, left_out), kept, spec.memory, spec.half_life)

    def raised(self, user: Int[np.ndarray, "n"], gid: Int[np.ndarray, "n"]) -> Recalled:
        """What the sparse terms add to the scores of users with these histories, ascending by user and gid.

        Args:
            user, gid: the events of all histories; of each user in one piece, oldest first.
        """
        if self.memory is None:
            return Recalled.nothing()
        recalled = self.memory.recall(user, gid, self.half_life)
        return recalled._replace(value=recalled.value * np.float32(self.weight))

    def dense(self, users: Float[Tensor, "B d"], raised: Recalled, first: int, last: int) -> Float[Tensor, "B items"]:
        """Scores of the items ``first <= gid < last``.

        Args:
            users: vectors of the user tower.
            raised: of these users' histories, see :meth:`raised`.
        """
        wide = torch.from_numpy(np.array(self.wide[first:last]))
        scores = users @ wide[:, :-1].T + wide[:, -1]
        here = (raised.gid >= first) & (raised.gid < last)
        row, column = torch.from_numpy(raised.user[here]), torch.from_numpy(raised.gid[here] - first)
        scores[row, column] += torch.from_numpy(raised.value[here, 0])
        return scores

    def candidates(
        self,
        index: Index,
        user: Float32[np.ndarray, "d"],
        raised_gid: Int64[np.ndarray, "m"],
        raised_value: Float32[np.ndarray, "m"],
        k: int,
        forbidden: Int64[np.ndarray, "f"],
    ) -> tuple[Float32[np.ndarray, "c"], Int64[np.ndarray, "c"]]:
        """Scores and gids of items of the index's type, in no order, each once; the best ``k`` are among them.

        Args:
            raised_gid, raised_value: what the user's history raises of this type and may be recommended, ascending.
            forbidden: gids that must not come, ascending.
        """
        query = np.append(user, np.float32(1))
        scores, gids = index.search(query, k, forbidden)
        others = ~among(gids, raised_gid)
        own = self.wide[raised_gid] @ query + raised_value
        return np.concatenate([scores[others], own]), np.concatenate([gids[others], raised_gid])


def with_item_terms(
    items: Mapping[str, Float32[np.ndarray, "N *d"]], left_out: str = ""
) -> Float32[np.ndarray, "N wide"]:
    """[v_j, b_j]; arguments as :meth:`Scorer.of_items`."""
    bias = np.zeros(len(items[VECTOR]), np.float32)
    for term in ITEM_TERMS:
        if term in items and term != left_out:
            bias += items[term]
    return np.column_stack([items[VECTOR], bias])


def among(values: Int[np.ndarray, "n"], ascending: Int[np.ndarray, "m"]) -> np.ndarray:
    """bool [n]: is each value in ``ascending``? A fifth of what np.isin takes for a few values."""
    if not len(ascending):
        return np.zeros(len(values), bool)
    places = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return ascending[places] == values
