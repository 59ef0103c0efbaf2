"""Turns trained weights into what is ranked: the share of unseen items, and the files of a variant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from recsys_ray.cluster.train import sum_over_ranks
from recsys_ray.scoring.choices import Choices, nobody_had
from recsys_ray.scoring.choose import item_terms
from recsys_ray.scoring.scorer import LEARNED, VECTOR, ScoreSpec
from recsys_ray.scoring.unseen import Period, share_ahead
from recsys_ray.storage.artifacts import save_arrays
from recsys_ray.two_tower.towers import TwoTower
from recsys_ray.two_tower.training import (
    TowerTask,
    item_vectors,
    learned_vectors,
    queries_by_type,
    sample_of_queries,
    users_of,
)

ASKED = ("test", "serve")  # snapshots as of which items are ranked


@dataclass(frozen=True)
class Periods:
    """Stretches of time that tell how much goes to unseen items, in seconds."""

    test: int
    valid: int
    since: dict[int, int]  # index of a training snapshot -> from it to the validation period


def unseen_shares(
    task: TowerTask, snapshot: str, periods: Periods, choices: Mapping[str, Choices]
) -> list[float | None]:
    """The share of choices after a snapshot that goes to unseen items, by type (:func:`share_ahead`): from the examples
    since each cut and, except for the validation snapshot itself, from the validation queries. Over all ranks."""
    examples = task.examples
    before = [
        _period(task, periods.since[cut], examples["target"][examples["snapshot"] >= cut], choices[name])
        for cut, name in sorted(task.snapshot_names.items(), reverse=True)
        if cut in periods.since
    ]
    asked = task.queries["target"] if snapshot != "valid" else np.zeros(0, np.int64)
    lately = _period(task, periods.valid, asked, choices["valid"])
    ahead = periods.valid if snapshot == "valid" else periods.test
    return share_ahead(ahead, _unseen_items(task, choices[snapshot]), lately, before)


def _period(task: TowerTask, seconds: int, target: np.ndarray, choices: Choices) -> Period:
    """Of targets of all ranks that were chosen after the moment of ``choices``."""
    ntype, targets = task.catalogue.ntype, torch.from_numpy(target).long()
    new = targets[torch.from_numpy(nobody_had(choices))[targets]]
    counts = torch.stack([torch.bincount(ntype[part], minlength=task.spec.num_types) for part in (targets, new)])
    chosen, unseen = sum_over_ranks(counts.double())
    return Period(seconds, chosen, unseen, _unseen_items(task, choices))


def _unseen_items(task: TowerTask, choices: Choices) -> torch.Tensor:
    """float64 [types]: number of unseen items."""
    new = torch.from_numpy(nobody_had(choices))
    return torch.bincount(task.catalogue.ntype[new], minlength=task.spec.num_types).double()


def write_towers(
    out: Path,
    model: TwoTower,
    task: TowerTask,
    score: ScoreSpec,
    choices: Mapping[str, Choices],
    shares: Mapping[str, list[float | None]],
) -> None:
    """Write the weights, and the vectors of all items with their item terms for the ranked snapshots.

    Args:
        out: the variant's folder, in that of the stage.
        score: what validation chose.
        choices: by snapshot; empty: there are no item terms.
        shares: of unseen items, by snapshot; empty: they are not adjusted.
    """
    some = sample_of_queries(task)
    for snapshot in ASKED:
        vectors = item_vectors(model, task.source, task.catalogue, snapshot)
        users, queries = users_of(model, task, snapshot, some), queries_by_type(model, task, snapshot, some)
        known = replace(task.moment, choices=choices.get(snapshot), shares=shares.get(snapshot, ()))
        terms = item_terms(queries, users, vectors, known, score)
        learned = learned_vectors(model, task.source, task.catalogue, snapshot)
        tables = {VECTOR: vectors.numpy(), **({} if learned is None else {LEARNED: learned.numpy()})}
        save_arrays(out / "items" / f"{snapshot}.safetensors", {**tables, **terms})
    save_file(model.state_dict(), out / "model.safetensors")
    hidden = model.ids.dropout if model.ids is not None else 0.0
    replace(task.spec, id_dropout=hidden).save(out / "spec.json")
    replace(score, unseen_share=shares.get("test", [])).save(out)
