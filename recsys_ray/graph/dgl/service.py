"""The one request that this project adds to DGL's RPC: sample in-neighbours on another partition's server.

Client and server both import this module, which registers the service.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

os.environ.setdefault("DGLBACKEND", "pytorch")
from dgl.distributed import rpc

from recsys_ray.graph.dgl.sampling import LocalGraph

_SERVICE = 770_001  # DGL's own services lie below 10,000 and from 800,000 on
_served: list[LocalGraph] = []  # the partition of this process's server


def serve(graph: LocalGraph) -> None:
    """Let this process answer for a partition."""
    _served[:] = [graph]


class SampleResponse(rpc.Response):
    """counts int64 [types, n], sources int32 and weights float32 [counts.sum()], as :meth:`LocalGraph.sample` gives
    them."""

    def __init__(self, counts: Tensor, source: Tensor, weight: Tensor) -> None:
        self.counts, self.source, self.weight = counts, source, weight

    def __getstate__(self) -> tuple[Any, ...]:
        return self.counts.to(torch.int32), self.source, self.weight

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        counts, self.source, self.weight = state
        self.counts = counts.long()


class SampleRequest(rpc.Request):
    """Sample with a seed, so that the answer depends on the asking client's generator only."""

    def __init__(self, local: Tensor, snapshot: int, fanout: int, seed: int) -> None:
        self.local, self.snapshot, self.fanout, self.seed = local, snapshot, fanout, seed

    def __getstate__(self) -> tuple[Any, ...]:
        return self.local, self.snapshot, self.fanout, self.seed

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.local, self.snapshot, self.fanout, self.seed = state

    def process_request(self, server_state: object) -> SampleResponse:
        generator = torch.Generator().manual_seed(self.seed)
        return SampleResponse(*_served[0].sample(self.local.long(), self.snapshot, self.fanout, generator))


rpc.register_service(_SERVICE, SampleRequest, SampleResponse)
