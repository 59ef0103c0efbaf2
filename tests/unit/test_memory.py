"""The direct memory beside the towers: its formula, its growth, and the weight that validation gives it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bundle_world import no_memory
from checkerboard import CHANCE, ITEMS, VALID, board_events, board_task, board_trainer

from recsys_ray.evaluation.baselines.towers import Tower
from recsys_ray.evaluation.recommenders import UserBatch
from recsys_ray.two_tower.memory import HALF_LIFE, OTHER, OWN, SMALL, Memory
from recsys_ray.two_tower.training import _ahead, train_epochs

EDGES = [(0, 1, 4), (1, 0, 4), (2, 0, 1), (3, 4, 2), (4, 3, 2), (0, 5, 1)]  # two were kept in one direction only
SIZE = 7


@pytest.fixture
def memory(tmp_path) -> Memory:
    src, dst, support = zip(*EDGES, strict=True)
    pq.write_table(pa.table({"src": src, "dst": dst, "support": support}), tmp_path / "edges.parquet")
    return Memory.of_edges(tmp_path / "edges.parquet", np.zeros(SIZE, np.int64))


def expected(history: list[int]) -> dict[int, float]:
    """By the formula, from the list of edges."""
    support = {(a, b): c for a, b, c in EDGES} | {(b, a): c for a, b, c in EDGES}
    degree = [sum(c for (a, _), c in support.items() if a == item) for item in range(SIZE)]
    latest = [item for place, item in enumerate(history) if item not in history[place + 1 :]]
    weight = {item: 0.5 ** (back / HALF_LIFE) for back, item in enumerate(reversed(latest))}
    total: dict[int, float] = {}
    for (a, b), c in support.items():
        if a in weight:
            similarity = c / (degree[a] ** OWN * degree[b] ** OTHER)
            total[b] = total.get(b, 0) + weight[a] / sum(weight.values()) * similarity
    return {item: np.log1p(value / SMALL) for item, value in total.items()}


def test_recall_is_the_formula(memory):
    histories = {0: [3, 0, 1], 2: [6], 3: [0, 2, 0, 0], 7: [4]}  # user 2's item has no edge
    user = np.repeat(list(histories), [len(h) for h in histories.values()])
    found = memory.recall(user, np.concatenate(list(histories.values())))
    want = [(u, item, value) for u, h in histories.items() for item, value in sorted(expected(h).items())]
    assert list(zip(*(column.tolist() for column in found[:2]), strict=True)) == [w[:2] for w in want]
    np.testing.assert_allclose(found[2], [w[2] for w in want], rtol=1e-5)
    nothing = memory.recall(np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert [len(column) for column in nothing] == [0, 0, 0]


def test_a_saved_memory_is_the_same(memory, tmp_path):
    memory.save(tmp_path / "m.safetensors")
    for name, column in vars(Memory.load(tmp_path / "m.safetensors")).items():
        assert np.array_equal(column, getattr(memory, name))


def test_new_items_bring_their_edges_and_replaced_ones_change_theirs(memory):
    """Item 7 is new and item 2 is replaced; pairs of the others stay as they are."""
    grown = memory.extended(np.array([0, 4]), np.array([7, 2]), np.array([3, 5]), np.array([2, 7]), np.arange(SIZE + 1))
    pairs = {}
    for item in range(SIZE + 1):
        for place in range(grown.begin[item], grown.begin[item + 1]):
            pairs[item, int(grown.gid[place])] = float(grown.similarity[place])
    kept = {(a, b) for a, b, _ in EDGES} | {(b, a) for a, b, _ in EDGES}
    assert set(pairs) == {pair for pair in kept if 2 not in pair} | {(0, 7), (7, 0), (4, 2), (2, 4)}
    assert pairs[0, 7] == pytest.approx(3 / (memory.degree[0] ** OWN * 3**OTHER))
    assert pairs[7, 0] == pytest.approx(3 / (3**OWN * memory.degree[0] ** OTHER))
    assert pairs[4, 2] == pytest.approx(5 / (5**OWN * 5**OTHER)) and memory.degree[4] == 2
    assert pairs[0, 1] == pytest.approx(float(memory.similarity[memory.begin[0]]))
    assert grown.degree[2] == 5 and grown.degree[7] == 3


def test_a_hub_remembers_its_most_similar_items_of_each_type(monkeypatch):
    """Item 0 is linked to all others; the more users share a pair, the more similar it is."""
    monkeypatch.setattr("recsys_ray.two_tower.memory.NEIGHBOURS", 2)
    ntype = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    others = np.arange(1, 8)
    memory = no_memory().extended(others, np.zeros(7, int), 1000 * others, np.arange(8), ntype)
    assert memory.gid[memory.begin[0] : memory.begin[1]].tolist() == [2, 3, 6, 7]
    assert [memory.gid[memory.begin[item]] for item in others] == [0] * 7


def test_counting_who_stands_before_a_target_needs_no_dense_bonus():
    random = np.random.default_rng(0)
    scores = torch.from_numpy(random.integers(0, 6, (40, 30)).astype(np.float32))  # many are equal
    scores[torch.from_numpy(random.random((40, 30)) < 0.1)] = -torch.inf
    target = torch.from_numpy(random.integers(0, 30, 40))
    scores[torch.arange(40), target] = 3.0
    bonus = torch.from_numpy(random.integers(1, 4, (40, 30)) * (random.random((40, 30)) < 0.3)).float()
    row, column = bonus.nonzero(as_tuple=True)
    for weight in (0.0, 0.5, 1.0):
        raised = scores + weight * bonus
        own = raised.gather(1, target[:, None])
        want = (raised > own).sum(1) + ((raised == own).sum(1) - 1) / 2
        assert torch.equal(_ahead(scores, target, row, column, bonus[row, column], weight), want)


def _board_memory(true: bool) -> Memory:
    """Edges between items of one colour, as the board's users make them, or between items at random."""
    events = board_events().before(VALID)
    src = events.gid.astype(np.int64)
    dst = np.random.default_rng(1).permutation(src)
    if true:
        keep = src % 2 == dst % 2
        src, dst = src[keep], dst[keep]
    return no_memory().extended(src, dst, np.ones(len(src), np.int64), np.arange(ITEMS), np.zeros(ITEMS, np.int64))


