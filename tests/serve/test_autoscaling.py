"""A step of load up and down: a replica comes and goes, and no request fails."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import psutil
import pytest
from bundle_world import make_world
from server_process import free_port, running, until, wait_for

pytestmark = pytest.mark.slow
_SERVE = """
import sys
from serve.deployment import Scaling
from serve.server import serve_forever
serve_forever(sys.argv[1], port=int(sys.argv[2]), scaling=Scaling(1, 2, ongoing=2, idle_s=5))
"""


@contextmanager
def clients(url: str, user_ids: list[str], count: int) -> Iterator[Counter]:
    """So many who ask again as soon as they are answered; yields the number of answers by status."""
    over, told = threading.Event(), Counter[int]()

    def ask(first: int) -> None:
        with httpx.Client(base_url=url, timeout=40) as client:
            for number in range(first, 10**9, count):
                if over.is_set():
                    return
                body = {"user_id": user_ids[number % len(user_ids)], "k": 5}
                told[client.post("/v1/recommendations", json=body).status_code] += 1

    with ThreadPoolExecutor(count) as pool:
        asked = [pool.submit(ask, number) for number in range(count)]
        try:
            yield told
        finally:
            over.set()
    for one in asked:
        one.result()  # a connection that broke


def test_replicas_follow_the_load(tmp_path):
    world = make_world(tmp_path / "world")
    world.bundle()
    port, log = free_port(), tmp_path / "serve.log"
    url, words = f"http://127.0.0.1:{port}", ["-c", _SERVE, str(world.root / "bundles"), str(port)]
    with running([sys.executable, *words], log) as process:
        wait_for(url, log, process)

        def replicas() -> int:
            below = psutil.Process(process.pid).children(recursive=True)
            return sum(one.name().startswith("ray::ServeRepl") for one in below if one.is_running())

        assert replicas() == 1
        began = time.monotonic()
        with clients(url, world.user_ids, 12) as many:
            until(lambda: replicas() == 2, 90)
            up = time.monotonic() - began
            time.sleep(3)
        began = time.monotonic()
        with clients(url, world.user_ids, 1) as few:
            until(lambda: replicas() == 1, 90)
            down = time.monotonic() - began
            time.sleep(1)
    print(f"\ntwo replicas after {up:.0f} s, one again after {down:.0f} s; answers {many} and {few}")
    assert set(many) == set(few) == {200}
