"""A type without training examples: what its untouched items are given together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkerboard import TYPES, board_task, board_trainer

from recsys_ray.two_tower.newcomers import share_of_blank, shift_of_blank
from recsys_ray.two_tower.rows import take


def test_untouched_items_get_what_single_events_say():
    random = np.random.default_rng(0)
    scores, blank = torch.from_numpy(random.normal(size=(50, 30))), torch.arange(30) < 20
    sums = [(scores[:, part] / 0.2).logsumexp(1) for part in (blank, ~blank)]
    shifted = scores + shift_of_blank(*sums, 0.7, 0.2)[:, None] * blank
    torch.testing.assert_close(shifted.div(0.2).softmax(1)[:, blank].sum(1), torch.full((50,), 0.7).double())


@pytest.mark.parametrize("which", [(0, 3), (3, 3), (0, 0)])
def test_nothing_is_shifted_where_there_is_nothing_to_compare_with(which):
    """None of the items is blank; all are; there is no item at all."""
    first, last = which
    sums = torch.randn(4, last)[:, :first].logsumexp(1), torch.randn(4, last)[:, first:].logsumexp(1)
    assert shift_of_blank(*sums, 0.7, 0.1).tolist() == [0.0] * 4


def test_the_share_is_that_of_items_with_one_event():
    """Good and Turing: against the next event of a world with known probabilities."""
    random = np.random.default_rng(0)
    chance = random.dirichlet(np.full(2000, 0.3))
    told, true = [], []
    for _ in range(200):
        users = random.multinomial(500, chance)
        told.append(share_of_blank(users))
        true.append(chance[users == 0].sum())
    assert np.mean(told) == pytest.approx(np.mean(true), abs=0.01) and 0.3 < np.mean(true) < 0.7
    assert share_of_blank(np.zeros(5, int)) == 0.5 and 0 < share_of_blank(np.array([9, 0])) < 0.1
    assert share_of_blank(np.array([1, 1, 0])) < 1


def test_training_tells_which_types_it_had_examples_of():
    task = board_task()
    trainer, _ = board_trainer(task)
    assert trainer.trained_types == list(range(TYPES)) and TYPES > 1
    ntype = task.catalogue.ntype.numpy()
    rows = np.flatnonzero(ntype[task.examples["target"]] != 0)
    trainer, _ = board_trainer(replace(task, examples=take(task.examples, rows)))
    assert trainer.trained_types == list(range(1, TYPES))
    assert not replace(task.spec, trained_types=[1]).has_trained(0) and not task.spec.has_trained(TYPES)
    assert task.spec.has_trained(0)
