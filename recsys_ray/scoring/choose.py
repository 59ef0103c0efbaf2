"""From trained weights to what is asked: the last choices of validation, and the files of a variant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from recsys_ray.scoring.memory import Memory, memory_file
from recsys_ray.scoring.shares import some_users
from recsys_ray.scoring.trends import choose_trends, trend_of_all
from recsys_ray.scoring.unseen import shift_of_all
from recsys_ray.storage.artifacts import save_arrays
from recsys_ray.two_tower.towers import ItemIds, TowerSpec, TwoTower
from recsys_ray.two_tower.training import TowerTask, item_vectors

ASKED = ("test", "serve")  # snapshots as of which items are ranked


def with_choices(
    model: TwoTower, task: TowerTask, memory: float, ridge: float, latest: Mapping[str, np.ndarray]
) -> TowerSpec:
    """The task's spec with what validation says of the memory and of trends. The same on every rank.

    Args:
        model: has not been trained on the validation period.
        memory, ridge: as the epochs' validation chose them.
        latest: see :func:`recsys_ray.scoring.trends.latest_file`; empty: there are no trends.
    """
    trends = choose_trends(model, task, latest, (memory, ridge)) if latest else []
    hidden = model.ids.dropout if isinstance(model.ids, ItemIds) else 0.0
    return replace(task.spec, memory=memory, ridge=ridge, id_dropout=hidden, trends=trends if any(trends) else [])


def write_towers(
    out: Path,
    model: TwoTower,
    task: TowerTask,
    latest: Mapping[str, np.ndarray],
    shares: Mapping[str, list[float | None]],
) -> None:
    """The weights, the vectors of all items, and what is added to their scores as of the snapshots that are asked
    about.

    Args:
        out: the variant's folder, in that of the stage.
        shares: of blank items, by snapshot; empty: they are given nothing.
    """
    spec, ntype = task.spec, task.catalogue.ntype
    shifts, means = dict[str, list[float]](), dict[str, list[float]]()
    for snapshot in ASKED:
        vectors = item_vectors(model, task.source, task.catalogue, snapshot)
        arrays, trend = {"vector": vectors.numpy()}, torch.zeros(len(vectors))
        if spec.trends:
            trend = trend_of_all(model, task, snapshot, vectors, latest[snapshot])
            arrays["trend"] = trend.numpy()
        save_arrays(out / "items" / f"{snapshot}.safetensors", arrays)
        if shares:
            blank = torch.from_numpy(Memory.load(memory_file(out.parent, snapshot)).users == 0)
            users = some_users(model, task, snapshot)
            wide = torch.cat([users, torch.ones(len(users), 1)], 1), torch.cat([vectors, trend[:, None]], 1)
            shifts[snapshot] = shift_of_all(*wide, blank, ntype, shares[snapshot], spec.temperature)
            means |= {snapshot: users.mean(0).tolist()} if len(users) else {}
    save_file(model.state_dict(), out / "model.safetensors")
    replace(spec, blank_share=shares.get("test"), blank_shift=shifts, mean_user=means).save(out / "spec.json")
