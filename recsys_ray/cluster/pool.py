"""Runs Ray tasks: many in parallel, or one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import ray

from recsys_ray.core.errors import UserError

Call = tuple[Any, ...]  # a function and its arguments


def in_parallel(calls: Iterable[Call], limit: int | None = None, ordered: bool = False) -> Iterator[Any]:
    """Run each call as a Ray task of one CPU, and yield what they return as it comes, or in the calls' order.

    Args:
        limit: tasks that may run, wait for a CPU or wait to be taken; what they were given and return is held as long.
            Default: twice the CPUs of the cluster, so that no CPU waits for this loop.

    Raises:
        UserError: a task raised one; any other error comes with Ray's traceback.
    """
    limit = limit or 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    left, running = iter(calls), deque[Any]()
    while True:
        while len(running) < limit and (call := next(left, None)):
            function, *arguments = call
            running.append(ray.remote(num_cpus=1)(function).remote(*arguments))
        if not running:
            return
        done = running[0] if ordered else ray.wait(list(running))[0][0]
        running.remove(done)
        yield result_of(done)


def alone(function: Any, *arguments: Any, cpus: int, seconds: float | None = None) -> Any:
    """Run one task that is granted ``cpus``, and return what it returned.

    Raises:
        TimeoutError: it took more than ``seconds``, and was ended.
    """
    # An attempt that is ended, or that fails, fails again.
    ref = ray.remote(num_cpus=cpus, max_retries=0)(function).remote(*arguments)
    done, _ = ray.wait([ref], timeout=seconds)
    if not done:
        ray.cancel(ref, force=True)
        raise TimeoutError
    return result_of(ref)


def cpus_of_one_host(cpus: int) -> int:
    """What a task that uses several threads can be granted: no more than one host has."""
    hosts = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return max(1, min(cpus, int(max(hosts, default=1))))


def result_of(ref: Any) -> Any:
    """What a task returned. An error that the user can act on is raised as it was, without Ray's traceback text."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
