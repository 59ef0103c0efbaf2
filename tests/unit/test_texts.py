"""The nearest texts, and the users that they stand for."""

from __future__ import annotations

import numpy as np
import pytest

from recsys_ray.graph.texts import ALIKE, NEW, NearestTexts, nearest_texts, text_pairs

ITEMS, DIM = 200, 16


@pytest.fixture
def text() -> np.ndarray:
    drawn = np.random.default_rng(0).normal(size=(ITEMS, DIM)) + 0.5
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float16)


def test_the_nearest_texts_are_those_of_other_items_that_somebody_had(text):
    had, wanted = np.arange(ITEMS) % 3 > 0, np.array([5, 0, 199, 64])
    found = nearest_texts(text, np.flatnonzero(had), text[wanted], wanted, threads=1)
    likeness = text.astype(np.float32) @ text.astype(np.float32).T
    np.fill_diagonal(likeness, -2)
    likeness[:, ~had] = -2
    want = np.argsort(-likeness[wanted], axis=1)[:, : found.gid.shape[1]]
    np.testing.assert_array_equal(found.gid, want)
    np.testing.assert_allclose(found.cosine, np.take_along_axis(likeness[wanted], want, 1), atol=1e-5)


def test_texts_are_read_in_parts(text, monkeypatch):
    whole = nearest_texts(text, np.arange(0, ITEMS, 2), text, np.arange(ITEMS), threads=1)
    monkeypatch.setattr("recsys_ray.graph.texts._READ", 9)
    parts = nearest_texts(text, np.arange(0, ITEMS, 2), text, np.arange(ITEMS), threads=1)
    np.testing.assert_array_equal(whole.gid, parts.gid)
    np.testing.assert_array_equal(whole.cosine, parts.cosine)


def test_a_text_of_no_item_may_have_any_neighbour(text):
    found = nearest_texts(text, np.arange(ITEMS), text[[7]], np.array([-1]), threads=1)
    assert found.gid[0, 0] == 7


def test_few_items_have_few_neighbours_and_none_has_itself(text):
    found = nearest_texts(text, np.arange(3), text[:4], np.arange(4), threads=1)
    told = [sorted(row[row >= 0].tolist()) for row in found.gid]
    assert told == [[1, 2], [0, 2], [0, 1], [0, 1, 2]]
    assert not (nearest_texts(text, np.arange(0), text[:4], np.arange(4), threads=1).gid >= 0).any()


def test_many_texts_are_compared_within_cells(text, monkeypatch):
    """Close to the exact neighbours, and the item itself is not among them."""
    exact = nearest_texts(text, np.arange(ITEMS), text, np.arange(ITEMS), threads=1)
    monkeypatch.setattr("recsys_ray.graph.texts._EXACT", 0)
    monkeypatch.setattr("recsys_ray.graph.texts._CELLS", 2)
    found = nearest_texts(text, np.arange(ITEMS), text, np.arange(ITEMS), threads=1)
    same = [len(np.intersect1d(a[:ALIKE], b[:ALIKE])) / ALIKE for a, b in zip(exact.gid, found.gid, strict=True)]
    assert np.mean(same) > 0.9
    assert not (found.gid == np.arange(ITEMS)[:, None]).any()


def near_of(rows: int, cosine: np.ndarray) -> NearestTexts:
    """Items 100, 101, ... for every row."""
    gid = np.tile(np.arange(100, 100 + len(cosine), dtype=np.int32), (rows, 1))
    return NearestTexts(gid, np.tile(cosine.astype(np.float32), (rows, 1)))


def test_users_come_from_the_nearest_that_have_some():
    cosine = np.linspace(0.9, 0.3, 30)
    users = np.ones(ITEMS, int)
    users[[100, 105]] = 0  # at this snapshot nobody had them
    users[[3, 7]] = 0, 5  # a new item counts more
    pairs = text_pairs(near_of(2, cosine), users, np.array([7, 3]))
    chosen = np.setdiff1d(np.arange(30), [0, 5])[:ALIKE]
    want = cosine[chosen] ** 8 / (cosine[chosen] ** 8).sum()
    for item, count in ((7, 1 + NEW / 6), (3, 1 + NEW)):
        assert pairs.src[pairs.dst == item].tolist() == (100 + chosen).tolist()
        np.testing.assert_allclose(pairs.users[pairs.dst == item], count * want, rtol=1e-5)


def test_a_text_that_many_items_have_says_nothing():
    default = np.r_[np.ones(ALIKE), np.full(20, 0.5)]
    told = np.r_[np.ones(ALIKE - 1), np.full(21, 0.5)]
    users = np.ones(ITEMS, int)
    assert not len(text_pairs(near_of(1, default), users, np.array([0])).src)
    assert len(text_pairs(near_of(1, told), users, np.array([0])).src) == ALIKE


def test_an_opposite_text_has_no_share():
    pairs = text_pairs(near_of(1, np.r_[0.5, np.full(29, -0.5)]), np.ones(ITEMS, int), np.array([0]))
    assert pairs.src.tolist() == [100] and pairs.users.tolist() == [1 + NEW / 2]
    assert not len(text_pairs(near_of(1, np.full(30, -0.5)), np.ones(ITEMS, int), np.array([0])).src)
