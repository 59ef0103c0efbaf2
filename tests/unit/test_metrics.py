"""Metrics against ranx, intervals, and queries and segments of a world that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from recsys_ray.data.tables import Catalogue, Events
from recsys_ray.evaluation.metrics import bootstrap_interval, find_hits, mean_interval, score_queries, widen
from recsys_ray.evaluation.segments import (
    SEGMENTS,
    ItemFacts,
    find_queries,
    popularity_tiers,
    segment_queries,
    segment_truths,
)

DEPTH, ITEMS = 100, 400


def random_rankings(seed: int, queries: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rankings of 100 of 400 items and 1 to 14 truths each; some truths are not ranked."""
    rng = np.random.default_rng(seed)
    ranked = np.stack([rng.permutation(ITEMS)[:DEPTH] for _ in range(queries)])
    truths = [rng.permutation(ITEMS)[: rng.integers(1, 15)] for _ in range(queries)]
    query = np.repeat(np.arange(queries), [len(t) for t in truths])
    return ranked, query, np.concatenate(truths)


@pytest.mark.parametrize("seed", range(4))
def test_metrics_agree_with_ranx(seed):
    ranx = pytest.importorskip("ranx")
    ranked, query, item = random_rankings(seed)
    hit_query, hit_rank, _ = find_hits(ranked, query, item)
    scores = score_queries(np.bincount(query, minlength=len(ranked)), hit_query, hit_rank)

    qrels = ranx.Qrels({f"q{q}": {f"i{i}": 1 for i in item[query == q]} for q in range(len(ranked))})
    run = ranx.Run(
        {f"q{q}": {f"i{i}": float(DEPTH - place) for place, i in enumerate(ranked[q])} for q in range(len(ranked))}
    )
    expected = ranx.evaluate(qrels, run, ["hit_rate@10", "ndcg@10", "mrr@100"])
    assert scores.hit.mean() == pytest.approx(expected["hit_rate@10"])
    assert scores.ndcg.mean() == pytest.approx(expected["ndcg@10"])
    assert scores.reciprocal_rank.mean() == pytest.approx(expected["mrr@100"])


def test_hits_by_hand():
    ranked = np.array([[5, 3, 1], [2, 0, -1], [4, 5, 6]])
    query, rank, truth = find_hits(ranked, np.array([0, 0, 1, 2]), np.array([1, 5, 9, 5]))
    assert query.tolist() == [0, 0, 2]
    assert rank.tolist() == [0, 2, 1]
    assert truth.tolist() == [1, 0, 3]
    scores = score_queries(np.array([2, 1, 1]), query, rank)
    assert scores.hit.tolist() == [True, False, True]
    assert scores.ndcg[0] == pytest.approx((1 + 0.5) / (1 + 1 / np.log2(3)))
    assert scores.reciprocal_rank.tolist() == [1.0, 0.0, 0.5]


def test_no_truth_and_no_ranking():
    nothing = np.zeros(0, dtype=np.int64)
    assert len(find_hits(np.full((2, 3), -1), nothing, nothing)[0]) == 0
    assert find_hits(np.full((1, 3), -1), np.array([0]), np.array([0]))[0].tolist() == []
    scores = score_queries(np.array([1, 0]), nothing, nothing)
    assert scores.hit.tolist() == [False, False] and scores.ndcg.tolist() == [0.0, 0.0]


def test_interval_covers_the_true_rate():
    rng, rate, covered = np.random.default_rng(7), 0.2, 0
    for trial in range(200):
        values = rng.random(300) < rate
        low, high = bootstrap_interval(values, np.arange(300), resamples=400, seed=trial)
        assert low <= values.mean() <= high
        covered += low <= rate <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_interval_is_that_of_resampled_users():
    """The draw over patterns is the same distribution as resampling users one by one."""
    rng = np.random.default_rng(3)
    users = np.sort(rng.integers(0, 80, 200))
    likes = rng.random(80) < 0.3  # a user's queries hit together
    values = likes[users]
    low, high = bootstrap_interval(values, users, resamples=20_000, seed=0)
    present = np.unique(users)
    hits = np.array([values[users == u].sum() for u in present])
    count = np.array([(users == u).sum() for u in present])
    drawn = rng.integers(0, len(present), (20_000, len(present)))
    expected = np.quantile(hits[drawn].sum(1) / count[drawn].sum(1), [0.025, 0.975])
    assert [low, high] == pytest.approx(expected, abs=0.01)
    alone = bootstrap_interval(values, np.arange(200), resamples=20_000, seed=0)
    assert high - low > alone[1] - alone[0]


