"""The index against brute force."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_ray.config import IndexConfig
from recsys_ray.core.errors import ArtifactError
from recsys_ray.scoring.memory import Recalled
from recsys_ray.scoring.scorer import Pairs, Ranked
from recsys_ray.serving.index import (
    TypeIndex,
    check_metric,
    check_unit_norm,
    exact_top_k,
)

DIM = 16
CODES = IndexConfig(exact_up_to=10, recall=1.0)


NONE = np.empty(0, np.int64)


def unit(rows: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, DIM), dtype=np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def search(index: TypeIndex, query: np.ndarray, k: int, barred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores and gids of one query."""
    found = index.search_each(query[None], k, Pairs(np.zeros(len(barred), np.int64), barred))
    return found.score, found.gid


def brute_force(vectors: np.ndarray, query: np.ndarray, k: int, allowed: np.ndarray) -> list[int]:
    scores = vectors[allowed] @ query
    return allowed[np.lexsort((allowed, -scores))[:k]].tolist()


@pytest.fixture(scope="module", params=[IndexConfig(), CODES], ids=["exact", "codes"])
def built(request) -> TypeIndex:
    """600 items, of which every third is of this type."""
    vectors = unit(600)
    return TypeIndex.build("book", vectors, np.arange(0, 600, 3, dtype=np.int32), request.param, unit(100, seed=9))


def test_kind_follows_size():
    vectors, gids = unit(11), np.arange(11, dtype=np.int32)
    assert TypeIndex.build("a", vectors, gids[:10], CODES).exact
    assert not TypeIndex.build("a", vectors, gids, CODES).exact


def test_exact_top_k_is_brute_force_across_chunks(monkeypatch):
    monkeypatch.setattr("recsys_ray.serving.index._CHUNK", 7)
    vectors, queries = unit(50), unit(4, seed=1)
    scores, rows = exact_top_k(vectors, np.arange(50), queries, 5)
    assert rows.tolist() == [brute_force(vectors, q, 5, np.arange(50)) for q in queries]
    np.testing.assert_allclose(scores, np.sort(queries @ vectors.T)[:, :-6:-1], atol=1e-6)


