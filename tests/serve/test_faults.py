"""kill -9 of each process behind the endpoint under load: what clients see, and that nothing acknowledged is lost."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from bundle_world import World, make_world
from redis_world import redis_server
from server_process import free_port, running, until, wait_for
from steady_load import Load, SteadyLoad

from serve.store import open_store

pytestmark = pytest.mark.slow
ITEMS = ["music-00001", "podcast-00002", "audiobook-00003"]
REPLICA, PROXY, MANAGER = "ray::ServeReplica", "haproxy", "ray::HAProxyManager"


class Server:
    """A running `recsys-ray serve` and the processes below it."""

    def __init__(self, url: str, pid: int, world: World, store: str) -> None:
        self.url, self._pid, self._world, self.store = url, pid, world, store

    def load(self, rate: float = 40.0) -> SteadyLoad:
        return SteadyLoad(self.url, self._world.user_ids, ITEMS, rate)

    def processes(self, name: str) -> list[psutil.Process]:
        """Those whose command begins with ``name`` or is a program of this name."""
        found = []
        for process in psutil.Process(self._pid).children(recursive=True):
            try:
                command = (process.cmdline() or [""])[0]
            except psutil.NoSuchProcess:
                continue
            if command.startswith(name) or Path(command).name == name:
                found.append(process)
        return found

    def kill(self, name: str) -> float:
        """kill -9 of one such process, until it is gone: its connections break only when its memory is released.
        Returns the moment before."""
        process, moment = self.processes(name)[0], time.monotonic()
        process.kill()
        process.wait(30)
        return moment

    def kept(self) -> set[str]:
        """All events in the store, each of them once."""
        store = open_store(self.store)
        found = [event.event_id for event in store.events_after("", 1_000_000)[0]]
        store.close()
        assert len(set(found)) == len(found)
        return set(found)


@contextmanager
def serving(world: World, folder: Path, store: str, replicas: int) -> Iterator[Server]:
    port, log = free_port(), folder / "serve.log"
    words = ["serve", "--bundle", world.root / "bundles", "--port", port, "--store", store, "--replicas", replicas]
    with running([sys.executable, "-m", "pipelines.cli", *map(str, words)], log) as process:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, log, process)
        yield Server(url, process.pid, world, store)


def answered_after(load: SteadyLoad, moment: float) -> bool:
    return any(one.answered and one.at > moment for one in load.since(moment).asked if one.until < float("inf"))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"))
    made.bundle()
    return made


def test_answers_go_on_without_redis_and_with_a_replica_that_starts_meanwhile(world, tmp_path):
    """Redis is killed, then the only replica, then Redis comes back with what it had acknowledged."""
    port = free_port()
    with ExitStack() as stack:
        uri, redis = stack.enter_context(redis_server(tmp_path, port))
        server = stack.enter_context(serving(world, tmp_path, uri, 1))
        with server.load(20.0) as load:  # 200 requests may wait: 10 s for the new replica
            time.sleep(2)
            redis.kill()
            redis.wait()
            gone = time.monotonic()
            time.sleep(4)
            killed = server.kill(REPLICA)
            dead = time.monotonic()
            until(lambda: answered_after(load, killed + 0.5))
            time.sleep(2)
            end = time.monotonic()
            stack.enter_context(redis_server(tmp_path, port))
            back = time.monotonic()
            time.sleep(5)
        print(f"\nRedis: {load.since(0)}")
        without = Load([one for one in load.since(gone).asked if gone < one.at and one.until < end])
        unanswered = [one for one in load.since(0).failed if one.event_id is None]
        assert all(one.statuses[-1] == 429 for one in unanswered), "too many wait for the new replica: come later"
        answers = [one for one in without.recommendations if one.answered]
        assert len(answers) > 30 and answers == without.degraded
        # An event got 503. Or the replica died while the event or its repeat was under way: that connection broke. Or
        # too many requests waited already for the new replica: 429, at first or also when it was repeated.
        refused = [one for one in without.events if one.statuses[-1] == 503]
        broken = [one for one in without.events if 0 in one.statuses]
        crowd = [one for one in without.events if one.statuses[-1] == 429]
        assert len(refused) > 5 and all(one in refused or one in broken or one in crowd for one in without.events)
        assert all(one.at > killed for one in crowd if one not in broken)
        assert all(one.at <= dead and one.until >= killed for one in broken), f"{broken}, killed {killed}, dead {dead}"
        others = [one for one in refused if one not in broken and one.statuses[0] != 503]
        assert all(one.statuses[0] == 429 and one.at > killed for one in others)
        assert all("store" in one.told["detail"] for one in refused)
        after = load.since(back + 2)
        assert after.asked and not after.failed and not after.degraded
        assert load.since(0).acknowledged <= server.kept()
        quick = Load([one for one in without.asked if one.until < killed]).recommendations
        assert quick and max(one.until - one.at for one in quick) < 2, "nobody waits for a store that is gone"


@pytest.fixture(scope="module")
def server(world, tmp_path_factory) -> Iterator[Server]:
    """Two replicas, each of which writes into the SQLite store."""
    folder = tmp_path_factory.mktemp("serve")
    with serving(world, folder, f"sqlite://{folder}/live.db", 2) as made:
        yield made


def test_a_killed_replica_costs_no_answer(server):
    with server.load() as load:
        time.sleep(2)
        moment = server.kill(REPLICA)
        until(lambda: len(server.processes(REPLICA)) < 2)
        until(lambda: len(server.processes(REPLICA)) == 2)
        time.sleep(2)
    told = load.since(0)
    print(f"\nreplica: {told}")
    assert not told.failed and not told.degraded
    late = [(round(one.at - moment, 2), round(one.first - moment, 2), one.statuses) for one in told.repeated]
    assert all(one.at < moment + 2 and moment <= one.first for one in told.repeated), late  # until HAProxy noticed
    assert told.gap < 3
    assert told.acknowledged <= server.kept()


@pytest.mark.parametrize("name", [PROXY, MANAGER])
def test_a_killed_proxy_comes_back(server, name):
    """The only door of the only machine: nobody can be answered meanwhile, but everybody is told so."""
    with server.load() as load:
        time.sleep(2)
        moment = server.kill(name)
        deadline = moment + 60
        while not answered_after(load, moment + 0.5):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(3)
        back = time.monotonic()
        time.sleep(2)
    told = load.since(0)
    print(f"\n{name}: {told}")
    assert told.gap < 20
    assert all(one.first >= moment and one.at < back for one in told.repeated + told.failed)
    assert {status for one in told.failed for status in one.statuses} <= {0, 404, 500}
    assert not any(one.told for one in told.failed), "no answer of the server, only the proxy's"
    assert load.since(back).asked and not load.since(back).failed
    assert told.acknowledged <= server.kept()