def test_interval_of_a_mean_covers_the_true_mean_and_agrees_with_the_bootstrap():
    rng, covered = np.random.default_rng(5), 0
    users = np.repeat(np.arange(300), 2)
    for _ in range(300):
        taste = rng.beta(1, 3, size=300)  # of a user; mean .25
        low, high = mean_interval(rng.beta(2, 2, size=600) - 0.5 + np.repeat(taste, 2), users)
        covered += low <= 0.25 <= high
    assert 270 <= covered <= 297  # 285 expected
    hits = rng.random(600) < 0.2
    assert np.allclose(mean_interval(hits.astype(float), users), bootstrap_interval(hits, users, 4000, 0), atol=0.004)
    assert mean_interval(np.empty(0), np.empty(0, int)) == (0.0, 0.0)


def test_seeds_widen_an_interval():
    assert widen(np.array([0.2]), 0.1, 0.4) == (pytest.approx(0.1), pytest.approx(0.4))
    low, high = widen(np.array([0.1, 0.2, 0.3]), 0.19, 0.21)  # t(2, .975) = 4.303, standard error .1 / sqrt(3)
    assert (low, high) == (
        pytest.approx(0.2 - np.hypot(0.01, 0.24841), abs=1e-4),
        pytest.approx(0.2 + np.hypot(0.01, 0.24841), abs=1e-4),
    )


def test_interval_is_seeded_and_handles_nothing():
    values, users = np.arange(50) % 3 == 0, np.arange(50)
    assert bootstrap_interval(values, users, 100, seed=1) == bootstrap_interval(values, users, 100, seed=1)
    assert bootstrap_interval(values[:0], users[:0], 100, seed=1) == (0.0, 0.0)


# Types: a = gids 0..3, b = gids 4..6. Test period from 100 to 200. Events: 0 positive, 1 weak.
CATALOGUE = Catalogue(("a", "b"), np.array([0, 4, 7]), np.ones(7, dtype=bool))
LOG = [  # uid, gid, event, timestamp
    (0, 0, 0, 10),  # user 0 knows type a only
    (0, 1, 1, 50),
    (0, 0, 0, 110),  # touched before: no truth
    (0, 1, 0, 120),  # touched before, if only weakly: no truth
    (0, 2, 0, 130),  # a truth of (0, a)
    (0, 2, 0, 131),  # the same once more
    (0, 5, 0, 140),  # a truth of (0, b), which is new to the user
    (0, 6, 1, 150),  # weak: no truth
    (1, 3, 0, 105),  # user 1 is cold
    (1, 4, 0, 106),
    (2, 4, 0, 20),  # user 2 has no new item
    (2, 4, 0, 120),
    (3, 3, 0, 95),  # user 3's test event lies past the end
    (3, 5, 0, 200),
]


@pytest.fixture
def log() -> Events:
    uid, gid, event, timestamp = np.array(LOG, dtype=np.int64).T
    return Events(uid, gid, event.astype(np.int8), timestamp)


def test_queries_by_hand(log):
    queries = find_queries(log, CATALOGUE, np.array([True, False]), cut=100, end=200)
    assert list(zip(queries.uid.tolist(), queries.item_type.tolist(), strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert queries.warm.tolist() == [True, True, False, False]
    assert queries.new_to_type.tolist() == [False, True, False, False]
    truths = list(zip(queries.truth_query.tolist(), queries.truth_item.tolist(), strict=True))
    assert truths == [(0, 2), (1, 5), (2, 3), (3, 4)]
    kept = queries.keep_users(np.array([1]))
    assert kept.uid.tolist() == [1, 1] and kept.truth_query.tolist() == [0, 1] and kept.truth_item.tolist() == [3, 4]


def test_segments_by_hand(log):
    queries = find_queries(log, CATALOGUE, np.array([True, False]), cut=100, end=200)
    facts = ItemFacts(unseen=np.array([0, 0, 1, 0, 0, 0, 1], dtype=bool), tier=np.array([0, 1, 4, 2, 0, 3, 4]))
    masks = segment_truths(queries, facts)
    assert set(masks) == set(SEGMENTS)
    member = segment_queries(queries, masks)
    found = {name: np.flatnonzero(member[:, k]).tolist() for k, name in enumerate(SEGMENTS)}
    assert found == {
        "all": [0, 1, 2, 3],
        "warm": [0, 1],
        "new_to_type": [1],
        "cold": [2, 3],
        "cold_items": [0],
        "tier1": [],
        "tier2": [],
        "tier3": [],
        "tier4": [1],
        "tier5": [0],
    }


def test_tiers_hold_a_fifth_of_the_events_each():
    catalogue = Catalogue(("a", "b"), np.array([0, 12, 14]), np.ones(14, dtype=bool))
    positives = np.array([0, 20, 10, 10, 5, 5, 5, 5, 20, 10, 5, 5, 0, 0])
    tier = popularity_tiers(positives, catalogue)
    assert [positives[:12][tier[:12] == k].sum() for k in range(5)] == [20] * 5
    assert tier[0] == 4  # no event: the tail
    assert tier[12:].tolist() == [4, 4]  # a type without events
