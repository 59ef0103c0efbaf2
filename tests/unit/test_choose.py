"""What validation chooses of the score: places with a memory, the share of unseen items, trends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkerboard import CHANCE, ITEMS, LIKED, TYPES, VALID, board_events, board_task, board_trainer

from recsys_ray.graph.texts import TextPairs
from recsys_ray.scoring.choose import (
    Moment,
    Queries,
    Users,
    choose,
    expected_shares,
    gain_of,
    item_terms,
    places,
    unseen_term,
)
from recsys_ray.scoring.memory import RIDGES, TEXT_USERS, WEIGHTS, Memory, Recalled
from recsys_ray.scoring.scorer import TRENDS, UNSEEN, ScoreSpec
from recsys_ray.scoring.trends import WEIGHTS as TREND_WEIGHTS
from recsys_ray.two_tower.rows import take
from recsys_ray.two_tower.stage import VARIANTS, write_specs
from recsys_ray.two_tower.towers import TowerSpec
from recsys_ray.two_tower.training import item_vectors, queries_by_type, sample_of_queries, train_epochs, users_of


def test_places_are_those_of_dense_scores():
    random = np.random.default_rng(0)
    first, users, items = 100, 400, 60
    scores = torch.from_numpy(random.integers(0, 12, (users, items)).astype(np.float32))  # many are equal
    scores[torch.from_numpy(random.random((users, items)) < 0.1)] = -torch.inf
    target = torch.from_numpy(random.integers(0, items, users))
    scores[torch.arange(users), target] = 9.0
    bonus = random.integers(1, 4, (users, items, 2)) * (random.random((users, items, 1)) < 0.3)
    row, column = np.nonzero(bonus.sum(2))
    elsewhere = np.arange(5), np.full(5, first + items + 3), np.ones((5, 2))  # of another type
    order = np.lexsort((np.r_[first + column, elsewhere[1]], np.r_[row, elsewhere[0]]))
    recalled = Recalled(
        np.r_[row, elsewhere[0]][order], np.r_[first + column, elsewhere[1]][order],
        np.r_[bonus[row, column], elsewhere[2]][order].astype(np.float32),
    )  # fmt: skip
    weights, bonus = [0.0, 0.5, 1.0], torch.from_numpy(bonus).float()
    want = torch.zeros(users, 3, 2)
    for place, weight in enumerate(weights):
        for ridge in range(2):
            raised = scores + weight * bonus[:, :, ridge]
            own = raised.gather(1, target[:, None])
            want[:, place, ridge] = (raised > own).sum(1) + ((raised == own).sum(1) - 1) / 2
    assert torch.equal(places(scores.clone(), target, recalled, first, weights), want)
    assert len(want.sum(0).unique()) > 3
    plain = places(scores, target, Recalled.nothing(), first, [0.0])[:, 0, 0]
    assert torch.equal(plain, want[:, 0, 0])


def test_unseen_items_of_a_type_get_its_share_in_the_mean(monkeypatch):
    """Of three types, the last without examples; in parts of a few users."""
    monkeypatch.setattr("recsys_ray.scoring.choose._ODDS_CELLS", 300)
    random = np.random.default_rng(0)
    vectors = torch.from_numpy(random.normal(size=(90, 8)).astype(np.float32))
    ntype, had = np.arange(90) // 30, (np.arange(90) % 4).astype(np.int32)
    row, history = np.repeat(np.arange(70), 3), random.integers(0, 90, 210)
    users = Users(torch.from_numpy(random.normal(size=(70, 8)).astype(np.float32)), row, history)
    moment = Moment(ntype, None, had[None], False, [0.02, 0.6, None])
    found = unseen_term(users, vectors, moment, 0.5)
    scores = users.vectors @ vectors.T + torch.from_numpy(found)
    scores[row, history] = -torch.inf
    for kind, share in enumerate((0.02, 0.6, (8 + 0.5) / (had[60:].sum() + 1))):  # eight items had one user
        of_type = (scores[:, ntype == kind] / 0.5).softmax(1)[:, had[ntype == kind] == 0].sum(1)
        assert of_type.mean() == pytest.approx(share, abs=1e-4) and of_type.std() > 0.001
    assert all(len(set(found[(ntype == kind) & (had == 0)])) == 1 for kind in range(3))
    trained, somebody = ntype < 2, had > 0
    assert not found[trained & somebody].any() and found[~trained & somebody].all()
    of_mean = vectors[~trained & somebody] @ users.vectors.mean(0)
    popular = (of_mean + torch.from_numpy(found[~trained & somebody])) / 0.5
    assert popular.softmax(0).tolist() == pytest.approx((had[60:][had[60:] > 0] / had[60:].sum()).tolist(), rel=1e-4)
    assert not unseen_term(users.part(0, 0), vectors, moment, 0.5).any()
    assert not unseen_term(users, vectors, replace(moment, shares=()), 0.5).any()
    everybody = replace(moment, choices=np.ones((1, 90), np.int32), shares=[0.5] * 3)
    assert not unseen_term(users, vectors, everybody, 0.5).any()


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
    task = board_task("nowhere")
    task.moment = replace(task.moment, memory=_board_memory(true))
    trainer, optimizer = board_trainer(task)
    state = train_epochs(trainer, optimizer, {})
    found = trainer.validate()
    assert state["score"]["memory"] > 0  # of items that are all alike none is among the first ten
    assert found.spec.memory in [0.1 * weight for weight in WEIGHTS] and found.spec.ridge == RIDGES[0]
    assert found.hit_rate > 0.9 if true else found.hit_rate < 2 * CHANCE
    alone, _ = board_trainer(replace(task, moment=Moment(task.moment.ntype, None)))
    alone.averaged = trainer.averaged
    assert alone.validate().hit_rate < 0.1 * CHANCE and alone.validate().spec.memory == 0


@pytest.mark.parametrize("true", [True, False])
def test_validation_counts_the_users_that_texts_stand_for_by_what_they_are_worth(true):
    """A weak memory knows a third of the items; the texts of the others resemble items of their colour, or any."""
    task = board_task("nowhere")
    whole = _board_memory(True)
    src = np.repeat(np.arange(ITEMS), np.diff(whole.begin))
    known = whole.gid % 3 == 0
    kept = Memory.of_edges(
        src[known], whole.gid[known], whole.coefficient[known] / 10, whole.users, np.zeros(ITEMS, int)
    )
    random = np.random.default_rng(0)
    alike = random.integers(0, ITEMS // 2, (ITEMS, 10)) * 2
    alike += np.arange(ITEMS)[:, None] % 2 if true else random.integers(0, 2, alike.shape)
    dst = np.repeat(np.arange(ITEMS), 10)
    pairs, place = np.unique(alike.ravel() * ITEMS + dst, return_index=True)
    texts = TextPairs(pairs // ITEMS, pairs % ITEMS, np.full(len(place), 0.1, np.float32))
    task.moment = replace(task.moment, memory=kept.with_texts(texts, np.zeros(ITEMS, int)))
    trainer, optimizer = board_trainer(task)
    train_epochs(trainer, optimizer, {})
    found = trainer.validate()
    trainer.task.moment = replace(task.moment, memory=kept)
    without = trainer.validate()
    assert without.spec.text_users == 0 and found.spec.text_users in TEXT_USERS
    assert (found.spec.memory, found.spec.ridge) == (without.spec.memory, without.spec.ridge)
    if true:
        assert found.spec.text_users > 0 and found.gain > 1.1 * without.gain
    else:
        assert found.gain >= without.gain


@pytest.mark.parametrize("share", [1e-6, 0.9])
def test_validation_ranks_with_the_share_of_unseen_items(share):
    """Nobody had any target: with a small share nobody finds them, with a large one everybody does."""
    task = board_task("text")
    queries = take(task.queries, np.arange(40))
    new = np.isin(np.arange(ITEMS), queries["target"])
    task = replace(task, queries=queries)
    task.moment = replace(task.moment, choices=np.where(new, 0, 5)[None], shares=[share] * TYPES)
    trainer, optimizer = board_trainer(task)
    train_epochs(trainer, optimizer, {})
    found = trainer.validate()
    assert found.hit_rate > 0.8 if share > 0.5 else found.hit_rate < 0.1


# -- trends


def board_world(targets: np.ndarray | None = None) -> tuple:
    """Untrained towers of a board, and the validation's queries (of these targets) as :func:`choose` takes them."""
    task = board_task("text")
    if targets is not None:
        task = replace(task, queries=take(task.queries, np.flatnonzero(targets[task.queries["target"]])))
    model = board_trainer(task)[0].averaged
    vectors = item_vectors(model, task.source, task.catalogue, "valid")
    rows, some = np.arange(len(task.queries["target"])), sample_of_queries(task)
    queries = queries_by_type(model, task, "valid", rows)
    return task, vectors, queries, queries_by_type(model, task, "valid", some), users_of(model, task, "valid", some)


