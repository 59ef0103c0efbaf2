"""The user tower in serving: a function of users' features that reads only the table rows it needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recsys_ray.serving.histories import mapped_arrays
from recsys_ray.two_tower.features import ItemTables, UserInputs
from recsys_ray.two_tower.towers import UserTower, load_user_tower


@dataclass(frozen=True)
class TowerRunner:
    """A tower with its item tables."""

    tower: UserTower
    tables: ItemTables

    @classmethod
    def open(cls, bundle: Path, ntype: Tensor) -> TowerRunner:
        """``bundle`` holds user_tower/, text.safetensors and what else the tower reads of items: ids.safetensors or
        hgnn.safetensors; ``ntype`` is Long[items]."""
        tower = load_user_tower(bundle / "user_tower")
        text = mapped_arrays(bundle / "text.safetensors")["vector"]
        reads = tower.spec.reads_embeddings
        hgnn = mapped_arrays(bundle / "hgnn.safetensors")["embedding"] if reads else None
        ids = mapped_arrays(bundle / "ids.safetensors")["vector"] if tower.spec.id_dim else None
        return cls(tower, ItemTables(text, hgnn, ntype, ids))

    @property
    def tastes(self) -> dict[str, int]:
        """Taste vectors that the tower was trained with, and their sizes."""
        return self.tower.spec.tastes

    def __call__(self, inputs: UserInputs) -> npt.NDArray[np.float32]:
        """Unit vectors [B, d]."""
        with torch.inference_mode():
            return self.tower(*self._touched(inputs)).float().numpy()

    def _touched(self, inputs: UserInputs) -> tuple[UserInputs, ItemTables]:
        """The same inputs over tables of only those items that occur: a tower may convert or copy its tables whole,
        which for a catalogue takes longer than all the rest of an answer."""
        gids, places = torch.unique(inputs.gids, return_inverse=True)
        if not len(gids):
            gids = torch.zeros(1, dtype=torch.int64)  # a table without a row is an edge that no tower needs to know
        whole = self.tables
        text, hgnn, ids = (None if table is None else table[gids] for table in (whole.text, whole.hgnn, whole.ids))
        tables = ItemTables(text, hgnn, whole.ntype[gids], ids)
        return replace(inputs, gids=places), tables
