"""The papers' encoder: two-layer heterogeneous GraphSAGE over sampled neighbours (paper A, section 3.2; GraphSAGE:
Hamilton et al. 2017).

Shape suffixes: N nodes, S source nodes of a block, D destination nodes of a block, T text dimension, H hidden
dimension, O output dimension.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from recsys_ray.config import HgnnConfig
from recsys_ray.hgnn.blocks import Block, ItemTypes, Relation
from recsys_ray.hgnn.sampler import TextSource


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

    def forward(self, h_SD: Float[Tensor, "S in_dim"], block: Block) -> Float[Tensor, "D out_dim"]:
        src_of, dst_of = self.types.slices(block.src), self.types.slices(block.dst)
        outputs = []
        for j, dst in enumerate(dst_of):
            own = self.own["all" if self.shared else str(j)](h_SD[block.dst_in_src[dst]])
            for i, src in enumerate(src_of):
                if (i, j) in block.edges and len(block.edges[i, j][0]):
                    own = own + self._aggregate((i, j), h_SD, src, dst, block)
            outputs.append(own)
        return torch.cat(outputs)

    def _aggregate(self, relation: Relation, h_SD: Tensor, src: slice, dst: slice, block: Block) -> Tensor:
        i, j = relation
        name = ("same" if i == j else "other") if self.shared else f"{i}_{j}"
        message = F.relu(self.relation[name](h_SD[src]))
        src_pos, dst_pos, _ = block.edges[relation]
        sent, receiver = message[src_pos - src.start], dst_pos - dst.start
        received = message.new_zeros(dst.stop - dst.start, message.shape[1])
        if self.aggregator == "max":  # no message is below 0
            return received.scatter_reduce(0, receiver[:, None].expand_as(sent), sent, "amax")
        count = torch.bincount(receiver, minlength=len(received)).clamp(min=1)
        return received.index_add(0, receiver, sent) / count[:, None]


def start_as_average(network: nn.Module) -> None:
    """Weights with which messages are averages: identities and orthogonal projections, no bias."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            square = module.in_features == module.out_features
            (nn.init.eye_ if square else nn.init.orthogonal_)(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class GraphSage(nn.Module):
    """Text vectors in, unit-norm item embeddings out.

    The text is projected to the hidden size once, before the layers, so that aggregation costs the hidden width and
    not the text's. The weights start as an average over the neighbourhood (identities and orthogonal projections),
    which already places items near those that they share users with; from random weights that takes many epochs.
    """

    def __init__(self, text_dim: int, config: HgnnConfig, types: ItemTypes) -> None:
        super().__init__()
        self.types, self.out_dim = types, config.out_dim
        self.project = nn.Linear(text_dim, config.hidden_dim)
        self.layers = nn.ModuleList(
            [
                SageLayer(config.hidden_dim, config.hidden_dim, types, config),
                SageLayer(config.hidden_dim, config.out_dim, types, config),
            ]
        )
        start_as_average(self)

    def forward(self, text_ST: Float[Tensor, "S T"], blocks: list[Block]) -> Float[Tensor, "D O"]:
        """Embeddings of the last block's dst nodes; ``text_ST`` belongs to the first block's src nodes."""
        return self.second(self._hidden(text_ST, blocks[0]), blocks[1])

    def first(self, source: TextSource, block: Block) -> Float[Tensor, "D H"]:
        """The state after the first layer."""
        return self._hidden(source.features("text", block.src), block)

    def second(self, state_SH: Float[Tensor, "S H"], block: Block) -> Float[Tensor, "D O"]:
        """The second layer; unit norm, at the output only."""
        return F.normalize(self.layers[1](state_SH, block), dim=-1)

    def _hidden(self, text_ST: Tensor, block: Block) -> Tensor:
        return F.relu(self.layers[0](self.project(text_ST), block))
