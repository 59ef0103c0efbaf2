"""A replica as Serve runs it, in this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recsys_ray.bundle.embedder import Embedder
from recsys_ray.core.errors import UserError
from recsys_ray.serving.live import LiveVectors
from recsys_ray.serving.recommender import Recommender
from serve.live import LiveAnswers, Variant
from serve.store import open_store


class Replica:
    """What ``create_app`` asks for."""

    refused = None

    def __init__(
        self, bundle: Path, store: str | None = None, variants: tuple[Variant, ...] = (), examples: bool = False
    ) -> None:
        self.recommender = Recommender.load(bundle)
        self.answers = LiveAnswers(open_store(store) if store else None, variants)
        self.examples = examples
        self.embedder: Embedder | None = None

    async def embed(self, record: Mapping[str, Any]) -> bytes:
        self.embedder = self.embedder or Embedder(self.recommender.artifact)
        (item,) = self.embedder.embed([record])
        return LiveVectors(self.recommender.artifact.counts["base"], item.wide, item.hgnn, item.raisers).pack()

    async def promote(self, version: str, force: bool) -> tuple[str, str | None]:
        raise UserError("this server serves one bundle, not a folder of bundles")

    async def rollback(self) -> tuple[str, str]:
        raise UserError("this server serves one bundle, not a folder of bundles")
