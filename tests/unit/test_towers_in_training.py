"""What the layers of the towers do in training only: bf16 and dropout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkerboard import CONFIG, board_task, board_trainer

from recsys_ray.two_tower.towers import Dropout
from recsys_ray.two_tower.training import item_vectors, train_epochs


def test_training_in_bf16_is_close_to_fp32_and_answers_are_fp32():
    task = board_task()
    losses, answers = {}, {}
    for precision in ("fp32", "bf16"):
        trainer, optimizer = board_trainer(task, CONFIG)
        trainer.model.train_in(precision)
        rows = np.flatnonzero(task.examples["snapshot"] == task.examples["snapshot"][0])[:64]
        answers[precision] = item_vectors(trainer.averaged, task.source, task.catalogue, "valid")
        trainer.model.train()
        losses[precision] = float(trainer.loss(trainer.batch(rows)).detach())
        assert train_epochs(trainer, optimizer, {})["history"][-1]["valid_hr_at_10"] > 0.97
    assert losses["bf16"] != losses["fp32"] and losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert torch.equal(answers["bf16"], answers["fp32"])


def test_dropout_keeps_its_share_and_the_mean():
    dropout, ones = Dropout(0.25), torch.ones(999, 7)
    torch.manual_seed(0)
    first = dropout(ones)
    assert first.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (first == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(first, dropout(ones))
    torch.manual_seed(0)
    assert torch.equal(first, dropout(ones))
    assert dropout.eval()(ones) is ones
    assert not Dropout(1.0)(ones).any()
