"""What encoders and samplers pass to each other: sampled or whole neighbourhoods, and where item types lie.

Shape suffixes: N nodes, S source nodes of a block, D destination nodes of a block, H width of a
layer's state.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Relation = tuple[int, int]  # (item type number of the neighbour, item type number of the node that receives)


@dataclass(frozen=True)
class Block:
    """One hop of a sampled neighbourhood. Nodes are gids in ascending order, so that the nodes of one item type
    stand together and a type is a slice, not an index."""

    src: Int64[Tensor, "S"]
    dst: Int64[Tensor, "D"]
    dst_in_src: Int64[Tensor, "D"]  # position of each dst node in src
    edges: dict[Relation, tuple[Int64[Tensor, "_"], Int64[Tensor, "_"], Float[Tensor, "_"]]]
    """Positions in src, positions in dst, and what a message counts."""


class ItemTypes:
    """gid ranges of the item types: items of type i have gids from ``starts[i]`` up to ``starts[i + 1]``."""

    def __init__(self, starts: Int64[Tensor, "types_plus_1"]) -> None:
        self.starts = starts
        self.count = len(starts) - 1

    def slices(self, gids: Int64[Tensor, "N"]) -> list[slice]:
        """Where each type lies in ascending ``gids``."""
        bounds = torch.searchsorted(gids, self.starts).tolist()
        return [slice(a, b) for a, b in itertools.pairwise(bounds)]

    def of(self, gids: Int64[Tensor, "N"]) -> Int64[Tensor, "N"]:
        return torch.searchsorted(self.starts, gids, right=True) - 1


@runtime_checkable
class LayerStore(Protocol):
    """Rows of items that ranks share between two layers."""

    def write(self, gids: Int64[Tensor, "N"], values: Float[Tensor, "N H"]) -> None: ...

    def read(self, gids: Int64[Tensor, "N"]) -> Float[Tensor, "N H"]: ...

    def barrier(self) -> None:
        """Return when every rank has arrived: all writes are then readable."""
        ...
