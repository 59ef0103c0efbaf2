"""The same contract for SQLite and for a real Redis server."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import apsw
import numpy as np
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from redis_world import redis_server
from server_process import free_port

from recsys_ray.scoring.memory import Raisers
from recsys_ray.serving.live import LiveVectors
from serve.store import GivenAnswer, LiveEvent, LiveItem, Store, StoreError, open_store

WIDE, HGNN = np.float32([1, 2, 3]), np.float32([4, 5])
RAISERS = Raisers(np.int32([3]), np.float32([0.5]))
MADE = LiveVectors("v1", WIDE, HGNN, RAISERS)
VECTORS = MADE.pack()
SONG = {"item_type": "music", "title": "x"}
COLUMNS = ("event_id", "user_id", "item_id", "event", "timestamp", "request_id")
WRITER = """
import sys
from serve.store import LiveEvent, LiveItem, open_store
store, who, count = open_store(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for number in range(count):
    assert store.add_events([LiveEvent(f"{who}-{number}", f"user-{number % 5}", "i", "stream", number)]) == 1
    if number % 10 == 0:
        store.put_item(LiveItem(f"{who}-{number}", {"item_type": "music", "title": who}))
    print(number, flush=True)
"""
CHANGER = """
import sys
from serve.store import LiveItem, open_store
store = open_store(sys.argv[1])
for number in range(int(sys.argv[2])):
    store.put_item(LiveItem(f"i{number % 7}", {"item_type": "music", "title": str(number)}))
"""


@pytest.fixture(scope="module")
def redis_uri(tmp_path_factory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as (uri, _):
        yield uri


@pytest.fixture(params=["sqlite", "redis"])
def uri(request, tmp_path) -> str:
    if request.param == "sqlite":
        return f"sqlite://{tmp_path}/live/events.db"
    found = request.getfixturevalue("redis_uri")
    redis.Redis.from_url(found).flushall()
    return found


@pytest.fixture
def store(uri) -> Iterator[Store]:
    made = open_store(uri)
    yield made
    made.close()


def event(number: int, user: str = "ü/1", **changes) -> LiveEvent:
    told = {"event_id": f"e{number}", "user_id": user, "item_id": f"i {number}", "event": "stream"}
    return LiveEvent(**{**told, "timestamp": 1_000 + number, **changes})


def test_events_of_a_user_are_the_latest_in_their_order(store):
    assert store.events_of(["ü/1"], 0, 10) == {}
    events = [event(number) for number in (3, 1, 2)]
    assert store.add_events(events) == 3
    assert store.add_events([event(9, "other"), event(4, request_id="r1")]) == 2
    mine = [event(1), event(2), event(3), event(4, request_id="r1")]
    assert store.events_of(["ü/1", "nobody", "other"], 0, 10) == {"ü/1": mine, "other": [event(9, "other")]}
    assert store.events_of(["ü/1"], 1_003, 10) == {"ü/1": mine[2:]}
    assert store.events_of(["ü/1"], 0, 2) == {"ü/1": mine[2:]}
    assert store.events_of([], 0, 2) == {}


def test_events_of_one_second_keep_the_order_in_which_they_came(store):
    events = [event(number, timestamp=1_000) for number in range(25)]
    assert store.add_events(events) == 25
    assert store.events_of(["ü/1"], 0, 100) == {"ü/1": events}
    assert store.events_of(["ü/1"], 0, 12) == {"ü/1": events[-12:]}


def test_a_repeated_event_changes_nothing(store):
    assert store.add_events([event(1), event(1)]) == 1
    assert store.add_events([event(1, event="follow"), event(2)]) == 1
    assert store.events_of(["ü/1"], 0, 10) == {"ü/1": [event(1), event(2)]}
    assert store.add_events([]) == 0


def test_all_events_can_be_read_in_the_order_in_which_they_came(store):
    events = [event(number, f"u{number % 3}") for number in (5, 3, 8, 1, 9)]
    for one in events:
        store.add_events([one])
    first, place = store.events_after("", 3)
    rest, end = store.events_after(place, 10)
    assert first + rest == events
    assert store.events_after(end, 10) == ([], end)


def test_items_are_told_by_their_latest_change(store):
    assert store.last_change() == 0 and store.items_after(0) == []
    book = LiveItem("b/ü", {**SONG, "title": "Ü", "categories": ["a"], "published_at": None}, VECTORS)
    assert store.put_item(book) == 1
    assert store.put_item(LiveItem("other", SONG)) == 2
    assert store.put_item(LiveItem("b/ü", None)) == 3
    assert store.last_change() == 3
    assert store.items_after(0) == [LiveItem("other", SONG, None, 2), LiveItem("b/ü", None, None, 3)]
    assert store.put_item(book) == 4
    assert store.items_after(3) == [LiveItem(book.item_id, book.record, VECTORS, 4)]


def test_vectors_are_replaced_unless_the_item_has_changed_meanwhile(store):
    """What was deleted or changed since it was read must not come back."""
    store.put_item(LiveItem("i", SONG, VECTORS))
    store.put_item(LiveItem("other", SONG, VECTORS))
    (read, _), again = store.items_after(0), replace(MADE, version="next").pack()
    assert store.put_vectors(read, again) and not store.put_vectors(read, again), "the second replica comes too late"
    assert store.items_after(0)[1] == LiveItem("i", SONG, again, 3) and store.last_change() == 3
    store.put_item(LiveItem("i", None))
    assert not store.put_vectors(LiveItem("i", SONG, again, 3), VECTORS)
    assert not store.put_vectors(LiveItem("unknown", SONG, again, 3), VECTORS)
    assert store.items_after(3) == [LiveItem("i", None, None, 4)] and store.last_change() == 4


BAD_EVENTS = {
    "no text": [b"\xff", "u", "i", "stream", 1_005, None],
    "a time that is none": ["e", "u", "i", "stream", "now", None],
    "half a character": ["e", "u", "i\ud800", "stream", 1_005, None],
}
BAD_ITEMS: dict[str, tuple[object, object]] = {
    "no JSON": ("{no", None),
    "no text": (b'{"item_type": "music\xff"}', None),
    "a list": ("[]", None),
    "a type that is none": ('{"item_type": 3, "title": "x"}', None),
    "categories that are none": ('{"item_type": "music", "categories": [1]}', None),
    "a state that is none": ('{"item_type": "music", "hidden": "no"}', None),
    "nested without end": ("[" * 100_000, None),
    "vectors that are none": (json.dumps(SONG), b"none"),
    "vectors of text": (json.dumps(SONG), "none"),
    "vectors of two dimensions": (
        json.dumps(SONG),
        LiveVectors("v", np.ones((2, 2), np.float32), HGNN, RAISERS).pack(),
    ),
    "vectors of nothing": (json.dumps(SONG), LiveVectors("v", np.float32([np.nan]), HGNN, RAISERS).pack()),
    "raised by no item": (json.dumps(SONG), LiveVectors("v", WIDE, HGNN, RAISERS._replace(gid=np.int32([-1]))).pack()),
    "raised by nothing": (json.dumps(SONG), LiveVectors("v", WIDE, HGNN, RAISERS._replace(gid=np.int32([]))).pack()),
}


def damage_event(uri: str, event_id: str, fields: list) -> None:
    """Put other fields in an event's place, whether or not a store would take them."""
    if uri.startswith("sqlite"):
        db = apsw.Connection(uri.removeprefix("sqlite://"))
        values = [v.encode("utf-8", "surrogatepass") if isinstance(v, str) else v for v in fields]
        marks = [
            f"{c} = {'CAST(? AS TEXT)' if isinstance(v, bytes) else '?'}" for c, v in zip(COLUMNS, values, strict=True)
        ]
        db.execute(f"UPDATE events SET {', '.join(marks)} WHERE event_id = ?", (*values, event_id))
        db.close()
        return
    db = redis.Redis.from_url(uri)
    text = b"[%s]" % b", ".join(b'"%s"' % v if isinstance(v, bytes) else json.dumps(v).encode() for v in fields)
    rows = db.xrange("recsys-ray:events")
    (place,) = (place for place, row in rows if json.loads(row[b"event"])[0] == event_id)
    db.delete("recsys-ray:events")
    for at, row in rows:
        db.xadd("recsys-ray:events", {"event": text if at == place else row[b"event"]}, at)
    for row in db.zrange("recsys-ray:user:u", 0, -1):
        if json.loads(row.partition(b" ")[2])[0] == event_id:
            db.zadd("recsys-ray:user:u", {row.partition(b" ")[0] + b" " + text: db.zscore("recsys-ray:user:u", row)})
            db.zrem("recsys-ray:user:u", row)


def damage_item(uri: str, item_id: str, record: object, vectors: object) -> None:
    if uri.startswith("sqlite"):
        db = apsw.Connection(uri.removeprefix("sqlite://"))
        db.execute(
            "UPDATE items SET record = CAST(? AS TEXT), vectors = ? WHERE item_id = ?", (record, vectors, item_id)
        )
        db.close()
        return
    told = record if isinstance(record, bytes) else str(record).encode()
    packed = json.dumps(base64.b64encode(vectors).decode() if isinstance(vectors, bytes) else vectors)
    db = redis.Redis.from_url(uri)
    change = db.hget("recsys-ray:items", item_id).partition(b" ")[0]
    db.hset("recsys-ray:items", item_id, b"%s [%s, %s]" % (change, told, packed.encode()))


@pytest.mark.parametrize("fields", BAD_EVENTS.values(), ids=BAD_EVENTS.keys())
def test_a_damaged_event_costs_no_other(store, uri, server_log, fields):
    events = [event(number, "u") for number in range(5)]
    store.add_events(events)
    damage_event(uri, "e2", fields)
    rest = [*events[:2], *events[3:]]
    for _ in range(3):
        assert store.events_of(["u"], 0, 10) == {"u": rest}
        found, place = store.events_after("", 3)
        assert found == rest[:2] and store.events_after(place, 3)[0] == rest[2:], "reading goes on behind it"
    (told,) = server_log.messages
    assert "damaged row" in told and store.damaged == 1
    assert not {"u", "i", "e"} & set(re.findall(r"\b\w\b", told)), "logs hold no ids"
    assert store.add_events([event(9, "u")]) == 1 and store.events_of(["u"], 0, 10) == {"u": [*rest, event(9, "u")]}
    store.forget_user("u")
    assert store.events_of(["u"], 0, 10) == {} and store.events_after("", 10)[0] == []


@pytest.mark.parametrize("record, vectors", BAD_ITEMS.values(), ids=BAD_ITEMS.keys())
def test_a_damaged_item_costs_no_other_and_counts_as_deleted(store, uri, server_log, record, vectors):
    for name in ("a", "secret", "b"):
        store.put_item(LiveItem(name, SONG, VECTORS))
    damage_item(uri, "secret", record, vectors)
    whole = [LiveItem("a", SONG, VECTORS, 1), LiveItem("b", SONG, VECTORS, 3)]
    for _ in range(3):
        assert store.items_after(0) == [whole[0], LiveItem("secret", None, None, 2), whole[1]]
    (told,) = server_log.messages
    assert "item of change 2" in told and "secret" not in told and store.damaged == 1
    assert store.put_item(LiveItem("secret", SONG, VECTORS)) == 4
    assert store.items_after(0) == [*whole, LiveItem("secret", SONG, VECTORS, 4)]


def test_a_damaged_number_of_a_change_does_not_stop_the_next_ones(tmp_path, server_log):
    """SQLite keeps whatever is written into a column of numbers."""
    store = open_store(f"sqlite://{tmp_path}/live.db")
    for name in "abcd":
        store.put_item(LiveItem(name, SONG))
    db = apsw.Connection(f"{tmp_path}/live.db")
    for name, change in (("a", "many"), ("b", 2**60), ("c", 3.5)):
        db.execute("UPDATE items SET change = ? WHERE item_id = ?", (change, name))
    db.close()
    assert store.last_change() == 4 and store.items_after(0) == [LiveItem("d", SONG, None, 4)]
    assert store.put_item(LiveItem("e", SONG)) == 5 and store.items_after(4) == [LiveItem("e", SONG, None, 5)]
    assert store.damaged == len(server_log.messages) == 3
    store.close()


def test_a_damaged_answer_costs_no_other_figure(tmp_path, redis_uri):
    db = redis.Redis.from_url(redis_uri)
    db.flushall()
    store = open_store(redis_uri)
    store.add_answers([GivenAnswer(f"r{number}", "a", "v1", 1_000) for number in range(3)])
    store.add_events([event(1, request_id="r1"), event(2, request_id="r2")])
    db.zadd("recsys-ray:answers", {b"\xff": 1_000, '["r"]': 1_001})
    db.rpush("recsys-ray:request:r1", b"\xff")
    assert store.outcomes(0, 2_000, ["stream"], 100) == {"a": (3, 2)} and store.damaged == 3
    store.close()


def test_outcomes_count_answers_that_an_event_follows(store):
    store.add_answers([GivenAnswer(f"r{number}", variant, "v1", 1_000) for number, variant in enumerate("aaab")])
    store.add_answers([GivenAnswer("old", "a", "v1", 10)])
    store.add_answers([])
    store.add_events([
        event(1, request_id="r0"), event(2, request_id="r0"), event(3, request_id="r1", event="preview"),
        event(500, request_id="r2"), event(4, request_id="r3"), event(5, request_id="unknown"),
    ])  # fmt: skip
    assert store.outcomes(1_000, 2_000, ["stream"], 100) == {"a": (3, 1), "b": (1, 1)}
    assert store.outcomes(0, 2_000, ["stream", "preview"], 1_000) == {"a": (4, 3), "b": (1, 1)}
    assert store.outcomes(5_000, 6_000, ["stream"], 100) == {}


def test_trim_forgets_what_is_old(store):
    store.add_events([event(number, request_id="r") for number in range(10)])
    assert store.trim(1_006) == 6
    kept = [event(number, request_id="r") for number in range(6, 10)]
    assert store.events_of(["ü/1"], 0, 100) == {"ü/1": kept} and store.events_after("", 100)[0] == kept
    assert store.trim(1_006) == 0


def test_a_forgotten_user_is_in_no_read(store):
    events = [event(number, request_id=f"r{number % 2}") for number in range(4)]
    others = [event(9, "other", request_id="r0")]
    store.add_events(events + others)
    store.add_answers([GivenAnswer("r0", "a", "v1", 1_000), GivenAnswer("r1", "a", "v1", 1_000)])
    assert store.forget_user("ü/1") == 4 and store.forget_user("ü/1") == 0
    assert store.events_of(["ü/1", "other"], 0, 10) == {"other": others}
    assert store.events_after("", 10)[0] == others
    assert store.outcomes(0, 2_000, ["stream"], 100) == {"a": (2, 1)}


def test_what_cannot_be_kept_is_a_sentence_without_the_user(store):
    for one in (event(1, "secret\ud800"), event(1, "secret", timestamp=2**70)):
        with pytest.raises(StoreError, match="cannot be used") as caught:
            store.add_events([event(2), one])
        assert "secret" not in str(caught.value)
    assert store.events_after("", 10)[0] == [], "all of a call or nothing"
    assert store.add_events([event(1)]) == 1


def write_apart(uri: str, who: str, count: int) -> subprocess.Popen:
    words = [sys.executable, "-c", WRITER, uri, who, str(count)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())})


