"""What training reads from the partitioned graph: neighbours, features and edges, by gid. No DGL type leaves this file.

Use a client on a single thread of a process that ends with the training: DGL keeps its connections per thread, and when
its process ends, after all results are in, it prints "User pressed Ctrl+C" or stops with "double free".
"""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recsys_ray.core.errors import UserError
from recsys_ray.graph.dgl.sampling import GRAPH_JSON, LocalGraph, NodeTable, Relation, feature_key


class Neighbors(NamedTuple):
    """Edges of one relation: ``dst_pos`` int64 [e], ascending positions in the query; ``src_gid`` int64 [e];
    ``weight`` float32 [e], what a message counts (:func:`recsys_ray.graph.pairs.message_weights`)."""

    dst_pos: Tensor
    src_gid: Tensor
    weight: Tensor


SampledNeighbors = dict[Relation, Neighbors]


class GraphClient:
    """One client of the partition servers.

    Attributes:
        table: where every item lies (types, partitions).
        part: the partition on this host.
        distributed: DGL's DistGraph, for this package alone.
        name: the attempt's name, which keeps shared memory of several attempts on one host apart.
    """

    def __init__(self, graph: object, name: str, graph_dir: Path, table: NodeTable, part: int) -> None:
        self.distributed, self.name, self.table, self.part = graph, name, table, part
        self._local = LocalGraph(graph.local_partition, graph_dir, table, part)  # type: ignore[attr-defined]

    @classmethod
    def connect(cls, address: str, graph_dir: Path) -> GraphClient:
        """Connect to the servers; returns when every client has.

        Args:
            address: :attr:`PartitionServers.address`.
            graph_dir: the graph stage's folder.

        Raises:
            UserError: no server runs on this host.
        """
        from recsys_ray.graph.dgl.servers import write_ip_config

        os.environ.update(DGL_DIST_MODE="distributed", DGL_ROLE="client", DGL_NUM_SERVER="1", DGL_NUM_SAMPLER="0")
        import dgl.distributed
        from dgl.distributed import rpc_client

        from recsys_ray.graph.dgl import service  # noqa: F401 - registers the request

        known = json.loads(address)
        mine = rpc_client.local_ip4_addr_list()
        if not any(ip in mine for ip in known["hosts"]):
            raise UserError(
                "this worker runs on a host without a graph partition; set as many partitions as hosts "
                "(graph.partitions) and as many workers (hgnn.workers, two_tower.workers)"
            )
        description = json.loads((Path(graph_dir) / GRAPH_JSON).read_text(encoding="utf-8"))
        table = NodeTable.load(Path(graph_dir), description)
        ip_config = write_ip_config(known["servers"])
        try:
            with redirect_stdout(io.StringIO()):
                dgl.distributed.initialize(ip_config)
                graph = dgl.distributed.DistGraph(known["name"])
        finally:
            Path(ip_config).unlink(missing_ok=True)
        return cls(graph, known["name"], Path(graph_dir), table, int(graph.get_partition_book().partid))

    def relations(self, snapshot: int) -> list[Relation]:
        """(source type, destination type) of the relations that have an edge anywhere in a snapshot."""
        return self.table.relations.get(snapshot, [])

    def local_gids(self) -> Tensor:
        """Gids that this host's partition owns, int64, ascending by type."""
        return self.table.gids_in(self.part)

    def sample(
        self, gids: Tensor, snapshot: int, fanout: int, generator: torch.Generator | None = None
    ) -> SampledNeighbors:
        """Draw in-neighbours: uniform, at most ``fanout`` per item and relation, without replacement, fresh each call.

        Args:
            gids: int64 [n]; any items, repeats allowed. Faster if ascending by type (sorted gids are).
            snapshot: index of the snapshot.
            fanout: -1 gives all neighbours.
            generator: decides the draw, also of other partitions; default: torch's global one.

        Returns:
            For each relation of :meth:`relations`, its edges (perhaps none).
        """
        kinds = self.table.types_of(gids)
        order = None
        if len(kinds) > 1 and bool((kinds[1:] < kinds[:-1]).any()):
            order = torch.argsort(kinds, stable=True)
            gids = gids[order]
        begin = [0, *torch.bincount(kinds, minlength=self.table.num_types).cumsum(0).tolist()]
        counts, source, weight = self._in_neighbors(gids, snapshot, fanout, generator)
        ends = torch.cat([counts.new_zeros(1), counts.reshape(-1).cumsum(0)])
        position = torch.arange(len(gids)) if order is None else order
        sampled: SampledNeighbors = {}
        for i, j in self.relations(snapshot):
            low, high = (int(ends[i * len(gids) + begin[k]]) for k in (j, j + 1))
            dst_pos = torch.repeat_interleave(position[begin[j] : begin[j + 1]], counts[i, begin[j] : begin[j + 1]])
            sampled[i, j] = Neighbors(dst_pos, source[low:high].long(), weight[low:high])
        return sampled

    def _in_neighbors(
        self, gids: Tensor, snapshot: int, fanout: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """counts, sources and weights, as :meth:`LocalGraph.sample`, over all partitions."""
        table = self.table
        local = table.local[gids].long()
        if table.num_parts == 1:
            return self._local.sample(local, snapshot, fanout, generator)
        from dgl.distributed import rpc

        from recsys_ray.graph.dgl.service import SampleRequest

        part = table.part[gids]
        seeds = torch.randint(2**62, (table.num_parts,), generator=generator).tolist()
        where = {p: torch.nonzero(part == p).squeeze(1) for p in range(table.num_parts)}
        others = [p for p in where if p != self.part and len(where[p])]
        pending = None
        if others:  # sent first, so that the other hosts work while this one does
            requests = [(p, SampleRequest(local[where[p]], snapshot, fanout, seeds[p])) for p in others]
            pending = rpc.send_requests_to_machine(requests)
        answers = {}
        if len(where[self.part]):
            answers[self.part] = self._local.sample(local[where[self.part]], snapshot, fanout, generator)
        if pending is not None:
            received = zip(others, rpc.recv_responses(pending), strict=True)
            answers.update((p, (r.counts, r.source, r.weight)) for p, r in received)
        return _interleave(where, answers, table.num_types, len(gids))

    def features(self, name: str, gids: Tensor) -> Tensor:
        """Rows of a node feature ('text', or one of the servers' ``features``), float32 [n, d] in order of ``gids``."""
        table = self.table
        kinds = table.types_of(gids)
        counts = torch.bincount(kinds, minlength=table.num_types).tolist()
        ordered = len(kinds) < 2 or not bool((kinds[1:] < kinds[:-1]).any())
        order = None if ordered else torch.argsort(kinds, stable=True)
        typed = gids if order is None else gids[order]
        rows: Tensor | None = None
        begin = 0
        for kind, count in enumerate(counts):
            found = self._typed_features(name, kind, typed[begin : begin + count])
            if rows is None:
                rows = torch.empty(len(gids), found.shape[1])
            if order is None:
                rows[begin : begin + count] = found
            else:
                rows[order[begin : begin + count]] = found.float()
            begin += count
        assert rows is not None
        return rows

    def _typed_features(self, name: str, kind: int, gids: Tensor) -> Tensor:
        """Rows of items of one type, in the precision that they are stored in."""
        table = self.table
        store = self.distributed._client  # type: ignore[attr-defined]
        key = feature_key(self.name, kind, name)
        if key not in store.data_store:
            raise KeyError(f"no node feature {name!r}")
        if len(gids) == 0:
            return store.data_store[key][:0]
        ids = self.typed_ids(gids, kind)
        if table.num_parts == 1:
            return torch.index_select(store.data_store[key], 0, ids)
        return store.pull(key, ids)

    def typed_ids(self, gids: Tensor, kind: int) -> Tensor:
        """DGL's ids inside the node type ``t{kind}`` of items that are all of that type, int64 [n]."""
        return self.table.local[gids].long() + self.table.typed_shift[self.table.part[gids].long(), kind]

    def rows_by_type(self, gids: Tensor) -> Iterator[tuple[int, slice]]:
        """Where the items of each type stand in ascending ``gids``; types without any are left out."""
        bounds = torch.searchsorted(gids, self.table.type_start).tolist()
        for kind, (begin, end) in enumerate(itertools.pairwise(bounds)):
            if begin < end:
                yield kind, slice(begin, end)

    def edges(self, snapshot: int) -> dict[Relation, tuple[Tensor, Tensor, Tensor]]:
        """This partition's edges of a snapshot (their destinations are owned here): relation -> (src_gid, dst_gid,
        weight), int64 and float32, every edge once over all partitions."""
        table = self.table
        layout = self._local.snapshot(snapshot)
        own = table.gid_of[table.part_start[self.part] : table.part_start[self.part + 1]].long()
        counts = layout.pointer[1:] - layout.pointer[:-1]
        segment = torch.repeat_interleave(torch.arange(len(counts)), counts)
        dst = own[segment // table.num_types]
        source_kind, kind = segment % table.num_types, table.types_of(dst)
        found = {}
        for i, j in self.relations(snapshot):
            here = (source_kind == i) & (kind == j)
            found[i, j] = layout.source[here].long(), dst[here], layout.weight[here]
        return found

    def barrier(self) -> None:
        """Wait for every client."""
        from dgl.distributed import rpc

        rpc.client_barrier()

    def close(self) -> None:
        """Leave. Waits until every client does; the servers end after that."""
        from dgl.distributed.dist_context import exit_client

        with redirect_stdout(io.StringIO()):
            exit_client()


def _interleave(
    where: dict[int, Tensor], answers: dict[int, tuple[Tensor, Tensor, Tensor]], types: int, nodes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Partitions' answers in the order of the query: counts [types, nodes], sources and weights, type by type, node by
    node."""
    counts = torch.zeros(types, nodes, dtype=torch.int64)
    for p, (part_counts, *_) in answers.items():
        counts[:, where[p]] = part_counts
    first = (counts.reshape(-1).cumsum(0) - counts.reshape(-1)).view(types, nodes)
    source = torch.empty(int(counts.sum()), dtype=torch.int32)
    weight = torch.empty(len(source))
    for p, (part_counts, found, counted) in answers.items():
        flat = part_counts.reshape(-1)
        shift = first[:, where[p]].reshape(-1) - (flat.cumsum(0) - flat)
        place = torch.repeat_interleave(shift, flat) + torch.arange(len(found))
        source[place], weight[place] = found, counted
    return counts, source, weight


@contextmanager
def partition_client(
    graph_dir: Path, rank: int, world: int, features: Mapping[str, Path] | None = None
) -> Iterator[GraphClient]:
    """In a worker of Ray Train: the first one starts the partition servers of this attempt, every one connects."""
    import ray
    from ray.train.collective import broadcast_from_rank_zero

    from recsys_ray.graph.dgl.servers import PartitionServers

    nodes: list[Any] = [ray.get_runtime_context().get_node_id()]
    if world > 1:
        mine, nodes = nodes[0], [None] * world
        torch.distributed.all_gather_object(nodes, mine)
    servers = PartitionServers(graph_dir, clients=world, hosts=nodes, features=features) if rank == 0 else None
    client = GraphClient.connect(broadcast_from_rank_zero(servers.address if servers else None), graph_dir)
    try:
        yield client
        client.close()
    finally:
        if servers is not None:
            servers.stop()
