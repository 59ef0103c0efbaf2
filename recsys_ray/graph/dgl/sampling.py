"""Neighbour sampling in one partition: vectorised, seeded, and the same code for client and server.

DGL's own ``sample_etype_neighbors`` looks at every edge type of a node and converts each answer into a heterograph;
with an edge type for every pair of item types in every snapshot, that is most of a training step. Here the edges of one
snapshot are laid out once as one segment per (node, type of source), so that a call touches only what it returns.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from recsys_ray.core.errors import ArtifactError
from recsys_ray.storage.artifacts import load_arrays

os.environ.setdefault("DGLBACKEND", "pytorch")  # unset, dgl writes a configuration file into the home directory
if TYPE_CHECKING:
    import dgl

PLACEHOLDER = "placeholder"  # edge type of loops that only keep a partition from having no edge at all
GRAPH_JSON = Path("partitions") / "graph.json"
NODES = "nodes.safetensors"
MESSAGES = "messages.safetensors"  # of a partition: what a message over each of its edges counts
_ETYPE = re.compile(r"^s(\d+)_t(\d+)_t(\d+)$")
Relation = tuple[int, int]  # (type of source, type of destination)


def edge_type_name(snapshot: int, source: int, destination: int) -> str:
    """DGL's name of the relation from item type ``source`` to ``destination`` in a snapshot."""
    return f"s{snapshot}_t{source}_t{destination}"


def feature_key(attempt: str, kind: int, feature: str) -> str:
    """Key of a node feature in DGL's store. DGL names shared memory after it alone: the attempt's name keeps apart
    what several runs on one host, or a killed one before, put there."""
    return f"node~t{kind}~{attempt}_{feature}"


@dataclass(frozen=True)
class NodeTable:
    """Where each item lies: the map between gids (rows of the items table) and DGL's numbers.

    DGL renumbers nodes so that a partition is one range, and inside it each type is one range. Attributes:

    - ``type_start`` int64 [types + 1]: gids of type i are ``type_start[i] .. type_start[i + 1]``.
    - ``part`` int16 [items], ``local`` int32 [items]: partition, and number inside the partition.
    - ``part_start`` int64 [parts + 1]: first homogeneous id of each partition.
    - ``gid_of`` int32 [homogeneous ids]: back again; -1 is a padding node.
    - ``typed_shift`` int64 [parts, types]: add it to ``local`` for the id inside the type.
    - ``relations``: of each snapshot, those that have an edge somewhere.
    - ``catalogue`` int64 [edge types, 3]: snapshot (-1: placeholder), source type, destination type.
    """

    type_start: Tensor
    part: Tensor
    local: Tensor
    part_start: Tensor
    gid_of: Tensor
    typed_shift: Tensor
    relations: dict[int, list[Relation]]
    catalogue: Tensor

    @property
    def num_types(self) -> int:
        return len(self.type_start) - 1

    @property
    def num_parts(self) -> int:
        return len(self.part_start) - 1

    def types_of(self, gids: Tensor) -> Tensor:
        """Item type of each gid, int64 [n]."""
        return torch.bucketize(gids, self.type_start[1:], right=True)

    def gids_in(self, part: int) -> Tensor:
        """Gids that a partition owns, in its own order, int64 (padding left out)."""
        inside = self.gid_of[self.part_start[part] : self.part_start[part + 1]].long()
        return inside[inside >= 0]

    @staticmethod
    def load(graph_dir: Path, description: dict) -> NodeTable:
        """From the graph stage's folder and its partitions' JSON (parsed).

        Raises:
            ArtifactError: files are missing or do not belong together.
        """
        num_types = len(description["ntypes"])
        original = load_arrays(graph_dir / NODES)
        if set(original) != {f"t{i}" for i in range(num_types)}:
            raise ArtifactError(f"{graph_dir / NODES} does not belong to {graph_dir / GRAPH_JSON}; run graph again")
        return _node_table(description, [original[f"t{i}"] for i in range(num_types)])


def _node_table(description: dict, original: list[np.ndarray]) -> NodeTable:
    num_types, num_parts = len(original), description["num_parts"]
    ranges = np.array([description["node_map"][f"t{i}"] for i in range(num_types)], np.int64)  # [types, parts, 2]
    sizes = np.array([int((ids >= 0).sum()) for ids in original], np.int64)
    type_start = np.concatenate([[0], np.cumsum(sizes)])
    part_start = np.concatenate([[0], ranges[:, :, 1].max(axis=0)])
    gid_of = np.full(part_start[-1], -1, np.int32)
    part, local = np.zeros(type_start[-1], np.int16), np.zeros(type_start[-1], np.int32)
    typed_shift = np.zeros((num_parts, num_types), np.int64)
    for i, ids in enumerate(original):
        begin = 0
        for p, (low, high) in enumerate(ranges[i]):
            inside = ids[begin : begin + high - low]
            real = inside >= 0
            gids = (inside + type_start[i])[real]
            gid_of[low:high][real] = gids
            part[gids] = p
            local[gids] = np.arange(low, high)[real] - part_start[p]
            typed_shift[p, i] = begin - (low - part_start[p])
            begin += high - low
    catalogue = np.full((len(description["etypes"]), 3), -1, np.int64)
    relations: dict[int, list[Relation]] = {}
    for name, number in description["etypes"].items():
        match = _ETYPE.match(name.split(":")[1])
        if match:
            snapshot, source, destination = (int(text) for text in match.groups())
            catalogue[number] = snapshot, source, destination
            relations.setdefault(snapshot, []).append((source, destination))
    return NodeTable(
        type_start=torch.from_numpy(type_start),
        part=torch.from_numpy(part),
        local=torch.from_numpy(local),
        part_start=torch.from_numpy(part_start),
        gid_of=torch.from_numpy(gid_of),
        typed_shift=torch.from_numpy(typed_shift),
        relations={snapshot: sorted(found) for snapshot, found in relations.items()},
        catalogue=torch.from_numpy(catalogue),
    )


