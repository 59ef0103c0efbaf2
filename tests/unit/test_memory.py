"""The direct memory beside the towers: its formula, its growth, and the weight that validation gives it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkerboard import CHANCE, ITEMS, VALID, board_events, board_task, board_trainer

from recsys_ray.evaluation.given import Tower
from recsys_ray.evaluation.ranking import UserBatch
from recsys_ray.scoring.memory import (
    REACH,
    RIDGES,
    RIVALS,
    SMALL,
    Memory,
    Recalled,
    _latest,
    one_row_a_user,
    place_kept,
)
from recsys_ray.scoring.places import ranks_with_memory
from recsys_ray.scoring.ridge import Edges, _ranges, solve
from recsys_ray.scoring.scorer import TrainedTower
from recsys_ray.two_tower.stage import VARIANTS, write_specs
from recsys_ray.two_tower.towers import TowerSpec, UserTower
from recsys_ray.two_tower.training import train_epochs

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


def test_coefficients_are_ridge_regressions_on_the_neighbours():
    """Least squares over users, with a row sqrt(ridge) for each neighbour."""
    random = np.random.default_rng(0)
    had = (random.random((200, SIZE)) < 0.3).astype(float)
    shared = had.T @ had
    edges = [(src, dst) for dst in range(SIZE) for src in range(SIZE) if src != dst and (src + dst) % 3]
    src, dst = np.array(edges).T
    support = shared[src, dst].astype(np.int64)
    shared[(np.add.outer(np.arange(SIZE), np.arange(SIZE)) % 3) == 0] = 0  # pairs that the graph does not have
    solved = solve(Edges(src, dst, support, support), had.sum(0).astype(int), 0, len(src))
    assert solved.shape == (len(src), len(RIDGES))
    for item in range(SIZE):
        near = src[dst == item]
        for column, ridge in enumerate(RIDGES):
            gram = shared[np.ix_(near, near)]
            gram[np.diag_indices(len(near))] = had[:, near].sum(0) + ridge
            np.testing.assert_allclose(gram @ solved[dst == item, column], had[:, near].T @ had[:, item], rtol=1e-5)
    whole = [(s, d) for d in range(4) for s in range(4) if s != d]  # a graph with every pair of four items
    src, dst = np.array(whole).T
    support = (had.T @ had)[src, dst].astype(int)
    solved = solve(Edges(src, dst, support, support), had.sum(0).astype(int), 0, len(src))
    for item in range(4):
        near = src[dst == item]
        tall = np.vstack([had[:, near], np.sqrt(RIDGE) * np.eye(3)])
        want = np.linalg.lstsq(tall, np.r_[had[:, item], np.zeros(3)], rcond=None)[0]
        np.testing.assert_allclose(solved[dst == item, 1], want, rtol=1e-4)


def test_pairs_that_the_graph_dropped_make_no_wild_coefficient():
    """Items 0 and 1 share more users than the graph says that they have: singular with the first ridge."""
    src, dst = np.array([1, 2, 0, 2, 0, 1]), np.array([0, 0, 1, 1, 2, 2])
    support = np.array([10, 3, 10, 4, 3, 4])
    solved = solve(Edges(src, dst, support, support), np.array([0, 0, 5]), 0, 6)
    assert np.isfinite(solved).all() and np.abs(solved).max() <= 1


def test_a_range_of_edges_is_solved_as_in_the_whole():
    random = np.random.default_rng(1)
    src, dst = np.array([(s, d) for d in range(SIZE) for s in range(SIZE) if s != d]).T
    edges = Edges(src, dst, random.integers(1, 20, len(src)), random.random(len(src)))
    users = np.full(SIZE, 60)
    whole = solve(edges, users, 0, len(src))
    ranges = _ranges(dst)
    assert [a for a, _ in ranges[1:]] == [b for _, b in ranges[:-1]] and (ranges[0][0], ranges[-1][1]) == (0, len(src))
    parts = [solve(edges, users, begin, end) for begin, end in ranges]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert (
        _ranges(np.zeros(0, np.int64)) == [(0, 0)] * 8 and solve(Edges(*np.zeros((4, 0), int)), users, 0, 0).size == 0
    )


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


def test_new_items_bring_their_edges_and_replaced_ones_change_theirs(memory):
    """Item 7 is new and item 2 is replaced; pairs of the others stay as they are."""
    users = np.zeros(SIZE + 1, int)
    users[[2, 7]] = 9, 4
    edges = np.array([0, 7, 4, 2]), np.array([7, 0, 2, 4]), np.array([3, 1.5, 5, 2.5])
    grown = memory.extended(*edges, users, np.array([2, 7]), np.arange(SIZE + 1), RIDGE)
    found = pairs_of(grown)
    assert set(found) == {pair for pair in PAIRS if 2 not in pair} | {(0, 7), (7, 0), (4, 2), (2, 4)}
    assert found[0, 7] == pytest.approx(3 / (3 + RIDGE)) and found[7, 0] == pytest.approx(1.5 / (4 + RIDGE))
    assert found[2, 4] == pytest.approx(2.5 / (9 + RIDGE)) and found[0, 1] == pytest.approx(0.4)
    assert grown.users.tolist() == [3, 4, 9, 6, 7, 8, 9, 4]


def test_an_item_that_is_met_with_a_new_one_is_blank_no_more(memory):
    """Or an answer would hold it twice: once for the edge, once as blank."""
    silent = replace(memory, users=np.array([0, *memory.users[1:]], np.int32))
    users = np.zeros(SIZE + 1, int)
    users[[0, 7]] = 2, 2
    edges = np.array([0, 7]), np.array([7, 0]), np.array([2.0, 1.0])
    grown = silent.extended(*edges, users, np.array([7]), np.zeros(SIZE + 1, int), RIDGE)
    assert (0, 7) in pairs_of(grown) and not grown.is_blank(np.array([0, 7])).any()


# -- what comes to mind


def expected(history: list[int], half_life: float) -> dict[int, float]:
    latest = [item for place, item in enumerate(history) if item not in history[place + 1 :]]
    weight = {item: 0.5 ** (back / half_life) for back, item in enumerate(reversed(latest))}
    total: dict[int, float] = {}
    for (a, b), value in PAIRS.items():
        if a in weight:
            total[b] = total.get(b, 0) + weight[a] / sum(weight.values()) * value
    return {item: np.log1p(max(value, 0) / SMALL) for item, value in total.items()}


@pytest.mark.parametrize("half_life", [1.0, 4.0])
def test_recall_is_the_formula(memory, half_life):
    histories = {0: [3, 0, 1], 2: [6], 3: [0, 2, 0, 0], 7: [4]}  # user 2's item has no edge
    user = np.repeat(list(histories), [len(h) for h in histories.values()])
    found = memory.recall(user, np.concatenate(list(histories.values())), half_life)
    want = [(u, item, value) for u, h in histories.items() for item, value in sorted(expected(h, half_life).items())]
    assert list(zip(*(column.tolist() for column in found[:2]), strict=True)) == [w[:2] for w in want]
    np.testing.assert_allclose(found[2][:, 0], [w[2] for w in want], rtol=1e-5)
    assert 0.0 in found[2]  # a negative sum is nothing
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
    weight = _latest(np.zeros(items, np.int64), gids, items + 1, 4.0)
    assert weight[1].tolist() == gids[3:].tolist() and 0 < weight[2][0] < 2e-4


# -- what it is worth


def risen(towers: np.ndarray, with_it: np.ndarray, blank: np.ndarray) -> torch.Tensor:
    """What blank items rise by, user by user."""
    rises = []
    for before, after in zip(towers, with_it, strict=True):
        best = np.argsort(-before, kind="stable")[:RIVALS]
        known = before[best[~blank[best] & np.isfinite(before[best])]]
        after = np.sort(after[~blank])[::-1][: len(known)]
        rises.append(np.interp(before[blank], known[::-1], (after - known)[::-1]))
    return torch.from_numpy(np.array(rises, np.float32))


def test_places_are_those_of_a_dense_bonus():
    random = np.random.default_rng(0)
    first, users, items = 100, 400, 60
    scores = torch.from_numpy(random.integers(0, 12, (users, items)).astype(np.float32))  # many are equal
    scores += torch.linspace(0, 0.4, items)  # so that it is clear which 20 are the best
    scores[torch.from_numpy(random.random((users, items)) < 0.1)] = -torch.inf
    target = torch.from_numpy(random.integers(0, items, users))
    scores[torch.arange(users), target] = 9.0
    blank = torch.arange(items) % 7 == 0
    bonus = random.integers(1, 4, (users, items, 2)) * (random.random((users, items, 1)) < 0.3)
    bonus[:, blank] = 0
    row, column = np.nonzero(bonus.sum(2))
    elsewhere = np.arange(5), np.full(5, first + items + 3), np.ones((5, 2))  # of another type
    order = np.lexsort((np.r_[first + column, elsewhere[1]], np.r_[row, elsewhere[0]]))
    recalled = Recalled(
        np.r_[row, elsewhere[0]][order], np.r_[first + column, elsewhere[1]][order],
        np.r_[bonus[row, column], elsewhere[2]][order].astype(np.float32), 1000,
    )  # fmt: skip
    weights, bonus = [0.0, 0.5, 1.0], torch.from_numpy(bonus).float()
    want = torch.zeros(users, 3, 2)
    for place, weight in enumerate(weights):
        for ridge in range(2):
            raised = scores + weight * bonus[:, :, ridge]
            raised[:, blank] += risen(scores.numpy(), raised.numpy(), blank.numpy())
            own = raised.gather(1, target[:, None])
            ahead = (raised > own).sum(1) + ((raised == own).sum(1) - 1) / 2
            want[:, place, ridge] = ahead
    assert torch.equal(ranks_with_memory(scores, target, recalled, first, blank, weights), want)
    assert len(want.sum(0).unique()) > 3


def test_a_blank_item_keeps_its_place_among_the_others():
    random = np.random.default_rng(0)
    before = torch.from_numpy(-np.sort(-random.normal(size=(50, RIVALS)))).float()
    after = (before + torch.from_numpy(random.exponential(size=before.shape)).float()).sort(1, descending=True).values
    blank = torch.from_numpy(random.normal(size=(50, 30))).float()
    risen = blank + place_kept(blank, before, after)
    place, kept = ((others[:, :, None] > own[:, None]).sum(1) for others, own in ((before, blank), (after, risen)))
    assert torch.equal(place, kept) and len(place.unique()) == RIVALS + 1
    assert torch.equal(blank.argsort(1), risen.argsort(1))
    alone = torch.full((2, 3), -torch.inf)
    alone[1, 0] = 1.0
    found = place_kept(torch.tensor([[0.5, 3.0], [0.5, 3.0]]), alone, alone + torch.tensor([2.0, 0.0, 0.0]))
    assert found.tolist() == [[0.0, 0.0], [2.0, 2.0]]  # no other item; one, which rises by 2
    assert one_row_a_user(torch.tensor([0, 0, 2]), torch.tensor([1.0, 3.0, 2.0]), 4).tolist() == [
        [1.0, 3.0], [-np.inf] * 2, [2.0, -np.inf], [-np.inf] * 2,
    ]  # fmt: skip


def _board_memory(true: bool) -> Memory:
    """Edges between items of one colour, as the board's users make them, or between items at random."""
    events = board_events().before(VALID)
    src = events.gid.astype(np.int64)
    dst = np.random.default_rng(1).permutation(src)
    keep = src % 2 == dst % 2 if true else src != dst
    src, dst = np.unique(np.stack([src[keep], dst[keep]]), axis=1)
    return Memory.of_edges(src, dst, np.full((len(src), len(RIDGES)), 0.1), np.ones(ITEMS, int), np.zeros(ITEMS, int))


