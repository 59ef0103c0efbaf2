"""The store in Redis or Valkey, for servers on several hosts.

Every write is one script or transaction and therefore atomic. Set ``appendonly yes``, ``appendfsync always`` (or
``everysec``, which may lose the last second if the host dies) and ``maxmemory-policy noeviction`` in Redis. Use a
single Redis: scripts create keys of their own, which Redis Cluster does not allow.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from serve.store.interface import GivenAnswer, LiveEvent, LiveItem, StoreError

_TIMEOUT_S = 2.0
# Before a Redis that did not answer is asked again; until then nobody waits for it. To be refused costs no time.
_REFUSED_S, _LATE_S = 1.0, 10.0
_INEXACT = 2**53  # scores of sorted sets are floats
_KEY = "recsys-ray:"
# KEYS: the log of all events. ARGV: the prefix, then for each event its id, user, time, request and the whole of it.
# A user's events of one second are ordered as texts: their places in the log are made equally long.
_ADD_EVENTS = """
local added = 0
for i = 2, #ARGV, 5 do
  local id, user, time, request, whole = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
  if redis.call('SETNX', ARGV[1] .. 'event:' .. id, '1') == 1 then
    added = added + 1
    local place = redis.call('XADD', KEYS[1], '*', 'event', whole)
    local at, number = string.match(place, '(%d+)-(%d+)')
    redis.call('ZADD', ARGV[1] .. 'user:' .. user, time, string.format('%015d-%010d ', at, number) .. whole)
    if request ~= '' then redis.call('RPUSH', ARGV[1] .. 'request:' .. request, whole) end
  end
end
return added
"""
_PUT_ITEM = """
local change = redis.call('INCR', KEYS[1])
redis.call('HSET', KEYS[2], ARGV[1], change .. ' ' .. ARGV[2])
redis.call('ZADD', KEYS[3], change, ARGV[1])
return change
"""
_ITEMS_AFTER = """
local found = {}
for i, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. ARGV[1], '+inf')) do
  found[i] = {name, redis.call('HGET', KEYS[2], name)}
