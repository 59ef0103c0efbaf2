"""Signatures: random signs that identify an item (random node features: Sato et al., SDM 2021).

They are a hash of the item's id: the same in every snapshot, on every rank and in every run, and a new item has one
without training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from recsys_ray.hgnn.blocks import Relation
from recsys_ray.hgnn.sampler import TextSource, WeightedEdges

_WORD = 64  # signs in an int64


def item_signatures(ids: Sequence[str], dim: int) -> Int[np.ndarray, "items words"]:
    """``dim`` bits for each id, packed; ``dim`` is rounded up to a multiple of 64 bits of storage."""
    words = -(-dim // _WORD)
    digests = b"".join(hashlib.shake_128(name.encode()).digest(8 * words) for name in ids)
    return np.frombuffer(digests, "<i8").reshape(len(ids), words)


def signs(packed: Int64[Tensor, "N words"], dim: int) -> Float[Tensor, "N dim"]:
    """+-1 / sqrt(dim): unit vectors."""
    bits = (packed[:, :, None] >> torch.arange(_WORD)) & 1
    return (bits.reshape(len(packed), -1)[:, :dim].float() * 2 - 1) / dim**0.5


class SignedSource:
    """A graph whose items have signatures.

    Args:
        packed: what :func:`item_signatures` gives.
    """

    def __init__(self, source: TextSource, packed: Int64[Tensor, "items words"], dim: int) -> None:
        self._source, self._packed, self._dim = source, packed, dim

    def sample(
        self, gids: Int64[Tensor, "N"], snapshot: int, fanout: int, generator: torch.Generator | None = None
    ) -> Mapping[Relation, WeightedEdges]:
        return self._source.sample(gids, snapshot, fanout, generator)

    def features(self, name: str, gids: Int64[Tensor, "N"]) -> Float[Tensor, "N T"]:
        return self._source.features(name, gids)

    def signs(self, gids: Int64[Tensor, "N"]) -> Float[Tensor, "N dim"]:
        return signs(self._packed[gids], self._dim)