@pytest.mark.parametrize("true", [True, False])
def test_validation_weighs_the_memory_by_what_it_is_worth(true):
    """Features tell nothing here: only the edges can."""
    task = replace(board_task("nowhere"), memory=_board_memory(true))
    trainer, optimizer = board_trainer(task)
    state = train_epochs(trainer, optimizer, {})
    found, _, weight, ridge = trainer.validate()
    assert state["memory"] > 0  # of items that are all alike none is among the first ten: anything is better
    assert weight > 0 and ridge == RIDGES[0] and (found > 0.9 if true else found < 2 * CHANCE)
    alone, _ = board_trainer(replace(task, memory=None))
    alone.averaged = trainer.averaged
    assert alone.validate().hit_rate < 0.1 * CHANCE and alone.validate().memory == 0


@pytest.mark.parametrize("shares", [None, [0.1, None]])
def test_evaluation_adds_the_memory_to_the_scores(shares):
    """User 0 has item 0 of type 0 (items 0 to 29) and then 3, which has no edge; items 40 and 41 of type 1 and item 7
    are blank, 1 is not offered."""
    ntype = np.repeat([0, 1], [30, 20])
    users = np.ones(50, int)
    users[[7, 40, 41]] = 0
    src, dst, made = np.array([0, 0, 0, 5]), np.array([1, 35, 6, 2]), np.array([0.2, 0.1, 0.05, 0.3])[:, None]
    memory = Memory.of_edges(src, dst, made, users, ntype)
    spec = TowerSpec(
        2, ["stream"], 1, 0, 3, 0, 0, 0, {}, [4], memory=0.5, half_life=1.0, temperature=0.3, blank_share=shares,
        blank_shift={"test": [0.7, 0.0]}, mean_user={"test": [0.2, -0.1, 0.0, 0.3]},
    )  # fmt: skip
    available = np.arange(50) != 1
    vectors = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32))
    trend = np.where((ntype == 0) & (users > 0), np.linspace(-0.5, 0.5, 50), 0).astype(np.float32)
    given = np.zeros((50, 1)), None, ntype, available, None, 0, memory, trend
    towers = TrainedTower(vectors.numpy(), UserTower(spec), *given)
    batch = UserBatch(np.arange(2), np.array([0, 2, 2]), np.array([0, 3]), np.zeros(2, int), np.arange(2))
    towers.user_vectors = lambda users: torch.ones(2, 4)
    towers.unknown = lambda users: np.zeros(2, bool)
    score = Tower("t", towers, np.zeros(50)).scorer(batch)
    plain = (torch.ones(2, 4) @ vectors.T).numpy() + trend
    if shares:  # of type 1's 18 events each was its item's only one: 18.5 to .5
        plain[:, 7] += 0.7
        had = np.r_[30:40, 42:50]  # of type 1: each by one user
        of_mean = np.exp(vectors[had].numpy() @ [0.2, -0.1, 0.0, 0.3] / 0.3)
        plain[:, had] += 0.3 * np.log(of_mean.sum() / 18 / of_mean).astype(np.float32)
        weight = np.exp(plain[:, 30:] / 0.3)
        fresh = weight[:, 10:12].sum(1)
        plain[:, 40:42] += 0.3 * np.log(37 * (weight.sum(1) - fresh) / fresh)[:, None]
    want = plain.copy()
    added = np.zeros(50)
    added[[1, 35, 6]] = 0.5 * np.log1p(np.array([0.2, 0.1, 0.05]) / 3 / SMALL)
    want[0] += added
    for kind in range(2):
        here = np.flatnonzero((ntype == kind) & available & ~np.isin(np.arange(50), [0, 3]))
        want[0, here[users[here] == 0]] += risen(plain[:1, here], want[:1, here], users[here] == 0)[0].numpy()
    parts = [(0, 12), (12, 30), (30, 38), (38, 50)]
    found = np.concatenate([score(first, last).numpy() for first, last in parts], axis=1)
    np.testing.assert_allclose(found, want, rtol=1e-5)
    assert found[0, 7] > plain[0, 7] and found[1, 7] == plain[1, 7]


def test_a_finished_variant_keeps_what_validation_chose(tmp_path):
    """A run that is killed while its second variant trains goes on with the first one's memory."""
    spec = TowerSpec(2, ["stream"], 1, 8, 3, 0, 0, 0, {}, [4])
    write_specs(tmp_path, list(VARIANTS), spec)
    replace(spec, memory=0.2, ridge=RIDGES[1]).save(tmp_path / "hgnn" / "spec.json")
    (tmp_path / "hgnn" / "metrics.json").write_text("[]")
    write_specs(tmp_path, list(VARIANTS), spec)
    assert TowerSpec.load(tmp_path / "hgnn" / "spec.json").memory == 0.2
    assert TowerSpec.load(tmp_path / "text_only" / "spec.json").hgnn_dim == 0
