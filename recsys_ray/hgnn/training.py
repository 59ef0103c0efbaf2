"""One rank's share of HGNN training: plain torch over any :class:`NeighborSource`, with or without other ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from recsys_ray.cluster.train import generator_for, mean_over_ranks, run_epochs, sum_over_ranks
from recsys_ray.config import HgnnConfig
from recsys_ray.hgnn.blocks import ItemTypes, LayerStore, Relation
from recsys_ray.hgnn.directions import graph_directions, text_directions
from recsys_ray.hgnn.encoder import Hgnn
from recsys_ray.hgnn.loss import in_batch_softmax, max_margin
from recsys_ray.hgnn.propagation import PropagationEncoder, unit, write_sums
from recsys_ray.hgnn.sampler import (
    Edges,
    ItemSource,
    NeighborSource,
    TextSource,
    WeightedEdges,
    among,
    build_blocks,
    by_unordered_relation,
    dropper,
    epoch_edges,
    held_out,
    pair_keys,
    quotas,
)

_VALIDATION_BATCHES = 4
_NODES_AT_ONCE = 65_536


class Graph(NamedTuple):
    """A snapshot of the graph, as one rank has it."""

    snapshot: int
    edges: Mapping[Relation, WeightedEdges]  # those that end in this rank's partition, and what their messages count
    told: Int64[Tensor, "n"]  # dst * items + src, ascending, of the edges of all partitions that texts alone tell


@dataclass
class EdgeTask:
    """The supervision of one rank, and what all ranks must agree on."""

    train: dict[Relation, Edges]  # by unordered relation
    valid: Edges
    shares: dict[Relation, int]  # edges that this rank draws in an epoch
    steps: int  # the same on every rank
    log_q: Float[Tensor, "items"]  # log of the expected draws of each item in an epoch
    sizes: dict[Relation, int] = field(default_factory=dict)  # training edges over all ranks


def plan_edges(
    edges: Mapping[Relation, Edges], config: HgnnConfig, num_items: int, num_types: int, seed: int, ranks: int = 1
) -> EdgeTask:
    """Split this rank's edges into training and validation and agree with the other ranks on the epoch's size."""
    train: dict[Relation, Edges] = {}
    valid: list[Edges] = []
    for relation, (src, dst) in by_unordered_relation(edges).items():
        out = held_out(pair_keys(src, dst, num_items), config.valid_share, seed)
        train[relation] = (src[~out], dst[~out])
        valid.append((src[out], dst[out]))
    relations = [(i, j) for i in range(num_types) for j in range(i, num_types)]
    local = torch.tensor([len(train[r][0]) if r in train else 0 for r in relations], dtype=torch.float64)
    total = sum_over_ranks(local.clone())
    sizes = {r: int(n) for r, n in zip(relations, total.tolist(), strict=True)}
    quota = quotas(sizes, config.min_edges) if config.balanced else sizes
    shares = {
        r: round(quota[r] * own / all_)
        for r, own, all_ in zip(relations, local.tolist(), total.tolist(), strict=True)
        if all_
    }
    steps = -(-sum(quota.values()) // (config.batch_size * ranks))
    if config.max_steps is not None:
        steps = min(steps, config.max_steps)
    expected = torch.zeros(num_items, dtype=torch.float64)
    for relation, (src, dst) in train.items():
        rate = quota[relation] / max(sizes[relation], 1)
        expected += rate * torch.bincount(torch.cat([src, dst]), minlength=num_items) / 2
    log_q = torch.log(sum_over_ranks(expected) + 1).float()
    nothing = torch.empty(0, dtype=torch.int64)
    held = (torch.cat([nothing, *(s for s, _ in valid)]), torch.cat([nothing, *(d for _, d in valid)]))
    return EdgeTask(train, held, shares, steps, log_q, sizes)


def by_users(graph: Graph, num_items: int) -> dict[Relation, Edges]:
    """The edges without those that texts alone tell."""
    found = {}
    for relation, (src, dst, _) in graph.edges.items():
        kept = ~among(dst * num_items + src, graph.told)
        found[relation] = src[kept], dst[kept]
    return found


def unknown_edges(
    known: Mapping[Relation, Edges], asked: Mapping[Relation, Edges], num_items: int
) -> Mapping[Relation, Edges]:
    """This rank's edges of the graph ``asked`` that an earlier one, ``known``, does not have; where all ranks together
    find none, all of ``asked``.

    To predict an edge from a graph that lacks just this edge is easier than what is asked of an embedding: what a user
    did links all items of the user, and the other links still tell. A model that learns from such edges comes to think
    too much of structure, and too little of text.
    """
    nothing = torch.empty(0, dtype=torch.int64)
    found: dict[Relation, Edges] = {}
    for relation, (src, dst) in asked.items():
        old_src, old_dst = known.get(relation, (nothing, nothing))
        fresh = ~among(dst * num_items + src, (old_dst * num_items + old_src).sort().values)
        found[relation] = src[fresh], dst[fresh]
    count = torch.tensor([sum(len(src) for src, _ in found.values())], dtype=torch.float64)
    return found if sum_over_ranks(count) > 0 else asked


@runtime_checkable
class Neighbourhoods(Protocol):
    """What an encoder sees of the items of a batch: the inputs of its ``forward``, without the edges of the batch."""

    def inputs(
        self, own: Int64[Tensor, "N"], partner: Int64[Tensor, "N"], generator: torch.Generator
    ) -> tuple[tuple[Any, ...], Int64[Tensor, "N"]]:
        """Inputs of the network, and the row of its output that belongs to each item of ``own``.

        Args:
            partner: the other end of the edge that is to be predicted; the item itself where there is none.
        """
        ...


class SampledNeighbourhoods:
    """For GraphSAGE: neighbours drawn afresh for each batch. No message passes over an edge of the batch, in either
    direction, nor over a validation edge."""

    def __init__(self, source: TextSource, config: HgnnConfig, snapshot: int, num_items: int, seed: int) -> None:
        self.source, self.config, self.snapshot, self.num_items, self.seed = source, config, snapshot, num_items, seed

    def inputs(self, own: Tensor, partner: Tensor, generator: torch.Generator) -> tuple[tuple[Any, ...], Tensor]:
        config = self.config
        seeds, place = torch.unique(own, return_inverse=True)
        keys = pair_keys(own, partner, self.num_items)
        drop = dropper(keys, self.num_items, config.valid_share, self.seed)
        blocks = build_blocks(self.source, seeds, self.snapshot, config.fanouts, generator, drop)
        return (self.source.features("text", blocks[0].src), blocks), place


class WholeNeighbourhoods:
    """For the propagation: sums over all neighbours (:func:`recsys_ray.hgnn.propagation.write_sums`), from which the
    edge that is to be predicted is taken out, in both layers.

    Args:
        sums: width 2 G, of the graph without its validation edges and those that texts alone tell.
    """

    def __init__(
        self, source: ItemSource, config: HgnnConfig, graph: Graph, num_items: int, seed: int, sums: LayerStore
    ) -> None:
        self.source, self.sums, self.dim, self.num_items = source, sums, config.signature_dim, num_items
        nothing, edges = torch.empty(0, dtype=torch.int64), graph.edges
        src = torch.cat([nothing, *(src for src, _, _ in edges.values())])
        dst = torch.cat([nothing, *(dst for _, dst, _ in edges.values())])
        weight = torch.cat([torch.empty(0), *(weight for _, _, weight in edges.values())])
        kept = ~held_out(pair_keys(src, dst, self.num_items), config.valid_share, seed)
        src, dst, weight = src[kept], dst[kept], weight[kept]
        here = dst * self.num_items + src
        keys, weights = zip((here, weight), *self._back(src, dst, here.sort().values, graph.snapshot), strict=True)
        sent, order = torch.sort(torch.cat(keys))  # each once: an edge ends in one partition
        counts = ~among(sent, graph.told)
        self._sent, self._weight = sent[counts], torch.cat(weights)[order][counts]

    def _back(self, src: Tensor, dst: Tensor, here: Tensor, snapshot: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and weights of edges in the other direction that end in other partitions: the cap of neighbours may keep
        one direction alone."""
        elsewhere = src[~torch.isin(src, dst)].unique()
        for nodes in elsewhere.split(_NODES_AT_ONCE):
            for position, neighbours, weight in self.source.sample(nodes, snapshot, -1).values():
                chosen = among(neighbours * self.num_items + nodes[position], here)
                yield (nodes[position] * self.num_items + neighbours)[chosen], weight[chosen]

    def _weight_of(self, src: Tensor, dst: Tensor) -> Float[Tensor, "N 1"]:
        """What each ``dst`` received from ``src`` counted; 0 where there is no edge."""
        keys = dst * self.num_items + src
        if not len(self._sent):
            return torch.zeros(len(keys), 1)
        place = torch.searchsorted(self._sent, keys).clamp(max=len(self._sent) - 1)
        return torch.where(self._sent[place] == keys, self._weight[place], 0.0)[:, None]

    def inputs(self, own: Tensor, partner: Tensor, generator: torch.Generator) -> tuple[tuple[Any, ...], Tensor]:
        nodes, place = torch.unique(torch.cat([own, partner]), return_inverse=True)
        table = self.sums.read(nodes).view(len(nodes), 2, self.dim)
        mine, other = place.split(len(own))
        sums, sent = table[mine], self._weight_of(partner, own)
        sums[:, 0] -= sent * self.source.signs(partner)
        sums[:, 1] -= sent * unit(table[other, 0])
        return (self.source.features("text", nodes)[mine], sums), torch.arange(len(own))


