"""Principal directions of a graph and of texts: the maps with which the propagation encoder starts.

The graph's are the largest of A = V diag(l) V^T that the sums k_i = [h1_i, h2_i] (recsys_ray/hgnn/propagation.py) hold:
items i and j then have the product sum over directions of l V_i V_j, which is what is left of a_ij without its noise.
This is block Krylov with Rayleigh and Ritz's projection (Halko, Martinsson and Tropp, SIAM Review 2011). The maps carry
the directions to every other snapshot of the graph, and to items that come later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from recsys_ray.cluster.train import generator_for, sum_over_ranks
from recsys_ray.hgnn.blocks import LayerStore, Relation
from recsys_ray.hgnn.sampler import TextSource, WeightedEdges

_NOISE = 1e-4  # of the largest variance: directions with less are left out
_SAMPLE = 300_000  # items, and edges, of a rank that tell the directions
_AT_ONCE = 65_536


def graph_directions(
    sums: LayerStore, dim: int, own: Int64[Tensor, "N"], edges: Mapping[Relation, WeightedEdges], most: int, seed: int,
    drop: Callable[[Tensor, Tensor], Bool[Tensor, "E"]],
) -> Float[Tensor, "n K"]:  # fmt: skip
    """The ``most`` largest principal directions, in the numbers of the sums; from samples of the items and of the
    edges. All ranks call this at once.

    Args:
        sums: h1 and h2 of all items, width K.
        dim: K.
        own: this rank's items, ascending.
        edges: those of the graph that end in this rank's partition, with their messages' weights.
        drop: marks edges that must not count, as in :func:`recsys_ray.hgnn.sampler.build_blocks`.
    """
    gram, linked = torch.zeros(2, dim, dim, dtype=torch.float64)
    for gids, share in _sample(own, seed):
        rows = sums.read(gids)
        gram += rows.T @ rows / share
    for src, dst, weight in edges.values():
        mine = torch.nonzero(torch.isin(dst, own) & ~drop(src, dst)).squeeze(1)
        for chosen, share in _sample(mine, seed):
            received = weight[chosen, None] * _rows(sums, src[chosen])
            linked += _rows(sums, dst[chosen]).T @ received / share
    return ritz(sum_over_ranks(gram), sum_over_ranks(linked), most)


def ritz(gram: Float[Tensor, "K K"], linked: Float[Tensor, "K K"], most: int) -> Float[Tensor, "n K"]:
    """The largest solutions of linked v = l gram v, each times sqrt(l), scaled so that their squares are 1 on average
    over the ``most`` asked for; all 0 where nothing is linked.

    Args:
        gram: sum over items of k_i k_i^T.
        linked: sum over edges of a_ij k_i k_j^T.
    """
    variance, axes = torch.linalg.eigh(gram.double())
    kept = variance > _NOISE * variance[-1].clamp(min=1e-12)
    whiten = axes[:, kept] / variance[kept].sqrt()
    size, turn = torch.linalg.eigh(whiten.T @ (linked + linked.T).double() / 2 @ whiten)  # ascending
    found = (whiten @ turn * size.clamp(min=0).sqrt()).flip(1)[:, :most]
    return (found * (most / found.square().sum().clamp(min=1e-12)).sqrt()).T.float()


def text_directions(source: TextSource, own: Int64[Tensor, "N"], most: int) -> Float[Tensor, "n T"]:
    """The ``most`` largest principal directions of the texts of all ranks' items, which keep their products best."""
    texts = (source.features("text", gids).double() for gids in own.split(_AT_ONCE))
    gram = torch.stack([text.T @ text for text in texts]).sum(0)
    _, axes = torch.linalg.eigh(sum_over_ranks(gram))
    return axes.flip(1)[:, :most].T.float()


def _sample(numbers: Int64[Tensor, "N"], seed: int) -> Iterator[tuple[Int64[Tensor, "n"], float]]:
    """At most ``_SAMPLE`` of them, in pieces, and their share."""
    chosen = torch.randperm(len(numbers), generator=generator_for(seed, "directions"))[:_SAMPLE]
    for some in numbers[chosen.sort().values].split(_AT_ONCE) if len(chosen) else ():
        yield some, len(chosen) / len(numbers)


def _rows(sums: LayerStore, gids: Int64[Tensor, "N"]) -> Float[Tensor, "N K"]:
    nodes, place = torch.unique(gids, return_inverse=True)
    return sums.read(nodes)[place]
