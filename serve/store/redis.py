"""The store in Redis or Valkey, for servers on several hosts.

Every write is one script or transaction and therefore atomic. Set ``appendonly yes``, ``appendfsync always`` (or
``everysec``, which may lose the last second if the host dies) and ``maxmemory-policy noeviction`` in Redis. Use a
single Redis: scripts create keys of their own, which Redis Cluster does not allow.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from serve.store.interface import GivenAnswer, LiveEvent, LiveItem, StoreError
from serve.store.rows import EXACT, UNREADABLE, Rows, parsed, text

_TIMEOUT_S = 0.5  # answers wait for it, all at once
# Before a Redis that did not answer is asked again; until then nobody waits for it. To be refused costs no time.
_REFUSED_S, _LATE_S = 1.0, 10.0
_KEY = "recsys-ray:"
_NOWHERE = "?"
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
# ARGV: id, its row, and the change that the row must have now, or ''.
_PUT_ITEM = """
if ARGV[3] ~= '' and tonumber(redis.call('ZSCORE', KEYS[3], ARGV[1])) ~= tonumber(ARGV[3]) then return 0 end
local change = redis.call('INCR', KEYS[1])
redis.call('HSET', KEYS[2], ARGV[1], change .. ' ' .. ARGV[2])
redis.call('ZADD', KEYS[3], change, ARGV[1])
return change
"""
_ITEMS_AFTER = """
local found = {}
local names = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. ARGV[1], '+inf', 'WITHSCORES')
for i = 1, #names, 2 do
  found[#found + 1] = {names[i], names[i + 1], redis.call('HGET', KEYS[2], names[i])}
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
        self._made = Rows()
        with self._errors():
            self._db: Any = redis.Redis.from_url(uri, retry=again, **times)
            if not wait:
                self._db.ping()
            scripts = _ADD_EVENTS, _PUT_ITEM, _ITEMS_AFTER
            self._add_events, self._put_item, self._items_after = map(self._db.register_script, scripts)

    def add_events(self, events: Sequence[LiveEvent]) -> int:
        words = [_KEY]
        for e in events:
            words += [e.event_id, e.user_id, str(e.timestamp), e.request_id or "", _packed(e)]
        with self._errors():
            if any(abs(e.timestamp) >= EXACT for e in events):
                raise OverflowError
            return int(self._add_events([f"{_KEY}events"], words)) if events else 0

    @property
    def damaged(self) -> int:
        return self._made.damaged

    def events_of(self, user_ids: Sequence[str], since: int, limit: int) -> dict[str, list[LiveEvent]]:
        with self._errors():
            pipe = self._db.pipeline(transaction=False)
            for user_id in user_ids:
                pipe.zrange(f"{_KEY}user:{user_id}", "+inf", since, desc=True, byscore=True, offset=0, num=limit)
            rows = pipe.execute() if user_ids else []
            found = {
                user_id: self._events(map(_placed, reversed(mine)))
                for user_id, mine in zip(user_ids, rows, strict=True)
            }
            return {user_id: events for user_id, events in found.items() if events}

    def events_after(self, place: str, limit: int) -> tuple[list[LiveEvent], str]:
        with self._errors():
            rows = self._db.xrange(f"{_KEY}events", min=f"({place}" if place else "-", count=limit)
            return self._events(map(_logged, rows)), rows[-1][0].decode() if rows else place

    def _events(self, rows: Iterable[tuple[str, Any]]) -> list[LiveEvent]:
        return [event for row in rows if (event := self._made.event(*row)) is not None]

    def put_item(self, item: LiveItem) -> int:
        return self._put(item, "")

    def put_vectors(self, item: LiveItem, vectors: bytes) -> bool:
        return self._put(replace(item, vectors=vectors), item.change) > 0

    def _put(self, item: LiveItem, over: int | str) -> int:
        vectors = None if item.vectors is None else base64.b64encode(item.vectors).decode()
        told = json.dumps([item.record, vectors], ensure_ascii=False)
        keys = [f"{_KEY}changes", f"{_KEY}items", f"{_KEY}items-by-change"]
        with self._errors():
            return int(self._put_item(keys, [item.item_id, told, over]))

    def last_change(self) -> int:
        with self._errors():
            return int(self._db.get(f"{_KEY}changes") or 0)

    def items_after(self, change: int) -> list[LiveItem]:
        with self._errors():
            # One script: between two reads an item could move past changes that the first did not see.
            rows = self._items_after([f"{_KEY}items-by-change", f"{_KEY}items"], [change])
        made = [self._made.item(_whole(at), text(name), *_state(row)) for name, at, row in rows]
        return [item for item in made if item is not None]

    def add_answers(self, answers: Sequence[GivenAnswer]) -> None:
        told = {json.dumps([one.request_id, one.variant, one.version]): one.timestamp for one in answers}
        with self._errors():
            if told:
                self._db.zadd(f"{_KEY}answers", told)

    def outcomes(self, since: int, until: int, events: Sequence[str], window: int) -> dict[str, tuple[int, int]]:
        with self._errors():
            rows = self._db.zrangebyscore(f"{_KEY}answers", since, f"({until}", withscores=True)
            answers = [answer for row in rows if (answer := self._answer(*row)) is not None]
            pipe = self._db.pipeline(transaction=False)
            for request_id, _, _ in answers:
                pipe.lrange(f"{_KEY}request:{request_id}", 0, -1)
            followers = pipe.execute() if answers else []
            found: dict[str, tuple[int, int]] = {}
            for (request_id, variant, moment), rows in zip(answers, followers, strict=True):
                after = self._events((f"answer {request_id}", parsed(row)) for row in rows)
                hit = any(e.event in events and moment <= e.timestamp <= moment + window for e in after)
                given, followed = found.get(variant, (0, 0))
                found[variant] = given + 1, followed + hit
            return found

    def _answer(self, row: bytes, moment: float) -> tuple[str, str, float] | None:
        match parsed(row):
            case [str(request_id), str(variant), str()]:
                return request_id, variant, moment
        self._made.skip(f"answer of {moment:.0f}", ValueError("it has other fields"))
        return None

    def trim(self, before: int) -> int:
        gone = 0
        with self._errors():
            self._db.zremrangebyscore(f"{_KEY}answers", "-inf", f"({before}")
            place = "-"
            while rows := self._db.xrange(f"{_KEY}events", min=place, count=1_000):
                events = [(at, row.get(b"event", b""), self._made.event(*_logged((at, row)))) for at, row in rows]
                gone += self._forget([one for one in events if _moment(one[0], one[2]) < before])
                place = f"({rows[-1][0].decode()}"
        return gone

    def forget_user(self, user_id: str) -> int:
        key, found = f"{_KEY}user:{user_id}", []
        with self._errors():
            for row in self._db.zrange(key, 0, -1):
                place, fields = _placed(row)
                event = self._made.event(place, fields)
                if place != _NOWHERE:
                    found.append((place.encode(), row.partition(b" ")[2], event))
            gone = self._forget(found)
            self._db.delete(key)  # with damaged rows
        return gone

    def _forget(self, rows: Sequence[tuple[bytes, bytes, LiveEvent | None]]) -> int:
        """Events by their places in the log; returns how many were there."""
        pipe = self._db.pipeline(transaction=True)
        for at, whole, event in rows:
            if event is None:
                continue
            moment, number = map(int, at.split(b"-"))
            pipe.zrem(f"{_KEY}user:{event.user_id}", f"{moment:015d}-{number:010d} ".encode() + whole)
            pipe.delete(f"{_KEY}event:{event.event_id}")
            if event.request_id:
                pipe.lrem(f"{_KEY}request:{event.request_id}", 0, whole)
        if rows:
            pipe.xdel(f"{_KEY}events", *(at for at, _, _ in rows))
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


def _logged(row: tuple[bytes, dict[bytes, bytes]]) -> tuple[str, Any]:
    """The place and the fields of an event in the log."""
    return row[0].decode(), parsed(row[1].get(b"event", b""))


def _placed(row: bytes) -> tuple[str, Any]:
    """Those of one of a user's events."""
    place, _, whole = row.partition(b" ")
    try:
        moment, number = map(int, place.split(b"-"))
    except ValueError:
        return _NOWHERE, UNREADABLE
    return f"{moment}-{number}", parsed(whole)


def _moment(at: bytes, event: LiveEvent | None) -> int:
    """When an event was; of a damaged one, when it came."""
    return int(at.split(b"-")[0]) // 1_000 if event is None else event.timestamp


def _whole(score: bytes) -> int | float:
    number = float(score)
    return int(number) if number.is_integer() else number


def _state(row: bytes | None) -> tuple[Any, Any]:
    """An item's record and vectors."""
    match parsed((row or b"").partition(b" ")[2]):
        case [record, None]:
            return record, None
        case [record, str(vectors)]:
            with suppress(ValueError):
                return record, base64.b64decode(vectors, validate=True)
    return UNREADABLE, None