def neighbourhoods_of(
    model: Hgnn, source: ItemSource, config: HgnnConfig, known: Graph, asked: Graph, seed: int,
    own: Int64[Tensor, "N"], shared: Callable[[int, str], LayerStore],
) -> Neighbourhoods:  # fmt: skip
    """What the model's training sees of the graph ``known``. A model of ``propagation`` first takes its start from the
    graph ``asked``, whose edges it is to predict; edges that texts alone tell count in none of this. All ranks call
    this at once.

    Args:
        own: this rank's items, ascending.
        shared: makes a table of all items, of a width and under a name.
    """
    num_items = int(model.types.starts[-1])
    if not isinstance(model, PropagationEncoder):
        return SampledNeighbourhoods(source, config, known.snapshot, num_items, seed)
    width = 2 * config.signature_dim
    sums, sent = shared(width, "sums"), shared(config.signature_dim, "sent")
    validation = dropper(own[:0], num_items, config.valid_share, seed)

    def dropped(graph: Graph) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda src, dst: validation(src, dst) | among(dst * num_items + src, graph.told)

    write_sums(source, asked.snapshot, own, sent, sums, dropped(asked))
    structure = graph_directions(sums, width, own, asked.edges, model.structure_dim, seed, dropped(asked))
    model.start(structure, text_directions(source, own, model.text.out_features))
    if known.snapshot != asked.snapshot:
        write_sums(source, known.snapshot, own, sent, sums, dropped(known))
    return WholeNeighbourhoods(source, config, known, num_items, seed, sums)


