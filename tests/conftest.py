"""Fixtures shared by all tests. Ray is started once a session, and only if a test asks for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

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
