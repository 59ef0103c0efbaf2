"""Starts or joins Ray with settings that suit small and large machines."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from recsys_ray.config import RayConfig
from recsys_ray.core.errors import UserError

# Read by Ray when it starts. A value that the user has set stays.
_SETTINGS = {
    "RAY_worker_niceness": "0",  # otherwise workers run at nice 15 and starve next to other processes
    "RAY_DATA_USE_DATASOURCE_V2": "0",  # the new Parquet reader takes seconds a read and makes one block of a file
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin at every barrier crawl when anything else wants a core
}
LOGICAL_CPUS_TO_SPARE = 2  # actors that hold every CPU leave none for Ray Data's read tasks: a silent deadlock


def granted_cpus() -> int:
    """CPUs that this process may use, not those that the machine has: its affinity, and a container's limit (``docker
    --cpus``, a Kubernetes limit), which affinity does not show."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, _container_limit(Path("/sys/fs/cgroup"))))


def _container_limit(cgroup: Path) -> int:
    """Whole CPUs that the control group grants in a period, version 2 or 1; a very large number without a limit."""
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with suppress(OSError, ValueError):
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
            if quota not in ("max", "-1"):
                return math.ceil(int(quota) / int(period))
    return sys.maxsize


@contextmanager
def without_lines(text: bytes) -> Iterator[None]:
    """Hold back what this process writes to standard error in the block, C++ included; then pass on all but the lines
    that hold ``text``."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as aside:
        os.dup2(aside.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            aside.seek(0)
            for line in aside:
                if text not in line:
                    os.write(2, line)


def _start_local(config: RayConfig, cpus: int) -> None:
    """Start Ray on this machine. Ray gives its processes 30 seconds to start, which nobody can set and a busy machine
    misses now and then; so it gets a second chance.

    Raises:
        UserError: Ray did not start in time, twice.
    """
    import ray

    for attempt in (1, 2):
        before = set(psutil.Process().children())
        try:
            ray.init(
                "local",
                num_cpus=cpus + LOGICAL_CPUS_TO_SPARE,
                include_dashboard=config.dashboard,
                _metrics_export_port=config.metrics_port,
                object_store_memory=config.object_store_mb * 1024 * 1024,
                log_to_driver=bool(os.environ.get("RECSYS_RAY_WORKER_LOGS")),
                logging_level=logging.ERROR,
                configure_logging=True,
            )
            return
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            left = set(psutil.Process().children()) - before  # Ray ends them only when this process ends
            for process in left:
                process.kill()
            psutil.wait_procs(left, timeout=10)
            if attempt == 2:
                raise UserError(
                    "Ray did not start within 30 seconds, twice. The machine is too busy, or processes of an earlier "
                    "Ray are still running; its logs are in /tmp/ray/session_latest/logs"
                ) from error


@contextmanager
def ray_session(config: RayConfig) -> Iterator[int]:
    """Start a local Ray or join a cluster; yields the number of CPUs to plan for.

    A Ray session that is already running in this process is reused. One started here ends with the block.

    Raises:
        UserError: the cluster at ``config.address`` cannot be reached, or a local Ray does not start.
    """
    joins, watched = config.address != "local", config.address != "local" or config.dashboard
    choices = {
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": str(int(joins)),  # this machine is not taken back by a cloud
        "RAY_TRAIN_ENABLE_STATE_TRACKING": str(int(watched)),  # trainings in the dashboard; costs seconds a training
    }
    for name, value in (_SETTINGS | choices).items():
        os.environ.setdefault(name, value)
    import ray

    cpus = config.num_cpus or granted_cpus()
    if ray.is_initialized():
        yield cpus
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if config.address == "local":
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a throw-away Ray that listens on this machine alone
        # Ray's C++ parts warn on the terminal of what is no mistake; what fails is raised all the same. But of this
        # setting they print a line, before it counts.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        with without_lines(b"Set ray log level from environment variable"):
            _start_local(config, cpus)
    else:
        try:
            ray.init(config.address, logging_level=logging.WARNING)
        except ConnectionError as error:
            raise UserError(f"no Ray cluster found at {config.address!r} (ray.address): {error}") from error
        cpus = int(ray.cluster_resources().get("CPU", cpus))
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Ray has put its own in their place, which aborts at SIGTERM
            signal.signal(number, handler)
    from ray.data import DataContext

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    DataContext.get_current().execution_no_progress_timeout_s = 600
    DataContext.get_current().enable_progress_bars = False
    try:
        yield cpus
    finally:
        ray.shutdown()
