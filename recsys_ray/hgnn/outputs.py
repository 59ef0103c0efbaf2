"""Reads the output of the HGNN stage, without dgl."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from recsys_ray.core.errors import ArtifactError
from recsys_ray.storage.artifacts import load_arrays


def load_embeddings(folder: Path, snapshot: str, num_items: int) -> Float[Tensor, "items out_dim"]:
    """Embeddings of all items on a snapshot, float32, row = gid.

    Raises:
        ArtifactError: the snapshot is missing, or an item of it is.
    """
    parts = [load_arrays(path) for path in sorted((folder / "embeddings" / snapshot).glob("part-*.safetensors"))]
    found = sum(len(part["gid"]) for part in parts)
    if found != num_items:
        raise ArtifactError(f"{folder} has embeddings of {found} of {num_items} items for {snapshot!r}; run hgnn again")
    table = torch.empty(num_items, parts[0]["embedding"].shape[1])
    for part in parts:
        table[torch.from_numpy(part["gid"])] = torch.from_numpy(part["embedding"])
    return table
