"""The HGNN stage: Ray Train workers over the DGL partitions train the model, then embed all items on all snapshots."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recsys_ray.cluster.train import Checkpoints, Worker, place_in_partition, run_workers
from recsys_ray.config import Config, HgnnConfig
from recsys_ray.core.errors import ArtifactError
from recsys_ray.core.progress import Progress
from recsys_ray.core.seeds import seed_from
from recsys_ray.data.tables import Tables
from recsys_ray.graph.dgl.client import GraphClient, partition_client
from recsys_ray.graph.dgl.store import PartitionStore
from recsys_ray.graph.edges import EDGES, read_edges, told_by_texts
from recsys_ray.graph.pairs import strengths
from recsys_ray.graph.snapshots import Snapshot, earlier_snapshot, snapshots_of, training_snapshot
from recsys_ray.graph.users import load_users
from recsys_ray.hgnn.blocks import ItemTypes, LayerStore
from recsys_ray.hgnn.encoder import Hgnn, make_hgnn
from recsys_ray.hgnn.inference import LocalStore, embed_items
from recsys_ray.hgnn.signature import SignedSource, item_signatures
from recsys_ray.hgnn.training import (
    EdgeTrainer,
    Graph,
    by_users,
    neighbourhoods_of,
    plan_edges,
    train_epochs,
    unknown_edges,
)
from recsys_ray.storage.artifacts import SCRATCH, Artifact, save_arrays, write_json

_SECONDS = "seconds.json"
_REPORT_EVERY = 5  # steps


def train_hgnn(
    config: Config, ingest: Artifact, featurize: Artifact, graph: Artifact, out: Path, progress: Progress, cpus: int,
    hosts: int,
) -> dict[str, Any]:  # fmt: skip
    """Train on the newest training graph (or take ``hgnn.weights``), embed all items on all snapshots, into ``out``
    (docs/architecture.md).

    An interrupted run continues at its last epoch.

    Raises:
        ArtifactError: the given weights are of another shape.
    """
    if config.hgnn.weights:
        _take_weights(config.hgnn, featurize.counts["text_dim"], len(ingest.counts["item_types"]), out)
    snapshots = snapshots_of(graph.counts)
    workers = config.hgnn.workers or hosts
    spec = _Spec(
        config=config.hgnn,
        seed=seed_from(config.seed, "hgnn"),
        graph=graph.path.resolve(),
        out=out.resolve(),
        starts=[0, *itertools.accumulate(ingest.counts["items_per_type"])],
        ingest=ingest.path.resolve(),
        text_dim=featurize.counts["text_dim"],
        snapshots=snapshots,
    )
    with progress.task("training and embedding", unit="steps", may_stop_early=True) as task:
        run_workers(
            _run_worker,
            spec,
            name=f"hgnn-{out.name}",
            seed=spec.seed,
            workers=workers,
            cpus=max(1, cpus // workers),
            scratch=out / SCRATCH,
            task=task,
        )
    history = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return {
        "epochs": len(history),
        "training_seconds": json.loads((out / SCRATCH / _SECONDS).read_text(encoding="utf-8")),
        "workers": workers,
        "out_dim": config.hgnn.out_dim,
        "last": history[-1:],
    }


def _take_weights(config: HgnnConfig, text_dim: int, types: int, out: Path) -> None:
    """Copy given weights into ``out``, with no history of epochs."""
    assert config.weights
    model = make_hgnn(text_dim, config, ItemTypes(torch.zeros(types + 1, dtype=torch.int64)))
    try:
        model.load_state_dict(load_file(config.weights))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(
            f"hgnn.weights: {config.weights} does not fit: {str(error).splitlines()[-1].strip()}; text encoder, "
            "hidden_dim, out_dim, signature_dim and weights_by must be the same as in its training"
        ) from error
    save_file(model.state_dict(), out / "model.safetensors")
    (out / SCRATCH).mkdir(exist_ok=True)
    write_json(out / SCRATCH / _SECONDS, 0.0)
    write_json(out / "metrics.json", [])


@dataclass(frozen=True)
class _Spec:
    """The workers' specification."""

    config: HgnnConfig
    seed: int
    graph: Path
    out: Path
    starts: list[int]  # gids: see ItemTypes
    ingest: Path
    text_dim: int
    snapshots: list[Snapshot]


def _run_worker(worker: Worker, spec: _Spec) -> None:
    with partition_client(spec.graph, worker.rank, worker.world) as client:
        model = make_hgnn(spec.text_dim, spec.config, ItemTypes(torch.tensor(spec.starts)))
        run = _Run(worker, spec, model, client)
        if spec.config.weights:
            model.load_state_dict(load_file(spec.out / "model.safetensors"))
        else:
            run.train()
        for snapshot in spec.snapshots:
            run.embed(snapshot)


