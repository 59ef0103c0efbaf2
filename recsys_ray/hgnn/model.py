"""Two-layer heterogeneous GraphSAGE over an item-item graph (paper A, section 3.2; GraphSAGE: Hamilton et al. 2017).

Shape suffixes: N nodes, S source nodes of a block, D destination nodes of a block, T text dimension, H hidden
dimension, O output dimension.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import dgl
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from recsys_ray.config import HgnnConfig

Relation = tuple[int, int]  # (item type number of the neighbour, item type number of the node that receives)


@dataclass(frozen=True)
class Block:
    """One hop of a sampled neighbourhood. Nodes are gids in ascending order, so that the nodes of one item type
    stand together and a type is a slice, not an index."""

    src: Int64[Tensor, "S"]
    dst: Int64[Tensor, "D"]
    dst_in_src: Int64[Tensor, "D"]  # position of each dst node in src
    edges: dict[Relation, tuple[Int64[Tensor, "_"], Int64[Tensor, "_"]]]  # positions in src, positions in dst


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


class SageLayer(nn.Module):
    """``h_c = W_self h_c + b + sum over relations r of agg_r``, where ``agg_r`` is the mean (or the largest
    of each element) over sampled neighbours c' of ``relu(W_r h_c' + b_r)``. No neighbours: the self term alone.

    ``shared``: one W_self, and of the relations only those inside a type and those between two types have weights of
    their own. Nothing then depends on which types there are, and a type that comes later has its weights already.
    """

    def __init__(self, in_dim: int, out_dim: int, types: ItemTypes, config: HgnnConfig) -> None:
        super().__init__()
        self.types, self.aggregator, self.shared = types, config.aggregator, config.weights_by == "kinship"
        kinds = range(types.count)
        owners = ["all"] if self.shared else [str(j) for j in kinds]
        relations = ["same", "other"] if self.shared else [f"{i}_{j}" for i in kinds for j in kinds]
        self.own = nn.ModuleDict({owner: nn.Linear(in_dim, out_dim) for owner in owners})
        self.relation = nn.ModuleDict({relation: nn.Linear(in_dim, out_dim) for relation in relations})

    def forward(
        self, own_SD: Float[Tensor, "S in_dim"], sent_SD: Float[Tensor, "S in_dim"], block: Block
    ) -> Float[Tensor, "D out_dim"]:
        """``own_SD`` enters the self term, ``sent_SD`` is what a node sends to its neighbours."""
        src_of, dst_of = self.types.slices(block.src), self.types.slices(block.dst)
        outputs = []
        for j, dst in enumerate(dst_of):
            own = self.own["all" if self.shared else str(j)](own_SD[block.dst_in_src[dst]])
            for i, src in enumerate(src_of):
                if (i, j) in block.edges and len(block.edges[i, j][0]):
                    own = own + self._aggregate((i, j), sent_SD, src, dst, block)
            outputs.append(own)
        return torch.cat(outputs)

    def _aggregate(self, relation: Relation, sent_SD: Tensor, src: slice, dst: slice, block: Block) -> Tensor:
        i, j = relation
        name = ("same" if i == j else "other") if self.shared else f"{i}_{j}"
        message = F.relu(self.relation[name](sent_SD[src]))
        src_pos, dst_pos = block.edges[relation]
        graph = dgl.create_block((src_pos - src.start, dst_pos - dst.start), len(message), dst.stop - dst.start)
        if self.aggregator == "mean":
            return dgl.ops.copy_u_mean(graph, message)  # over no neighbour: 0
        pooled = dgl.ops.copy_u_max(graph, message)
        return pooled.masked_fill(torch.isinf(pooled), 0.0)  # DGL's maximum over no neighbour is -inf


class HGNN(nn.Module):
    """Text vectors in, unit-norm item embeddings out.

    Two things are ours, not the papers'. The text is projected to the hidden size once, before the layers, so that
    aggregation costs the hidden width and not the text's. And an item sends its *signature* beside its text, random
    signs that stand for its identity (recsys_ray/hgnn/signature.py): text alone cannot tell which of two look-alikes
    a neighbour is, so without it the model cannot see that two items share neighbours. A node's own signature never
    enters its own self term: an item without edges is embedded from its text alone.

    The weights start as an average over the neighbourhood (identities and orthogonal projections), which already
    places items near those that they share users with; from random weights that takes many epochs.
    """

    def __init__(self, text_dim: int, config: HgnnConfig, types: ItemTypes) -> None:
        super().__init__()
        self.types, self.text_dim, self.out_dim = types, text_dim, config.out_dim
        self.project = nn.Linear(text_dim, config.hidden_dim)
        self.sign = nn.Linear(config.signature_dim, config.hidden_dim, bias=False) if config.signature_dim else None
        self.layers = nn.ModuleList(
            [
                SageLayer(config.hidden_dim, config.hidden_dim, types, config),
                SageLayer(config.hidden_dim, config.out_dim, types, config),
            ]
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                square = module.in_features == module.out_features
                (nn.init.eye_ if square else nn.init.orthogonal_)(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, inputs_SI: Float[Tensor, "S I"], blocks: list[Block]) -> Float[Tensor, "D O"]:
        """Embeddings of the last block's dst nodes; ``inputs_SI`` (text, then signature) belongs to the first block's
        src nodes."""
        return self.second(self.first(inputs_SI, blocks[0]), blocks[1])

    def first(self, inputs_SI: Float[Tensor, "S I"], block: Block) -> Float[Tensor, "D H"]:
        """The first layer."""
        own = self.project(inputs_SI[:, : self.text_dim])
        sent = own if self.sign is None else own + self.sign(inputs_SI[:, self.text_dim :])
        return F.relu(self.layers[0](own, sent, block))

    def second(self, h_SH: Float[Tensor, "S H"], block: Block) -> Float[Tensor, "D O"]:
        """The second layer; unit norm, at the output only."""
        return F.normalize(self.layers[1](h_SH, h_SH, block), dim=-1)
