"""Fixtures shared by all tests. Ray is started, and the small run made, once a session and only if a test asks."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

settings.register_profile("here", deadline=None)  # a busy machine is no failure
settings.load_profile("here")

# Before anything imports them: the shapes in these packages' annotations are checked while the tests run.
CHECKED = ("hgnn", "two_tower", "evaluation", "scoring", "baselines")
install_import_hook([f"recsys_ray.{name}" for name in CHECKED], "shape_check.check")


@pytest.fixture(scope="session")
def ray_local():
    """A real local Ray whose workers can import the test modules."""
    os.environ.update(RAY_worker_niceness="0", RAY_AUTH_MODE="disabled", RAY_DATA_USE_DATASOURCE_V2="0")
    from recsys_ray.cluster.session import ray_session
    from recsys_ray.config import RayConfig

    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with ray_session(RayConfig(num_cpus=4, object_store_mb=256)):
        yield


@pytest.fixture
def server_log(caplog) -> Iterator[pytest.LogCaptureFixture]:
    """What a server logs. Its loggers keep to themselves once Ray or a server was here."""
    loggers = [logging.getLogger(name) for name in ("recsys_ray.serve", "ray.serve")]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        logger.addHandler(caplog.handler)
    yield caplog
    for logger, (level, propagate) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate = propagate
        logger.removeHandler(caplog.handler)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """The tables of a small demo world."""
    from pipeline_world import make_data

    folder = tmp_path_factory.mktemp("small") / "data"
    make_data(folder)
    return folder


@dataclass(frozen=True)
class SmallRun:
    folder: Path
    config: Path
    done: subprocess.CompletedProcess[str]  # what the command printed


@pytest.fixture(scope="session")
def small_run(ray_local, small_data) -> SmallRun:
    """A finished run of the command line. It takes half a minute, so every test that needs one looks at this one: what
    a test adds to it, it takes away."""
    from pipeline_world import configure, make_run

    root = small_data.parent
    shown = {"map_items": 300, "examples": 12}  # parts of the report, which no figure depends on
    config = configure(root, small_data, "run", evaluate=shown)
    return SmallRun(root / "run", config, make_run(config))
