"""Training for all models: Ray Train workers, epochs with checkpoints, and sums over the workers."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from recsys_ray.core.errors import UserError
from recsys_ray.core.progress import Task
from recsys_ray.core.seeds import seed_from
from recsys_ray.storage.artifacts import BEST, LAST
from recsys_ray.storage.checkpoint import load_checkpoint, save_checkpoint

_POLL_S = 0.5
_MAX_FAILURES = 2  # attempts after the first; each starts at the last checkpoint

Spec = TypeVar("Spec")


def generator_for(*parts: int | str) -> torch.Generator:
    """A torch generator seeded by the parts."""
    return torch.Generator().manual_seed(seed_from(*parts))


def sum_over_ranks(values: Tensor) -> Tensor:
    """All-reduce; the tensor itself where there is one rank."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def mean_over_ranks(value: float) -> float:
    """The mean of the ranks' values."""
    sums = sum_over_ranks(torch.tensor([value, 1.0], dtype=torch.float64))
    return float(sums[0] / sums[1])


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


@dataclass(frozen=True)
class Worker:
    """One of the processes of a training."""

    rank: int
    world: int  # how many there are
    board: Any

    def show(self, done: int, total: int, detail: str) -> None:
        """Let the terminal show how far the first worker is."""
        if self.rank == 0:
            self.board.put.remote(done, total, detail)


class Checkpoints:
    """The last and the best epoch of one model, in a folder that all workers can read. The first worker writes.

    Args:
        trained: everything a training needs to continue.
        kept: what is kept of the best epoch.
    """

    def __init__(
        self, worker: Worker, folder: Path, trained: nn.Module, kept: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.worker, self.folder, self.trained, self.kept, self.optimizer = worker, folder, trained, kept, optimizer

    def resume(self) -> dict[str, Any]:
        """The state after the last epoch, whose weights are loaded; empty where there is none."""
        last = self.folder / LAST
        return load_checkpoint(last, self.trained, self.optimizer) if last.exists() else {}

    def save(self, state: dict[str, Any], better: bool) -> None:
        """At the end of an epoch: write the checkpoint, then report the epoch's metrics to Ray Train. Every worker
        calls it and waits for all others, so every epoch that Ray knows of can be resumed."""
        import ray.train

        if self.worker.rank == 0:
            if better:
                save_checkpoint(self.folder / BEST, self.kept, self.optimizer, state)
            save_checkpoint(self.folder / LAST, self.trained, self.optimizer, state)
        ray.train.report({"model": self.folder.name, **state["history"][-1]})

    def load_best(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        load_checkpoint(self.folder / BEST, model, optimizer)


def run_epochs(
    one_epoch: Callable[[int], tuple[dict[str, Any], float, dict[str, Any]]],
    epochs: int,
    patience: int,
    state: dict[str, Any],
    on_epoch: Callable[[dict[str, Any], bool], None],
) -> dict[str, Any]:
    """Train from ``state`` (empty: from the start) until the last epoch, or until ``patience`` epochs in a row were no
    better than the best.

    Args:
        one_epoch: the epoch's number -> its metrics, how good it is (more is better), and what of ``state`` is
            replaced if it is the best so far.
        on_epoch: called with the new state and whether the epoch is the best: the place for checkpoints.

    Returns:
        The state: ``history`` (the metrics of every epoch), ``best``, ``bad`` (epochs since the best), and what
        ``one_epoch`` put there.
    """
    for key, value in (("history", []), ("best", None), ("bad", 0)):
        state.setdefault(key, value)
    for epoch in range(len(state["history"]), epochs):
        if state["bad"] >= patience:
            break
        metrics, good, chosen = one_epoch(epoch)
        better = state["best"] is None or good > state["best"]
        state |= {"best": good, "bad": 0, **chosen} if better else {"bad": state["bad"] + 1}
        state["history"].append({"epoch": epoch, **metrics})
        on_epoch(state, better)
    return state


def run_workers(
    function: Callable[[Worker, Spec], None],
    spec: Spec,
    *,
    name: str,
    seed: int,
    workers: int,
    cpus: int,
    scratch: Path,
    task: Task,
    datasets: Mapping[str, Any] | None = None,
) -> None:
    """Run ``function(worker, spec)`` in every worker of a Ray Train run, and show what the first one says.

    If a worker dies, the attempt fails; the next one starts at the function's own checkpoint. Ray does not count the
    loss of a preempted host.

    Args:
        name: of the run, the same when it is started again after the driver was killed.
        seed: of the weights.
        cpus: of each worker; its threads are as many.
        scratch: a folder that all hosts reach.

    Raises:
        UserError: a worker raised one.
    """
    import ray
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    board: Any = ray.remote(num_cpus=0)(_Board).remote()
    trainer = TorchTrainer(
        _run_worker,
        train_loop_config={"function": function, "spec": spec, "seed": seed, "threads": cpus, "board": board},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers,
            resources_per_worker={"CPU": cpus},
            placement_strategy="SPREAD",
        ),
        run_config=RunConfig(
            name=name,
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
        mistake = ray.get(board.failure.remote())
        raise mistake or error from error
    finally:
        done.set()
        watcher.join()
        ray.kill(board)


def _run_worker(given: dict[str, Any]) -> None:
    """Called by Ray Train: caps threads to the granted CPUs, seeds torch and forwards user errors."""
    import ray.train

    torch.set_num_threads(given["threads"])
    torch.use_deterministic_algorithms(True, warn_only=True)  # several threads add up gradients in any order
    os.environ["OMP_NUM_THREADS"] = str(given["threads"])
    torch.manual_seed(seed_from(given["seed"], "weights"))
    context, board = ray.train.get_context(), given["board"]
    try:
        given["function"](Worker(context.get_world_rank(), context.get_world_size(), board), given["spec"])
    except UserError as error:
        ray.get(board.fail.remote(error))
        raise


class _Board:
    """An actor that keeps the latest report and any user error of a worker."""

    def __init__(self) -> None:
        self._latest: tuple[int, int, str] | None = None
        self._failure: UserError | None = None

    def put(self, done: int, total: int, detail: str) -> None:
        self._latest = (done, total, detail)

    def latest(self) -> tuple[int, int, str] | None:
        return self._latest

    def fail(self, error: UserError) -> None:
        self._failure = error

    def failure(self) -> UserError | None:
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