@dataclass(frozen=True)
class SnapshotEdges:
    """In-edges of a partition's own nodes in one snapshot.

    Sources of segment ``node * types + source type`` are ``source[pointer[s] : pointer[s + 1]]`` (gids, int32), and
    ``weight`` (float32) is what their messages count.
    """

    pointer: Tensor
    source: Tensor
    weight: Tensor


class LocalGraph:
    """One partition in this process: DGL's structure, and the layouts of the snapshots last used."""

    def __init__(self, graph: dgl.DGLGraph, graph_dir: Path, table: NodeTable, part: int, keep: int = 2) -> None:
        self._graph, self.table, self.part, self._keep = graph, table, part, keep
        self._weights = torch.from_numpy(
            load_arrays(graph_dir / GRAPH_JSON.parent / f"part{part}" / MESSAGES)["weight"]
        )
        self._snapshots: OrderedDict[int, SnapshotEdges] = OrderedDict()

    def snapshot(self, snapshot: int) -> SnapshotEdges:
        """The layout of a snapshot; made at its first use, the ``keep`` last used ones are kept."""
        if snapshot not in self._snapshots:
            self._snapshots[snapshot] = self._lay_out(snapshot)
            while len(self._snapshots) > self._keep:
                self._snapshots.popitem(last=False)
        self._snapshots.move_to_end(snapshot)
        return self._snapshots[snapshot]

    def _lay_out(self, snapshot: int) -> SnapshotEdges:
        import dgl

        table = self.table
        pointer, indices, edge_ids = self._graph.adj_tensors("csc")
        nodes = int(table.part_start[self.part + 1] - table.part_start[self.part])
        inner = int(pointer[nodes])  # DGL numbers a partition's own nodes before its halo
        indices = indices[:inner].long()
        number, weight = self._graph.edata[dgl.ETYPE].long(), self._weights
        if len(edge_ids):
            number, weight = number[edge_ids[:inner].long()], weight[edge_ids[:inner].long()]
        kept = torch.nonzero(table.catalogue[number, 0] == snapshot).squeeze(1)
        owner = torch.bucketize(kept, pointer[1 : nodes + 1].long(), right=True)
        segment = owner * table.num_types + table.catalogue[number[kept], 1]
        source, weight = table.gid_of[self._graph.ndata[dgl.NID][indices[kept]]], weight[kept]
        if len(segment) > 1 and bool((segment[1:] < segment[:-1]).any()):
            order = torch.argsort(segment, stable=True)
            segment, source, weight = segment[order], source[order], weight[order]
        counts = torch.bincount(segment, minlength=nodes * table.num_types)
        return SnapshotEdges(torch.cat([counts.new_zeros(1), counts.cumsum(0)]), source, weight)

    def sample(
        self, local: Tensor, snapshot: int, fanout: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw in-neighbours of this partition's nodes.

        Args:
            local: int64 [n], numbers inside the partition.
            fanout: at most so many per node and relation, without replacement; -1: all.

        Returns:
            counts int64 [types, n], sources int32 [counts.sum()] (gids) and their messages' weights (float32), type of
            source by type of source, and inside it node by node.
        """
        edges = self.snapshot(snapshot)
        types = self.table.num_types
        segments = (local.unsqueeze(0) * types + torch.arange(types).unsqueeze(1)).reshape(-1)
        start = edges.pointer[segments]
        counts, picks = draw(start, edges.pointer[segments + 1] - start, fanout, generator)
        return counts.view(types, -1), edges.source[picks], edges.weight[picks]


def draw(start: Tensor, degree: Tensor, fanout: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Uniform subsets of segments, without replacement (Floyd's algorithm, all segments at once).

    Args:
        start: int64 [s], first position of each segment.
        degree: int64 [s], length of each segment.
        fanout: size of the subsets; shorter segments are taken whole; -1: all segments are.

    Returns:
        counts int64 [s] and positions int64 [counts.sum()], segment by segment.
    """
    counts = degree.clamp(max=fanout) if fanout >= 0 else degree
    first = counts.cumsum(0) - counts
    picks = torch.repeat_interleave(start - first, counts)
    picks += torch.arange(len(picks))
    large = torch.nonzero(degree > fanout).squeeze(1) if fanout > 0 else degree.new_empty(0)
    if len(large) == 0:
        return counts, picks
    length = degree[large]
    uniform = torch.rand(fanout, len(large), generator=generator, dtype=torch.float64)
    chosen = length.new_empty(fanout, len(large))
    for step in range(fanout):
        last = length - fanout + step  # the candidate that this step may take in place of a repeated draw
        candidate = (uniform[step] * (last + 1)).long()
        if step:
            repeated = (chosen[:step] == candidate).any(dim=0)
            candidate = torch.where(repeated, last, candidate)
        chosen[step] = candidate
    where = first[large].unsqueeze(0) + torch.arange(fanout).unsqueeze(1)
    picks[where.reshape(-1)] = (start[large].unsqueeze(0) + chosen).reshape(-1)
    return counts, picks