@pytest.mark.parametrize("true", [True, False])
def test_validation_weighs_the_memory_by_what_it_is_worth(true):
    """Features tell nothing here: only the edges can."""
    task = replace(board_task("nowhere"), memory=_board_memory(true))
    trainer, optimizer = board_trainer(task)
    state = train_epochs(trainer, optimizer, {})
    found, weight = trainer.validate()
    assert state["memory"] > 0  # of items that are all alike none is among the first ten: anything is better
    assert weight > 0 and (found > 0.9 if true else found < 2 * CHANCE)
    alone, _ = board_trainer(replace(task, memory=None))
    alone.averaged = trainer.averaged
    assert alone.validate()[0] < 0.1 * CHANCE and alone.validate()[1] == 0


class _Towers:
    """All items are alike to the towers; of user 0 the memory says something."""

    item_vectors = np.ones((6, 2), np.float32)

    def user_vectors(self, users: UserBatch) -> torch.Tensor:
        return torch.ones(len(users), 2)

    def remembered(self, users: UserBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.array([0, 0]), np.array([1, 4]), np.array([0.5, 0.25], np.float32)


def test_evaluation_adds_the_memory_to_the_scores():
    users = UserBatch(np.arange(2), np.zeros(3, np.int64), *(np.zeros(0, np.int64) for _ in range(3)))
    score = Tower("t", _Towers()).scorer(users)
    assert score(0, 6).tolist() == [[2, 2.5, 2, 2, 2.25, 2], [2] * 6]
    assert score(2, 5).tolist() == [[2, 2, 2.25], [2] * 3]
