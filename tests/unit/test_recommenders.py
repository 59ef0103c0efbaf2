"""The same contract for every recommender, and a world in which the right answers are known."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
import torch
from colour_world import CATALOGUE, ITEMS, PER_TYPE, USERS, colour_events, fit, known_data, write_features

from recsys_ray.baselines import BASELINES
from recsys_ray.baselines.histories import HistoryRule
from recsys_ray.baselines.vectors import MeanVectors
from recsys_ray.data.tables import Catalogue, Events
from recsys_ray.evaluation import ranking as recommenders
from recsys_ray.evaluation.given import ReadyLists, Tower
from recsys_ray.evaluation.ranking import Recommender, Scorer, UserBatch, batch_of, rank, rank_queries, top_k
from recsys_ray.evaluation.segments import SEGMENTS, find_queries

HISTORY = colour_events()
POPULARITY = np.bincount(HISTORY.gid, minlength=ITEMS)
Build = Callable[[str], Recommender]


class ColourTower:
    """Knows the answer: items and users are vectors of their colour."""

    item_vectors = np.eye(2, dtype=np.float32)[np.arange(ITEMS) % 2]

    def unknown(self, users: UserBatch) -> np.ndarray:
        return users.empty

    def scorer(self, users: UserBatch) -> Scorer:
        vectors = torch.eye(2)[torch.from_numpy(users.uid % 2)]
        return lambda first, last: vectors @ torch.from_numpy(self.item_vectors[first:last]).T


def oracle() -> ReadyLists:
    lists = [np.arange(user % 2, ITEMS, 2) for user in range(USERS)]
    per_type = [line[(line >= a) & (line < a + PER_TYPE)] for line in lists for a in (0, PER_TYPE)]
    offsets = np.concatenate([[0], np.cumsum([len(line) for line in per_type])])
    return ReadyLists("oracle", np.arange(2 * USERS), offsets, np.concatenate(per_type), types=2)


@pytest.fixture(scope="module")
def build_anew(tmp_path_factory) -> Build:
    """Fits a model by its name."""
    folder = tmp_path_factory.mktemp("features")
    write_features(folder)

    def made(name: str) -> Recommender:
        if name == "2t_hgnn":
            return Tower(name, ColourTower(), POPULARITY)
        if name == "oracle":
            return oracle()
        if name == "ials":
            pytest.importorskip("implicit")
        return fit(name, known_data(folder))

    return made


@pytest.fixture(scope="module")
def build(build_anew) -> Build:
    """The same, but each name once."""
    ready: dict[str, Recommender] = {}

    def made(name: str) -> Recommender:
        if name not in ready:
            ready[name] = build_anew(name)
        return ready[name]

    return made


NAMES = [*BASELINES, "2t_hgnn", "oracle"]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "popularity"])
def test_right_answers(name, build):
    """Popularity cannot know a user's colour; everything else must, and what is trained may slip: the last digits
    of a training are another processor's, another number of threads'."""
    batch = batch_of(np.arange(USERS - 1), HISTORY)
    ranked = rank(build(name), batch, CATALOGUE, 1, k=10)
    right = (ranked % 2 == np.arange(USERS - 1)[:, None] % 2).mean()
    assert right > 0.95 if name in BASELINES and BASELINES[name].seeded else right == 1  # by chance: 0.5


@pytest.mark.parametrize("name", NAMES)
class TestContract:
    def test_only_items_of_the_type_never_a_seen_one_and_none_twice(self, name, build):
        batch = batch_of(np.arange(USERS), HISTORY)
        for item_type in (0, 1):
            first, last = CATALOGUE.range_of(item_type)
            ranked = rank(build(name), batch, CATALOGUE, item_type)
            for row in range(USERS):
                items = ranked[row][ranked[row] >= 0]
                assert len(items) and len(set(items)) == len(items)
                assert ((items >= first) & (items < last)).all()
                assert not set(items) & set(HISTORY.gid[HISTORY.uid == row])

    def test_deterministic_and_the_same_alone_as_in_a_batch(self, name, build, build_anew):
        model = build(name)
        batch = batch_of(np.arange(USERS), HISTORY)
        ranked = rank(model, batch, CATALOGUE, 0)
        assert np.array_equal(ranked, rank(build_anew(name), batch, CATALOGUE, 0))
        alone = rank(model, batch_of(np.array([7]), HISTORY), CATALOGUE, 0)
        assert np.array_equal(alone[0][:5], ranked[7][:5])

    def test_without_history(self, name, build):
        nobody = batch_of(np.array([USERS - 1]), HISTORY)
        assert nobody.empty.all()
        ranked = rank(build(name), nobody, CATALOGUE, 0, k=10)
        assert (ranked >= 0).all()
        if name != "oracle":
            assert np.array_equal(np.sort(POPULARITY[ranked[0]]), np.sort(np.sort(POPULARITY[:PER_TYPE])[-10:]))

    def test_unavailable_items_stay_out_unless_asked_for(self, name, build):
        available = np.ones(ITEMS, dtype=bool)
        available[:40] = False
        catalogue = Catalogue(CATALOGUE.types, CATALOGUE.bounds, available)
        nobody = batch_of(np.array([USERS - 1]), HISTORY)
        ranked = rank(build(name), nobody, catalogue, 0)[0]
        assert set(ranked[ranked >= 0]) <= set(range(40, 60))
        kept = rank(build(name), nobody, catalogue, 0, always=(np.array([0]), np.array([1])))[0]
        assert set(kept[kept >= 0]) == set(ranked[ranked >= 0]) | {1}

    def test_chunks_of_the_catalogue_change_nothing(self, name, build, monkeypatch):
        batch = batch_of(np.arange(USERS), HISTORY)
        catalogue = Catalogue(("all",), np.array([0, ITEMS]), np.ones(ITEMS, dtype=bool))
        whole = rank(build(name), batch, catalogue, 0, k=20)
        monkeypatch.setattr(recommenders, "_CELLS", 1)
        monkeypatch.setattr(recommenders, "_MIN_COLUMNS", 7)
        chunked = rank(build(name), batch, catalogue, 0, k=20)
        assert (whole == chunked).mean() > 0.99  # rounding may swap near-equals

    def test_survives_the_way_to_a_task(self, name, build):
        model = build(name)
        batch = batch_of(np.arange(5), HISTORY)
        before = rank(model, batch, CATALOGUE, 0)
        assert np.array_equal(before, rank(pickle.loads(pickle.dumps(model)), batch, CATALOGUE, 0))


def test_ties_go_to_the_first_columns():
    scores = torch.tensor([[1.0, 2, 1, 1, 2, 1], [0, 0, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0], [-torch.inf] * 5 + [1.0]])
    values, columns = top_k(scores, 3)
    assert columns[:3].tolist() == [[1, 4, 0], [0, 1, 2], [0, 1, 2]]
    assert values[0].tolist() == [2, 2, 1] and columns[3, 0] == 5
    assert top_k(scores, 10)[0].shape == (4, 6)


def test_top_k_against_a_full_sort():
    scores = torch.from_numpy(np.random.default_rng(0).integers(0, 6, (50, 200)).astype(np.float32))
    expected = scores.sort(dim=1, descending=True, stable=True).indices[:, :20]
    assert torch.equal(top_k(scores, 20)[1], expected)


def test_a_score_that_is_no_number_is_an_error():
    broken = MeanVectors("hgnn", np.full((ITEMS, 2), np.nan, dtype=np.float32), POPULARITY, HistoryRule(50))
    with pytest.raises(ValueError, match="hgnn gave a score"):
        rank(broken, batch_of(np.array([0]), HISTORY), CATALOGUE, 0)


def test_batches_and_latest_items():
    events = Events(*(np.array(c) for c in ([1, 1, 1, 1, 4], [7, 8, 7, 9, 7], [0, 0, 0, 0, 0], [1, 2, 3, 4, 1])))
    users = pa.table({"user_id": ["b", "c", "e"]})
    batch = batch_of(np.array([1, 2, 4]), events, users)
    assert batch.offsets.tolist() == [0, 4, 4, 5] and batch.empty.tolist() == [False, True, False]
    row, place, _ = HistoryRule(2).entries(batch)
    assert list(zip(row.tolist(), batch.gid[place].tolist(), strict=True)) == [(0, 7), (0, 9), (2, 7)]
    _, place, _ = HistoryRule(10).entries(batch)
    assert batch.gid[place].tolist() == [8, 7, 9, 7]


@pytest.mark.parametrize(("name", "expected"), [("2t_hgnn", 1.0), ("popularity", None)])
def test_queries_of_the_colours(name, expected, build):
    """Test events are the rest of the own colour: the first ten of a perfect model hold nothing else."""
    rows = [
        (user, item, 100)
        for user in range(USERS - 1)
        for item in range(user % 2, ITEMS, 2)
        if item not in HISTORY.gid[HISTORY.uid == user]
    ]
    uid, gid, time = np.array(rows).T
    merged = [np.concatenate(pair) for pair in ((HISTORY.uid, uid), (HISTORY.gid, gid), (HISTORY.timestamp, time))]
    order = np.lexsort((merged[2], merged[0]))
    events = Events(merged[0][order], merged[1][order], np.zeros(len(order), dtype=np.int8), merged[2][order])
    queries = find_queries(events, CATALOGUE, np.array([True]), cut=100, end=200)
    assert len(queries) == 2 * (USERS - 1)
    member = np.zeros((len(queries), len(SEGMENTS)), dtype=bool)
    member[:, 0] = True
    found = rank_queries(build(name), queries, member, HISTORY, None, CATALOGUE, batch_size=16)
    # 18 of the 48 unseen items of a type are truths: a perfect model has them all in its first 18.
    top = np.bincount(found.hit_query[found.hit_rank < 18], minlength=len(queries))
    assert (top == 18).all() if expected else (top < 18).any()
    assert np.array_equal(queries.truth_query[found.hit_truth], found.hit_query)
    assert found.covered[0].all() and not found.covered[1:].any()
