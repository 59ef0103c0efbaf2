"""How much goes to items that nobody had: shares from examples and from events, and what gives them to unseen items."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkerboard import ITEMS, TYPES, board_task

from recsys_ray.config import load_config
from recsys_ray.graph.snapshots import Fold, Snapshot
from recsys_ray.scoring.unseen import Period, popular_in_type, share_ahead, share_of_events, shift_to_share
from recsys_ray.two_tower.rows import take
from recsys_ray.two_tower.scores import Periods, unseen_shares
from recsys_ray.two_tower.stage import _periods


def test_the_mean_of_the_shares_is_the_share():
    log_odds = torch.from_numpy(np.random.default_rng(0).normal(size=200) * 3)
    for share in (0.001, 0.3, 0.95):
        found = torch.sigmoid(log_odds + shift_to_share(share, log_odds))
        assert found.mean() == pytest.approx(share, abs=1e-6) and found.std() > 1e-4
    none = torch.tensor([torch.inf, -torch.inf, torch.nan])  # users with items of one kind only tell nothing
    assert shift_to_share(0.3, none) == 0.0
    assert shift_to_share(0.3, torch.cat([none, log_odds])) == shift_to_share(0.3, log_odds)


def test_the_mean_user_gets_what_is_popular_and_others_what_they_differ_by():
    generator = torch.Generator().manual_seed(0)
    items, users = torch.randn(40, 8, generator=generator), np.arange(40) % 5
    mean_user, other = torch.randn(2, 8, generator=generator)
    had = users > 0
    shift = popular_in_type(items, users, mean_user, 0.3)
    assert (shift[~had] == 0).all() and shift.dtype == torch.float32
    chances = ((items @ mean_user + shift) / 0.3)[had].softmax(0)
    torch.testing.assert_close(chances, torch.from_numpy(users[had] / users.sum()).float())
    before, after = ((items @ mean_user)[had] / 0.3).exp(), ((items @ mean_user + shift)[had] / 0.3).exp()
    assert after.sum() == pytest.approx(float(before.sum()), rel=1e-5)  # other types have no less of the mean user
    odds = ((items @ other + shift) / 0.3)[had].softmax(0) / chances
    torch.testing.assert_close(odds / odds.sum(), ((items @ (other - mean_user)) / 0.3)[had].softmax(0))
    assert popular_in_type(items, np.zeros(40, int), mean_user, 0.3).tolist() == [0.0] * 40


def test_the_share_of_events_is_that_of_items_with_one():
    """Good and Turing: against the next event of a world with known probabilities."""
    random = np.random.default_rng(0)
    chance = random.dirichlet(np.full(2000, 0.3))
    told, true = [], []
    for _ in range(200):
        users = random.multinomial(500, chance)
        told.append(share_of_events(users))
        true.append(chance[users == 0].sum())
    assert np.mean(told) == pytest.approx(np.mean(true), abs=0.01) and 0.3 < np.mean(true) < 0.7
    assert share_of_events(np.zeros(5, int)) == 0.5 and 0 < share_of_events(np.array([9, 0])) < 0.1
    assert share_of_events(np.array([1, 1, 0])) < 1


def kept(share: float, scale: float = 1.0) -> float:
    """What is given: odds of half a unit of the logarithm less, times ``scale``."""
    odds = share / (1 - share) * np.exp(-0.5) * scale
    return pytest.approx(odds / (1 + odds))


def test_the_share_to_come_is_that_of_a_period_as_long():
    """Of four types: one in all periods, one that is not in validation, one that is only there, one in none."""
    items = torch.tensor([5.0, 5, 5, 0])
    lately = Period(14, torch.tensor([9.0, 0, 9, 0]), torch.tensor([0.0, 0, 9, 0]), items)
    before = [
        Period(44, torch.tensor([19.0, 19, 0, 0]), torch.tensor([9.0, 9, 0, 0]), items),
        Period(144, torch.tensor([99.0, 99, 0, 0]), torch.tensor([74.5, 0, 0, 0]), items),
    ]
    told = [(1, 0.05), (14, 0.05), (24, 0.05 + (0.475 - 0.05) / 3), (44, 0.475), (94, 0.6125), (144, 0.75), (999, 0.75)]
    for ahead, share in told:
        found = share_ahead(ahead, items, lately, before)
        assert found == [kept(share), kept(np.interp(ahead, [44, 144], [0.475, 0.005])), None, None]
    for seconds in (0, 14):  # no longer than validation, or times are logical: validation alone tells
        short = [before[0]._replace(seconds=seconds)]
        assert share_ahead(30, items, lately, short) == [kept(0.05), kept(0.475), None, None]


def test_fewer_unseen_items_have_less_of_what_is_to_come_and_more_each():
    """Of three types: one whose unseen items have become fewer, one with ever more of them, one that has none left."""
    targets, unseen = torch.full((3,), 99.0), torch.tensor([9.5, 89.5, 9.5])
    lately, before = (Period(s, targets, unseen, torch.tensor([n, 1.0, 10.0])) for s, n in ((14, 160.0), (28, 320.0)))
    now = torch.tensor([15.0, 10_000.0, 0.0])
    assert share_ahead(21, now, lately, [before]) == [kept(0.1, 1 / 2), kept(0.9, 10), kept(0.1)]


def test_shares_are_those_since_each_cut_and_of_validation():
    """Nobody had every second item as of the last cut, every third as of validation, none as of the first cut; type 0
    has no example in the last cut."""
    task, step = board_task(), {"cut0": 1, "cut1": 2, "valid": 3, "later": 4}
    choices = {name: (np.arange(ITEMS) % every)[None] for name, every in step.items()}
    ntype, last = task.catalogue.ntype.numpy(), task.examples["snapshot"] == 1
    assert task.snapshot_names[1] == "cut1" and 0 < last.sum() < len(last)
    rows = np.flatnonzero((ntype[task.examples["target"]] != 0) | ~last)
    task = replace(task, examples=take(task.examples, rows))
    last = task.examples["snapshot"] == 1
    since = {10: (task.examples["target"][last], 2), 20: (task.examples["target"], 1), 1: (task.queries["target"], 3)}
    for ahead, (table, every) in since.items():
        found = unseen_shares(task, "later", Periods(ahead, 2, {0: 19, 1: 9}), choices)
        assert found[0] is None and len(found) == TYPES > 1
        for kind in range(1, TYPES):
            mine, of_type = table[ntype[table] == kind], np.flatnonzero(ntype == kind)
            scale = ((of_type % 4 == 0).sum() / (of_type % every == 0).sum()) ** 0.25
            share = ((mine % every == 0).sum() + 0.5) / (len(mine) + 1)
            if ahead == 10:  # a tenth of the way from the one cut to the other
                alone = unseen_shares(task, "later", Periods(ahead, 2, {1: 9}), choices)
                assert alone[kind] == kept(share, scale) and found[kind] > alone[kind]
            else:
                assert found[kind] == kept(share, scale)


def test_the_share_in_validation_does_not_look_at_validation():
    """Or the choices that validation makes would know what they are asked."""
    task = board_task()
    choices = {name: (np.arange(ITEMS) % 3)[None] for name in ("cut0", "cut1", "valid")}
    periods = Periods(15, 15, {0: 65, 1: 30})
    found = unseen_shares(task, "valid", periods, choices)
    other = replace(task, queries=take(task.queries, np.flatnonzero(task.queries["target"] % 3 == 0)))
    assert unseen_shares(other, "valid", periods, choices) == found
    assert all(0 < share < 1 for share in found)


def test_periods_are_known_only_where_examples_tell_shares():
    counts = {"valid_from": 70, "test_from": 90, "end": 100}
    fold = Fold(0, 2, 0)
    cuts = [Snapshot("cut0", 0, 20, 0), Snapshot("cut1", 1, 40, 0), Snapshot("valid", 2, 70, 0)]
    folds = [Snapshot("cut0", 0, 70, 0, None, fold), Snapshot("valid", 1, 70, 0)]
    assert _periods(load_config(), counts, cuts) == Periods(10, 20, {0: 50, 1: 30})
    assert _periods(load_config(overrides=["two_tower.memory=false"]), counts, cuts) == Periods(10, 20, {0: 50, 1: 30})
    counts["protocol"] = "leave_one_out"
    assert _periods(load_config(), counts, folds) == Periods(10, 20, {0: 0})
    for override in ("graph.features_as_of=window", "two_tower.loss=paper", "two_tower.unseen=false"):
        assert _periods(load_config(overrides=[override]), counts, cuts) is None