def test_several_processes_write_at_once_and_nothing_is_lost(store, uri):
    writers = [write_apart(uri, f"w{number}", 60) for number in range(4)]
    while any(writer.poll() is None for writer in writers):
        store.events_of([f"user-{number}" for number in range(5)], 0, 10)
    assert [writer.wait() for writer in writers] == [0] * 4
    found, _ = store.events_after("", 1_000)
    assert len({one.event_id for one in found}) == len(found) == 240
    changes = [item.change for item in store.items_after(0)]
    assert changes == list(range(1, 25)) and store.last_change() == 24


def test_what_was_acknowledged_outlives_a_killed_process(store, uri):
    writer = write_apart(uri, "w", 100_000)
    assert writer.stdout is not None
    told = [writer.stdout.readline() for _ in range(50)]
    os.kill(writer.pid, signal.SIGKILL)
    told += [line for line in writer.stdout if line.endswith("\n")]
    writer.wait()
    found = {one.event_id for one in store.events_after("", 100_000)[0]}
    assert {f"w-{int(line)}" for line in told} <= found
    assert store.add_events([event(1)]) == 1, "the next one is not held up"


def test_changes_read_beside_a_writer_are_in_order_and_none_is_missed(store, uri):
    words = [sys.executable, "-c", CHANGER, uri, "400"]
    changer = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(Path.cwd())})
    seen, state = 0, {}
    while (running := changer.poll() is None) or seen < store.last_change():
        changes = store.items_after(seen)
        numbers = [item.change for item in changes]
        assert numbers == sorted(numbers)
        whole = [item.change for item in store.items_after(0)]
        assert whole == sorted(whole)
        state.update({item.item_id: item.change for item in changes})
        seen = numbers[-1] if numbers else seen
        assert running or changes
    assert changer.returncode == 0 and seen == 400
    assert state == {item.item_id: item.change for item in store.items_after(0)}


