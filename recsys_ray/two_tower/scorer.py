"""A trained two-tower as evaluation sees it: item vectors of a snapshot, user vectors from histories."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from recsys_ray.artifacts import load_arrays
from recsys_ray.snapshots import DAY
from recsys_ray.two_tower.batches import country_index
from recsys_ray.two_tower.inputs import ItemTables, UserInputs
from recsys_ray.two_tower.memory import TYPICAL, Memory, memory_file
from recsys_ray.two_tower.towers import UserTower, load_item_ids, load_user_tower

if TYPE_CHECKING:
    from recsys_ray.evaluation.baselines.towers import Remember
    from recsys_ray.evaluation.recommenders import UserBatch

_ITEMS = 32_768  # whose scores are held at once


@dataclass
class TrainedTower:
    """Travels to Ray tasks: arrays and one small module. Fulfils ``TowerScorer`` of the evaluation."""

    item_vectors: np.ndarray  # float32 [items, d]
    tower: UserTower
    text: np.ndarray  # float16 [items, t]
    hgnn: np.ndarray | None  # float32 [items, h], as of the snapshot
    ntype: np.ndarray  # int64 [items]
    ids: np.ndarray | None  # float32 [items, d], the items' own vectors
    moment: int  # the snapshot's time: a history reaches back from here
    memory: Memory | None = None  # as of the snapshot; None: the towers alone

    @staticmethod
    def open(folder: Path, text: np.ndarray, hgnn: np.ndarray | None, ntype: np.ndarray, moment: int) -> TrainedTower:
        """The towers of ``folder`` with the item vectors of the test snapshot.

        Raises:
            ArtifactError: the folder is not whole.
        """
        vectors = load_arrays(folder / "items" / "test.safetensors")["vector"]
        tower, ids = load_user_tower(folder), load_item_ids(folder)
        memory = None
        if tower.spec.memory:
            memory = Memory.load(memory_file(folder.parent, "test")).at(tower.spec.ridge)
        return TrainedTower(vectors, tower, text, hgnn if tower.spec.hgnn_dim else None, ntype, ids, moment, memory)

    @torch.no_grad()
    def user_vectors(self, users: UserBatch) -> Float[Tensor, "users d"]:
        """Unit vectors of the users, by their latest events inside the window."""
        kept = self._kept(users)
        lengths = np.bincount(users.rows[kept], minlength=len(users))
        needed, place = np.unique(users.gid[kept], return_inverse=True)
        tables = ItemTables(
            text=torch.from_numpy(self.text[needed]).float(),
            hgnn=None if self.hgnn is None else torch.from_numpy(self.hgnn[needed]),
            ntype=torch.from_numpy(self.ntype[needed]),
            ids=None if self.ids is None else torch.from_numpy(self.ids[needed]),
        )
        age, country, tastes = self._traits(users)
        inputs = UserInputs(
            gids=torch.from_numpy(place.astype(np.int64)),
            events=torch.from_numpy(users.event[kept].astype(np.int64)),
            offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)),
            age=age,
            country=country,
            tastes=tastes,
        )
        return self.tower(inputs, tables)

    def remember(self, users: UserBatch, vectors: Float[Tensor, "users d"]) -> Remember | None:
        """See ``TowerScorer``."""
        if self.memory is None:
            return None
        kept, weight = self._kept(users), self.tower.spec.memory
        memory, recalled = self.memory, self.memory.recall(users.rows[kept], users.gid[kept])
        usual: dict[int, Tensor] = {}  # of each item type that was asked for

        def add(first: int, last: int, scores: Tensor) -> None:
            here = (recalled.gid >= first) & (recalled.gid < last)
            row, column = recalled.user[here], recalled.gid[here] - first
            scores[row, column] += weight * torch.from_numpy(recalled.value[here, 0])
            fresh = np.flatnonzero(memory.is_blank(np.arange(first, last)))
            if len(fresh):
                kind = int(self.ntype[first])
                if kind not in usual:
                    best = self._best(users, vectors, kind)
                    usual[kind] = weight * torch.from_numpy(recalled.typical(best))
                scores[:, fresh] += usual[kind]

        return add

    def _best(self, users: UserBatch, vectors: Float[Tensor, "users d"], kind: int) -> np.ndarray:
        """int64 [users, TYPICAL]: the items of a type that the towers rank first, none of the user's own; -1: none."""
        gids = np.flatnonzero(self.ntype == kind)
        values, best = torch.full((len(users), 0), -torch.inf), torch.zeros((len(users), 0), dtype=torch.int64)
        for start in range(int(gids[0]), int(gids[-1]) + 1, _ITEMS):
            stop = min(start + _ITEMS, int(gids[-1]) + 1)
            scores = vectors @ torch.from_numpy(np.array(self.item_vectors[start:stop])).float().T
            own = (users.gid >= start) & (users.gid < stop)
            scores[users.rows[own], users.gid[own] - start] = -torch.inf
            top = scores.topk(min(TYPICAL, stop - start), dim=1)
            values, best = torch.cat([values, top.values], 1), torch.cat([best, top.indices + start], 1)
            top = values.topk(min(TYPICAL, values.shape[1]), dim=1)
            values, best = top.values, best.gather(1, top.indices)
        return np.where(torch.isfinite(values).numpy(), best.numpy(), -1)

    def _kept(self, users: UserBatch) -> np.ndarray:
        """bool [events]: the latest ones inside the window."""
        spec = self.tower.spec
        kept = np.repeat(users.offsets[1:], np.diff(users.offsets)) - np.arange(len(users.gid)) <= spec.history
        if spec.window_days is not None:
            kept &= users.timestamp >= self.moment - spec.window_days * DAY
        return kept

    def _traits(self, users: UserBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        spec, count = self.tower.spec, len(users)
        if users.users is None:
            tastes = {name: torch.full((count, dim), torch.nan) for name, dim in spec.tastes.items()}
            return torch.full((count,), torch.nan), torch.full((count,), -1), tastes
        ages = np.array([np.nan if a is None else a for a in users.users.column("age").to_pylist()], np.float32)
        countries = np.array([c or "" for c in users.users.column("country").to_pylist()], dtype=str)
        tastes = {}
        for name, dim in spec.tastes.items():
            rows = [row or [np.nan] * dim for row in users.users.column(name).to_pylist()]
            tastes[name] = torch.from_numpy(np.asarray(rows, np.float32).reshape(count, dim))
        return torch.from_numpy(ages), torch.from_numpy(country_index(spec.countries, countries)), tastes