class EdgeTrainer:
    """Loss of batches of edges, on the training snapshot."""

    def __init__(
        self, model: nn.Module, network: nn.Module, source: NeighborSource, neighbourhoods: Neighbourhoods,
        types: ItemTypes, config: HgnnConfig, snapshot: int, seed: int,
    ) -> None:  # fmt: skip
        self.model, self.network, self.source, self.neighbourhoods = model, network, source, neighbourhoods
        self.types, self.config, self.snapshot, self.seed = types, config, snapshot, seed
        self.num_items = int(types.starts[-1])

    def loss(self, anchors: Tensor, positives: Tensor, task: EdgeTask, generator: torch.Generator) -> Tensor:
        """Loss of one batch of edges; their own messages, in both directions, are left out."""
        config = self.config
        negatives = anchors[:0]
        if config.loss == "max_margin":
            negatives = torch.randint(self.num_items, (config.negatives,), generator=generator)
        own = torch.cat([anchors, positives, negatives])
        partner = torch.cat([positives, anchors, negatives])
        inputs, rows = self.neighbourhoods.inputs(own, partner, generator)
        z = self.network(*inputs)[rows]
        a, p, n = z.split([len(anchors), len(positives), len(negatives)])
        if config.loss == "softmax":
            types = self.types.of(positives)
            return in_batch_softmax(a, p, anchors, positives, types, task.log_q[positives], config.temperature)
        return max_margin(a, p, n, self._linked(anchors, negatives), config.margin)

    def _linked(self, anchors: Tensor, negatives: Tensor) -> Tensor:
        """Which negatives are neighbours of which anchors, or the anchors themselves."""
        linked = anchors[:, None] == negatives
        nodes, place = torch.unique(anchors, return_inverse=True)
        order = torch.argsort(negatives)
        table = torch.zeros(len(nodes), len(negatives), dtype=torch.bool)
        for dst_pos, src, _ in self.source.sample(nodes, self.snapshot, -1, None).values():
            for shift in (0, 1):  # a negative can be drawn twice; a third time changes nothing worth a loop
                at = (torch.searchsorted(negatives[order], src) + shift).clamp(max=len(order) - 1)
                hit = negatives[order[at]] == src
                table[dst_pos[hit], order[at[hit]]] = True
        return linked | table[place]

    def epoch(self, task: EdgeTask, epoch: int, rank: int) -> Iterator[tuple[Tensor, Tensor, torch.Generator]]:
        """The batches of one epoch: edges drawn afresh, the same number on every rank."""
        generator = generator_for(self.seed, "hgnn", epoch, rank)
        size = self.config.batch_size
        wanted = min(sum(task.shares.values()), task.steps * size) if task.steps == 1 else task.steps * size
        anchors, positives = epoch_edges(task.train, task.shares, max(wanted, 1), generator)
        for step in range(task.steps):
            rows = slice(step * size, (step + 1) * size)
            yield anchors[rows], positives[rows], generator

    @torch.no_grad()
    def validate(self, task: EdgeTask) -> float:
        """Mean loss of a fixed sample of held-out edges, over all ranks."""
        generator = generator_for(self.seed, "validation")
        order = torch.randperm(len(task.valid[0]), generator=generator)[: _VALIDATION_BATCHES * self.config.batch_size]
        sums = torch.zeros(2, dtype=torch.float64)
        for rows in order.split(self.config.batch_size):
            loss = self.loss_without_ranks(task.valid[0][rows], task.valid[1][rows], task, generator)
            sums += torch.tensor([loss * len(rows), len(rows)], dtype=torch.float64)
        sums = sum_over_ranks(sums)
        return float(sums[0] / sums[1]) if sums[1] else float("nan")

    def loss_without_ranks(
        self, anchors: Tensor, positives: Tensor, task: EdgeTask, generator: torch.Generator
    ) -> float:
        """Like :meth:`loss`, past the DDP wrapper: ranks may have different numbers of validation batches."""
        network, self.network = self.network, self.model
        try:
            return float(self.loss(anchors, positives, task, generator))
        finally:
            self.network = network


