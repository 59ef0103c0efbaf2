"""Embeds every item on a snapshot, layer by layer over full neighbourhoods.

Each item is computed once per layer, whereas sampling outwards from each item would compute the same neighbours again
and again. Nothing is random: the same graph and weights give the same embeddings.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from recsys_ray.hgnn.blocks import Block, LayerStore
from recsys_ray.hgnn.encoder import Hgnn
from recsys_ray.hgnn.sampler import ItemSource, build_blocks

_CHUNK = 16_384  # neighbourhoods of a chunk overlap: the larger, the less is computed twice
_ALL = -1


class LocalStore:
    """The store of a single rank."""

    def __init__(self, num_items: int, dim: int) -> None:
        self.table = torch.zeros(num_items, dim)

    def write(self, gids: Int64[Tensor, "N"], values: Float[Tensor, "N H"]) -> None:
        self.table[gids] = values

    def read(self, gids: Int64[Tensor, "N"]) -> Float[Tensor, "N H"]:
        return self.table[gids]

    def barrier(self) -> None:
        pass


@torch.no_grad()
def embed_items(
    model: Hgnn,
    source: ItemSource,
    snapshot: int,
    own: Int64[Tensor, "N"],
    store: LayerStore,
    on_chunk: Callable[[int], None] = lambda count: None,
) -> Float[Tensor, "N O"]:
    """Unit-norm embeddings of this rank's items ``own`` (ascending gids); an item without edges is embedded from its
    text alone. ``store`` holds ``HgnnConfig.state_dim``."""
    model.eval()

    def block_of(gids: Tensor) -> Block:
        on_chunk(len(gids))
        return build_blocks(source, gids, snapshot, [_ALL])[0]

    for gids in own.split(_CHUNK):
        block = block_of(gids)
        store.write(gids, model.first(source, block))
    store.barrier()
    parts = []
    for gids in own.split(_CHUNK):
        block = block_of(gids)
        parts.append(model.second(store.read(block.src), block))
    store.barrier()  # no rank may overwrite the store while another still reads
    return torch.cat(parts) if parts else torch.empty(0, model.out_dim)
