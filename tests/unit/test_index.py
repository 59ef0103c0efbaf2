"""FAISS against brute force."""

from __future__ import annotations

from dataclasses import replace

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_ray.config import IndexConfig
from recsys_ray.core.errors import ArtifactError
from recsys_ray.scoring.memory import Recalled
from recsys_ray.scoring.scorer import Pairs
from recsys_ray.serving.index import (
    TypeIndex,
    check_metric,
    check_unit_norm,
    exact_top_k,
    search_types,
)

DIM = 16
HNSW = IndexConfig(exact_up_to=10, recall=1.0)


def unit(rows: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, DIM), dtype=np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def brute_force(vectors: np.ndarray, query: np.ndarray, k: int, allowed: np.ndarray) -> list[int]:
    scores = vectors[allowed] @ query
    return allowed[np.lexsort((allowed, -scores))[:k]].tolist()


@pytest.fixture(scope="module", params=[IndexConfig(), HNSW], ids=["exact", "hnsw"])
def built(request) -> TypeIndex:
    """600 items, of which every third is of this type."""
    vectors = unit(600)
    return TypeIndex.build("book", vectors, np.arange(0, 600, 3, dtype=np.int32), request.param, unit(100, seed=9))


def test_kind_follows_size():
    vectors, gids = unit(11), np.arange(11, dtype=np.int32)
    assert TypeIndex.build("a", vectors, gids[:10], HNSW).exact
    assert not TypeIndex.build("a", vectors, gids, HNSW).exact


def test_exact_top_k_is_brute_force_across_chunks(monkeypatch):
    monkeypatch.setattr("recsys_ray.serving.index._CHUNK", 7)
    vectors, queries = unit(50), unit(4, seed=1)
    scores, rows = exact_top_k(vectors, queries, 5)
    assert rows.tolist() == [brute_force(vectors, q, 5, np.arange(50)) for q in queries]
    np.testing.assert_allclose(scores, np.sort(queries @ vectors.T)[:, :-6:-1], atol=1e-6)


