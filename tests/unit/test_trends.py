"""What the last weeks tell of items beyond the towers: counts and shrinkage. What validation makes of it is in
test_choose.py."""

from __future__ import annotations

import numpy as np
import pytest
from checkerboard import ITEMS, TEST, USERS, VALID, board_events

from recsys_ray.core.clock import DAY
from recsys_ray.graph.snapshots import Fold, Snapshot
from recsys_ray.scoring.choices import PERIODS, count_choices, nobody_had
from recsys_ray.scoring.trends import log_ratios, surplus


def test_choices_are_first_positive_events_before_the_moment_and_of_the_periods():
    """Of all users, and of those that a fold does not leave out."""
    events, fold = board_events(), Fold(0, 2, 0)
    moments = [Snapshot(str(k), k, time, 0) for k, time in enumerate((VALID, TEST, 20 * DAY))]
    moments.append(Snapshot("fold", 3, VALID, 0, None, fold))
    found = count_choices(events, moments, [0], ITEMS)
    first: dict[tuple[int, int], int] = {}
    for uid, gid, event, time in zip(events.uid, events.gid, events.event, events.timestamp, strict=True):
        if event == 0:
            first.setdefault((int(uid), int(gid)), int(time))
    left_out = set(np.arange(USERS)[fold.has(np.arange(USERS))].tolist())
    wanted = np.zeros((len(moments), 1 + len(PERIODS), ITEMS), int)
    for (uid, gid), time in first.items():
        for place, snapshot in enumerate(moments):
            if snapshot.without is not None and uid in left_out:
                continue
            wanted[place, 0, gid] += time < snapshot.time
            for period, (since, until) in enumerate(PERIODS, 1):
                wanted[place, period, gid] += snapshot.time - since * DAY <= time < snapshot.time - until * DAY
    assert np.array_equal(found, wanted) and wanted.any((0, 2)).all() and 0 < len(left_out) < USERS
    assert np.array_equal(nobody_had(found[2]), wanted[2, 0] == 0) and 0 < nobody_had(found[2]).sum() < ITEMS
    assert not count_choices(events, moments, [], ITEMS).any()


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


def test_ratios_are_followed_through_the_periods():
    random, ntype = np.random.default_rng(1), np.arange(ITEMS) // 80
    had = np.arange(ITEMS) % 11 > 0
    counts = random.poisson(5, (len(PERIODS), ITEMS)) * had
    expected = random.random(ITEMS) * had
    expected[ntype == 1] = 0  # nobody was asked about the second type
    found = log_ratios(np.stack([had * 9, *counts]), expected, ntype)
    mine = np.flatnonzero(had & (ntype == 0))
    share = expected[mine] / expected[mine].sum()
    first = surplus(counts[0, mine], share)
    moved = share * np.exp(first)
    np.testing.assert_allclose(found[mine], first + surplus(counts[1, mine], moved / moved.sum()), rtol=1e-5)
    assert (np.delete(found, mine) == 0).all() and np.abs(found[mine]).max() > 0.1
