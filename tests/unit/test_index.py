"""FAISS against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_ray.config import IndexConfig
from recsys_ray.core.errors import ArtifactError
from recsys_ray.serving.index import (
    TypeIndex,
    check_metric,
    check_unit_norm,
    exact_top_k,
    recall_at,
    search_types,
)

DIM = 16
HNSW = IndexConfig(exact_up_to=10)


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
    return TypeIndex.build("book", vectors, np.arange(0, 600, 3, dtype=np.int32), request.param)


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
    assert recall_at(empty, vectors) == 1.0


def test_types_are_merged_by_score():
    vectors = unit(90)
    kinds = [TypeIndex.build(str(t), vectors, np.arange(t, 90, 3, dtype=np.int32), IndexConfig()) for t in range(3)]
    for query in unit(5, seed=3):
        _, gids = search_types(kinds, query, 12)
        assert gids.tolist() == brute_force(vectors, query, 12, np.arange(90))
        _, gids = search_types(kinds[:2], query, 12)
        assert gids.tolist() == brute_force(vectors, query, 12, np.flatnonzero(np.arange(90) % 3 < 2))


def test_recall_is_one_when_exact_and_less_when_the_graph_is_poor():
    vectors, queries = unit(3_000), unit(100, seed=4)
    gids = np.arange(3_000, dtype=np.int32)
    assert recall_at(TypeIndex.build("a", vectors, gids, IndexConfig()), queries) == 1.0
    poor = IndexConfig(exact_up_to=10, hnsw_links=2, ef_construction=2, ef_search=1)
    found = recall_at(TypeIndex.build("a", vectors, gids, poor), queries)
    good = recall_at(TypeIndex.build("a", vectors, gids, HNSW), queries)
    assert found < 0.5 < 0.9 < good


def test_equal_vectors_stand_for_each_other():
    vectors = np.repeat(unit(2), 40, axis=0)  # ten of forty equals: ids say nothing
    index = TypeIndex.build("a", vectors, np.arange(80, dtype=np.int32), HNSW)
    assert recall_at(index, vectors[:1]) == 1.0


def test_saved_and_loaded(built, tmp_path):
    built.save(tmp_path / "t0.faiss")
    loaded = TypeIndex.load(tmp_path / "t0.faiss", "book", built.gids, built.vectors, built.ef_search)
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
        TypeIndex.load(path, "book", built.gids, built.vectors, 64)
    other = faiss.IndexFlatL2(DIM)
    other.add(built.vectors[built.gids])
    faiss.write_index(other, str(path))
    with pytest.raises(ArtifactError, match="does not rank by 'inner_product'"):
        TypeIndex.load(path, "book", built.gids, built.vectors, 64)
    built.save(path)
    with pytest.raises(ArtifactError, match="holds 200 vectors"):
        TypeIndex.load(path, "book", built.gids[:-1], built.vectors, 64)
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
