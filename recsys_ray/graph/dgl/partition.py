"""Turns edges and text vectors into DGL partitions of one heterograph that holds every snapshot.

DGL splits the graph (METIS), renumbers it and writes its own format. Its ``partition_graph`` is not used, because it
fails if a partition has no node or no edge of some type, which happens with small item types and quiet snapshots.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from recsys_ray.cluster.pool import result_of
from recsys_ray.core.errors import ArtifactError
from recsys_ray.graph.dgl.sampling import GRAPH_JSON, MESSAGES, NODES, PLACEHOLDER, edge_type_name
from recsys_ray.graph.pairs import message_weights, strengths
from recsys_ray.storage.artifacts import load_arrays, save_arrays

os.environ.setdefault("DGLBACKEND", "pytorch")
_NAME = "items"


class _Edges(NamedTuple):
    """Of all snapshots."""

    src: np.ndarray  # int32
    dst: np.ndarray  # int32
    etype: np.ndarray  # int32, number of the edge type
    weight: np.ndarray  # float32, of messages


def partition_graph(
    edges: Sequence[tuple[int, Path]], ntype: np.ndarray, text: Path, graph_dir: Path, parts: int, seed: int
) -> dict[str, Any]:
    """Run :func:`write_partitions` in a Ray task whose process ends with it: DGL keeps memory and OpenMP threads."""
    import ray

    task = ray.remote(num_cpus=1, max_calls=1, max_retries=1)(write_partitions)
    return result_of(task.remote(list(edges), ntype, text, graph_dir, parts, seed))


def write_partitions(
    edges: Sequence[tuple[int, Path]], ntype: np.ndarray, text: Path, graph_dir: Path, parts: int, seed: int
) -> dict[str, Any]:
    """Write ``partitions/`` and ``nodes.safetensors`` below ``graph_dir``.

    Args:
        edges: (index of the snapshot, Parquet file of src, dst, weight).
        ntype: int16 [items], item type of each gid; ascending.
        text: safetensors with ``vector`` float16 [items, text_dim].
        parts: number of partitions.

    Returns:
        ``method`` ('whole', 'metis' or 'random') and ``nodes_per_part``.

    Raises:
        ArtifactError: the text vectors are of another number of items.
    """
    vectors = load_arrays(text)["vector"]
    if len(vectors) != len(ntype):
        raise ArtifactError(f"{text} holds {len(vectors)} vectors for {len(ntype)} items; run featurize again")
    num_types = int(ntype.max()) + 1
    found, names = _read_edges(edges, ntype, num_types)
    with open(os.devnull, "w") as quiet, redirect_stdout(quiet):  # noqa: PTH123 - dgl prints its every step
        assigned, method = _assign(found.src, found.dst, ntype, parts, seed)
        types, gids, assigned = _pad(ntype, assigned, parts)
        found, names = _add_loops(found, names, types, assigned, parts)
        _write(graph_dir, found, names, (types, gids, assigned), parts, method, vectors)
    return {"method": method, "nodes_per_part": np.bincount(assigned[gids >= 0], minlength=parts).tolist()}


def _read_edges(
    edges: Sequence[tuple[int, Path]], ntype: np.ndarray, num_types: int
) -> tuple[_Edges, list[tuple[str, str, str]]]:
    """All edges, and the canonical names of the edge types that exist."""
    sources, destinations, keys = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
    weights = [np.zeros(0, np.float32)]
    for snapshot, path in edges:
        table = pq.read_table(path, columns=["src", "dst", "weight"])
        src, dst, weight = (column.to_numpy() for column in table.columns)
        sources.append(src)
        destinations.append(dst)
        weights.append(message_weights(src, dst, weight, strengths(dst, weight, len(ntype))))
        keys.append((snapshot * num_types + ntype[src].astype(np.int64)) * num_types + ntype[dst])
    present, etype = np.unique(np.concatenate(keys), return_inverse=True)
    names = []
    for key in present.tolist():
        snapshot, source, destination = key // num_types**2, key // num_types % num_types, key % num_types
        names.append((f"t{source}", edge_type_name(snapshot, source, destination), f"t{destination}"))
    made = np.concatenate(sources), np.concatenate(destinations), etype.astype(np.int32), np.concatenate(weights)
    return _Edges(*made), names


def _assign(src: np.ndarray, dst: np.ndarray, ntype: np.ndarray, parts: int, seed: int) -> tuple[np.ndarray, str]:
    """Partition of each item, int64 [items], and how it was found."""
    if parts == 1:
        return np.zeros(len(ntype), np.int64), "whole"
    found = None
    if len(src):
        import dgl
        from dgl.partition import metis_partition_assignment

        pairs = np.unique(
            src.astype(np.int64) * len(ntype) + dst
        )  # a pair counts once, however many snapshots it is in
        ends = torch.from_numpy(pairs // len(ntype)), torch.from_numpy(pairs % len(ntype))
        union = dgl.graph(ends, num_nodes=len(ntype))
        try:
            found = metis_partition_assignment(union, parts, balance_ntypes=torch.from_numpy(ntype.astype(np.int64)))
        except dgl.DGLError:
            found = None
    if found is not None and len(torch.unique(found)) == parts:
        return found.numpy().astype(np.int64), "metis"
    return np.random.default_rng(seed).permutation(len(ntype)) % parts, "random"


def _pad(ntype: np.ndarray, assigned: np.ndarray, parts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give every partition a node of every type; DGL cannot share an empty array between processes.

    Returns types (int64), gids (int64, -1 for padding) and partitions (int64) of all nodes, items first.
    """
    num_types = int(ntype.max()) + 1
    present = np.bincount(assigned * num_types + ntype, minlength=parts * num_types).reshape(parts, num_types)
    part, kind = np.nonzero(present == 0)
    types = np.concatenate([ntype.astype(np.int64), kind])
    gids = np.concatenate([np.arange(len(ntype)), np.full(len(kind), -1)])
    return types, gids, np.concatenate([assigned, part])


