"""The co-interaction memory: its formula and its growth. What validation gives it is in test_choose.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp

from recsys_ray.baselines.ease import solve as solve_ease
from recsys_ray.graph.edges import Edges
from recsys_ray.graph.texts import TextPairs
from recsys_ray.scoring.memory import NO_RAISERS, REACH, RIDGES, SMALL, Memory, MemoryOfNew, Raisers, latest
from recsys_ray.scoring.ridge import _ranges, solve

RIDGE = RIDGES[1]
PAIRS = {(0, 1): 0.4, (1, 0): 0.2, (2, 0): 0.1, (3, 4): -0.3, (4, 3): 0.3, (0, 5): 0.05}  # from, to: b
SIZE = 7


@pytest.fixture
def memory() -> Memory:
    src, dst = np.array(list(PAIRS)).T
    made = np.array(list(PAIRS.values()))[:, None]
    return Memory.of_edges(src, dst, made, np.arange(SIZE) + 3, np.zeros(SIZE, int))


def pairs_of(memory: Memory) -> dict[tuple[int, int], float]:
    rows = np.repeat(np.arange(len(memory.users)), np.diff(memory.begin))
    values = memory.coefficient[:, 0].tolist()
    return dict(zip(zip(rows.tolist(), memory.gid.tolist(), strict=True), values, strict=True))


# -- what is remembered


def whole_pairs(had: np.ndarray) -> Edges:
    """All pairs of items that users had (bool [users, items]); a pair's weight is its number of users."""
    shared = had.T.astype(int) @ had
    np.fill_diagonal(shared, 0)
    dst, src = np.nonzero(shared)
    return Edges(src, dst, shared[src, dst], shared[src, dst])


def random_users(items: int = SIZE, users: int = 200) -> np.ndarray:
    return np.random.default_rng(0).random((users, items)) < np.linspace(0.1, 0.6, items)


def test_with_all_pairs_coefficients_are_those_of_ease():
    had = random_users()
    solved = solve(whole_pairs(had), had.sum(0), np.zeros(SIZE, int), 0, SIZE)
    assert solved.b.shape == (SIZE * (SIZE - 1), len(RIDGES))
    for column, ridge in enumerate(RIDGES):
        ease = solve_ease(sp.csr_matrix(had.astype(np.float32)), ridge)
        np.testing.assert_allclose(solved.b[:, column], ease[solved.src, solved.dst], atol=1e-3)


def test_coefficients_are_ridge_regressions_on_the_nearest_items(monkeypatch):
    """Least squares over users, with a row sqrt(ridge) for each of the three nearest items by cosine."""
    monkeypatch.setattr("recsys_ray.scoring.ridge._UNKNOWNS", 3)
    monkeypatch.setattr("recsys_ray.scoring.ridge._OF_A_TYPE", 3)
    had = random_users()
    users, shared = had.sum(0), had.T.astype(int) @ had
    solved = solve(whole_pairs(had), users, np.zeros(SIZE, int), 0, SIZE)
    for item in range(SIZE):
        cosine = shared[item] / np.sqrt(users * users[item])
        cosine[item] = -1
        near = np.sort(np.argsort(-cosine)[:3])
        assert solved.src[solved.dst == item].tolist() == near.tolist()
        tall = np.vstack([had[:, near], np.sqrt(RIDGE) * np.eye(3)])
        want = np.linalg.lstsq(tall, np.r_[had[:, item], np.zeros(3)], rcond=None)[0]
        np.testing.assert_allclose(solved.b[solved.dst == item, 1], want, rtol=1e-4)


def test_each_type_has_its_nearest_items(monkeypatch):
    monkeypatch.setattr("recsys_ray.scoring.ridge._UNKNOWNS", 4)
    monkeypatch.setattr("recsys_ray.scoring.ridge._OF_A_TYPE", 1)
    had, ntype = random_users(), np.array([0, 0, 0, 0, 1, 1, 1])
    solved = solve(whole_pairs(had), had.sum(0), ntype, 0, SIZE)
    for item in range(SIZE):
        assert np.bincount(ntype[solved.src[solved.dst == item]]).tolist() == [2, 2]


