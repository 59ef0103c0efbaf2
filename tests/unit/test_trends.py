"""What the last weeks tell of items beyond the towers: counts, shrinkage, and the weight that validation gives it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkerboard import ITEMS, LIKED, TEST, TYPES, VALID, board_events, board_task, board_trainer

from recsys_ray.core.clock import DAY
from recsys_ray.graph.activity import CHOSEN
from recsys_ray.scoring.trends import (
    PERIODS,
    WEIGHTS,
    choose_trends,
    count_latest,
    log_ratios,
    surplus,
    tower_shares,
    trend_of_all,
)
from recsys_ray.two_tower.rows import take
from recsys_ray.two_tower.training import TowerTask, item_vectors, sample_of_queries


@pytest.fixture(scope="module")
def task() -> TowerTask:
    """Somebody had every item but each eleventh."""
    task = board_task()
    for table in task.catalogue.activity.values():
        table[:, CHOSEN] = (torch.arange(ITEMS) % 11 > 0).float()
    return task


def had() -> np.ndarray:
    return np.arange(ITEMS) % 11 > 0


def fresh_model(task):
    return board_trainer(task)[0].averaged


def test_choices_are_first_positive_events_of_the_periods():
    events, moments = board_events(), [VALID, TEST, 20 * DAY]
    found = count_latest(events, moments, [0], ITEMS)
    first: dict[tuple[int, int], int] = {}
    for uid, gid, event, time in zip(events.uid, events.gid, events.event, events.timestamp, strict=True):
        if event == 0:
            first.setdefault((int(uid), int(gid)), int(time))
    wanted = np.zeros((len(moments), len(PERIODS), ITEMS), int)
    for (_, gid), time in first.items():
        for place, moment in enumerate(moments):
            for period, (since, until) in enumerate(PERIODS):
                wanted[place, period, gid] += moment - since * DAY <= time < moment - until * DAY
    assert np.array_equal(found, wanted) and wanted.any((0, 2)).all()
    assert not count_latest(events, moments, [], ITEMS).any()


@pytest.mark.parametrize("prior", [0.5, 4.0])
def test_counts_are_shrunk_as_the_rates_that_made_them_differ(prior):
    """Rates are Gamma(a, a) times what is expected: the mean with the a found is near that with the a of the world, and
    nearer to the truth than the counts are."""
    random = np.random.default_rng(0)
    share = random.dirichlet(np.full(3000, 0.5))
    rate = random.gamma(prior, 1 / prior, 3000)
    count = random.poisson(20_000 * share * rate)
    found, expected = np.exp(surplus(count, share)), count.sum() * share
    known = (count + prior) / (expected + prior)
    assert np.abs(found / known - 1).max() < 0.25
    raw = count / np.maximum(expected, 1e-9)
    weight = share / share.sum()
    assert (weight * (found - rate) ** 2).sum() < 0.9 * (weight * (raw - rate) ** 2).sum()


def test_chance_alone_is_no_trend():
    random = np.random.default_rng(0)
    share = random.dirichlet(np.ones(500))
    assert np.abs(surplus(random.poisson(5000 * share), share)).max() < 0.1
    assert surplus(np.zeros(500, int), share) == pytest.approx(0, abs=0.01)


def test_shares_are_the_towers_softmax_over_what_somebody_had(task, monkeypatch):
    monkeypatch.setattr("recsys_ray.two_tower.training._SHIFT_SAMPLE", 100)
    model = fresh_model(task)
    vectors = item_vectors(model, task.source, task.catalogue, "valid")
    shares = tower_shares(model, task, "valid", vectors)
    rows = sample_of_queries(task)
    assert 50 < len(rows) <= 100
    kinds = task.catalogue.ntype.numpy()[task.queries["target"][rows]]
    per_type = [float(shares[task.catalogue.ntype == kind].sum()) for kind in range(TYPES)]
    assert per_type == pytest.approx(np.bincount(kinds, minlength=TYPES).tolist(), rel=1e-5)
    assert (shares[~had()] == 0).all()
    one = replace(task, queries=take(task.queries, rows[:1]))
    alone = tower_shares(model, one, "valid", vectors)
    assert (alone[task.queries["history"][: task.queries["offsets"][1]]] == 0).all() and alone.sum() == pytest.approx(1)


def test_ratios_are_followed_through_the_periods(task):
    random = np.random.default_rng(1)
    counts = random.poisson(5, (len(PERIODS), ITEMS)) * had()
    shares = torch.from_numpy(random.random(ITEMS) * had())
    shares[task.catalogue.ntype == 1] = 0  # nobody was asked about the second type
    found = log_ratios(counts, shares, task, "valid").numpy()
    mine = np.flatnonzero(had() & (np.arange(ITEMS) < 2 * LIKED))
    share = shares.numpy()[mine] / shares.numpy()[mine].sum()
    first = surplus(counts[0, mine], share)
    moved = share * np.exp(first)
    np.testing.assert_allclose(found[mine], first + surplus(counts[1, mine], moved / moved.sum()), rtol=1e-5)
    assert (np.delete(found, mine) == 0).all() and np.abs(found[mine]).max() > 0.1


def test_validation_takes_a_trend_that_goes_on_and_leaves_one_that_does_not(task):
    """In the first type what was chosen last week is what validation asks for, in the second it is anything else."""
    model = fresh_model(task)
    targets = np.bincount(task.queries["target"], minlength=ITEMS)
    even = np.arange(ITEMS) % 4 < 2
    queries = take(task.queries, np.flatnonzero(even[task.queries["target"]]))
    week = np.where(np.arange(ITEMS) < 2 * LIKED, even, ~even) * targets * had() * 20
    latest = {"valid": np.stack([np.zeros_like(week), week])}
    found = choose_trends(model, replace(task, queries=queries), latest, (0.0, 0.0))
    assert found[0] > 0 and found[1] == 0 and set(found) <= set(WEIGHTS)
    nothing = {"valid": np.zeros((len(PERIODS), ITEMS), int)}
    assert choose_trends(model, task, nothing, (0.0, 0.0)) == [0.0] * TYPES


def test_every_type_has_its_weight(task):
    model, random = fresh_model(task), np.random.default_rng(0)
    vectors = item_vectors(model, task.source, task.catalogue, "valid")
    counts = random.poisson(4, (len(PERIODS), ITEMS)) * had()
    trained = replace(task, spec=replace(task.spec, trends=[0.5, 0.0]))
    given = trend_of_all(model, trained, "valid", vectors, counts)
    ratios = log_ratios(counts, tower_shares(model, task, "valid", vectors), task, "valid")
    assert (
        torch.equal(given[: 2 * LIKED], 0.5 * task.spec.temperature * ratios[: 2 * LIKED])
        and given[: 2 * LIKED].abs().max() > 0
    )
    assert not given[2 * LIKED :].any() and ratios[2 * LIKED :].any()