def test_search_is_brute_force(built):
    for query in unit(20, seed=2):
        scores, gids = built.search(query, 10)
        assert gids.tolist() == brute_force(built.vectors, query, 10, built.gids)
        np.testing.assert_allclose(scores, built.vectors[gids] @ query, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(k=st.integers(1, 90), most=st.integers(0, 150), narrow=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_many_queries_find_what_each_finds_alone(built, k, most, narrow, seed):
    random = np.random.default_rng(seed)
    queries = random.standard_normal((20, DIM), dtype=np.float32)
    barred = [np.sort(random.choice(600, random.integers(0, most + 1), replace=False)) for _ in queries]
    pairs = Pairs(np.repeat(np.arange(20), [len(gids) for gids in barred]), np.concatenate(barred))
    allowed = np.flatnonzero(random.random(200) < 0.3) if narrow else None
    alone = [built.search(query, k, gids, allowed) for query, gids in zip(queries, barred, strict=True)]
    together = [built.search_each(queries, k, pairs, allowed)]
    together += [built.rank(queries, k, Recalled.nothing(), pairs, allowed)] if built.exact else []
    for found in together:
        assert found.row.tolist() == [row for row, (_, gids) in enumerate(alone) for _ in gids]
        scores, gids = (np.concatenate(column) for column in zip(*alone, strict=True))
        np.testing.assert_allclose(found.score, scores, atol=1e-5)
        other = found.gid != gids  # of scores that are equal but for rounding either may come first
        rounded = np.einsum("nd,nd->n", queries[found.row[other]], built.vectors[found.gid[other]])
        np.testing.assert_allclose(rounded, scores[other], atol=2e-6)


def test_the_best_of_many_scores_are_among_the_places(monkeypatch):
    monkeypatch.setattr("recsys_ray.serving.index._SCORES", 1000)  # several rows at once
    vectors = np.repeat(unit(500), 2, axis=0)  # every score twice
    index = TypeIndex.build("a", vectors, np.arange(1000, dtype=np.int32), IndexConfig())
    queries = unit(7, seed=1)
    found = index.rank(queries, 11, Recalled.nothing(), Pairs(np.zeros(2, np.int64), np.array([1, 5])))
    for row, query in enumerate(queries):
        left = np.setdiff1d(np.arange(1000), [1, 5] if row == 0 else [])
        assert found.gid[found.row == row].tolist() == brute_force(vectors, query, 11, left)


@settings(max_examples=60, deadline=None)
@given(k=st.integers(1, 250), count=st.integers(0, 200), seed=st.integers(0, 5), small=st.booleans())
def test_search_never_returns_forbidden_and_always_enough(k, count, seed, small, monkeypatch_module):
    monkeypatch_module.setattr("recsys_ray.serving.index._OVERFETCH", 20 if small else 256)
    vectors = unit(300)
    index = TypeIndex.build(
        "a", vectors, np.arange(0, 300, dtype=np.int32)[50:250], HNSW if seed % 2 else IndexConfig()
    )
    barred = np.sort(np.random.default_rng(seed).choice(300, count, replace=False))
    allowed = np.setdiff1d(index.gids, barred)
    scores, gids = index.search(unit(1, seed + 10)[0], k, barred)
    assert len(set(gids.tolist())) == len(gids) == min(k, len(allowed))
    assert set(gids.tolist()) <= set(allowed.tolist())
    assert (np.diff(scores) <= 1e-6).all()
    if index.exact:
        assert gids.tolist() == brute_force(vectors, unit(1, seed + 10)[0], k, allowed)


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_nothing_left_and_empty_type():
    vectors = unit(5)
    index = TypeIndex.build("a", vectors, np.arange(5, dtype=np.int32), IndexConfig())
    assert len(index.search(vectors[0], 3, np.arange(5))[1]) == 0
    empty = TypeIndex.build("b", vectors, np.empty(0, np.int32), IndexConfig())
    assert len(empty.search(vectors[0], 3)[1]) == 0
    assert empty.tuned(vectors, 1.0) is empty


def test_types_are_merged_by_score():
    vectors = unit(90)
    kinds = [TypeIndex.build(str(t), vectors, np.arange(t, 90, 3, dtype=np.int32), IndexConfig()) for t in range(3)]
    for query in unit(5, seed=3):
        _, gids = search_types(kinds, query, 12)
        assert gids.tolist() == brute_force(vectors, query, 12, np.arange(90))
        _, gids = search_types(kinds[:2], query, 12)
        assert gids.tolist() == brute_force(vectors, query, 12, np.flatnonzero(np.arange(90) % 3 < 2))


def share_found(index: TypeIndex, queries: np.ndarray, k: int) -> float:
    """By ids."""
    found = [set(index.search(query, k)[1].tolist()) for query in queries]
    wanted = [brute_force(index.vectors, query, k, index.gids) for query in queries]
    return float(np.mean([len(a & set(b)) / k for a, b in zip(found, wanted, strict=True)]))


def test_as_many_candidates_are_followed_as_the_recall_needs():
    vectors, queries = unit(3_000), unit(100, seed=4)
    gids = np.arange(3_000, dtype=np.int32)
    exact = TypeIndex.build("a", vectors, gids, IndexConfig())
    assert exact.tuned(queries, 1.0) is exact and exact.recall == 1
    index = TypeIndex.build("a", vectors, gids, HNSW, queries)
    low, high = index.tuned(queries, 0.8), index.tuned(queries, 0.999)
    assert 0.8 <= low.recall < high.recall and low.ef_search < high.ef_search
    for tuned in (low, high):
        assert min(share_found(tuned, queries, k) for k in (10, 100)) == pytest.approx(tuned.recall, abs=0.005)
    poor = TypeIndex.build("a", vectors, gids, IndexConfig(exact_up_to=10, hnsw_links=2, ef_construction=2), queries)
    assert max(poor.ef_search) == 1_024 and poor.recall < 0.99


def test_a_graph_that_is_stretched_finds_items_by_their_bias():
    """Vectors as trained ones: near some directions, and a number b that makes up most of the places of a list."""
    random = np.random.default_rng(0)
    vectors = np.concatenate([unit(4_000), np.where(random.random(4_000) < 0.03, 0.4, -0.02)[:, None]], axis=1)
    vectors = vectors.astype(np.float32)
    queries = np.concatenate([unit(200, seed=1), np.ones((200, 1), np.float32)], axis=1)
    gids = np.arange(4_000, dtype=np.int32)
    made = TypeIndex.build("a", vectors, gids, HNSW, queries)
    assert made.stretch == pytest.approx(0.4**-0.5)
    plain = replace(made, index=faiss.IndexHNSWFlat(DIM + 1, 16, faiss.METRIC_INNER_PRODUCT), stretch=1.0)
    plain.add(gids)
    plain, narrow = plain.tuned(queries, 0.0), made.tuned(queries, 0.0)  # both with the fewest candidates
    assert plain.recall + 0.05 < narrow.recall < made.recall
    for query in queries[:20]:
        scores, found = made.search(query, 10)
        np.testing.assert_allclose(scores, vectors[found] @ query, atol=1e-5)


def test_equal_vectors_stand_for_each_other():
    vectors = np.repeat(unit(2), 200, axis=0)  # a hundred of two hundred equals: ids say nothing
    index = TypeIndex.build("a", vectors, np.arange(400, dtype=np.int32), HNSW, vectors[:1])
    assert index.recall == 1.0


def test_saved_and_loaded(built, tmp_path):
    built.save(tmp_path / "t0.faiss")
    loaded = TypeIndex.load(tmp_path / "t0.faiss", "book", built.gids, built.vectors, built.settings)
    assert loaded.exact == built.exact
    for query in unit(5, seed=5):
        assert loaded.search(query, 10, built.gids[:3].astype(np.int64))[1].tolist() == (
            built.search(query, 10, built.gids[:3].astype(np.int64))[1].tolist()
        )


def test_what_does_not_fit_is_refused(built, tmp_path):
    import faiss

    path = tmp_path / "t0.faiss"
    path.write_bytes(b"no index")
    with pytest.raises(ArtifactError, match="cannot be read as an index"):
        TypeIndex.load(path, "book", built.gids, built.vectors, built.settings)
    other = faiss.IndexFlatL2(DIM)
    other.add(built.vectors[built.gids])
    faiss.write_index(other, str(path))
    with pytest.raises(ArtifactError, match="does not rank by 'inner_product'"):
        TypeIndex.load(path, "book", built.gids, built.vectors, built.settings)
    built.save(path)
    with pytest.raises(ArtifactError, match="contains 200 vectors"):
        TypeIndex.load(path, "book", built.gids[:-1], built.vectors, built.settings)
    with pytest.raises(ArtifactError, match="metric 'cosine'"):
        check_metric("cosine", "the tower")


def test_vectors_must_have_unit_norm():
    vectors = unit(5)
    check_unit_norm(vectors, "vectors")
    for bad in (2.0, np.nan):
        wrong = vectors.copy()
        wrong[3] *= bad
        with pytest.raises(ArtifactError, match="row 3 of vectors"):
            check_unit_norm(wrong, "vectors")
