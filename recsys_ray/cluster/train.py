"""What the ranks of a training share: seeds, sums, and how a Ray Train job is started and watched."""

from __future__ import annotations

import hashlib
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recsys_ray.core.errors import UserError
from recsys_ray.core.progress import Task

_POLL_S = 0.5
_MAX_FAILURES = 2  # attempts after the first; each starts at the last checkpoint


def seed_from(*parts: int | str) -> int:
    """A 56-bit seed that depends on the parts alone: the same after a restart."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def generator_for(*parts: int | str) -> torch.Generator:
    """A torch generator seeded by the parts."""
    return torch.Generator().manual_seed(seed_from(*parts))


def sum_over_ranks(values: Tensor) -> Tensor:
    """All-reduce; the tensor itself where there is one rank."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def largest_over_ranks(value: int) -> int:
    """The largest of the ranks' values."""
    values = torch.tensor(value)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return int(values)


def place_in_partition(client_part: int, rank: int, world: int) -> tuple[int, int]:
    """(place, count) of this rank among the ranks that share its host's partition: they divide its items."""
    parts = torch.full((world,), 0, dtype=torch.int64)
    parts[rank] = client_part
    parts = sum_over_ranks(parts)
    sharing = [r for r in range(world) if int(parts[r]) == client_part]
    return sharing.index(rank), len(sharing)


def run_ranks(
    function: Callable[[dict[str, Any]], None],
    parameters: dict[str, Any],
    workers: int,
    cpus_per_worker: int,
    scratch: Path,
    task: Task,
    datasets: Mapping[str, Any] | None = None,
) -> None:
    """Run ``function(parameters)`` on every rank of a Ray Train job, and show what rank 0 reports.

    ``parameters["board"]`` is where a rank reports: ``board.put.remote(done, total, detail)``. A rank that dies takes
    the attempt with it; the next one starts at the function's own checkpoint.

    Raises:
        UserError: a rank raised one, or every attempt failed.
    """
    import ray
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    board: Any = ray.remote(num_cpus=0)(_Board).remote()
    trainer = TorchTrainer(
        function,
        train_loop_config={**parameters, "board": board},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers,
            resources_per_worker={"CPU": cpus_per_worker},
            placement_strategy="SPREAD",
        ),
        run_config=RunConfig(
            name=f"attempts-{uuid.uuid4().hex[:8]}",
            storage_path=str((scratch / "ray_train").resolve()),
            failure_config=FailureConfig(max_failures=_MAX_FAILURES),
        ),
        datasets=dict(datasets or {}),
        dataset_config=DataConfig(enable_shard_locality=False),
    )
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(board, task, done), daemon=True)
    watcher.start()
    try:
        trainer.fit()
    except Exception as error:
        sentence = ray.get(board.failure.remote())
        raise UserError(sentence) if sentence else error from error
    finally:
        done.set()
        watcher.join()
        ray.kill(board)


class _Board:
    """An actor that remembers the latest report, and the sentence of a rank that met a user's mistake."""

    def __init__(self) -> None:
        self._latest: tuple[int, int, str] | None = None
        self._failure = ""

    def put(self, done: int, total: int, detail: str) -> None:
        self._latest = (done, total, detail)

    def latest(self) -> tuple[int, int, str] | None:
        return self._latest

    def fail(self, sentence: str) -> None:
        self._failure = sentence

    def failure(self) -> str:
        return self._failure


def _watch(board: Any, task: Task, done: threading.Event) -> None:
    import ray

    while not done.wait(_POLL_S):
        try:
            latest = ray.get(board.latest.remote(), timeout=30)
        except Exception:  # progress must not take a result with it
            continue
        if latest:
            task.update(latest[0], total=latest[1], detail=latest[2])


@contextmanager
def rank_setup(parameters: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Inside a rank: cap the threads to the CPUs that were granted, seed torch, pass a user's mistake on.

    Yields (rank, ranks).
    """
    import ray.train

    context = ray.train.get_context()
    threads = int(parameters["threads"])
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)  # several threads add up gradients in any order
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.manual_seed(seed_from(parameters["seed"], "weights"))
    try:
        yield context.get_world_rank(), context.get_world_size()
    except UserError as error:
        import ray

        ray.get(parameters["board"].fail.remote(str(error)))
        raise


@contextmanager
def partition_client(
    graph_dir: Path, rank: int, world: int, features: Mapping[str, Path] | None = None
) -> Iterator[Any]:
    """Inside a rank: rank 0 starts the partition servers of this attempt, every rank connects."""
    import ray
    from ray.train.collective import broadcast_from_rank_zero

    from recsys_ray.graph.dgl.client import GraphClient
    from recsys_ray.graph.dgl.servers import PartitionServers

    nodes: list[Any] = [None] * world
    mine = ray.get_runtime_context().get_node_id()
    if world > 1:
        torch.distributed.all_gather_object(nodes, mine)
    else:
        nodes = [mine]
    servers = PartitionServers(graph_dir, clients=world, hosts=nodes, features=features) if rank == 0 else None
    address = broadcast_from_rank_zero(servers.address if servers else None)
    client = GraphClient.connect(address, graph_dir)
    try:
        yield client
        client.close()
    finally:
        if servers is not None:
            servers.stop()