def test_what_was_acknowledged_outlives_a_killed_redis(tmp_path):
    with redis_server(tmp_path) as (uri, server):
        writer = write_apart(uri, "w", 100_000)
        told = [writer.stdout.readline() for _ in range(50)]
        server.kill()
        told += [line for line in writer.stdout if line.endswith("\n")]
        assert writer.wait() == 1, "the writer is told"
    with redis_server(tmp_path) as (uri, _):
        store = open_store(uri)
        assert {f"w-{int(line)}" for line in told} <= {one.event_id for one in store.events_after("", 100_000)[0]}
        store.close()


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_nobody_waits_for_a_redis_that_is_gone_or_hangs(tmp_path, fault):
    port = free_port()
    with redis_server(tmp_path, port) as (uri, server):
        store = open_store(uri)
        assert store.add_events([event(1)]) == 1
        server.send_signal(fault)
        try:
            began = time.monotonic()
            for _ in range(20):
                with pytest.raises(StoreError, match="does not answer"):
                    store.events_of(["ü/1"], 0, 10)
                with pytest.raises(StoreError, match="does not answer"):
                    store.add_events([event(2)])
            assert time.monotonic() - began < 8, "only the first waits: 40 calls would take more than 20 s"
        finally:
            server.send_signal(signal.SIGCONT)
            store.close()