@pytest.mark.parametrize(("src", "dst"), [(0, 1), (1, 0)])
def test_a_pair_that_is_kept_in_one_direction_counts_in_both(src, dst):
    had = random_users(3)
    users, ntype, pairs = had.sum(0), np.zeros(3, int), whole_pairs(had)
    half = Edges(*(column[(pairs.src != src) | (pairs.dst != dst)] for column in pairs))
    whole, less = (solve(some, users, ntype, 2, 3) for some in (pairs, half))
    np.testing.assert_array_equal(whole.b, less.b)


def test_missing_pairs_make_no_wild_coefficient():
    """Items 0 and 1 share more users than they have: singular with the first ridge."""
    src, dst = np.array([1, 2, 0, 2, 0, 1]), np.array([0, 0, 1, 1, 2, 2])
    support = np.array([10, 3, 10, 4, 3, 4])
    solved = solve(Edges(src, dst, support, support), np.array([0, 0, 5]), np.zeros(3, int), 0, 3)
    assert np.isfinite(solved.b).all() and np.abs(solved.b).max() <= 1


def test_a_range_of_items_is_solved_as_in_the_whole():
    had, ntype = random_users(40), np.arange(40) // 20
    pairs, users = whole_pairs(had), had.sum(0)
    whole = solve(pairs, users, ntype, 0, 40)
    ranges = _ranges(pairs.dst, 40)
    assert [a for a, _ in ranges[1:]] == [b for _, b in ranges[:-1]] and (ranges[0][0], ranges[-1][1]) == (0, 40)
    parts = [solve(pairs, users, ntype, *items) for items in ranges]
    for column, of_parts in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(of_parts), column)
    nothing = Edges(*np.zeros((4, 0), int))
    assert _ranges(nothing.dst, 40)[-1] == (0, 40) and len(solve(nothing, users, ntype, 0, 40).b) == 0


def test_a_hub_remembers_its_largest_items_of_each_type(monkeypatch):
    monkeypatch.setattr("recsys_ray.scoring.memory.NEIGHBOURS", 2)
    ntype = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    others = np.arange(1, 8)
    src, dst = np.r_[np.zeros(7, int), others], np.r_[others, np.zeros(7, int)]
    memory = Memory.of_edges(src, dst, np.r_[others, others][:, None] / 10, np.ones(8, int), ntype)
    assert sorted(pairs_of(memory)) == [(0, 2), (0, 3), (0, 6), (0, 7), *((item, 0) for item in range(1, 8))]


def test_a_saved_memory_is_the_same_and_one_ridge_can_be_taken_of_it(memory, tmp_path):
    columns = np.arange(len(RIDGES))[None] + memory.coefficient
    several = replace(memory, coefficient=columns)
    several.save(tmp_path / "m.safetensors")
    for name, column in vars(Memory.load(tmp_path / "m.safetensors")).items():
        assert np.array_equal(column, getattr(several, name))
    assert np.array_equal(several.at(RIDGES[2]).coefficient, columns[:, 2:3])


def test_texts_stand_for_users_beside_those_who_had_an_item(memory, tmp_path):
    """Items 5 and 6 are like item 0, and 6 like item 3; a pair that the edges have, too, gets both."""
    several = replace(memory, coefficient=np.repeat(memory.coefficient, len(RIDGES), 1))
    texts = TextPairs(np.array([0, 0, 3]), np.array([5, 6, 6]), np.array([1, 0.25, 0.75], np.float32))
    whole = several.with_texts(texts, np.zeros(SIZE, int))
    whole.save(tmp_path / "m.safetensors")
    whole = Memory.load(tmp_path / "m.safetensors")
    found = pairs_of(whole.at(RIDGE, [10.0]))
    assert set(found) == {*PAIRS, (0, 6), (3, 6)}
    assert found[0, 5] == pytest.approx(PAIRS[0, 5] + 10 / (3 + RIDGE))
    assert found[0, 6] == pytest.approx(2.5 / (3 + RIDGE)) and found[3, 6] == pytest.approx(7.5 / (6 + RIDGE))
    assert found[3, 4] == pytest.approx(PAIRS[3, 4])
    assert pairs_of(whole.at(RIDGE)) == pairs_of(memory)
    both = whole.at(RIDGE, [0.0, 10.0]).coefficient
    assert both.shape == (len(PAIRS) + 2, 2)
    np.testing.assert_array_equal(both[:, 1:], whole.at(RIDGE, [10.0]).coefficient)