HAD = np.where(np.arange(ITEMS) % 7 == 0, 0, 9)  # nobody had every seventh item


def test_expected_shares_are_the_towers_softmax_over_what_somebody_had():
    task, vectors, queries, _, _ = board_world()
    moment = Moment(task.moment.ntype, None, np.stack([HAD, HAD, HAD]), True)
    shares = expected_shares(queries, vectors, moment, 0.1)
    per_type = [float(shares[task.catalogue.ntype == kind].sum()) for kind in range(TYPES)]
    counts = np.bincount(task.catalogue.ntype.numpy()[task.queries["target"]], minlength=TYPES)
    assert per_type == pytest.approx(counts.tolist(), rel=1e-5)
    assert (shares[torch.from_numpy(HAD == 0)] == 0).all()
    first = queries[0]
    one = Queries(*vars(first.part(0, 1)).values(), first.first, first.count, first.target[:1])
    alone = expected_shares([one], vectors, moment, 0.1)
    assert (alone[one.history] == 0).all() and alone.sum() == pytest.approx(1)


def test_validation_takes_a_trend_that_goes_on_and_leaves_one_that_does_not():
    """In the first type what was chosen last week is what validation asks for, in the second it is anything else."""
    even = np.arange(ITEMS) % 4 < 2
    task, vectors, queries, some, users = board_world(even)
    targets = np.bincount(task.queries["target"], minlength=ITEMS)
    week = np.where(np.arange(ITEMS) < 2 * LIKED, even, ~even) * (targets + 1) * (HAD > 0) * 20
    choices = np.stack([HAD, np.zeros_like(week), week])
    moment = Moment(task.moment.ntype, None, choices, True)
    found = choose(queries, some, users, vectors, moment, ScoreSpec())
    assert found.spec.trends[0] > 0 and found.spec.trends[1] == 0 and set(found.spec.trends) <= set(TREND_WEIGHTS)
    plain = choose(queries, some, users, vectors, replace(moment, with_trends=False), ScoreSpec())
    assert found.gain > plain.gain and plain.spec.trends == []
    still = replace(moment, choices=np.stack([HAD, np.zeros_like(week), np.zeros_like(week)]))
    assert choose(queries, some, users, vectors, still, ScoreSpec()).spec.trends == []


