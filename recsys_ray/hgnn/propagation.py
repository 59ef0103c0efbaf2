"""The HGNN's default encoder: text in one channel, structure in another, spread over whole neighbourhoods.

Two look-alikes cannot be told apart by their texts, and a sum over sampled neighbours is mostly noise. So the structure
of the graph has a channel of its own, which is linear up to its norms, like SIGN (Rossi et al., Scalable Inception
Graph Neural Networks, 2020): every item sends its signature (recsys_ray/hgnn/signature.py), and

    h1_i^r = sum over neighbours j of relation r of w_ij sign_j                h1_i = unit(h1_i^same + h1_i^other)
    h2_i^r = sum over neighbours j of relation r of w_ij h1_j
    s_i    = unit(sum over r of W1_r h1_i^r + W2_r h2_i^r)
    s_i    = unit(W_p text_i + b_p)                                            without edges
    z_i    = unit([unit(W_t text_i), gain * s_i])

The weights w_ij (:func:`recsys_ray.graph.pairs.message_weights`) keep popular neighbours from drowning the others.
Relations are those within an item type and those between two types, so a type that comes later has its weights already.
For an item without edges the text predicts the structure, learned from items that are isolated in training
(``HgnnConfig.isolated``): what its text tells about taste counts, and both channels always have the same norms.

A sum of random signs is a random projection of an item's neighbourhood. Left as it is, half of its numbers are noise:
W1 and W2 start at the principal directions of the graph that are in these sums (:meth:`PropagationEncoder.start`).

The sums do not depend on the weights. In training they are made once (:func:`write_sums`), and each pair of a batch is
taken out of them where it counts (:class:`recsys_ray.hgnn.training.WholeNeighbourhoods`).

Shape suffixes: N nodes, S source nodes of a block, D destination nodes of a block, T text dimension, G signs, O output
dimension, K = 2 G, H = 5 O / 2: the state that an item keeps and sends after the first layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from recsys_ray.config import HgnnConfig
from recsys_ray.hgnn.blocks import Block, ItemTypes, LayerStore
from recsys_ray.hgnn.sampler import ItemSource, build_blocks

KINSHIPS = ("same", "other")  # relations inside an item type, and those between two types
_SMALLEST = 1e-3  # of a norm: what rounding leaves of a sum, whose parts have norm 1, counts as nothing
_CHUNK = 16_384  # neighbourhoods of a chunk overlap: the larger, the less is read twice
_ALL = -1
_NOISE = 1e-4  # of the largest variance: directions with less are left out at the start


def unit(x: Float[Tensor, "N d"]) -> Float[Tensor, "N d"]:
    """Rows of norm 1; a row of nothing stays nothing."""
    return F.normalize(x, dim=-1, eps=_SMALLEST)


class PropagationEncoder(nn.Module):
    """See the module. Without :meth:`start` the weights are random projections."""

    def __init__(self, text_dim: int, config: HgnnConfig, types: ItemTypes) -> None:
        super().__init__()
        self.types, self.out_dim = types, config.out_dim
        self.structure_dim = config.out_dim // 2
        self.text = nn.Linear(text_dim, config.out_dim - self.structure_dim, bias=False)
        nn.init.orthogonal_(self.text.weight)
        self.one = _alike(config.signature_dim, self.structure_dim)
        self.two = _alike(config.signature_dim, self.structure_dim)
        self.predicted = nn.Linear(text_dim, self.structure_dim)
        self.log_gain = nn.Parameter(torch.tensor(0.0))

    @torch.no_grad()
    def start(self, gram: Float[Tensor, "K K"], linked: Float[Tensor, "K K"]) -> None:
        """Let the structure start as the largest principal directions of the graph, A = V diag(l) V^T, as far as the
        sums k_i = [h1_i, h2_i] hold them: items i and j then have the product sum over directions of l V_i V_j, which
        is what is left of a_ij without its noise. Block Krylov with Rayleigh and Ritz's projection (Halko, Martinsson
        and Tropp, SIAM Review 2011); the weights carry it to every other snapshot of the graph.

        Args:
            gram: sum over items of k_i k_i^T.
            linked: sum over edges of a_ij k_i k_j^T.
        """
        variance, axes = torch.linalg.eigh(gram.double())
        kept = variance > _NOISE * variance[-1].clamp(min=1e-12)
        whiten = axes[:, kept] / variance[kept].sqrt()
        inside = whiten.T @ (linked + linked.T).double() / 2 @ whiten
        size, turn = torch.linalg.eigh(inside)  # ascending
        found = (whiten @ turn * size.clamp(min=0).sqrt()).flip(1)[:, : self.structure_dim]
        if not found.any():
            return  # nothing is linked
        weight = torch.zeros(self.structure_dim, len(gram))
        weight[: found.shape[1]] = (found * (self.structure_dim / found.square().sum()).sqrt()).T.float()
        for kinds, part in zip((self.one, self.two), weight.chunk(2, 1), strict=True):
            for kind in kinds.values():
                kind.load_state_dict({"weight": part})

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """The optimiser's. The projections start as a good embedding, which large steps would destroy; how much the
        structure counts, and what a text predicts, has yet to be found."""
        maps = [*self.text.parameters(), *self.one.parameters(), *self.two.parameters()]
        return [
            {"params": maps, "lr": learning_rate},
            {"params": list(self.predicted.parameters()), "lr": 10 * learning_rate},
            {"params": [self.log_gain], "lr": 100 * learning_rate},
        ]

    def forward(self, text_NT: Float[Tensor, "N T"], sums_N4G: Float[Tensor, "N 4 G"]) -> Float[Tensor, "N O"]:
        """Embeddings from texts and from what :func:`write_sums` made."""
        h1_same, h1_other, h2_same, h2_other = sums_N4G.unbind(1)
        near = self.one["same"](h1_same) + self.one["other"](h1_other)
        far = self.two["same"](h2_same) + self.two["other"](h2_other)
        return self._join(self.text(text_NT), self.predicted(text_NT), near, far)

    def first(self, source: ItemSource, block: Block) -> Float[Tensor, "D H"]:
        """The state after the first layer: the text's channel, the structure that the text predicts, what the
        neighbours' signatures make of it, and what the item itself sends over both kinds of relations."""
        h1_same, h1_other = sums_over(source.signs(block.src), block, self.types)
        h1 = unit(h1_same + h1_other)
        near = self.one["same"](h1_same) + self.one["other"](h1_other)
        text = source.features("text", block.dst)
        sent = self.two["same"](h1), self.two["other"](h1)
        return torch.cat([self.text(text), self.predicted(text), near, *sent], 1)

    def second(self, state_SH: Float[Tensor, "S H"], block: Block) -> Float[Tensor, "D O"]:
        """Unit-norm embeddings."""
        wide, thin = self.text.out_features, self.structure_dim
        text, predicted, near, to_same, to_other = state_SH.split([wide, thin, thin, thin, thin], 1)
        far = sums_over(to_same, block, self.types)[0] + sums_over(to_other, block, self.types)[1]
        own = block.dst_in_src
        return self._join(text[own], predicted[own], near[own], far)

    def _join(self, text: Tensor, predicted: Tensor, near: Tensor, far: Tensor) -> Tensor:
        structure = unit(near + far)
        structure = torch.where(structure.any(1, keepdim=True), structure, unit(predicted))
        return F.normalize(torch.cat([unit(text), self.log_gain.exp() * structure], 1), dim=-1)