def test_of_the_items_that_a_text_resembles_the_nearest_are_kept(memory, monkeypatch):
    monkeypatch.setattr("recsys_ray.scoring.memory.NEIGHBOURS", 2)
    texts = TextPairs(np.zeros(4, int), np.array([3, 4, 5, 6]), np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    found = memory.with_texts(texts, np.zeros(SIZE, int))
    row = slice(found.begin[0], found.begin[1])
    told = found.text[row] > 0
    assert found.gid[row][told].tolist() == [4, 6] and set(found.gid[row][~told]) == {1, 5}


def test_new_items_bring_their_edges_and_replaced_ones_change_theirs(memory):
    """Item 7 is new and item 2 is replaced; pairs of the others stay as they are."""
    users = np.array([3, 4, 9, 6, 7, 8, 9, 4])
    edges = np.array([0, 7, 4, 2]), np.array([7, 0, 2, 4]), np.array([3, 1.5, 5, 2.5])
    texts = TextPairs(np.array([0, 3]), np.array([7, 7]), np.array([0.4, 0.6], np.float32))
    grown = memory.extended(*edges, users, np.array([2, 7]), np.arange(SIZE + 1), RIDGE, texts, 10.0)
    found = pairs_of(grown)
    assert set(found) == {pair for pair in PAIRS if 2 not in pair} | {(0, 7), (7, 0), (4, 2), (2, 4), (3, 7)}
    assert found[0, 7] == pytest.approx((3 + 4) / (3 + RIDGE)) and found[3, 7] == pytest.approx(6 / (6 + RIDGE))
    assert found[7, 0] == pytest.approx(1.5 / (4 + RIDGE))
    assert found[2, 4] == pytest.approx(2.5 / (9 + RIDGE)) and found[0, 1] == pytest.approx(0.4)
    assert grown.users.tolist() == users.tolist()


def test_an_extension_keeps_what_interactions_and_texts_tell_of_a_hub(memory, monkeypatch):
    monkeypatch.setattr("recsys_ray.scoring.memory.NEIGHBOURS", 2)
    whole = replace(memory, coefficient=np.repeat(memory.coefficient, len(RIDGES), 1))
    texts = TextPairs(np.zeros(2, int), np.array([3, 4]), np.array([0.5, 0.5], np.float32))
    chosen = whole.with_texts(texts, np.zeros(SIZE, int)).at(RIDGE, [1.0])
    none = np.zeros(0, int)
    grown = chosen.extended(
        none, none, np.zeros(0), np.zeros(SIZE + 1, int), np.array([SIZE]), np.zeros(SIZE + 1, int), RIDGE,
        TextPairs(none, none, np.zeros(0, np.float32)), 1.0,
    )  # fmt: skip
    assert sorted(pair[1] for pair in pairs_of(grown) if pair[0] == 0) == [1, 3, 4, 5]


# -- what comes to mind


def expected(history: list[int], half_life: float | None) -> dict[int, float]:
    distinct = [item for place, item in enumerate(history) if item not in history[place + 1 :]]
    weight = {item: 0.5 ** (back / half_life) if half_life else 1 for back, item in enumerate(reversed(distinct))}
    total: dict[int, float] = {}
    for (a, b), value in PAIRS.items():
        if a in weight:
            total[b] = total.get(b, 0) + weight[a] / sum(weight.values()) * value
    return {item: np.log1p(max(value, 0) / SMALL) for item, value in total.items()}


@pytest.mark.parametrize("together", [1, 4, 1 << 16])
@pytest.mark.parametrize("half_life", [1.0, 4.0, None])
def test_recall_is_the_formula(memory, half_life, together, monkeypatch):
    monkeypatch.setattr("recsys_ray.scoring.memory._TOGETHER", together)
    histories = {0: [3, 0, 1], 2: [6], 3: [0, 2, 0, 0], 7: [4]}  # user 2's item has no edge
    user = np.repeat(list(histories), [len(h) for h in histories.values()])
    found = memory.recall(user, np.concatenate(list(histories.values())), half_life)
    want = [(u, item, value) for u, h in histories.items() for item, value in sorted(expected(h, half_life).items())]
    assert list(zip(*(column.tolist() for column in found[:2]), strict=True)) == [w[:2] for w in want]
    np.testing.assert_allclose(found[2][:, 0], [w[2] for w in want], rtol=1e-5)
    assert 0.0 in found[2]  # a negative sum is nothing
    part = memory.recall(user, np.concatenate(list(histories.values())), half_life, slice(1, 5))
    inside = (found.gid >= 1) & (found.gid < 5)
    assert inside.any() and not inside.all()
    for column, whole in zip(part, found, strict=True):
        np.testing.assert_array_equal(column, whole[inside])
    nothing = memory.recall(np.zeros(0, np.int64), np.zeros(0, np.int64), half_life)
    assert [len(column) for column in nothing[:3]] == [0, 0, 0]


def test_of_a_long_past_the_latest_items_are_recalled():
    items = REACH + 3
    memory = Memory.of_edges(
        np.arange(items),
        np.full(items, items),
        np.full((items, 1), 0.1),
        np.ones(items + 1, int),
        np.zeros(items + 1, int),
    )
    gids = np.arange(items)
    found, alone = (memory.recall(np.zeros(len(part), np.int64), part, 4.0) for part in (gids, gids[3:]))
    assert found.value == alone.value == pytest.approx(np.log1p(0.1 / SMALL))
    assert len(memory.recall(np.zeros(4, np.int64), np.array([0, 1, 1, 0]), 4.0).gid) == 1
    weight = latest(np.zeros(items, np.int64), gids, items + 1, 4.0)
    assert weight[1].tolist() == gids[3:].tolist() and 0 < weight[2][0] < 2e-4


@pytest.mark.parametrize("half_life", [1.0, None])
def test_new_items_are_raised_as_an_extension_would_raise_them(memory, half_life):
    users, new = np.append(np.arange(SIZE) + 3, [0, 0, 0]), SIZE + np.arange(3)
    texts = TextPairs(np.array([6, 0, 3, 6]), np.array([9, 7, 7, 7]), np.array([2.0, 1.0, 2.5, 0.5], np.float32))
    none = np.zeros(0, int)
    grown = memory.extended(none, none, np.zeros(0), users, new, np.zeros(SIZE + 3, int), RIDGE, texts, 3.0)
    of_new = MemoryOfNew.of([Raisers.of(texts, gid, users, RIDGE, 3.0) for gid in new.tolist()])
    user, gid = np.array([0, 0, 0, 2, 4, 4]), np.array([3, 6, 0, 1, 0, 6])
    want, found = grown.recall(user, gid, half_life, slice(SIZE, SIZE + 3)), of_new.recall(user, gid, SIZE, half_life)
    assert found.user.tolist() == want.user.tolist() == [0, 0, 4, 4]
    assert (found.gid + SIZE).tolist() == want.gid.tolist() == [7, 9, 7, 9]
    np.testing.assert_allclose(found.value, want.value, rtol=1e-6)
    assert not len(MemoryOfNew.of([]).recall(user, gid, SIZE, half_life).gid)
    assert not len(MemoryOfNew.of([NO_RAISERS] * 9).recall(user, gid, SIZE, half_life).gid)
