"""ANN search by inner product, one FAISS index per item type.

Up to ``index.exact_up_to`` items of a type are searched exactly, more with HNSW. Vectors have unit norm and the towers
are trained on the inner product. An index with another metric would silently rank wrongly, so the metric is compared
when an index is built and when it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from recsys_ray.config import IndexConfig
from recsys_ray.core.errors import ArtifactError
from recsys_ray.scoring.memory import Recalled
from recsys_ray.scoring.scorer import Pairs, Ranked, among
from recsys_ray.serving.index_file import check_index_file

METRIC = "inner_product"
UNIT_NORM_WITHIN = 1e-3
_OVERFETCH = 256  # forbidden items up to which an exact search asks for more and drops them, instead of testing each
_GATHER = 20_000  # allowed items up to which their vectors are multiplied, whatever the index
_MOST_EF = 2_048  # efSearch under a filter
_EF_SEARCH = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1_024)  # which are tried for an index
_RECALLS = (10, 100)  # list lengths whose recall decides
_MOST_STRETCH = 4.0
_SAMPLE = 1_000
_CHUNK = 65_536  # rows an exact search holds at once
_SCORES = 1 << 23  # that a ranking holds at once: they should stay in the processor's cache
_STRIDE = 64  # scores of which the best one is looked at first
_NOTHING = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


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


def exact_top_k(vectors: Vectors, queries: Vectors, k: int) -> tuple[Vectors, Ids]:
    """Scores and row numbers [q, min(k, n)] of the best rows, best first, without FAISS: what recall is measured by."""
    scores = np.empty((len(queries), 0), np.float32)
    rows = np.empty((len(queries), 0), np.int64)
    for start in range(0, len(vectors), _CHUNK):
        chunk = queries @ np.asarray(vectors[start : start + _CHUNK]).T
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
    """The available items of one type.

    HNSW links an item to those that it would find if it were a query, but queries are [u, 1] and items [v, b] with a
    small b: a walk along such links passes by the items with a large b, which are most of what is to be found. So the
    graph is made of [v, c b] and asked with [u, 1 / c], which changes no product. With c^2 b = 1 a typical item of an
    answer stands for the query [v, 1]. On trained vectors this finds .99 of the best ten where c = 1 finds .91.
    """

    name: str
    index: faiss.Index
    gids: npt.NDArray[np.int32]  # ascending; position in the index -> gid
    vectors: Vectors  # [all items, d], row = gid: for the exact search where HNSW finds too few
    stretch: float = 1.0  # c
    ef_search: tuple[int, int] = (0, 0)  # candidates that HNSW follows beyond a list: of up to 10 items, of more
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
            queries: [q, d], typical ones, which HNSW is tuned with; None: some of the items.
        """
        dimension = vectors.shape[1]
        if len(gids) <= config.exact_up_to:
            index: faiss.Index = faiss.IndexFlatIP(dimension)
            made = cls(name, index, gids, vectors)
            made.add(gids)
            return made
        if queries is None:
            queries = vectors[gids[np.linspace(0, len(gids) - 1, min(_SAMPLE, len(gids))).astype(int)]]
        index = faiss.IndexHNSWFlat(dimension, config.hnsw_links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = config.ef_construction
        best, rows = exact_top_k(vectors[gids], queries, max(_RECALLS))
        typical = float(np.median(vectors[gids[rows[:, : min(_RECALLS)]], -1]))
        made = cls(name, index, gids, vectors, min(max(typical**-0.5, 1.0), _MOST_STRETCH) if typical > 0 else 1.0)
        made.add(gids)
        return made._tuned(queries, best, config.recall)

    def add(self, gids: npt.NDArray[np.int32]) -> None:
        """Put these items behind those that are there."""
        for start in range(0, len(gids), _CHUNK):
            part = np.array(self.vectors[gids[start : start + _CHUNK]])
            part[:, -1] *= self.stretch
            self.index.add(part)

    def tuned(self, queries: Vectors, least: float) -> TypeIndex:
        """This index with the smallest ``ef_search`` that reaches a recall of ``least`` for ``queries`` [q, d], or else
        with the largest."""
        if self.exact:
            return self
        return self._tuned(queries, exact_top_k(self.vectors[self.gids], queries, max(_RECALLS))[0], least)

    def _tuned(self, queries: Vectors, best: Vectors, least: float) -> TypeIndex:
        """``best``: scores of exact search [q, k], best first."""
        chosen, recalls = [], []
        for k in _RECALLS:
            for ef_search in _EF_SEARCH:
                recall = self._recall(queries, best[:, :k], ef_search)
                if recall >= least:
                    break
            chosen.append(ef_search)
            recalls.append(recall)
        return replace(self, ef_search=(chosen[0], chosen[1]), recall=min(recalls))

    def _recall(self, queries: Vectors, best: Vectors, ef_search: int) -> float:
        """Share of places that hold an item as good as the last one of exact search.

        Scores are compared, not ids: items with equal vectors (same text, no edges) may stand for each other.
        """
        k = best.shape[1]
        scores, found = self._walk(queries, k + ef_search, k)
        return float(((found >= 0) & (scores >= best[:, -1:] - 1e-5)).mean())

    def _walk(
        self, queries: Vectors, ef: int, ask: int, selector: faiss.IDSelector | None = None
    ) -> tuple[Vectors, Ids]:
        """Scores and positions [q, ask]; -1 where nothing is found. ``ef``: HNSW's efSearch."""
        if self.exact:
            parameters = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
        else:
            queries = queries.copy()
            queries[:, -1] /= self.stretch
            parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=ef)  # type: ignore[attr-defined]
        scores, found = self.index.search(queries, ask, params=parameters)
        return scores, found

    def _ef(self, k: int, beyond: int) -> int:
        return k + max(self.ef_search[k > min(_RECALLS)], beyond)

    @classmethod
    def load(
        cls,
        path: Path,
        name: str,
        gids: npt.NDArray[np.int32],
        vectors: Vectors,
        settings: Mapping[str, Any],
        mapped: bool = True,
    ) -> TypeIndex:
        """Read what :meth:`save` wrote; replicas on one host share a ``mapped`` index's memory.

        Args:
            settings: as :attr:`settings` of the index that was saved.

        Raises:
            ArtifactError: the file is damaged, ranks by another metric, or does not fit the items.
        """
        check_index_file(path)
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
        except RuntimeError as error:
            raise ArtifactError(f"{path} cannot be read as an index; build the bundle again") from error
        if index.ntotal != len(gids) or index.d != vectors.shape[1]:
            raise ArtifactError(
                f"{path} contains {index.ntotal} vectors of {index.d} numbers, but the bundle has {len(gids)} items of "
                f"type {name!r} and vectors of {vectors.shape[1]}; build the bundle again"
            )
        short, long = settings["ef_search"]
        return cls(name, index, gids, vectors, settings["stretch"], (short, long), settings["recall"])

    @property
    def settings(self) -> dict[str, Any]:
        """What the file does not hold."""
        return {"stretch": self.stretch, "ef_search": self.ef_search, "recall": self.recall}

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        faiss.write_index(self.index, str(path))

    @cached_property
    def exact(self) -> bool:
        return isinstance(faiss.downcast_index(self.index), faiss.IndexFlat)

    def search(
        self, query: Vectors, k: int, forbidden: Ids | None = None, allowed: Ids | None = None, beyond: int = 0
    ) -> tuple[Vectors, Ids]:
        """The best ``k`` items for ``query`` [d].

        How it is searched is decided by how many items are allowed, before the search: under a narrow filter HNSW
        returns a full list that is far from the best one.

        Args:
            forbidden: gids that must not come, ascending.
            allowed: positions in the index, ascending; None: all.
            beyond: so many more items come, for which the recall need not be as high.

        Returns:
            scores [m] and gids [m], best first; m < k + beyond only where the type has fewer items that are allowed.
        """
        local = self.positions(forbidden)
        if allowed is not None:
            return self._search_allowed(query, k, local, allowed, beyond)
        wanted = min(k + beyond, len(self.gids) - len(local))
        if wanted <= 0:
            return np.empty(0, np.float32), np.empty(0, np.int64)
        ef = self._ef(k, beyond)
        # Where it is cheaper to ask for more and to drop what is forbidden: up to efSearch it costs HNSW nothing.
        selective = len(local) > _OVERFETCH if self.exact else wanted + len(local) > ef
        ask = wanted if selective else wanted + len(local)
        selector = None
        if selective:  # FAISS's type stubs lack what its Python layer adds
            selector = faiss.IDSelectorNot(faiss.IDSelectorBatch(local))  # type: ignore[call-arg,arg-type]
        scores, found = self._walk(query[None], ef, ask, selector)
        keep = found[0] >= 0
        if not selective and len(local):
            keep &= ~among(found[0], local)
        scores, found = scores[0][keep][:wanted], found[0][keep][:wanted]
        if len(found) < wanted:  # HNSW lost its way among forbidden items
            rest = np.setdiff1d(np.arange(len(self.gids)), local, assume_unique=True)
            scores, found = self._among(query, wanted, rest)
        return scores, self.gids[found].astype(np.int64)

    def _search_allowed(self, query: Vectors, k: int, local: Ids, allowed: Ids, beyond: int) -> tuple[Vectors, Ids]:
        barred = local[among(local, allowed)]
        wanted = min(k + beyond, len(allowed) - len(barred))
        if wanted <= 0:
            return np.empty(0, np.float32), np.empty(0, np.int64)
        if len(allowed) <= _GATHER:
            rest = allowed[~among(allowed, barred)] if len(barred) else allowed
            scores, found = self._among(query, wanted, rest)
            return scores, self.gids[found].astype(np.int64)
        bits = np.zeros(len(self.gids), bool)
        bits[allowed] = True
        bits[barred] = False
        packed = np.packbits(bits, bitorder="little")
        selector = faiss.IDSelectorBitmap(packed)  # type: ignore[call-arg,arg-type]
        ef = min(int(self._ef(k, beyond) * len(self.gids) / len(allowed)), _MOST_EF)
        scores, found = self._walk(query[None], max(ef, wanted), wanted, selector)
        keep = found[0] >= 0
        if int(keep.sum()) < wanted:
            scores, found = self._among(query, wanted, np.flatnonzero(bits))
            return scores, self.gids[found].astype(np.int64)
        return scores[0], self.gids[found[0]].astype(np.int64)

    def search_each(
        self, queries: Vectors, k: int, forbidden: Pairs, allowed: Ids | None = None, beyond: int = 0
    ) -> Ranked:
        """As :meth:`search` for each of the ``queries`` [q, d]. Those are searched together that need not step around
        forbidden items; the walk of each, and so what it finds, is that of :meth:`search`."""
        place = self.place(forbidden.gid)
        row, barred = forbidden.row[place >= 0], place[place >= 0]
        count = np.bincount(row, minlength=len(queries))
        wanted, ef = np.minimum(k + beyond, len(self.gids) - count), self._ef(k, beyond)
        together = (wanted > 0) & (count <= _OVERFETCH if self.exact else wanted + count <= ef)
        if allowed is not None:
            together[:] = False
        parts = [Ranked(*_NOTHING)]
        if together.any():
            rows = np.flatnonzero(together)
            scores, found = self._walk(queries[rows], ef, int((wanted + count)[rows].max()))
            keep = found >= 0
            if len(row):
                keep &= ~among((rows[:, None] * len(self.gids) + found).ravel(), row * len(self.gids) + barred).reshape(
                    keep.shape
                )
            keep &= keep.cumsum(1) <= wanted[rows, None]
            whole = keep.sum(1) == wanted[rows]
            keep &= whole[:, None]
            together[rows[~whole]] = False
            parts.append(Ranked(np.repeat(rows, keep.sum(1)), self.gids[found[keep]].astype(np.int64), scores[keep]))
        alone = np.flatnonzero(~together & (wanted > 0))
        begin = np.searchsorted(forbidden.row, np.arange(len(queries) + 1)) if len(alone) else ()
        for number in alone:
            mine = forbidden.gid[begin[number] : begin[number + 1]]
            score, gid = self.search(queries[number], k, mine, allowed, beyond)
            parts.append(Ranked(np.full(len(gid), number), gid, score))
        return parts[-1] if len(parts) <= 2 else Ranked.best(parts, k + beyond)

    def rank(self, queries: Vectors, k: int, raised: Recalled, forbidden: Pairs, allowed: Ids | None = None) -> Ranked:
        """The best ``k`` items of each of the ``queries`` [q, d] by all scores of an exact index.

        A product of matrices takes a tenth of the time that FAISS takes for as many searches.

        Args:
            raised: what is added to scores; items that are not in the index are passed over.
            forbidden: what must not come.
            allowed: positions in the index, ascending; None: all.
        """
        gids = self.gids if allowed is None else self.gids[allowed]
        table = self.vectors[gids]  # a copy: what FAISS maps is not aligned, which would cost one copy a product
        added, barred = self.place(raised.gid), self.place(forbidden.gid)
        if allowed is not None:
            column = np.full(len(self.gids) + 1, -1)  # the last one is what -1 means
            column[allowed] = np.arange(len(allowed))
            added, barred = column[added], column[barred]
        parts = [Ranked(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
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

    def positions(self, gids: Ids | None) -> Ids:
        """Positions in the index of those of the ascending ``gids`` that are in it."""
        places = self.place(np.empty(0, np.int64) if gids is None else gids)
        return places[places >= 0].astype(np.int64)

    def _among(self, query: Vectors, k: int, positions: Ids) -> tuple[Vectors, Ids]:
        """Scores and positions of the best ``k`` of these positions, by multiplying their vectors."""
        scores = np.empty(len(positions), np.float32)
        for start in range(0, len(positions), _CHUNK):
            part = positions[start : start + _CHUNK]
            scores[start : start + _CHUNK] = self.vectors[self.gids[part]] @ query
        best = np.argpartition(-scores, min(k, len(scores)) - 1)[:k]
        best = best[np.lexsort((positions[best], -scores[best]))]
        return scores[best], positions[best]


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


def search_types(
    indexes: Sequence[TypeIndex], query: Vectors, k: int, forbidden: Ids | None = None
) -> tuple[Vectors, Ids]:
    """The best ``k`` items of several types: one vector space, so their scores compare."""
    return merge_best([index.search(query, k, forbidden) for index in indexes], k)


def merge_best(found: Sequence[tuple[Vectors, Ids]], k: int) -> tuple[Vectors, Ids]:
    """The best ``k`` of several (scores, gids); of equal scores the smaller gid."""
    scores, gids = np.concatenate([s for s, _ in found]), np.concatenate([g for _, g in found])
    best = np.lexsort((gids, -scores))[:k]
    return scores[best], gids[best]
