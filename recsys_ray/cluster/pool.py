"""Ray tasks: many in parallel, or one alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray

from recsys_ray.core.errors import UserError


def in_parallel(jobs: list[tuple[Any, ...]], cpus: int) -> Iterator[Any]:
    """Run ``(function, *arguments)`` as Ray tasks, ``cpus`` at a time; yields results as they come."""
    waiting, running = list(reversed(jobs)), list[Any]()
    while waiting or running:
        while waiting and len(running) < max(cpus, 1):
            function, *arguments = waiting.pop()
            running.append(ray.remote(num_cpus=1)(function).remote(*arguments))
        done, running = ray.wait(running)
        yield result_of(done[0])


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
