"""The HGNN's default encoder: text in one channel, structure in another, spread over whole neighbourhoods.

Two look-alikes cannot be told apart by their texts, and a sum over sampled neighbours is mostly noise. So the structure
of the graph has a channel of its own, which is linear up to its norms, like SIGN (Rossi et al., Scalable Inception
Graph Neural Networks, 2020): every item sends its signature (recsys_ray/hgnn/signature.py), and

    h1_i = sum over neighbours j of w_ij sign_j
    h2_i = sum over neighbours j of w_ij unit(h1_j)
    s_i  = unit(V1 h1_i + V2 h2_i)
    z_i  = unit([unit(W_t text_i), GAIN s_i])

The weights w_ij (:func:`recsys_ray.graph.pairs.message_weights`) keep popular neighbours from drowning the others.
Nothing depends on which item types there are, so a type that comes later is embedded as any other. An item that nobody
had is linked with the items that have the nearest texts (``GraphConfig.text_users``); one whose text tells nothing
either has no structure.

A sum of random signs is a random projection of an item's neighbourhood, and half of its numbers are noise. V1 and V2
are the principal directions of the graph (recsys_ray/hgnn/directions.py), which training leaves alone: learning to
predict edges makes them worse for what users choose next (docs/experiments.md). W_t starts as those of the texts.

The sums do not depend on the weights. In training they are made once (:func:`write_sums`), and each pair of a batch is
taken out of them where it counts (:class:`recsys_ray.hgnn.training.WholeNeighbourhoods`).

Shape suffixes: N nodes, S source nodes of a block, D destination nodes of a block, T text dimension, G signs, O output
dimension, d = O / 2, K = 2 G, H = O + d: the state that an item keeps and sends after the first layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from recsys_ray.config import HgnnConfig
from recsys_ray.hgnn.blocks import Block, ItemTypes, LayerStore
from recsys_ray.hgnn.sampler import ItemSource, build_blocks

_SMALLEST = 1e-3  # of a norm: what rounding leaves of a sum, whose parts have norm 1, counts as nothing
GAIN = 2**0.5  # so that two items' structure counts twice as much as their texts
_CHUNK = 16_384  # neighbourhoods of a chunk overlap: the larger, the less is read twice
_ALL = -1


def unit(x: Float[Tensor, "N d"]) -> Float[Tensor, "N d"]:
    """Rows of norm 1; a row of nothing stays nothing."""
    return F.normalize(x, dim=-1, eps=_SMALLEST)


class PropagationEncoder(nn.Module):
    """See the module. Without :meth:`start` the maps are random projections."""

    near: Float[Tensor, "d G"]  # V1
    far: Float[Tensor, "d G"]  # V2

    def __init__(self, text_dim: int, config: HgnnConfig, types: ItemTypes) -> None:
        super().__init__()
        self.types, self.out_dim, self.structure_dim = types, config.out_dim, config.out_dim // 2
        self.text = nn.Linear(text_dim, config.out_dim - self.structure_dim, bias=False)
        nn.init.orthogonal_(self.text.weight)
        for name in ("near", "far"):
            self.register_buffer(name, nn.init.orthogonal_(torch.empty(self.structure_dim, config.signature_dim)))

    @torch.no_grad()
    def start(self, structure: Float[Tensor, "n K"], text: Float[Tensor, "m T"]) -> None:
        """Take principal directions, at most as many as there are numbers in a channel, for V1 and V2 and for W_t."""
        if structure.any():  # else nothing is linked
            maps = torch.zeros(self.structure_dim, structure.shape[1])
            maps[: len(structure)] = structure
            for found, kept in zip(maps.chunk(2, 1), (self.near, self.far), strict=True):
                kept.copy_(found)
        self.text.weight[: len(text)] = text

    def forward(self, text_NT: Float[Tensor, "N T"], sums_N2G: Float[Tensor, "N 2 G"]) -> Float[Tensor, "N O"]:
        """Embeddings from texts and from what :func:`write_sums` made."""
        h1, h2 = sums_N2G.unbind(1)
        return self._join(self.text(text_NT), h1 @ self.near.T + h2 @ self.far.T)

    def first(self, source: ItemSource, block: Block) -> Float[Tensor, "D H"]:
        """The state after the first layer: the text's channel, what the neighbours' signatures make of the item's
        structure, and what the item itself sends."""
        h1, text = sums_over(source.signs(block.src), block), source.features("text", block.dst)
        return torch.cat([self.text(text), h1 @ self.near.T, unit(h1) @ self.far.T], 1)

    def second(self, state_SH: Float[Tensor, "S H"], block: Block) -> Float[Tensor, "D O"]:
        """Unit-norm embeddings."""
        thin = self.structure_dim
        text, near, sent = state_SH.split([self.text.out_features, thin, thin], 1)
        own = block.dst_in_src
        return self._join(text[own], near[own] + sums_over(sent, block))

    def _join(self, text: Tensor, structure: Tensor) -> Tensor:
        return F.normalize(torch.cat([unit(text), GAIN * unit(structure)], 1), dim=-1)


def sums_over(values_Sd: Float[Tensor, "S d"], block: Block) -> Float[Tensor, "D d"]:
    """Weighted sums over all neighbours."""
    sums = values_Sd.new_zeros(len(block.dst), values_Sd.shape[1])
    for src, dst, weight in block.edges.values():
        sums.index_add_(0, dst, weight[:, None] * values_Sd[src])
    return sums


@torch.no_grad()
def write_sums(
    source: ItemSource,
    snapshot: int,
    own: Int64[Tensor, "N"],
    sent: LayerStore,
    sums: LayerStore,
    drop: Callable[[Tensor, Tensor], Bool[Tensor, "E"]] | None = None,
) -> None:
    """Write h1 and h2 of this rank's items ``own`` (ascending gids) into ``sums`` (width 2 G), in two passes over the
    graph; ``sent`` (width G) holds unit(h1) in between.

    Args:
        drop: marks edges that must not count, as in :func:`build_blocks`.
    """

    def blocks() -> Iterator[tuple[Tensor, Block]]:
        for gids in own.split(_CHUNK):
            yield gids, build_blocks(source, gids, snapshot, [_ALL], drop=drop)[0]

    for gids, block in blocks():
        sent.write(gids, unit(sums_over(source.signs(block.src), block)))
    sent.barrier()
    for gids, block in blocks():
        near, far = sums_over(source.signs(block.src), block), sums_over(sent.read(block.src), block)
        sums.write(gids, torch.cat([near, far], 1))
    sums.barrier()
