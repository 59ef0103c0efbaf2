"""One replica of the endpoint: it answers from one bundle, takes over the next one, and embeds new items.

Tower, index and HTTP are in one process, so that no request crosses processes twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
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
from recsys_ray.core.errors import ArtifactError, UserError
from recsys_ray.serving.live import LiveVectors
from recsys_ray.serving.recommender import Recommender
from recsys_ray.storage.artifacts import open_artifact
from recsys_ray.storage.store import Place, local_output
from serve.app import create_app
from serve.live import LiveAnswers, variants_of
from serve.logs import failed, write_json_lines
from serve.metrics import RayMeter
from serve.settings import Settings
from serve.store import StoreError, open_store

if TYPE_CHECKING:
    from fastapi import FastAPI

    from recsys_ray.bundle.embedder import Embedder

_LOG = logging.getLogger("ray.serve")
_WATCH_S = 1.0
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
