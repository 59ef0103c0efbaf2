"""Hidden states that the ranks of a layer-by-layer inference share: DGL's key-value store on the partition servers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_ray.graph.dgl.client import GraphClient


class PartitionStore:
    """float32 [items, dim], spread over the partitions as the items are. Every client must make it, and at once.

    It fulfils ``LayerStore`` of the embedding.
    """

    def __init__(self, client: GraphClient, dim: int, name: str = "hidden") -> None:
        from dgl.distributed import DistTensor

        self._client, self._dim = client, dim
        table = client.table
        graph: Any = client.distributed
        self._tensors = [
            DistTensor(
                (graph.num_nodes(f"t{kind}"), dim),
                torch.float32,
                name=f"{client.name}_{name}",  # the attempt's name keeps runs on one host apart
                part_policy=graph.get_node_partition_policy(f"t{kind}"),
            )
            for kind in range(table.num_types)
        ]

    def write(self, gids: Tensor, values: Tensor) -> None:
        """Rows of ascending ``gids``, from whichever rank."""
        for kind, rows in self._client.rows_by_type(gids):
            self._tensors[kind][self._client.typed_ids(gids[rows], kind)] = values[rows].contiguous()

    def read(self, gids: Tensor) -> Tensor:
        """Rows of ascending ``gids``, float32 [n, dim]."""
        values = torch.empty(len(gids), self._dim)
        for kind, rows in self._client.rows_by_type(gids):
            values[rows] = self._tensors[kind][self._client.typed_ids(gids[rows], kind)]
        return values

    def barrier(self) -> None:
        """Return when every client has arrived."""
        self._client.barrier()
