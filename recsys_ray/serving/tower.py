"""The user tower as serving sees it: a function of users' features, fed only the table rows that they touch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recsys_ray.core.errors import ArtifactError
from recsys_ray.serving.histories import mapped_arrays
from recsys_ray.two_tower.features import ItemTables, UserInputs


class UserTowerLike(Protocol):
    """Users' features -> unit vectors Float[B, d]."""

    def __call__(self, inputs: UserInputs, tables: ItemTables) -> Tensor: ...


LoadTower = Callable[[Path], UserTowerLike]


def load_user_tower(folder: Path) -> UserTowerLike:
    """The trained tower; imported late, so that this module is tested without it."""
    from recsys_ray.two_tower import towers

    return towers.load_user_tower(folder)


@dataclass(frozen=True)
class TowerRunner:
    """A tower with its item tables."""

    tower: UserTowerLike
    tables: ItemTables
    spec: dict[str, Any]

    @classmethod
    def open(cls, bundle: Path, load: LoadTower, ntype: Tensor) -> TowerRunner:
        """``bundle`` holds user_tower/, text.safetensors, hgnn.safetensors and, where items have
        vectors of their own, ids.safetensors; ``ntype`` is Long[items]."""
        path = bundle / "user_tower" / "spec.json"
        try:
            spec = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read ({error}); build the bundle again") from error
        text = mapped_arrays(bundle / "text.safetensors")["vector"]
        hgnn = mapped_arrays(bundle / "hgnn.safetensors")["embedding"]
        ids = mapped_arrays(bundle / "ids.safetensors")["vector"] if spec.get("id_dim") else None
        return cls(load(path.parent), ItemTables(text, hgnn, ntype, ids), spec)

    @property
    def tastes(self) -> dict[str, int]:
        """Taste vectors that the tower was trained with, and their sizes."""
        return dict(self.spec.get("tastes", {}))

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
        compact = UserInputs(places, inputs.events, inputs.offsets, inputs.age, inputs.country, inputs.tastes)
        return compact, tables