def test_search_is_brute_force(built):
    for query in unit(20, seed=2):
        scores, gids = search(built, query, 10, NONE)
        assert gids.tolist() == brute_force(built.vectors, query, 10, built.gids)
        np.testing.assert_allclose(scores, built.vectors[gids] @ query, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(k=st.integers(1, 90), most=st.integers(0, 150), narrow=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_many_queries_find_what_each_finds_alone(built, k, most, narrow, seed):
    random = np.random.default_rng(seed)
    queries = random.standard_normal((20, DIM), dtype=np.float32)
    barred = [np.sort(random.choice(600, random.integers(0, most + 1), replace=False)) for _ in queries]
    pairs = Pairs(np.repeat(np.arange(20), [len(gids) for gids in barred]), np.concatenate(barred))
    allowed = random.random(200) < 0.3 if narrow else None
    singly = [Pairs(np.zeros(len(gids), np.int64), gids) for gids in barred]
    alone = [built.search_each(query[None], k, one, allowed) for query, one in zip(queries, singly, strict=True)]
    found = built.search_each(queries, k, pairs, allowed)
    assert found.row.tolist() == [row for row, one in enumerate(alone) for _ in one.gid]
    scores, gids = (np.concatenate([one[place] for one in alone]) for place in (2, 1))
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
@given(k=st.integers(1, 250), count=st.integers(0, 200), seed=st.integers(0, 5))
def test_search_never_returns_forbidden_and_always_enough(k, count, seed):
    vectors = unit(300)
    index = TypeIndex.build(
        "a", vectors, np.arange(0, 300, dtype=np.int32)[50:250], CODES if seed % 2 else IndexConfig()
    )
    barred = np.sort(np.random.default_rng(seed).choice(300, count, replace=False))
    allowed = np.setdiff1d(index.gids, barred)
    scores, gids = search(index, unit(1, seed + 10)[0], k, barred)
    assert len(set(gids.tolist())) == len(gids) == min(k, len(allowed))
    assert set(gids.tolist()) <= set(allowed.tolist())
    assert (np.diff(scores) <= 1e-6).all()
    if index.exact:
        assert gids.tolist() == brute_force(vectors, unit(1, seed + 10)[0], k, allowed)


def test_nothing_left_and_empty_type():
    vectors = unit(5)
    index = TypeIndex.build("a", vectors, np.arange(5, dtype=np.int32), IndexConfig())
    assert len(search(index, vectors[0], 3, np.arange(5))[1]) == 0
    empty = TypeIndex.build("b", vectors, np.empty(0, np.int32), IndexConfig())
    assert len(search(empty, vectors[0], 3, NONE)[1]) == 0
    assert empty.tuned(vectors, 1.0) is empty


def test_types_are_merged_by_score():
    vectors = unit(90)
    kinds = [TypeIndex.build(str(t), vectors, np.arange(t, 90, 3, dtype=np.int32), IndexConfig()) for t in range(3)]
    for query in unit(5, seed=3):
        found = [index.search_each(query[None], 12, Pairs.nothing()) for index in kinds]
        assert Ranked.best(found, 12).gid.tolist() == brute_force(vectors, query, 12, np.arange(90))
        few = np.flatnonzero(np.arange(90) % 3 < 2)
        assert Ranked.best(found[:2], 12).gid.tolist() == brute_force(vectors, query, 12, few)


def share_found(index: TypeIndex, queries: np.ndarray, k: int) -> float:
    """By ids."""
    found = [set(search(index, query, k, NONE)[1].tolist()) for query in queries]
    wanted = [brute_force(index.vectors, query, k, index.gids) for query in queries]
    return float(np.mean([len(a & set(b)) / k for a, b in zip(found, wanted, strict=True)]))


def test_as_many_candidates_are_compared_as_the_recall_needs():
    vectors, queries = unit(3_000), unit(100, seed=4)
    gids = np.arange(3_000, dtype=np.int32)
    exact = TypeIndex.build("a", vectors, gids, IndexConfig())
    assert exact.tuned(queries, 1.0) is exact and exact.recall == 1
    index = TypeIndex.build("a", vectors, gids, CODES, queries)
    low, high = index.tuned(queries, 0.8), index.tuned(queries, 0.999)
    assert 0.8 <= low.recall < high.recall and low.candidates < high.candidates
    for tuned in (low, high):
        assert min(share_found(tuned, queries, k) for k in (10, 100)) == pytest.approx(tuned.recall, abs=0.005)
    unmet = index.tuned(queries, 1.1)
    assert unmet.candidates == (6_400, 6_400) and unmet.recall == 1.0, "of so many candidates none is missed"


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("k", [10, 100])
def test_under_a_filter_the_recall_is_as_high(share, k):
    """Filters that go with taste and against it, and any others."""
    vectors, queries = unit(20_000), unit(50, seed=4)
    index = TypeIndex.build("a", vectors, np.arange(20_000, dtype=np.int32), IndexConfig(exact_up_to=10), queries)
    liking = vectors @ queries[0]
    for number in (liking, -liking, np.random.default_rng(0).random(20_000)):
        allowed = number >= np.sort(number)[-int(20_000 * share)]
        found = index.search_each(queries, k, Pairs.nothing(), allowed)
        exact = index.rank(queries, k, Recalled.nothing(), Pairs.nothing(), allowed)
        assert found.row.tolist() == exact.row.tolist() and allowed[found.gid].all()
        assert np.isin(found.row * 20_000 + found.gid, exact.row * 20_000 + exact.gid).mean() >= 0.99


def test_items_that_come_by_their_terms_are_found():
    """Vectors as trained ones: near some directions, and a number b that makes up most of the places of a list."""
    random = np.random.default_rng(0)
    vectors = np.concatenate([unit(4_000), np.where(random.random(4_000) < 0.03, 0.4, -0.02)[:, None]], axis=1)
    vectors = vectors.astype(np.float32)
    queries = np.concatenate([unit(200, seed=1), np.ones((200, 1), np.float32)], axis=1)
    made = TypeIndex.build("a", vectors, np.arange(4_000, dtype=np.int32), IndexConfig(exact_up_to=10), queries)
    assert made.recall >= 0.99 and made.candidates[1] <= 800
    for query in queries[:20]:
        scores, found = search(made, query, 10, NONE)
        np.testing.assert_allclose(scores, vectors[found] @ query, atol=1e-5)


def test_equal_vectors_stand_for_each_other():
    vectors = np.repeat(unit(2), 200, axis=0)  # a hundred of two hundred equals: ids say nothing
    index = TypeIndex.build("a", vectors, np.arange(400, dtype=np.int32), CODES, vectors[:1])
    assert index.recall == 1.0


def test_saved_and_loaded(built, tmp_path):
    path = tmp_path / "index" / "t0.safetensors"
    built.save(path)
    assert path.exists() != built.exact
    loaded = TypeIndex.load(path, "book", built.gids, built.vectors, json.loads(json.dumps(built.settings)))
    assert (loaded.exact, loaded.recall, loaded.candidates) == (built.exact, built.recall, built.candidates)
    for query in unit(5, seed=5):
        barred = built.gids[:3].astype(np.int64)
        assert search(loaded, query, 10, barred)[1].tolist() == search(built, query, 10, barred)[1].tolist()


def test_an_index_grows():
    vectors, gids = unit(3_000), np.arange(3_000, dtype=np.int32)
    grown = TypeIndex.build("a", vectors, gids[:2_000], CODES, vectors[:50]).grown(gids)
    for query in unit(5, seed=5):
        assert search(grown, query, 10, NONE)[1].tolist() == brute_force(vectors, query, 10, gids)


def test_what_does_not_fit_is_refused(tmp_path):
    vectors, path = unit(200), tmp_path / "t0.safetensors"
    built = TypeIndex.build("book", vectors, np.arange(200, dtype=np.int32), CODES)
    path.write_bytes(b"no index")
    with pytest.raises(ArtifactError, match=f"{path} is damaged"):
        TypeIndex.load(path, "book", built.gids, vectors, built.settings)
    built.save(path)
    with pytest.raises(ArtifactError, match="is not an index of 199 vectors of 16"):
        TypeIndex.load(path, "book", built.gids[:-1], vectors, built.settings)
    with pytest.raises(ArtifactError, match="is not an index of 200 vectors of 18"):
        TypeIndex.load(path, "book", built.gids, np.zeros((200, 18), np.float32), built.settings)
    assert built.codes is not None
    replace(built.codes, centroids=np.full_like(built.codes.centroids, np.nan)).save(path)
    with pytest.raises(ArtifactError, match="centroids that are not finite"):
        TypeIndex.load(path, "book", built.gids, vectors, built.settings)
    with pytest.raises(ArtifactError, match="index of 'book' is of another version"):
        TypeIndex.load(path, "book", built.gids, vectors, {"ef_search": [8, 8], "stretch": 1.0, "recall": 1.0})
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
