"""Search by inner product among the items of one type.

Up to ``index.exact_up_to`` items every vector is compared with a query. Above, 4-bit codes of all vectors select
candidates (codes.py), and the candidates' vectors decide. Vectors have unit norm and the towers are trained on the
inner product. An index with another metric would silently rank wrongly, so the metric is compared when an index is
built and when it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys_ray.config import IndexConfig
from recsys_ray.core.errors import ArtifactError
from recsys_ray.scoring.memory import Recalled
from recsys_ray.scoring.scorer import Pairs, Ranked, among
from recsys_ray.serving.codes import Codes

METRIC = "inner_product"
UNIT_NORM_WITHIN = 1e-3
_CANDIDATES = (50, 100, 200, 400, 800, 1_600, 3_200, 6_400)  # numbers of them that are tried for an index
_RECALLS = (10, 100)  # list lengths whose recall decides
_COMPARED, _SORTED = 150, 65  # what a vector that is compared costs, and a candidate, in codes that are scanned
_MARGIN = 1.5  # more candidates than a filter's share asks for: what it allows is not spread evenly
_SAMPLE = 1_000
_CHUNK = 65_536  # rows an exact search holds at once
_SCORES = 1 << 23  # that a ranking holds at once: they should stay in the processor's cache
_STRIDE = 64  # scores of which the best one is looked at first

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def index_file(number: int) -> str:
    """Where a bundle has the codes of the items of type number ``number``."""
    return f"index/t{number}.safetensors"


def check_metric(spec_metric: object, where: object) -> None:
    """The metric that the towers were trained on must be the one that the index ranks by.

    Raises:
        ArtifactError: it is another one.
    """
    if spec_metric != METRIC:
        raise ArtifactError(
            f"{where} was trained on the metric {spec_metric!r}, but the index ranks by {METRIC!r}; train again"
        )


def check_unit_norm(vectors: Vectors, where: object) -> None:
    """Raises ArtifactError where a row of ``vectors`` [n, d] is not of length 1 (or holds NaN)."""
    for start in range(0, len(vectors), _CHUNK):
        norms = np.linalg.norm(vectors[start : start + _CHUNK], axis=1)
        wrong = np.flatnonzero(~(np.abs(norms - 1) <= UNIT_NORM_WITHIN))
        if len(wrong):
            row = int(wrong[0])
            raise ArtifactError(f"row {start + row} of {where} has length {norms[row]:.4g}, not 1; train again")


def exact_top_k(vectors: Vectors, gids: npt.NDArray[np.integer], queries: Vectors, k: int) -> tuple[Vectors, Ids]:
    """Scores and positions [q, min(k, n)] of the best of ``vectors[gids]``, best first: what recall is measured by."""
    scores = np.empty((len(queries), 0), np.float32)
    rows = np.empty((len(queries), 0), np.int64)
    for start in range(0, len(gids), _CHUNK):
        chunk = queries @ vectors[gids[start : start + _CHUNK]].T
        row, found = np.divmod(_places_of_best(chunk, k), chunk.shape[1])
        best = Ranked.best([(row, found, chunk[row, found])], k)
        shape = len(queries), -1
        scores = np.concatenate([scores, best.score.reshape(shape)], axis=1)
        rows = np.concatenate([rows, start + best.gid.reshape(shape)], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
    return scores, rows


@dataclass(frozen=True)
class TypeIndex:
    """The available items of one type."""

    name: str
    gids: npt.NDArray[np.int32]  # ascending; position in the index -> gid
    vectors: Vectors  # [all items, d], row = gid
    codes: Codes | None = None  # of the items, by position; None: every vector is compared
    candidates: tuple[int, int] = (0, 0)  # whose vectors are compared: for lists of up to 10 items, of up to 100
    recall: float = 1.0  # against exact search, the lower of recall@10 and recall@100

    @classmethod
    def build(
        cls,
        name: str,
        vectors: Vectors,
        gids: npt.NDArray[np.int32],
        config: IndexConfig,
        queries: Vectors | None = None,
    ) -> TypeIndex:
        """Index ``vectors[gids]``.

        Args:
            vectors: [all items, d], row = gid.
            queries: [q, d], typical ones, which the number of candidates is chosen with; None: some of the items.
        """
        if len(gids) <= config.exact_up_to:
            return cls(name, gids, vectors)
        if queries is None:
            queries = vectors[gids[np.linspace(0, len(gids) - 1, min(_SAMPLE, len(gids))).astype(int)]]
        codes = Codes.learn(vectors, gids).extended(vectors, gids)
        return cls(name, gids, vectors, codes).tuned(queries, config.recall)

    def grown(self, gids: npt.NDArray[np.int32]) -> TypeIndex:
        """The index of ``gids``: those that are there, and behind them others."""
        codes = None if self.codes is None else self.codes.extended(self.vectors, gids[len(self.gids) :])
        return replace(self, gids=gids, codes=codes)

    def tuned(self, queries: Vectors, least: float) -> TypeIndex:
        """This index with the fewest candidates that reach a recall of ``least`` for ``queries`` [q, d], or else with
        the most."""
        if self.exact:
            return self
        best = exact_top_k(self.vectors, self.gids, queries, max(_RECALLS))[0]
        chosen, recalls = [], []
        for k in _RECALLS:
            for count in _CANDIDATES:
                recall = replace(self, candidates=(count, count))._recall(queries, best[:, :k])
                if recall >= least:
                    break
            chosen.append(count)
            recalls.append(recall)
        return replace(self, candidates=(chosen[0], chosen[1]), recall=min(recalls))

    def _recall(self, queries: Vectors, best: Vectors) -> float:
        """Share of places that hold an item as good as the last one of exact search.

        Scores are compared, not ids: items with equal vectors (same text, no edges) may stand for each other.

        Args:
            best: scores of exact search [q, k], best first.
        """
        found = self.search_each(queries, best.shape[1], Pairs.nothing())
        return float((found.score >= best[found.row, -1] - 1e-5).sum() / best.size)

    @classmethod
    def load(
        cls,
        path: Path,
        name: str,
        gids: npt.NDArray[np.int32],
        vectors: Vectors,
        settings: Mapping[str, Any],
    ) -> TypeIndex:
        """Read what :meth:`save` wrote; replicas on one host share its memory.

        Args:
            settings: as :attr:`settings` of the index that was saved.

        Raises:
            ArtifactError: the file is damaged, of another version, or does not fit the items.
        """
        if "candidates" not in settings:
            raise ArtifactError(f"the index of {name!r} is of another version of recsys-ray; build the bundle again")
        if settings["candidates"] is None:
            return cls(name, gids, vectors)
        short, long = map(int, settings["candidates"])
        codes = Codes.load(path, len(gids), vectors.shape[1])
        return cls(name, gids, vectors, codes, (short, long), float(settings["recall"]))

    @property
    def settings(self) -> dict[str, Any]:
        """What the file does not hold. Where every vector is compared there are no candidates, and no file."""
        return {"candidates": None if self.exact else self.candidates, "recall": self.recall}

    def save(self, path: Path) -> None:
        if self.codes is not None:
            self.codes.save(path)

    @property
    def exact(self) -> bool:
        return self.codes is None

    @cached_property
    def _table(self) -> Vectors:
        """The vectors by position, of an index without codes; aligned in memory, which mapped ones may not be."""
        return self.vectors[self.gids]

    def search_each(
        self, queries: Vectors, k: int, forbidden: Pairs, allowed: Mask | None = None, beyond: int = 0
    ) -> Ranked:
        """The best ``k`` items of each of the ``queries`` [q, d]. What a query finds does not depend on the others.

        Args:
            forbidden: what must not come.
            allowed: by position; None: all.
            beyond: so many more items come, for which the recall need not be as high.

        Returns:
            ``k + beyond`` items of each query, fewer only where fewer may come.
        """
        items = len(self.gids)
        count = items if allowed is None else int(np.count_nonzero(allowed))
        needed = max(self.candidates[k > min(_RECALLS)], self.candidates[1] * k // max(_RECALLS), k + beyond)
        # Of so many candidates one may come.
        spread = 1.0 if allowed is None else _MARGIN * items / max(count, 1)
        narrow = allowed is not None and _COMPARED * count <= items + _SORTED * spread * needed
        if self.codes is None or narrow:
            return self.rank(queries, k + beyond, Recalled.nothing(), forbidden, allowed)
        at = self.place(forbidden.gid)
        barred = Pairs(forbidden.row[at >= 0], at[at >= 0].astype(np.int64))
        ask = np.minimum(_power_of_two(spread * needed + np.bincount(barred.row, minlength=len(queries))), items)
        parts, left = [Ranked.nothing()], np.ones(len(queries), bool)
        while left.any():
            asked = int(ask[left].min())
            rows = np.flatnonzero(left & (ask == asked))
            if asked == items:
                found, enough = self._compared(queries, rows, k + beyond, forbidden, allowed), np.ones(len(rows), bool)
            else:
                found, enough = self._by_codes(queries, rows, needed, asked, barred, allowed)
            parts.append(found)
            ask[rows] = min(4 * asked, items)
            left[rows[enough]] = False
        return Ranked.best(parts, k + beyond)

    def _by_codes(
        self, queries: Vectors, rows: Ids, needed: int, ask: int, barred: Pairs, allowed: Mask | None
    ) -> tuple[Ranked, Mask]:
        """Of each of these rows of ``queries`` the ``needed`` candidates that may come among the best ``ask`` by their
        codes, with exact scores, in no order; and which rows have as many. ``barred``: positions."""
        assert self.codes is not None
        place, items = self.codes.nearest(queries[rows], ask), len(self.gids)
        may = place >= 0
        if allowed is not None:
            may &= allowed[place]
        if len(barred.row):
            taken = among((rows[:, None] * items + place).ravel(), barred.row * items + barred.gid)
            may &= ~taken.reshape(may.shape)
        counted = may.cumsum(1)
        enough = counted[:, -1] >= needed
        may &= (counted <= needed) & enough[:, None]
        row, gid = np.repeat(rows, may.sum(1)), self.gids[place[may]].astype(np.int64)
        return Ranked(row, gid, np.einsum("nd,nd->n", self.vectors[gid], queries[row])), enough

    def _compared(self, queries: Vectors, rows: Ids, k: int, forbidden: Pairs, allowed: Mask | None) -> Ranked:
        """As :meth:`rank`, for some rows of ``queries``."""
        mine = among(forbidden.row, rows)
        barred = Pairs(np.searchsorted(rows, forbidden.row[mine]), forbidden.gid[mine])
        found = self.rank(queries[rows], k, Recalled.nothing(), barred, allowed)
        return found._replace(row=rows[found.row])

    def rank(self, queries: Vectors, k: int, raised: Recalled, forbidden: Pairs, allowed: Mask | None = None) -> Ranked:
        """The best ``k`` items of each of the ``queries`` [q, d], by comparing every vector.

        Args:
            raised: what is added to scores; items that are not in the index are passed over.
            forbidden: what must not come.
            allowed: by position; None: all.
        """
        gids, added, barred = self.gids, self.place(raised.gid), self.place(forbidden.gid)
        if allowed is None:
            table = self._table if self.exact else self.vectors[gids]
        else:
            kept = np.flatnonzero(allowed)
            added, barred = (np.where(among(at, kept), np.searchsorted(kept, at), -1) for at in (added, barred))
            gids, table = gids[kept], self._table[kept] if self.exact else self.vectors[gids[kept]]
        parts = [Ranked.nothing()]
        rows = max(1, _SCORES // max(len(gids), 1))
        for start in range(0, len(queries) if len(gids) else 0, rows):
            scores = queries[start : start + rows] @ table.T
            mine = slice(*np.searchsorted(raised.user, [start, start + rows]))
            here = added[mine] >= 0
            scores[raised.user[mine][here] - start, added[mine][here]] += raised.value[mine, 0][here]
            mine = slice(*np.searchsorted(forbidden.row, [start, start + rows]))
            here = barred[mine] >= 0
            scores[forbidden.row[mine][here] - start, barred[mine][here]] = -np.inf
            row, found = np.divmod(_places_of_best(scores, k), len(gids))
            parts.append(Ranked.best([(row + start, gids[found].astype(np.int64), scores[row, found])], k))
        return Ranked(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    @cached_property
    def _places(self) -> npt.NDArray[np.int32]:
        """By gid, counted from that of the first item: its position, or -1."""
        places = np.full(int(self.gids[-1]) - int(self.gids[0]) + 1, -1, np.int32)
        places[self.gids - self.gids[0]] = np.arange(len(self.gids))
        return places

    def place(self, gids: Ids) -> npt.NDArray[np.int32]:
        """Positions in the index; -1 for items that are not in it."""
        if not len(self.gids):
            return np.full(len(gids), -1, np.int32)
        at = gids - int(self.gids[0])
        inside = (at >= 0) & (at < len(self._places))
        return np.where(inside, self._places[np.where(inside, at, 0)], np.int32(-1))

    def mask(self, gids: Ids) -> Mask:
        """By position: is an item among ``gids``?"""
        listed, places = np.zeros(len(self.gids), bool), self.place(gids)
        listed[places[places >= 0]] = True
        return listed


def _power_of_two(counts: npt.NDArray[Any]) -> Ids:
    """The smallest powers of two that are not below these."""
    return np.int64(2) ** np.ceil(np.log2(counts)).astype(np.int64)


def _places_of_best(scores: Vectors, k: int) -> Ids:
    """Places in the flattened ``scores`` [q, n] that hold the best ``k`` of each row, and a few more; never -inf.

    Of every ``_STRIDE`` scores the largest is taken. At least k scores reach the k-th largest of these, and few more.
    """
    n = scores.shape[1]
    width = min(n, max(n // _STRIDE, 4 * k))
    best = scores[:, :width].copy()
    for start in range(width, n, width):
        part = scores[:, start : start + width]
        np.maximum(best[:, : part.shape[1]], part, out=best[:, : part.shape[1]])
    lowest = np.full(len(scores), np.finfo(np.float32).min, np.float32)
    if k < width:
        lowest = np.maximum(lowest, np.partition(best, width - k, axis=1)[:, width - k])
    return np.flatnonzero((scores >= lowest[:, None]).ravel())
