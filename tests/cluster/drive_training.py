"""Runs on the first of two hosts: trains HGNN and two-tower over two partitions, then the same on one host alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from recsys_ray.cluster.session import ray_session
from recsys_ray.config import Config, RayConfig
from recsys_ray.core.progress import Progress
from recsys_ray.data.ingest import ingest
from recsys_ray.data.tables import Tables
from recsys_ray.demo.world import spec_for
from recsys_ray.demo.write import write_demo
from recsys_ray.graph.stage import build_graph
from recsys_ray.hgnn.outputs import load_embeddings
from recsys_ray.hgnn.stage import train_hgnn
from recsys_ray.storage.artifacts import Artifact, load_arrays, publish, save_arrays
from recsys_ray.storage.outputs import work_folder
from recsys_ray.two_tower.stage import train_two_tower

EVENTS, TEXT_DIM = 6_000, 32
EPOCHS = 4  # of one worker; two workers take as many steps in twice the epochs
QUIET = Progress(quiet=True)


def settings(root: Path, workers: int) -> Config:
    tables = {name: str(root / "demo" / name) for name in ("items", "interactions", "users")}
    return Config.model_validate({
        "data": {**tables, "now": "2026-01-02", "shards": 4},
        "graph": {"window_days": 120, "cuts": 2, "first_cut": 0.4, "partitions": workers},
        "hgnn": {"out_dim": 32, "signature_dim": 32, "epochs": EPOCHS * workers, "patience": 99,
                 "batch_size": 256, "min_edges": 2000, "learning_rate": 0.01},
        "two_tower": {"layers": [64, 32], "epochs": EPOCHS * workers, "patience": 99, "batch_size": 256,
                      "history": 20, "ablation": False},
    })  # fmt: skip


def finish(work: Path, counts: dict[str, Any]) -> Artifact:
    """Publish what a stage left in its work folder."""
    return publish(work, work.parent.name, work.name, counts=counts)


def text_vectors(root: Path, tables: Artifact) -> Artifact:
    """Stands for featurize: what it would write, without an encoder. The vectors tell language and categories,
    and as much noise."""
    work = work_folder(root / "featurize", "featurize")
    random, words = np.random.default_rng(0), dict[str, np.ndarray]()
    rows = Tables(tables.path).items("language", "categories").to_pylist()
    vectors = random.normal(size=(len(rows), TEXT_DIM))
    for vector, row in zip(vectors, rows, strict=True):
        for word in (row["language"], *(row["categories"] or ())):
            vector += words.setdefault(word, random.normal(size=TEXT_DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    save_arrays(work / "text.safetensors", {"vector": vectors.astype(np.float16)})
    return finish(work, {"text_dim": TEXT_DIM})


def train(root: Path, tables: Artifact, text: Artifact, hosts: int) -> dict[str, Any]:
    """Graph, HGNN and two-tower on so many hosts, a worker on each; what came out."""
    config, runs = settings(root, hosts), root / f"on-{hosts}"
    work = work_folder(runs / "graph", "graph")
    graph = finish(work, build_graph(config, tables.path, text.path, work, QUIET, hosts, hosts))
    work = work_folder(runs / "hgnn", "hgnn")
    hgnn = finish(work, train_hgnn(config, tables, text, graph, work, QUIET, hosts, hosts))
    work = work_folder(runs / "two_tower", "two_tower")
    towers = finish(work, train_two_tower(config, tables, text, graph, hgnn, work, QUIET, hosts, hosts))
    items = sum(tables.counts["items_per_type"])
    parts = sorted((hgnn.path / "embeddings" / "test").glob("part-*.safetensors"))
    owned = [load_arrays(part)["gid"].tolist() for part in parts]
    vectors = {s: load_embeddings(hgnn.path, s, items).numpy() for s in ("cut0", "cut1", "valid", "test", "serve")}
    trained = {"hgnn": hgnn.path, "two_tower": towers.path / "hgnn"}
    histories = {
        name: json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for name, folder in trained.items()
    }
    return {
        "items": items,
        "workers": [hgnn.counts["workers"], towers.counts["workers"]],
        "nodes_per_partition": graph.counts["nodes_per_partition"],
        "owned": owned,
        "unit": [bool(np.allclose(np.linalg.norm(v, axis=1), 1, atol=1e-4)) for v in vectors.values()],
        "item_vectors": [
            list(load_arrays(towers.path / "hgnn" / "items" / f"{s}.safetensors")["vector"].shape)
            for s in ("test", "serve")
        ],
        "histories": histories,
    }


def main(root: Path) -> None:
    with ray_session(RayConfig(address="auto")):
        write_demo(root / "demo", spec_for(EVENTS, 0), QUIET)
        work = work_folder(root / "ingest", "ingest")
        tables = finish(work, ingest(settings(root, 1), work, QUIET))
        text = text_vectors(root, tables)
        report = {str(hosts): train(root, tables, text, hosts) for hosts in (2, 1)}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
