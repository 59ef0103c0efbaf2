"""Balanced multi-link neighbour sampler (paper A, section 3.2) and the neighbourhoods of a batch.

Co-interaction graphs are unbalanced: podcast-podcast edges outnumber audiobook-audiobook edges by orders of magnitude.
In each epoch the larger relations are undersampled, uniformly and afresh, to the size of the smallest one, so that all
item types shape the model and an epoch's cost does not grow with the number of edges. Only the supervision is reduced;
messages still pass over the whole graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from recsys_ray.hgnn.blocks import Block, Relation

Edges = tuple[Int64[Tensor, "_"], Int64[Tensor, "_"]]  # src gids, dst gids; as many
WeightedEdges = tuple[Int64[Tensor, "_"], Int64[Tensor, "_"], Float[Tensor, "_"]]  # and what their messages count
_MIX = (0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64))  # odd 64-bit constants, as signed


@runtime_checkable
class NeighborSource(Protocol):
    """Where neighbours come from: DGL partitions in production, plain tensors in tests."""

    def sample(
        self, gids: Int64[Tensor, "N"], snapshot: int, fanout: int, generator: torch.Generator | None = None
    ) -> Mapping[Relation, tuple[Int64[Tensor, "_"], Int64[Tensor, "_"], Float[Tensor, "_"]]]:
        """Per relation: position in ``gids`` of the receiving node, gid of the neighbour, what its message counts
        (:func:`recsys_ray.graph.pairs.message_weights`). At most ``fanout`` a node and relation; -1: all."""
        ...


@runtime_checkable
class TextSource(NeighborSource, Protocol):
    """Neighbours, and the text vectors of items."""

    def features(self, name: str, gids: Int64[Tensor, "N"]) -> Float[Tensor, "N T"]: ...


@runtime_checkable
class ItemSource(TextSource, Protocol):
    """Neighbours, text vectors and signatures (recsys_ray/hgnn/signature.py) of items."""

    def signs(self, gids: Int64[Tensor, "N"]) -> Float[Tensor, "N G"]: ...


def quotas(sizes: Mapping[Relation, int], min_edges: int) -> dict[Relation, int]:
    """Supervision edges an epoch for each unordered relation, over all ranks.

    The size of the smallest relation, but not below ``min_edges``: a type with three items must not starve the others.
    """
    present = [size for size in sizes.values() if size]
    target = max(min(present, default=0), min_edges)
    return {relation: min(size, target) for relation, size in sizes.items()}


def unordered(relation: Relation) -> Relation:
    """(a, b) and (b, a) are the two directions of one relation."""
    return min(relation), max(relation)


def by_unordered_relation(edges: Mapping[Relation, Edges]) -> dict[Relation, Edges]:
    """Join the two directions of each relation."""
    parts: dict[Relation, list[Edges]] = {}
    for relation in sorted(edges):
        parts.setdefault(unordered(relation), []).append(edges[relation])
    return {
        relation: (torch.cat([src for src, _ in found]), torch.cat([dst for _, dst in found]))
        for relation, found in parts.items()
    }


def epoch_edges(
    edges: Mapping[Relation, Edges], shares: Mapping[Relation, int], total: int, generator: torch.Generator
) -> Edges:
    """This rank's anchors and positives of one epoch: ``shares[r]`` edges of relation r, drawn uniformly without
    replacement, each turned in a random direction, shuffled, and filled up by repetition to ``total`` rows, so that
    every rank has the same number."""
    src, dst = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    for relation in sorted(edges):
        chosen = torch.randperm(len(edges[relation][0]), generator=generator)[: shares.get(relation, 0)]
        src.append(edges[relation][0][chosen])
        dst.append(edges[relation][1][chosen])
    anchors, positives = torch.cat(src), torch.cat(dst)
    turned = torch.rand(len(anchors), generator=generator) < 0.5
    anchors, positives = torch.where(turned, positives, anchors), torch.where(turned, anchors, positives)
    order = torch.randperm(len(anchors), generator=generator)
    if len(order) and len(order) != total:
        order = order.repeat(-(-total // len(order)))[:total]
    return anchors[order], positives[order]


def pair_keys(a: Int64[Tensor, "E"], b: Int64[Tensor, "E"], num_items: int) -> Int64[Tensor, "E"]:
    """One number per unordered pair of items, so that both directions of an edge share it."""
    return torch.minimum(a, b) * num_items + torch.maximum(a, b)


def among(values: Int64[Tensor, "N"], ascending: Int64[Tensor, "M"]) -> Bool[Tensor, "N"]:
    """Is each value in ``ascending``?"""
    if not len(ascending):
        return torch.zeros(len(values), dtype=torch.bool)
    return ascending[torch.searchsorted(ascending, values).clamp(max=len(ascending) - 1)] == values


def held_out(keys: Int64[Tensor, "E"], share: float, seed: int) -> Bool[Tensor, "E"]:
    """Whether each pair belongs to the validation edges: a hash of the pair, so that every rank and both directions
    agree without exchanging anything."""
    mixed = (keys + seed) * _MIX[0]
    mixed = (mixed ^ (mixed >> 29)) * _MIX[1]
    return ((mixed >> 20) & 0xFFFFF).to(torch.float64) < share * (1 << 20)


def build_blocks(
    source: NeighborSource,
    seeds: Int64[Tensor, "D"],
    snapshot: int,
    fanouts: Sequence[int],
    generator: torch.Generator | None = None,
    drop: Callable[[Tensor, Tensor], Bool[Tensor, "E"]] | None = None,
) -> list[Block]:
    """Sampled neighbourhoods of ascending, distinct ``seeds``, outermost hop first.

    ``fanouts`` go from the seeds outwards. ``drop(src, dst)`` marks edges over which no message may pass: the
    supervision edges of the batch, in both directions, and the validation edges.
    """
    blocks: list[Block] = []
    for fanout in fanouts:
        edges = {}
        for relation, (dst_pos, src_gid, weight) in source.sample(seeds, snapshot, fanout, generator).items():
            if drop is not None and len(src_gid):
                keep = ~drop(src_gid, seeds[dst_pos])
                dst_pos, src_gid, weight = dst_pos[keep], src_gid[keep], weight[keep]
            edges[relation] = dst_pos, src_gid, weight
        nodes = torch.unique(torch.cat([seeds, *(src for _, src, _ in edges.values())]))
        placed = {r: (torch.searchsorted(nodes, src), dst_pos, w) for r, (dst_pos, src, w) in edges.items()}
        blocks.append(Block(nodes, seeds, torch.searchsorted(nodes, seeds), placed))
        seeds = nodes
    return blocks[::-1]


def dropper(
    batch_keys: Int64[Tensor, "B"], num_items: int, valid_share: float, seed: int
) -> Callable[[Tensor, Tensor], Bool[Tensor, "E"]]:
    """The ``drop`` of :func:`build_blocks` for a batch with these pair keys."""
    banned = torch.unique(batch_keys)

    def drop(src: Tensor, dst: Tensor) -> Tensor:
        keys = pair_keys(src, dst, num_items)
        return among(keys, banned) | held_out(keys, valid_share, seed)

    return drop
