"""A client that asks at a steady rate, whether or not answers come, and asks once more where it got none."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

_EVENTS_EVERY = 4  # one request of four reports an event, the others ask for recommendations


@dataclass
class Asked:
    """One request and what came of it. Times are of the monotonic clock."""

    at: float
    event_id: str | None  # None: it asks for recommendations
    statuses: list[int] = field(default_factory=list)  # of the first try and, if there was one, of the second
    told: dict[str, Any] = field(default_factory=dict)  # the last answer's body
    first: float = float("inf")  # when the first try had ended
    until: float = float("inf")  # when all was done

    @property
    def answered(self) -> bool:
        return self.statuses[-1:] == [200]


@dataclass(frozen=True)
class Load:
    """Some requests, all of which are done."""

    asked: Sequence[Asked]

    @property
    def recommendations(self) -> list[Asked]:
        return [one for one in self.asked if one.event_id is None]

    @property
    def events(self) -> list[Asked]:
        return [one for one in self.asked if one.event_id is not None]

    @property
    def repeated(self) -> list[Asked]:
        return [one for one in self.asked if len(one.statuses) > 1]

    @property
    def failed(self) -> list[Asked]:
        return [one for one in self.asked if not one.answered]

    @property
    def degraded(self) -> list[Asked]:
        return [one for one in self.recommendations if one.told.get("degraded")]

    @property
    def acknowledged(self) -> set[str]:
        return {one.event_id for one in self.asked if one.event_id is not None and one.answered}

    @property
    def gap(self) -> float:
        """The longest time without a recommendation."""
        moments = sorted(one.until for one in self.recommendations if one.answered)
        return max((later - earlier for earlier, later in itertools.pairwise(moments)), default=float("inf"))

    def __str__(self) -> str:
        slowest = max((one.until - one.at for one in self.asked), default=0.0)
        return (
            f"sent {len(self.asked)}, answered {len(self.asked) - len(self.failed)}, repeated {len(self.repeated)}, "
            f"failed {len(self.failed)}, degraded {len(self.degraded)}, longest gap {self.gap:.2f} s, slowest "
            f"{slowest:.2f} s, statuses {dict(Counter(tuple(one.statuses) for one in self.asked))}"
        )


class SteadyLoad:
    """``with SteadyLoad(url, users, items) as load: ...``, afterwards ``load.since(moment)``.

    A status of 0 means that the connection broke or was refused. After 0, 429 or 503, and where a proxy answered and
    not the server, the client asks a second time, ``pause`` seconds later.
    """

    def __init__(
        self, url: str, user_ids: Sequence[str], item_ids: Sequence[str], rate: float, pause: float = 1.0
    ) -> None:
        self._url, self._users, self._items, self._rate, self._pause = url, user_ids, item_ids, rate, pause
        self._asked: list[Asked] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> SteadyLoad:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def since(self, moment: float, until: float = float("inf")) -> Load:
        """The requests that were under way or sent between two moments."""
        return Load([one for one in self._asked if one.until >= moment and one.at < until])

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        async with httpx.AsyncClient(base_url=self._url, timeout=40, limits=limits) as client:
            began, tasks = time.monotonic(), set()
            for number in itertools.count():
                await asyncio.sleep(max(0.0, began + number / self._rate - time.monotonic()))
                if self._stop.is_set():
                    break
                tasks.add(task := asyncio.create_task(self._ask(client, number)))
                task.add_done_callback(tasks.discard)
            await asyncio.gather(*tasks)

    async def _ask(self, client: httpx.AsyncClient, number: int) -> None:
        user = self._users[number % len(self._users)]
        one = Asked(time.monotonic(), f"{id(self)}-{number}" if number % _EVENTS_EVERY == 0 else None)
        self._asked.append(one)
        path, body = "/v1/recommendations", {"user_id": user, "k": 5}
        if one.event_id is not None:
            event = {"user_id": user, "item_id": self._items[number % len(self._items)], "event_id": one.event_id}
            path, body = "/v1/events", {"events": [event]}
        again = await self._try(client, path, body, one)
        one.first = time.monotonic()
        if again:
            await asyncio.sleep(self._pause)
            await self._try(client, path, body, one)
        one.until = time.monotonic()

    async def _try(self, client: httpx.AsyncClient, path: str, body: dict[str, Any], one: Asked) -> bool:
        """Whether it makes sense to ask again."""
        try:
            response = await client.post(path, json=body)
        except httpx.TransportError:
            one.statuses.append(0)
            return True
        one.statuses.append(response.status_code)
        one.told = {}
        with suppress(ValueError):
            one.told = response.json()
        return response.status_code in (429, 503) or not one.told