def test_a_redis_that_comes_back_is_asked_again(tmp_path):
    port = free_port()
    with redis_server(tmp_path, port) as (uri, server):
        store = open_store(uri)
        assert store.add_events([event(1)]) == 1
        server.kill()
        with pytest.raises(StoreError, match="does not answer"):
            store.add_events([event(2)])
    with redis_server(tmp_path, port):
        time.sleep(1)
        assert store.events_of(["ü/1"], 0, 10) == {"ü/1": [event(1)]}
    store.close()


def test_a_redis_may_come_later(tmp_path):
    port = free_port()
    with pytest.raises(StoreError, match="does not answer"):
        open_store(f"redis://127.0.0.1:{port}/0")
    store = open_store(f"redis://127.0.0.1:{port}/0", wait=True)
    with redis_server(tmp_path, port):
        assert store.add_events([event(1)]) == 1
    store.close()


def test_a_read_does_not_wait_for_a_write(tmp_path):
    store = open_store(f"sqlite://{tmp_path}/live.db")
    store.add_events([event(1)])
    other = apsw.Connection(f"{tmp_path}/live.db")
    other.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(1) as pool:
        write = pool.submit(store.add_events, [event(2)])
        while not write.running():
            time.sleep(0.01)
        time.sleep(0.1)  # it holds its lock by now
        assert store.events_of(["ü/1"], 0, 10) == {"ü/1": [event(1)]}
        assert not write.done()
        other.execute("ROLLBACK")
        assert write.result() == 1
    assert store.events_of(["ü/1"], 0, 10) == {"ü/1": [event(1), event(2)]}
    store.close()


