"""Embeds items that came after the graph: the trained HGNN over their own neighbourhoods, without training.

The other items do not change: their first-layer states are those that the HGNN stage stored. An item without edges is
embedded from its text alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from recsys_ray.config import HgnnConfig
from recsys_ray.core.errors import ArtifactError
from recsys_ray.hgnn.blocks import ItemTypes, Relation
from recsys_ray.hgnn.encoder import Hgnn, make_hgnn
from recsys_ray.hgnn.inference import LocalStore, embed_items
from recsys_ray.hgnn.sampler import WeightedEdges
from recsys_ray.hgnn.signature import SignedSource, item_signatures


@dataclass(frozen=True)
class Surroundings:
    """Items to be embedded and all that send to them. Rows mean the same in every array, in any order."""

    ids: Sequence[str]
    ntype: Int64[Tensor, "N"]
    text: Float[Tensor, "N T"]
    hidden: Float[Tensor, "N H"]  # the first layer's states; rows of ``wanted`` are not read
    wanted: Int64[Tensor, "W"]  # rows, each once
    src: Int64[Tensor, "E"]  # rows; src sends to dst
    dst: Int64[Tensor, "E"]  # rows among ``wanted``
    weight: Float[Tensor, "E"]  # what a message counts (recsys_ray.graph.pairs.message_weights)


class EdgeList:
    """A small graph in memory, with all of a node's in-edges. Fulfils ``TextSource`` for whole neighbourhoods."""

    def __init__(self, src: Tensor, dst: Tensor, weight: Tensor, types: ItemTypes, text: Float[Tensor, "N T"]) -> None:
        self._text, self._edges = text, dict[Relation, WeightedEdges]()
        kinds = types.of(src) * types.count + types.of(dst)
        for kind in torch.unique(kinds).tolist():
            chosen = torch.nonzero(kinds == kind).squeeze(1)
            order = torch.argsort(dst[chosen], stable=True)
            chosen = chosen[order]
            self._edges[divmod(kind, types.count)] = src[chosen], dst[chosen], weight[chosen]

    def sample(
        self, gids: Int64[Tensor, "N"], snapshot: int, fanout: int, generator: torch.Generator | None = None
    ) -> Mapping[Relation, WeightedEdges]:
        """In-edges of ascending ``gids``: position of the receiver, neighbour, weight."""
        assert fanout < 0, "whole neighbourhoods only"
        found = {}
        for relation, (src, dst, weight) in self._edges.items():
            begin, end = torch.searchsorted(dst, gids), torch.searchsorted(dst, gids, right=True)
            position = torch.repeat_interleave(torch.arange(len(gids)), end - begin)
            first = torch.cumsum(end - begin, 0) - (end - begin)
            edge = torch.arange(len(position)) + (begin - first)[position]
            found[relation] = position, src[edge], weight[edge]
        return found

    def features(self, name: str, gids: Int64[Tensor, "N"]) -> Float[Tensor, "N T"]:
        return self._text[gids]


def embed_inductively(
    weights: Path, config: HgnnConfig, num_types: int, items: Surroundings
) -> tuple[Float[Tensor, "W H"], Float[Tensor, "W O"]]:
    """The first layer's states and the unit-norm embeddings of ``items.wanted``, in its order.

    Raises:
        ArtifactError: the weights cannot be read or are of another shape.
    """
    order = torch.argsort(items.ntype, stable=True)  # the model wants a type in one range
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    starts = torch.searchsorted(items.ntype[order], torch.arange(num_types + 1))
    types = ItemTypes(starts)
    model = load_hgnn(weights, config, items.text.shape[1], types)
    edges = EdgeList(place[items.src], place[items.dst], items.weight, types, items.text[order])
    packed = torch.from_numpy(item_signatures([items.ids[i] for i in order.tolist()], config.signature_dim).copy())
    source = SignedSource(edges, packed, config.signature_dim)
    store = LocalStore(len(order), config.state_dim)
    store.table[:] = items.hidden[order]
    own, back = torch.sort(place[items.wanted])
    found = embed_items(model, source, 0, own, store)
    embedding = torch.empty_like(found)
    embedding[back] = found
    return store.read(place[items.wanted]), embedding


def load_hgnn(weights: Path, config: HgnnConfig, text_dim: int, types: ItemTypes) -> Hgnn:
    """A trained model for a catalogue whose types are these ranges of rows.

    Raises:
        ArtifactError: the weights cannot be read or are of another shape.
    """
    model = make_hgnn(text_dim, config, types)
    try:
        model.load_state_dict(load_file(weights))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(
            f"the HGNN in {weights} cannot be loaded ({str(error).splitlines()[-1].strip()})"
        ) from error
    return model.eval().requires_grad_(False)