def test_what_is_measured_is_the_score_that_is_written():
    """The NDCG that validation tells is that of the item terms and the memory, ranked densely."""
    even = np.arange(ITEMS) % 4 < 2
    task, vectors, queries, some, users = board_world(even)
    week = even * (HAD > 0) * 20
    moment = Moment(task.moment.ntype, _board_memory(True), np.stack([HAD, week, week]), True, [0.3, None])
    found = choose(queries, some, users, vectors, moment, ScoreSpec(half_life=2.0))
    memory = moment.memory.at(found.spec.ridge)
    terms = item_terms(some, users, vectors, moment, found.spec)
    assert {TRENDS, UNSEEN} >= set(terms) and terms[UNSEEN].any()
    bias, gain = torch.from_numpy(sum(terms.values())), 0.0
    for asked in queries:
        mine = slice(asked.first, asked.first + asked.count)
        scores = asked.without_history(asked.vectors @ vectors[mine].T + bias[mine], asked.first)
        of_mind = memory.recall(asked.row, asked.history, 2.0)
        gain += float(gain_of(places(scores, asked.target, of_mind, asked.first, [found.spec.memory])).sum())
    assert gain / len(task.queries["target"]) == pytest.approx(found.gain, rel=1e-6)


def test_every_type_has_its_weight_of_the_trend():
    task, vectors, _, some, users = board_world()
    random = np.random.default_rng(0)
    moment = Moment(task.moment.ntype, None, np.stack([HAD, *(random.poisson(4, (2, ITEMS)) * (HAD > 0))]), True)
    whole, half = (
        item_terms(some, users, vectors, moment, ScoreSpec(trends=weights))[TRENDS]
        for weights in ([1.0, 1.0], [0.5, 0.0])
    )
    np.testing.assert_allclose(half[: 2 * LIKED], 0.5 * whole[: 2 * LIKED], rtol=1e-6)
    assert np.abs(half).max() > 0 and not half[2 * LIKED :].any() and whole[2 * LIKED :].any()
    assert not whole[HAD == 0].any()


def test_without_queries_nothing_is_chosen():
    task = board_task()
    nobody = replace(task, queries=take(task.queries, np.zeros(0, int)))
    nobody.moment = replace(task.moment, memory=_board_memory(True))
    found = board_trainer(nobody)[0].validate()
    assert found.spec == ScoreSpec() and np.isnan(found.gain)


def test_a_finished_variant_keeps_its_spec(tmp_path):
    """A run that is killed while its second variant trains goes on with the first one as it is."""
    spec = TowerSpec(2, ["stream"], 1, 8, 3, 0, 0, 0, {}, [4])
    write_specs(tmp_path, list(VARIANTS), spec)
    replace(spec, last_item=True).save(tmp_path / "hgnn" / "spec.json")
    (tmp_path / "hgnn" / "metrics.json").write_text("[]")
    write_specs(tmp_path, list(VARIANTS), spec)
    assert TowerSpec.load(tmp_path / "hgnn" / "spec.json").last_item
    assert TowerSpec.load(tmp_path / "text_only" / "spec.json").hgnn_dim == 0
