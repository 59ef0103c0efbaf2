"""One score, seen twice: over all items, and through an index."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_ray.config import IndexConfig
from recsys_ray.core.errors import ArtifactError
from recsys_ray.scoring.memory import SMALL, Memory
from recsys_ray.scoring.scorer import (
    MEMORY,
    TRENDS,
    UNSEEN,
    VECTOR,
    Pairs,
    Scorer,
    ScoreSpec,
    among,
    as_queries,
    with_item_terms,
)
from recsys_ray.serving.index import TypeIndex


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def random_memory(random: np.random.Generator, items: int, ntype: np.ndarray) -> Memory:
    src, dst = np.unique(random.integers(0, items, (2, 4 * items)), axis=1)
    kept = src != dst
    made = random.normal(0.05, 0.2, (int(kept.sum()), 1))
    return Memory.of_edges(src[kept], dst[kept], made, np.ones(items, int), ntype)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    k=st.integers(1, 40),
    history=st.integers(0, 30),
    excluded=st.integers(0, 30),
    weight=st.sampled_from([0.0, 0.05, 0.3, 1.2]),
    beyond=st.sampled_from([0, 3, 32]),
)
def test_the_index_finds_the_list_of_all_scores(seed, sizes, k, history, excluded, weight, beyond, monkeypatch_module):
    """Random worlds, exact index: the same list, and the same scores to float32."""
    monkeypatch_module.setattr("recsys_ray.scoring.scorer._BEYOND", beyond)  # so that few of the raised are looked at
    random = np.random.default_rng(seed)
    items, ntype = sum(sizes), np.repeat(np.arange(len(sizes)), sizes)
    vectors = random.normal(size=(items, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    terms = {name: random.normal(0, 0.2, items).astype(np.float32) for name in (TRENDS, UNSEEN)}
    spec = ScoreSpec(memory=weight, half_life=2.0)
    score = Scorer.of_items({VECTOR: vectors, **terms}, spec, random_memory(random, items, ntype))
    available = random.random(items) > 0.1
    touched = random.integers(0, items, history)
    forbidden = np.union1d(touched, random.integers(0, items, excluded))
    user = random.normal(size=8).astype(np.float32)
    user /= np.linalg.norm(user)

    raised = score.raised(np.zeros(history, np.int64), touched)
    dense = score.dense(torch.from_numpy(user)[None], raised, 0, items)[0].numpy()
    dense[~available] = dense[forbidden] = -np.inf
    indexes, barred = [], Pairs(np.zeros(len(forbidden), np.int64), forbidden)
    for kind in range(len(sizes)):
        gids = np.flatnonzero(available & (ntype == kind)).astype(np.int32)
        index = TypeIndex.build(str(kind), score.wide, gids, IndexConfig())
        indexes.append(index)
        alone = score.candidates([index], user[None], raised, k, barred)
        together = index.rank(as_queries(user[None]), k, raised, barred)
        np.testing.assert_allclose(together.score, alone.score, atol=2e-6)
    _, gids, scores = score.candidates(indexes, user[None], raised, k, barred)

    order = np.lexsort((np.arange(items), -dense))[:k]
    order = order[np.isfinite(dense[order])]
    assert len(gids) == len(order) == len(set(gids.tolist()))
    np.testing.assert_allclose(scores, dense[order], atol=2e-6)
    np.testing.assert_allclose(scores, dense[gids], atol=2e-6)
    apart = np.abs(np.diff(dense[order])) > 1e-5  # scores nearer than this may stand in either order
    if apart.all():
        assert gids[:-1].tolist() == order[:-1].tolist()  # the last may tie with the first that is left out


def test_ranges_of_items_have_the_scores_of_the_whole_and_a_term_can_be_left_out():
    random = np.random.default_rng(0)
    vectors = random.normal(size=(50, 4)).astype(np.float32)
    items = {VECTOR: vectors, TRENDS: np.linspace(-1, 1, 50, dtype=np.float32), UNSEEN: np.ones(50, np.float32)}
    spec = ScoreSpec(memory=0.5, half_life=1.0)
    src, dst = np.array([0, 0, 0, 5]), np.array([1, 35, 6, 2])
    made = np.array([0.2, 0.1, 0.05, 0.3])[:, None]
    memory = Memory.of_edges(src, dst, made, np.ones(50, int), np.zeros(50, int))
    user, row, history = np.array([0, 0]), torch.from_numpy(random.normal(size=(2, 4)).astype(np.float32)), [0, 3]
    score = Scorer.of_items(items, spec, memory)
    raised = score.raised(user, np.array(history))
    plain = (row @ torch.from_numpy(vectors).T).numpy()
    want = plain + items[TRENDS] + items[UNSEEN]
    want[0, [1, 35, 6]] += 0.5 * np.log1p(np.array([0.2, 0.1, 0.05]) / 3 / SMALL)  # item 3 came after item 0
    parts = [score.dense(row, raised, first, last) for first, last in ((0, 12), (12, 30), (30, 50))]
    np.testing.assert_allclose(torch.cat(parts, 1).numpy(), want, atol=1e-6)
    alone = Scorer.of_items(items, spec, memory, MEMORY)
    assert not len(alone.raised(user, np.array(history)).gid)
    rows = {name: with_item_terms(items, name)[:, -1] for name in ("", MEMORY, TRENDS, UNSEEN)}
    np.testing.assert_allclose(rows[""], items[TRENDS] + 1)
    np.testing.assert_allclose(rows[MEMORY], rows[""])
    np.testing.assert_allclose(rows[TRENDS], 1)
    np.testing.assert_allclose(rows[UNSEEN], items[TRENDS])


def test_what_validation_chose_is_kept_and_a_damaged_file_is_told(tmp_path):
    spec = replace(ScoreSpec(), memory=0.2, trends=[0.5, 0.0], unseen_share=[0.1, None])
    spec.save(tmp_path)
    assert ScoreSpec.load(tmp_path) == spec
    (tmp_path / "score.json").write_text('{"colour": 1}')
    with pytest.raises(ArtifactError, match=r"score\.json is not a valid score description"):
        ScoreSpec.load(tmp_path)


def test_among():
    assert among(np.array([1, 5, 9]), np.array([0, 5, 7])).tolist() == [False, True, False]
    assert among(np.array([1, 5]), np.zeros(0, int)).tolist() == [False, False]