def _add_loops(
    edges: _Edges, names: list[tuple[str, str, str]], types: np.ndarray, assigned: np.ndarray, parts: int
) -> tuple[_Edges, list[tuple[str, str, str]]]:
    """A loop under an edge type of its own, never sampled, where a partition would have no edge at all."""
    empty = np.nonzero(np.bincount(assigned[edges.dst], minlength=parts) == 0)[0]
    if len(empty) == 0:
        return edges, names
    nodes = np.array([np.nonzero((assigned == p) & (types == 0))[0][0] for p in empty], np.int32)
    loops = _Edges(nodes, nodes, np.full(len(nodes), len(names), np.int32), np.zeros(len(nodes), np.float32))
    joined = _Edges(*(np.concatenate(columns) for columns in zip(edges, loops, strict=True)))
    return joined, [*names, ("t0", PLACEHOLDER, "t0")]


def _write(
    graph_dir: Path,
    edges: _Edges,
    names: list[tuple[str, str, str]],
    nodes: tuple[np.ndarray, np.ndarray, np.ndarray],
    parts: int,
    method: str,
    vectors: np.ndarray,
) -> None:
    import dgl
    from dgl.data.utils import save_tensors
    from dgl.distributed.partition import _dump_part_config, _save_graphs

    types, gids, assigned = nodes
    pieces = _split(edges, types, assigned, parts)
    kind, weight = torch.from_numpy(edges.etype.astype(np.int64)), torch.from_numpy(edges.weight)
    num_types = int(types.max()) + 1
    type_start = np.searchsorted(types[gids >= 0], np.arange(num_types + 1))
    node_map: dict[str, list[list[int]]] = {f"t{i}": [] for i in range(num_types)}
    edge_map: dict[tuple[str, str, str], list[list[int]]] = {name: [] for name in names}
    original: dict[str, list[np.ndarray]] = {f"t{i}": [] for i in range(num_types)}
    description = {
        "graph_name": _NAME, "num_nodes": len(types), "num_edges": len(edges[0]), "part_method": method,
        "num_parts": parts, "halo_hops": 1, "node_map": node_map, "edge_map": edge_map,
        "ntypes": {f"t{i}": i for i in range(num_types)}, "etypes": {name: i for i, name in enumerate(names)},
    }  # fmt: skip
    node_cursor = edge_cursor = 0
    folder = graph_dir / GRAPH_JSON.parent
    for p in range(parts):
        piece = pieces.pop(p)
        inner = piece.ndata["inner_node"].bool()
        owned = piece.ndata.pop("orig_id")[inner].numpy()  # index into ``nodes``, in DGL's new order
        features: dict[str, Tensor] = {}
        for i in range(num_types):
            own_gids = gids[owned[types[owned] == i]]
            node_map[f"t{i}"].append([node_cursor, node_cursor + len(own_gids)])
            node_cursor += len(own_gids)
            original[f"t{i}"].append(np.where(own_gids >= 0, own_gids - type_start[i], -1))
            features[f"t{i}/gid"] = torch.from_numpy(own_gids)
            rows = vectors[own_gids].astype(np.float32)
            rows[own_gids < 0] = 0
            features[f"t{i}/text"] = torch.from_numpy(rows)
        original_edge = piece.edata.pop("orig_id")
        piece.edata[dgl.ETYPE] = kind[original_edge]
        per_type = torch.bincount(piece.edata[dgl.ETYPE][piece.edata["inner_edge"].bool()], minlength=len(names))
        for name, count in zip(names, per_type.tolist(), strict=True):
            edge_map[name].append([edge_cursor, edge_cursor + count])
            edge_cursor += count
        (folder / f"part{p}").mkdir(parents=True, exist_ok=True)
        save_tensors(str(folder / f"part{p}" / "node_feat.dgl"), features)
        save_tensors(str(folder / f"part{p}" / "edge_feat.dgl"), {})
        save_arrays(folder / f"part{p}" / MESSAGES, {"weight": weight[original_edge].numpy()})
        _save_graphs(str(folder / f"part{p}" / "graph.dgl"), [piece], formats=["csc"], sort_etypes=False)
        description[f"part-{p}"] = {  # relative to the JSON: the folder may be moved
            "node_feats": f"part{p}/node_feat.dgl",
            "edge_feats": f"part{p}/edge_feat.dgl",
            "part_graph": f"part{p}/graph.dgl",
        }
    save_arrays(graph_dir / NODES, {name: np.concatenate(ids) for name, ids in original.items()})
    _dump_part_config(str(graph_dir / GRAPH_JSON), description)


