"""Inspecting a bundle without serving it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys_ray.serving.catalogue import read_table
from recsys_ray.serving.histories import mapped_arrays
from recsys_ray.storage.artifacts import open_artifact
from recsys_ray.storage.outputs import find_bundle
from recsys_ray.two_tower.towers import TowerSpec


class Bundle:
    """What a run publishes for serving: item vectors, user tower, indexes, histories, in one folder.

    Open one by :meth:`open`; :class:`recsys_ray.Recommender` answers from it.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path, verify: bool = False) -> Bundle:
        """Open a bundle.

        Args:
            path: a bundle's folder, a folder of bundles, or a run's folder; of the last two the current bundle.
            verify: compare every file with its checksum.

        Raises:
            ArtifactError: there is no whole bundle.
        """
        artifact = open_artifact(find_bundle(path), verify)
        return cls(artifact.path, artifact.manifest)

    @property
    def version(self) -> str:
        """Name of the bundle: the date of the last event and a fingerprint."""
        return str(self.counts["version"])

    @property
    def counts(self) -> Mapping[str, Any]:
        """What the bundle holds in numbers: items, users, recall of the indexes, ..."""
        return self.manifest["counts"]

    @property
    def item_types(self) -> list[str]:
        return list(self.counts["item_types"])

    @property
    def item_ids(self) -> list[str]:
        """Ids of all items; the position is the row of :attr:`vectors`."""
        return read_table(self.path / "items.arrow")["item_id"].to_pylist()

    @property
    def vectors(self) -> npt.NDArray[np.float32]:
        """The item tower's vectors, float32 [items, d], unit norm, memory-mapped."""
        width = TowerSpec.load(self.path / "user_tower" / "spec.json").layers[-1]  # a further column holds item terms
        return mapped_arrays(self.path / "vectors.safetensors")["vector"].numpy()[:, :width]

    def __len__(self) -> int:
        """Number of items."""
        return int(self.counts["items"])

    def __repr__(self) -> str:
        return f"Bundle({self.version!r}, {len(self):,} items of {', '.join(self.item_types)})"