class _Run:
    """Training and embedding of one worker."""

    def __init__(self, worker: Worker, spec: _Spec, model: Hgnn, client: GraphClient) -> None:
        self.worker, self.spec, self.model, self.client = worker, spec, model, client
        self.place, self.sharing = place_in_partition(client.part, worker.rank, worker.world)
        ids = Tables(spec.ingest).item_ids.to_pylist()
        packed = torch.from_numpy(item_signatures(ids, spec.config.signature_dim).copy())
        self.source = SignedSource(client, packed, spec.config.signature_dim)
        self.store = self._shared(spec.config.state_dim, "state")

    def _shared(self, dim: int, name: str) -> LayerStore:
        """A table of all items, which all ranks make at once."""
        return (
            LocalStore(self.spec.starts[-1], dim) if self.worker.world == 1 else PartitionStore(self.client, dim, name)
        )

    def _own(self) -> Int64[Tensor, "N"]:
        """The items of this rank, ascending."""
        return torch.tensor_split(torch.sort(self.client.local_gids()).values, self.sharing)[self.place]

    def _graph(self, snapshot: Snapshot) -> Graph:
        told = told_by_texts(self._edge_file(snapshot), self.spec.starts[-1])
        return Graph(snapshot.index, self.client.edges(snapshot.index), torch.from_numpy(told))

    def _edge_file(self, snapshot: Snapshot) -> Path:
        return self.spec.graph / EDGES / f"{snapshot.name}.parquet"

    def train(self) -> None:
        """Train from the last checkpoint, or from the start; leaves the best weights in the model."""
        import ray.train.torch

        spec, config, model, worker = self.spec, self.spec.config, self.model, self.worker
        newest = training_snapshot(spec.snapshots)
        earlier = earlier_snapshot(spec.snapshots) if config.encoder == "propagation" else newest
        asked, known = self._graph(newest), self._graph(earlier)
        had = by_users(known, spec.starts[-1]), by_users(asked, spec.starts[-1])
        edges = {
            relation: (src[self.place :: self.sharing], dst[self.place :: self.sharing])
            for relation, (src, dst) in unknown_edges(*had, spec.starts[-1]).items()
        }
        task = plan_edges(edges, config, spec.starts[-1], model.types.count, spec.seed, worker.world)
        around = neighbourhoods_of(model, self.source, config, known, asked, spec.seed, self._own(), self._shared)
        network: nn.Module = model
        if worker.world > 1:  # now that all start alike: it takes rank 0's start. A batch need not hold every relation
            network = ray.train.torch.prepare_model(model, parallel_strategy_kwargs={"find_unused_parameters": True})
        optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
        trainer = EdgeTrainer(model, network, self.source, around, model.types, config, known.snapshot, spec.seed)
        checkpoints = Checkpoints(worker, spec.out / SCRATCH / "hgnn", model, model, optimizer)

        def on_step(epoch: int, step: int, loss: float) -> None:
            if step % _REPORT_EVERY == 0:
                done, total = epoch * task.steps + step, config.epochs * task.steps
                worker.show(done, total, f"epoch {epoch} loss {loss:.4f}")

        state = checkpoints.resume()
        state = train_epochs(trainer, task, optimizer, state, worker.rank, on_step, checkpoints.save)
        checkpoints.load_best(model)
        if worker.rank == 0:
            save_file(model.state_dict(), spec.out / "model.safetensors")
            seconds = round(state["seconds"], 1)
            write_json(spec.out / SCRATCH / _SECONDS, seconds)  # not in the output: made again it is the same
            write_json(spec.out / "metrics.json", state["history"])

    def embed(self, snapshot: Snapshot) -> None:
        """Write this worker's items of one snapshot; a snapshot that is already there is left alone."""
        worker, name = self.worker, snapshot.name
        target = self.spec.out / "embeddings" / name / f"part-{worker.rank:05d}.safetensors"
        if worker.world == 1 and target.exists():
            return
        own = self._own()
        done = 0

        def on_chunk(count: int) -> None:
            nonlocal done
            done += count
            worker.show(done, 2 * len(own), f"embedding snapshot {name}")

        embedding = embed_items(self.model, self.source, snapshot.index, own, self.store, on_chunk)
        arrays = {"gid": own.numpy(), "embedding": embedding.numpy()}
        if name == "serve":  # what the bundle's items send to items that are new (hgnn/inductive.py)
            arrays["hidden"] = self.store.read(own).half().numpy()
            _, dst, _, weight = read_edges(self._edge_file(snapshot))
            arrays["strength"] = strengths(dst, weight, self.spec.starts[-1])[own.numpy()]
            arrays["users"] = load_users(self.spec.graph)[name][own.numpy()]
        save_arrays(target, arrays)