def _split(edges: _Edges, types: np.ndarray, assigned: np.ndarray, parts: int) -> dict[int, Any]:
    """DGL's partitions with one hop of halo, by number. ``orig_id`` of a node or edge is its number here."""
    import dgl
    from dgl.partition import partition_graph_with_halo

    src, dst, kind = (torch.from_numpy(column.astype(np.int64)) for column in edges[:3])
    node_types = torch.from_numpy(types)
    if parts > 1:
        graph = dgl.graph((src, dst), num_nodes=len(types))
        graph.ndata[dgl.NTYPE], graph.edata[dgl.ETYPE] = node_types, kind
        pieces, _, _ = partition_graph_with_halo(graph, torch.from_numpy(assigned), 1, reshuffle=True)
        for piece in pieces.values():
            piece.ndata[dgl.NTYPE] = node_types[piece.ndata["orig_id"]]
        return pieces
    order = torch.argsort(kind, stable=True)  # edges of one type are one range, as after DGL's own renumbering
    whole = dgl.graph((src[order], dst[order]), num_nodes=len(types))
    whole.ndata[dgl.NTYPE] = node_types
    whole.ndata["orig_id"] = whole.ndata[dgl.NID] = torch.arange(len(types))
    whole.edata["orig_id"], whole.edata[dgl.EID] = order, torch.arange(len(kind))
    whole.ndata["inner_node"] = torch.ones(len(types), dtype=torch.uint8)
    whole.edata["inner_edge"] = torch.ones(len(kind), dtype=torch.uint8)
    return {0: whole}