def _alike(in_dim: int, out_dim: int) -> nn.ModuleDict:
    """A projection for each kinship; both start as the same one."""
    same, other = (nn.Linear(in_dim, out_dim, bias=False) for _ in KINSHIPS)
    nn.init.orthogonal_(same.weight)
    other.load_state_dict(same.state_dict())
    return nn.ModuleDict(dict(zip(KINSHIPS, (same, other), strict=True)))


def sums_over(
    values_Sd: Float[Tensor, "S d"], block: Block, types: ItemTypes
) -> tuple[Float[Tensor, "D d"], Float[Tensor, "D d"]]:
    """Weighted sums over the neighbours of an item's own type, and over those of other types."""
    same, other = (values_Sd.new_zeros(len(block.dst), values_Sd.shape[1]) for _ in KINSHIPS)
    for (i, j), (src, dst, weight) in block.edges.items():
        (same if i == j else other).index_add_(0, dst, weight[:, None] * values_Sd[src])
    return same, other


@torch.no_grad()
def write_sums(
    source: ItemSource,
    types: ItemTypes,
    snapshot: int,
    own: Int64[Tensor, "N"],
    sent: LayerStore,
    sums: LayerStore,
    drop: Callable[[Tensor, Tensor], Bool[Tensor, "E"]] | None = None,
) -> None:
    """Write h1^same, h1^other, h2^same, h2^other of this rank's items ``own`` (ascending gids) into ``sums``
    (width 4 G), in two passes over the graph; ``sent`` (width G) holds h1 in between.

    Args:
        drop: marks edges that must not count, as in :func:`build_blocks`.
    """

    def blocks() -> Iterator[tuple[Tensor, Block]]:
        for gids in own.split(_CHUNK):
            yield gids, build_blocks(source, gids, snapshot, [_ALL], drop=drop)[0]

    for gids, block in blocks():
        same, other = sums_over(source.signs(block.src), block, types)
        sent.write(gids, unit(same + other))
    sent.barrier()
    for gids, block in blocks():
        near, far = sums_over(source.signs(block.src), block, types), sums_over(sent.read(block.src), block, types)
        sums.write(gids, torch.cat([*near, *far], 1))
    sums.barrier()
