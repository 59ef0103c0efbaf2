"""The HGNN stage: Ray Train ranks over the DGL partitions train the model, then embed every item on every snapshot."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from recsys_ray.cluster.train import partition_client, place_in_partition, rank_setup, run_ranks, seed_from
from recsys_ray.config import Config, HgnnConfig
from recsys_ray.core.errors import ArtifactError
from recsys_ray.core.progress import Progress
from recsys_ray.core.snapshots import snapshots_of, training_snapshot
from recsys_ray.data.tables import Tables
from recsys_ray.graph.dgl.store import PartitionStore
from recsys_ray.hgnn.inference import LocalStore, embed_items
from recsys_ray.hgnn.model import HGNN, ItemTypes
from recsys_ray.hgnn.signature import SignedSource, item_signatures
from recsys_ray.hgnn.training import EdgeTrainer, plan_edges, train_epochs
from recsys_ray.storage.artifacts import SCRATCH, Artifact, save_arrays, write_json
from recsys_ray.storage.checkpoint import load_checkpoint, save_checkpoint

_CHECKPOINT = "checkpoint.safetensors"
_BEST = "best.safetensors"
_SECONDS = "seconds.json"
_REPORT_EVERY = 5  # steps


def train_hgnn(
    config: Config, ingest: Artifact, featurize: Artifact, graph: Artifact, out: Path, progress: Progress, cpus: int,
    hosts: int,
) -> dict[str, Any]:  # fmt: skip
    """Train on the newest training graph (or take ``hgnn.weights``), embed all items on all snapshots, into ``out``
    (docs/architecture.md).

    A run that was killed goes on at its last epoch.

    Raises:
        ArtifactError: the given weights are of another shape.
    """
    if config.hgnn.weights:
        _take_weights(config.hgnn, featurize.counts["text_dim"], len(ingest.counts["item_types"]), out)
    snapshots = snapshots_of(graph.counts)
    workers = config.hgnn.workers or hosts
    per_worker = max(1, cpus // workers)
    parameters = {
        "config": config.hgnn.model_dump(),
        "seed": seed_from(config.seed, "hgnn"),
        "threads": per_worker,
        "graph": str(graph.path.resolve()),
        "out": str(out.resolve()),
        "starts": [0, *itertools.accumulate(ingest.counts["items_per_type"])],
        "ingest": str(ingest.path.resolve()),
        "text_dim": featurize.counts["text_dim"],
        "snapshots": [(s.name, s.index) for s in snapshots],
        "trained": bool(config.hgnn.weights),
        "train_on": training_snapshot(snapshots).index,
    }
    with progress.task("training and embedding", unit="steps", may_stop_early=True) as task:
        run_ranks(_train_rank, parameters, workers, per_worker, out / SCRATCH, task)
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
    model = HGNN(text_dim, config, ItemTypes(torch.zeros(types + 1, dtype=torch.int64)))
    try:
        model.load_state_dict(load_file(config.weights))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(
            f"hgnn.weights: {config.weights} does not fit: {str(error).splitlines()[-1].strip()}; text encoder, "
            "hidden_dim, out_dim, signature_dim and weights_by must be those that it was trained with"
        ) from error
    save_file(model.state_dict(), out / "model.safetensors")
    (out / SCRATCH).mkdir(exist_ok=True)
    write_json(out / SCRATCH / _SECONDS, 0.0)
    write_json(out / "metrics.json", [])


def _train_rank(parameters: dict[str, Any]) -> None:
    """What each rank runs."""
    with rank_setup(parameters) as (rank, world), partition_client(Path(parameters["graph"]), rank, world) as client:
        config = HgnnConfig.model_validate(parameters["config"])
        types = ItemTypes(torch.tensor(parameters["starts"]))
        model = HGNN(parameters["text_dim"], config, types)
        place, sharing = place_in_partition(client.part, rank, world)
        ids = Tables(Path(parameters["ingest"])).item_ids.to_pylist()
        packed = torch.from_numpy(item_signatures(ids, config.signature_dim).copy())
        source = SignedSource(client, packed, config.signature_dim)
        rank_run = _RankRun(parameters, config, types, model, client, source, rank, world, place, sharing)
        if parameters["trained"]:
            model.load_state_dict(load_file(Path(parameters["out"]) / "model.safetensors"))
        else:
            rank_run.train()
        for name, index in parameters["snapshots"]:
            rank_run.embed(name, index)


class _RankRun:
    """Training and embedding of one rank."""

    def __init__(
        self, parameters: dict[str, Any], config: HgnnConfig, types: ItemTypes, model: HGNN, client: Any,
        source: SignedSource, rank: int, world: int, place: int, sharing: int,
    ) -> None:  # fmt: skip
        self.parameters, self.config, self.types, self.model = parameters, config, types, model
        self.client, self.source, self.rank, self.world = client, source, rank, world
        self.place, self.sharing = place, sharing
        self.out = Path(parameters["out"])
        alone = world == 1
        dim = config.hidden_dim
        self.store = LocalStore(int(types.starts[-1]), dim) if alone else PartitionStore(client, dim)

    def train(self) -> None:
        """Train from the last checkpoint, or from the start; leaves the best weights in the model."""
        import ray.train.torch

        config, snapshot = self.config, self.parameters["train_on"]
        edges = {
            relation: (src[self.place :: self.sharing], dst[self.place :: self.sharing])
            for relation, (src, dst) in self.client.edges(snapshot).items()
        }
        seed = self.parameters["seed"]
        task = plan_edges(edges, config, int(self.types.starts[-1]), self.types.count, seed, self.world)
        network: nn.Module = self.model
        if self.world > 1:  # a batch need not hold every relation
            network = ray.train.torch.prepare_model(
                self.model, parallel_strategy_kwargs={"find_unused_parameters": True}
            )
        optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate)
        scratch = self.out / SCRATCH
        state: dict[str, Any] = {}
        if (scratch / _CHECKPOINT).exists():
            state = load_checkpoint(scratch / _CHECKPOINT, self.model, optimizer)
        trainer = EdgeTrainer(self.model, network, self.source, self.types, config, snapshot, seed)

        def on_step(epoch: int, step: int, loss: float) -> None:
            if self.rank == 0 and step % _REPORT_EVERY == 0:
                self._report(epoch * task.steps + step, config.epochs * task.steps, f"epoch {epoch} loss {loss:.4f}")

        def on_epoch(state: dict[str, Any], better: bool) -> None:
            if self.rank == 0:
                if better:
                    save_checkpoint(scratch / _BEST, self.model, optimizer, state)
                save_checkpoint(scratch / _CHECKPOINT, self.model, optimizer, state)

        state = train_epochs(trainer, task, optimizer, state, self.rank, on_step, on_epoch)
        self.client.barrier()  # rank 0 has written the best weights
        if (scratch / _BEST).exists():
            load_checkpoint(scratch / _BEST, self.model)
        if self.rank == 0:
            save_file(self.model.state_dict(), self.out / "model.safetensors")
            write_json(scratch / _SECONDS, round(state["seconds"], 1))  # not in the output: made again it is the same
            write_json(self.out / "metrics.json", state["history"])

    def embed(self, name: str, index: int) -> None:
        """Write this rank's items of one snapshot; a snapshot that is already there is left alone."""
        target = self.out / "embeddings" / name / f"part-{self.rank:05d}.safetensors"
        if self.sharing == self.world == 1 and target.exists():
            return
        own = torch.sort(self.client.local_gids()).values
        own = torch.tensor_split(own, self.sharing)[self.place]
        done = 0

        def on_chunk(count: int) -> None:
            nonlocal done
            done += count
            if self.rank == 0:
                self._report(done, 2 * len(own), f"embedding snapshot {name}")

        embedding = embed_items(self.model, self.source, index, own, self.store, on_chunk)
        arrays = {"gid": own.numpy(), "embedding": embedding.numpy()}
        if name == "serve":  # what the bundle's items send to items that are new (hgnn/inductive.py)
            arrays["hidden"] = self.store.read(own).half().numpy()
        save_arrays(target, arrays)

    def _report(self, done: int, total: int, detail: str) -> None:
        self.parameters["board"].put.remote(done, total, detail)
