"""Runs on the first of two hosts: builds a graph in two partitions and looks at it from both hosts."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import ray
import torch
from graph_world import small_config, true_edges, write_world
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from recsys_ray.cluster.session import ray_session
from recsys_ray.config import RayConfig
from recsys_ray.core.progress import Progress
from recsys_ray.graph.dgl.client import GraphClient
from recsys_ray.graph.dgl.servers import PartitionServers
from recsys_ray.graph.stage import build_graph
from recsys_ray.storage.artifacts import load_arrays


@ray.remote(num_cpus=1, max_calls=1)
def look(address: str, graph: Path, featurize: Path, snapshots: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that one host sees, compared with the truth."""
    client = GraphClient.connect(address, graph)
    items = len(client.table.part)
    gids = torch.randperm(items, generator=torch.Generator().manual_seed(client.part))
    seen: dict[str, Any] = {"part": client.part, "local": client.local_gids().tolist(), "neighbours": [], "edges": []}
    for s in snapshots:
        truth = true_edges(graph, s["name"])
        sampled = client.sample(gids, s["index"], -1)
        found = {
            (src, int(gids[position])): weight
            for n in sampled.values()
            for position, src, weight in zip(*(column.tolist() for column in n), strict=True)
        }
        seen["neighbours"].append(found.keys() == truth.keys())
        seen["neighbours"].append(all(abs(found[edge] - truth[edge]) < 1e-6 for edge in truth))
        few = client.sample(gids, s["index"], 2, torch.Generator().manual_seed(1))
        again = client.sample(gids, s["index"], 2, torch.Generator().manual_seed(1))
        seen["neighbours"].append(all(torch.equal(few[r].src_gid, again[r].src_gid) for r in few))
        seen["neighbours"].append(
            all((int(a), int(gids[b])) in truth for n in few.values() for b, a, _ in zip(*n, strict=True))
        )
        seen["edges"].append(
            sorted(
                e
                for src, dst, _ in client.edges(s["index"]).values()
                for e in zip(src.tolist(), dst.tolist(), strict=True)
            )
        )
    text = torch.from_numpy(load_arrays(featurize / "text.safetensors")["vector"]).float()
    seen["text"] = torch.equal(client.features("text", gids), text[gids])
    away = torch.nonzero(client.table.part != client.part).squeeze(1)
    seen["remote_text"] = torch.equal(client.features("text", away), text[away]) and len(away) > 0
    client.sample(away, 0, 5)
    begin = time.perf_counter()
    client.sample(away, 0, 5)
    seen["remote_ms"] = 1000 * (time.perf_counter() - begin)
    client.close()
    return seen


def main(root: Path) -> None:
    with ray_session(RayConfig(address="auto")):
        config = small_config(max_neighbors=20)
        ingest, featurize = write_world(root)
        graph = root / "graph"
        counts = build_graph(config, ingest, featurize, graph, Progress(quiet=True), cpus=2, num_hosts=2)
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        with PartitionServers(graph, clients=2, hosts=nodes) as servers:
            seen = ray.get([
                look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                    servers.address, graph, featurize, counts["snapshots"])
                for node in nodes
            ], timeout=200)  # fmt: skip
        truth = [sorted(true_edges(graph, s["name"])) for s in counts["snapshots"]]
        edges = zip(*(s.pop("edges") for s in seen), strict=True)
        together = [sorted([*map(tuple, a), *map(tuple, b)]) for a, b in edges]
        report = {"method": counts["partition_method"], "edges": together == truth, "seen": seen}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