def test_a_damaged_file_is_a_sentence(tmp_path):
    path = tmp_path / "live.db"
    path.write_bytes(b"no database " * 1000)
    with pytest.raises(StoreError, match=f"the store {path} cannot be used"):
        open_store(f"sqlite://{path}")
    with pytest.raises(StoreError, match="cannot be used"):
        open_store(f"sqlite://{Path(tmp_path / 'live.db' / 'below.db')}")


def test_a_file_that_is_damaged_in_the_middle_is_a_sentence(tmp_path):
    path = tmp_path / "live.db"
    store = open_store(f"sqlite://{path}")
    store.add_events([event(number) for number in range(5_000)])
    store.put_item(LiveItem("i", {"title": "x"}))
    store.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:8192] + b"\xa5" * (len(whole) - 8192))
    with pytest.raises(StoreError, match=f"the store {path} cannot be used"):
        open_store(f"sqlite://{path}").events_after("", 10_000)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> bytes:
    """A store with some of everything."""
    path = tmp_path_factory.mktemp("whole") / "live.db"
    store = open_store(f"sqlite://{path}")
    store.add_events([event(number, f"u{number % 7}", request_id=f"r{number}") for number in range(300)])
    for number in range(20):
        store.put_item(LiveItem(f"i{number}", {**SONG, "title": "x" * 50}, VECTORS))
    store.add_answers([GivenAnswer(f"r{number}", "a", "v", 1_000) for number in range(50)])
    store.close()
    return path.read_bytes()


