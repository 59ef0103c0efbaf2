"""The map of the items: who is on it, and that near stays near."""

from __future__ import annotations

import numpy as np
import pytest

from recsys_ray.data.tables import Catalogue
from recsys_ray.report.item_map import lay_out, nearest, sample_items


def catalogue(*sizes: int, hidden: int = 0) -> Catalogue:
    available = np.arange(sum(sizes)) >= hidden
    return Catalogue(tuple("abc"[: len(sizes)]), np.concatenate([[0], np.cumsum(sizes)]), available)


def test_a_small_type_is_seen():
    items = catalogue(10_000, 30, 2000)
    gids = sample_items(items, 400, seed=0)
    counts = np.bincount(items.type_of(gids), minlength=3)
    assert counts[1] == 30 and counts[0] > 4 * counts[2] / 1.5 and 397 <= counts.sum() <= 400
    assert np.array_equal(gids, np.unique(gids))
    assert np.array_equal(gids, sample_items(items, 400, seed=0))
    assert not np.array_equal(gids, sample_items(items, 400, seed=1))


def test_all_available_items_where_they_are_few():
    assert sample_items(catalogue(20, 10, hidden=5), 400, seed=0).tolist() == list(range(5, 30))
    assert len(sample_items(catalogue(20, 10), 0, seed=0)) == 0


@pytest.fixture(scope="module")
def clusters() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(3), 25)
    vectors = np.eye(3, 16)[label] + rng.normal(0, 0.1, (75, 16))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), label


def test_clusters_stay_together(clusters):
    units, label = clusters
    layout = lay_out(units, seed=0)
    apart = np.linalg.norm(layout[:, None] - layout[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    assert (label[apart.argmin(1)] == label).all()
    assert 0.9 < np.quantile(np.abs(layout), 0.995) < 1.1
    assert np.array_equal(layout, lay_out(units, seed=0))
    again = lay_out(units, seed=0, start=layout)  # starts where it was, and the clusters stay about there
    moved = [np.linalg.norm(again[label == k].mean(0) - layout[label == k].mean(0)) for k in range(3)]
    assert max(moved) < 0.6


def test_nearest_by_inner_product(clusters):
    units, label = clusters
    near = nearest(units, 4)
    assert near.shape == (75, 4) and (label[near] == label[:, None]).all()
    assert (near != np.arange(75)[:, None]).all()
    assert near[0, 0] == np.argsort(-(units @ units[0]))[1]
    assert nearest(units[:3], 6).shape == (3, 2)