end
return found
"""


class RedisStore:
    """Keeps to :class:`serve.store.interface.Store`."""

    def __init__(self, uri: str, wait: bool = False) -> None:
        """``wait``: a Redis that does not answer now is no error, for it may answer later."""
        self._asked_again = 0.0
        # The package's default tries again ten times with pauses between, for which every answer would wait.
        again = Retry(NoBackoff(), 1, (redis.ConnectionError,))
        times = {"socket_timeout": _TIMEOUT_S, "socket_connect_timeout": _TIMEOUT_S}
        with self._errors():
            self._db: Any = redis.Redis.from_url(uri, decode_responses=True, retry=again, **times)
            if not wait:
                self._db.ping()
            scripts = _ADD_EVENTS, _PUT_ITEM, _ITEMS_AFTER
            self._add_events, self._put_item, self._items_after = map(self._db.register_script, scripts)

    def add_events(self, events: Sequence[LiveEvent]) -> int:
        words = [_KEY]
        for e in events:
            words += [e.event_id, e.user_id, str(e.timestamp), e.request_id or "", _packed(e)]
        with self._errors():
            if any(abs(e.timestamp) >= _INEXACT for e in events):
                raise OverflowError
            return int(self._add_events([f"{_KEY}events"], words)) if events else 0

    def events_of(self, user_ids: Sequence[str], since: int, limit: int) -> dict[str, list[LiveEvent]]:
        with self._errors():
            pipe = self._db.pipeline(transaction=False)
            for user_id in user_ids:
                pipe.zrange(f"{_KEY}user:{user_id}", "+inf", since, desc=True, byscore=True, offset=0, num=limit)
            rows = pipe.execute() if user_ids else []
            return {
                user_id: [_unpacked(row.partition(" ")[2]) for row in reversed(found)]
                for user_id, found in zip(user_ids, rows, strict=True)
                if found
            }

    def events_after(self, place: str, limit: int) -> tuple[list[LiveEvent], str]:
        with self._errors():
            rows = self._db.xrange(f"{_KEY}events", min=f"({place}" if place else "-", count=limit)
            return [_unpacked(row["event"]) for _, row in rows], rows[-1][0] if rows else place

    def put_item(self, item: LiveItem) -> int:
        vectors = None if item.vectors is None else base64.b64encode(item.vectors).decode()
        keys = [f"{_KEY}changes", f"{_KEY}items", f"{_KEY}items-by-change"]
        with self._errors():
            return int(self._put_item(keys, [item.item_id, json.dumps([item.record, vectors], ensure_ascii=False)]))

    def last_change(self) -> int:
        with self._errors():
            return int(self._db.get(f"{_KEY}changes") or 0)

    def items_after(self, change: int) -> list[LiveItem]:
        found = []
        with self._errors():
            # One script: between two reads an item could move past changes that the first did not see.
            for name, row in self._items_after([f"{_KEY}items-by-change", f"{_KEY}items"], [change]):
                at, _, told = row.partition(" ")
                record, vectors = json.loads(told)
                found.append(LiveItem(name, record, vectors and base64.b64decode(vectors), int(at)))
        return found

    def add_answers(self, answers: Sequence[GivenAnswer]) -> None:
        told = {json.dumps([one.request_id, one.variant, one.version]): one.timestamp for one in answers}
        with self._errors():
            if told:
                self._db.zadd(f"{_KEY}answers", told)

    def outcomes(self, since: int, until: int, events: Sequence[str], window: int) -> dict[str, tuple[int, int]]:
        with self._errors():
            rows = self._db.zrangebyscore(f"{_KEY}answers", since, f"({until}", withscores=True)
            pipe = self._db.pipeline(transaction=False)
            for told, _ in rows:
                pipe.lrange(f"{_KEY}request:{json.loads(told)[0]}", 0, -1)
            followers = pipe.execute() if rows else []
            found: dict[str, tuple[int, int]] = {}
            for (told, moment), after in zip(rows, followers, strict=True):
                hit = any(e.event in events and moment <= e.timestamp <= moment + window for e in map(_unpacked, after))
                given, followed = found.get(variant := json.loads(told)[1], (0, 0))
                found[variant] = given + 1, followed + hit
            return found

    def trim(self, before: int) -> int:
        gone = 0
        with self._errors():
            self._db.zremrangebyscore(f"{_KEY}answers", "-inf", f"({before}")
            place = "-"
            while rows := self._db.xrange(f"{_KEY}events", min=place, count=1_000):
                old = [(at, row["event"]) for at, row in rows if _unpacked(row["event"]).timestamp < before]
                gone += self._forget(old)
                place = f"({rows[-1][0]}"
        return gone

    def forget_user(self, user_id: str) -> int:
        with self._errors():
            rows = [row.partition(" ") for row in self._db.zrange(f"{_KEY}user:{user_id}", 0, -1)]
            return self._forget([("-".join(str(int(part)) for part in at.split("-")), whole) for at, _, whole in rows])

    def _forget(self, rows: Sequence[tuple[str, str]]) -> int:
        """Events by their places in the log; returns how many were there."""
        pipe = self._db.pipeline(transaction=True)
        for at, whole in rows:
            event, (moment, number) = _unpacked(whole), at.split("-")
            pipe.zrem(f"{_KEY}user:{event.user_id}", f"{int(moment):015d}-{int(number):010d} {whole}")
            pipe.delete(f"{_KEY}event:{event.event_id}")
            if event.request_id:
                pipe.lrem(f"{_KEY}request:{event.request_id}", 0, whole)
        if rows:
            pipe.xdel(f"{_KEY}events", *(at for at, _ in rows))
        return int(pipe.execute()[-1]) if rows else 0

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        if time.monotonic() < self._asked_again:
            raise StoreError("the store in Redis does not answer")
        try:
            yield
        except (redis.ConnectionError, redis.TimeoutError) as error:
            pause = _LATE_S if isinstance(error, redis.TimeoutError) else _REFUSED_S
            self._asked_again = time.monotonic() + pause
            raise StoreError(f"the store in Redis does not answer ({type(error).__name__})") from None
        except (redis.RedisError, OSError, ValueError, OverflowError) as error:  # its text may hold values
            raise StoreError(f"the store in Redis cannot be used ({type(error).__name__})") from None


def _packed(event: LiveEvent) -> str:
    return json.dumps(list(vars(event).values()), ensure_ascii=False)


def _unpacked(text: str) -> LiveEvent:
    return LiveEvent(*json.loads(text))