@given(data=st.data())
@settings(max_examples=150)
def test_whatever_became_of_the_file_it_is_read_or_a_sentence(file, tmp_path_factory, data):
    """Bytes changed, the end missing, a part empty, or no store at all."""
    places = st.integers(0, len(file) - 1)
    kind = data.draw(st.sampled_from(["flipped", "cut", "empty", "foreign"]))
    damaged = bytearray(file)
    if kind == "flipped":
        for place in data.draw(st.lists(places, min_size=1, max_size=40)):
            damaged[place] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        del damaged[data.draw(places) :]
    elif kind == "empty":
        start = data.draw(places)
        count = min(data.draw(st.integers(1, 6_000)), len(damaged) - start)
        damaged[start : start + count] = bytes(count)
    else:
        damaged = bytearray(data.draw(st.binary(max_size=20_000)))
    path = tmp_path_factory.mktemp("damaged") / "live.db"
    path.write_bytes(damaged)
    try:
        store = open_store(f"sqlite://{path}")
    except StoreError:
        return
    calls: list[Callable[[], object]] = [
        lambda: store.events_after("", 1_000), lambda: store.events_of(["u1"], 0, 10), store.last_change,
        lambda: store.items_after(0), lambda: store.outcomes(0, 5_000, ["stream"], 10),
        lambda: store.add_events([event(1_000)]), lambda: store.put_item(LiveItem("i", None)),
        lambda: store.trim(1_005), store.close,
    ]  # fmt: skip
    for call in calls:
        with suppress(StoreError):
            call()


def test_a_store_that_is_not_there_is_a_sentence():
    with pytest.raises(StoreError, match="Redis does not answer"):
        open_store(f"redis://127.0.0.1:{free_port()}/0")
    with pytest.raises(StoreError, match="is not a supported store; use sqlite"):
        open_store("mongodb://x")


def test_a_store_that_must_be_there_is_not_made(tmp_path):
    with pytest.raises(StoreError, match="there is no store"):
        open_store(f"sqlite://{tmp_path}/typo.db", make=False)
    assert not list(tmp_path.iterdir())
