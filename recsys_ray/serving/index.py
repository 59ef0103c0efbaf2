"""ANN search by inner product, one FAISS index per item type.

Up to ``index.exact_up_to`` items of a type are searched exactly, more through HNSW. Vectors have unit norm and the
towers are trained on the inner product; an index of another metric would rank wrongly without a word, so the metric
is compared when an index is built and again when it is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt

from recsys_ray.config import IndexConfig
from recsys_ray.core.errors import ArtifactError
from recsys_ray.scoring.scorer import among

METRIC = "inner_product"
UNIT_NORM_WITHIN = 1e-3
_OVERFETCH = 256  # up to so many forbidden items it is cheaper to ask for more and drop them than to test each visit
_CHUNK = 65_536  # rows an exact search holds at once

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


def as_queries(users: Vectors) -> Vectors:
    """[u, 1] for vectors of users [q, d]: what items [v_j, b_j] are asked with (recsys_ray/scoring/scorer.py)."""
    return np.pad(users, ((0, 0), (0, 1)), constant_values=1)


def exact_top_k(vectors: Vectors, queries: Vectors, k: int) -> tuple[Vectors, Ids]:
    """Scores and row numbers [q, min(k, n)] of the best rows, best first, without FAISS: what recall is measured by."""
    scores = np.empty((len(queries), 0), np.float32)
    rows = np.empty((len(queries), 0), np.int64)
    for start in range(0, len(vectors), _CHUNK):
        chunk = queries @ np.asarray(vectors[start : start + _CHUNK]).T
        scores = np.concatenate([scores, chunk], axis=1)
        here = np.arange(start, start + chunk.shape[1])
        rows = np.concatenate([rows, np.broadcast_to(here, chunk.shape)], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, rows = np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)
    return scores, rows


@dataclass(frozen=True)
class TypeIndex:
    """The available items of one type."""

    name: str
    index: faiss.Index
    gids: npt.NDArray[np.int32]  # ascending; position in the index -> gid
    vectors: Vectors  # [all items, d], row = gid: for the exact search where HNSW finds too few
    ef_search: int

    @classmethod
    def build(cls, name: str, vectors: Vectors, gids: npt.NDArray[np.int32], config: IndexConfig) -> TypeIndex:
        """Index ``vectors[gids]``; ``vectors`` is [all items, d], row = gid."""
        dimension = vectors.shape[1]
        if len(gids) <= config.exact_up_to:
            index: faiss.Index = faiss.IndexFlatIP(dimension)
        else:
            index = faiss.IndexHNSWFlat(dimension, config.hnsw_links, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = config.ef_construction
        for start in range(0, len(gids), _CHUNK):
            index.add(np.ascontiguousarray(vectors[gids[start : start + _CHUNK]]))
        return cls(name, index, gids, vectors, config.ef_search)

    @classmethod
    def load(
        cls, path: Path, name: str, gids: npt.NDArray[np.int32], vectors: Vectors, ef_search: int, mapped: bool = True
    ) -> TypeIndex:
        """Read what :meth:`save` wrote; replicas on one host share a ``mapped`` index's memory.

        Raises:
            ArtifactError: the file is damaged, ranks by another metric, or does not fit the items.
        """
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
        except RuntimeError as error:
            raise ArtifactError(f"{path} cannot be read as an index; build the bundle again") from error
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ArtifactError(f"{path} does not rank by {METRIC!r}, which the towers were trained on; build it again")
        if index.ntotal != len(gids) or index.d != vectors.shape[1]:
            raise ArtifactError(
                f"{path} holds {index.ntotal} vectors of {index.d} numbers, but the bundle has {len(gids)} items of "
                f"type {name!r} and vectors of {vectors.shape[1]}; build the bundle again"
            )
        return cls(name, index, gids, vectors, ef_search)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        faiss.write_index(self.index, str(path))

    @cached_property
    def exact(self) -> bool:
        return isinstance(faiss.downcast_index(self.index), faiss.IndexFlat)

    def search(self, query: Vectors, k: int, forbidden: Ids | None = None) -> tuple[Vectors, Ids]:
        """The best ``k`` items for ``query`` [d] that are not in ``forbidden`` (sorted gids).

        Returns:
            scores [m] and gids [m], best first; m < k only where the type has fewer items that are allowed.
        """
        local = self._positions(forbidden)
        wanted = min(k, len(self.gids) - len(local))
        if wanted <= 0:
            return np.empty(0, np.float32), np.empty(0, np.int64)
        selective = len(local) > _OVERFETCH
        ask = wanted if selective else wanted + len(local)
        scores, found = self.index.search(query[None], ask, params=self._parameters(ask, local if selective else None))
        keep = found[0] >= 0
        if not selective and len(local):
            keep &= ~among(found[0], local)
        scores, found = scores[0][keep][:wanted], found[0][keep][:wanted]
        if len(found) < wanted:  # HNSW lost its way among forbidden items
            scores, found = self._exact(query, wanted, local)
        return scores, self.gids[found].astype(np.int64)

    def _positions(self, forbidden: Ids | None) -> Ids:
        """Positions in the index of those forbidden gids that are in it."""
        if forbidden is None or not len(forbidden) or not len(self.gids):
            return np.empty(0, np.int64)
        known = forbidden[among(forbidden, self.gids)]
        return np.searchsorted(self.gids, known)

    def _parameters(self, ask: int, without: Ids | None) -> faiss.SearchParameters:
        selector = None  # FAISS's type stubs lack what its Python layer adds
        if without is not None:
            selector = faiss.IDSelectorNot(faiss.IDSelectorBatch(without))  # type: ignore[call-arg,arg-type]
        if self.exact:
            return faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
        parameters = faiss.SearchParametersHNSW  # type: ignore[attr-defined]
        return parameters(sel=selector, efSearch=max(self.ef_search, ask))

    def _exact(self, query: Vectors, k: int, without: Ids) -> tuple[Vectors, Ids]:
        allowed = np.setdiff1d(np.arange(len(self.gids)), without, assume_unique=True)
        scores, rows = exact_top_k(self.vectors[self.gids[allowed]], query[None], k)
        return scores[0], allowed[rows[0]]


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


def recall_at(index: TypeIndex, queries: Vectors, k: int = 10) -> float:
    """Share of the first ``k`` places that hold an item as good as exact search's k-th.

    Scores are compared, not ids: items with equal vectors (same text, no edges) may stand for each other.
    """
    k = min(k, len(index.gids))
    if not k or not len(queries):
        return 1.0
    exact, _ = exact_top_k(index.vectors[index.gids], queries, k)
    parameters = index._parameters(k, None)
    scores, found = index.index.search(np.ascontiguousarray(queries), k, params=parameters)
    good = (found >= 0) & (scores >= exact[:, -1:] - 1e-5)
    return float(good.mean())