def train_epochs(
    trainer: EdgeTrainer,
    task: EdgeTask,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    rank: int,
    on_step: Callable[[int, int, float], None] = lambda epoch, step, loss: None,
    on_epoch: Callable[[dict[str, Any], bool], None] = lambda state, better: None,
) -> dict[str, Any]:
    """Train until the validation loss falls no more (:func:`recsys_ray.cluster.train.run_epochs`). The state has
    ``seconds``, of the steps alone."""
    state.setdefault("seconds", 0.0)

    def one_epoch(epoch: int) -> tuple[dict[str, Any], float, dict[str, Any]]:
        total, started = 0.0, time.monotonic()
        trainer.network.train()
        for step, (anchors, positives, generator) in enumerate(trainer.epoch(task, epoch, rank)):
            loss = trainer.loss(anchors, positives, task, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.item()
            on_step(epoch, step, total / (step + 1))
        state["seconds"] += time.monotonic() - started
        mean = mean_over_ranks(total / max(task.steps, 1))
        trainer.network.eval()
        valid = trainer.validate(task)
        # No held-out edges: the training loss tells.
        return {"loss": mean, "valid_loss": valid}, -(valid if valid == valid else mean), {}

    return run_epochs(one_epoch, trainer.config.epochs, trainer.config.patience, state, on_epoch)
