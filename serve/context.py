"""What the routes share: the current recommender, and where answers are computed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import orjson
from fastapi import Response

from recsys_ray.serving.laps import Laps
from recsys_ray.serving.recommender import Recommender
from recsys_ray.serving.requests import Question, RequestError
from serve.batching import Batches
from serve.live import LiveAnswers, Told
from serve.metrics import Metrics
from serve.store import Store, StoreError

Result = TypeVar("Result")
_SWITCH_S = 2e-4  # the event loop must not wait 5 ms, the default, whenever the thread is at work
_TOGETHER = 640  # places that a batch fills: 64 lists of ten
_LONG = 5  # a list that is ranked again costs so many times its places


class Live(Protocol):
    """Where the app finds the recommender of the moment: it may be swapped between two requests."""

    @property
    def recommender(self) -> Recommender: ...

    @property
    def refused(self) -> str | None: ...

    @property
    def examples(self) -> bool: ...

    @property
    def answers(self) -> LiveAnswers: ...

    async def embed(self, record: Mapping[str, Any]) -> bytes:
        """Vectors of a new item (``LiveVectors.pack``). Raises UserError where that cannot be done."""
        ...

    async def promote(self, version: str, force: bool) -> tuple[str, str | None]:
        """The versions served now and before. Raises UserError for a bundle that is refused."""
        ...

    async def rollback(self) -> tuple[str, str]:
        """As :meth:`promote`. Raises UserError where there is nothing to go back to."""
        ...


class Context:
    """Recommendations are computed on the event loop (serve/batching.py), everything that takes longer in a thread."""

    def __init__(self, live: Live, metrics: Metrics) -> None:
        sys.setswitchinterval(_SWITCH_S)
        self.live, self.metrics = live, metrics
        self._batches: Batches[Question, Told] = Batches(self.answers, _TOGETHER, _places)
        self._thread = ThreadPoolExecutor(1, "facts")

    async def answer(self, question: Question) -> Told:
        """Raises RequestError."""
        return await self._batches.ask(question)

    def answers(self, questions: Sequence[Question]) -> list[Told | RequestError]:
        """All together, in the thread of the caller."""
        laps = Laps()
        told = self.live.answers.answers(self.live.recommender, questions, laps)
        self.metrics.answers([one for one in told if isinstance(one, Told)], laps.seconds)
        return told

    @property
    def store(self) -> Store:
        """Raises StoreError where there is none."""
        if self.live.answers.store is None:
            raise StoreError("this server has no event store: start it with --store")
        return self.live.answers.store

    async def ask(self, work: Callable[[Recommender], Result]) -> Result:
        """Work with the recommender, which knows all changes by then."""

        def current() -> Result:
            recommender = self.live.recommender
            self.live.answers.take_changes(recommender)
            return work(recommender)

        return await self.run(current)

    async def run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _places(question: Question) -> int:
    """What an answer costs."""
    places = question.k if question.quotas is None else sum(question.quotas.values())
    return max(10, places) * (_LONG if question.diversity or question.popularity else 1)


def json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
