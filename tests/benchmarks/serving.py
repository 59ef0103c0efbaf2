"""The endpoint under load, beside an empty FastAPI deployment on the same Ray Serve and the same app on bare uvicorn.

make bench-serving          (or: python -m tests.benchmarks.serving --items 100000)

All are asked in the same run, with the same settings, on the same cores as the generator of the load. The endpoint is
asked a second time with filters, while events arrive. "First answers" are the three after the server says it is ready.

make bench-serving SOAK=600 (or: python -m tests.benchmarks.serving --soak 600)

Instead, the endpoint alone with an event store: for so many seconds, 80 % of the questions a second that it can answer,
and events beside. Prints the memory of the replica, what failed and p99, minute by minute.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' worlds

from bundle_world import make_world

from recsys_ray.bundle.bundle import Bundle
from recsys_ray.config import IndexConfig
from recsys_ray.serving.recommender import Recommender
from tests.benchmarks.load import PATH, Load, closed, open_loop, questions

_EVENTS = 20  # a second
_EMPTY = """
import serve.server as server
from serve.deployment import Scaling

def application(args):
    from fastapi import FastAPI, Request
    from ray import serve

    app = FastAPI()
    items = [{"item_id": f"item-{k}", "item_type": "music", "title": "A title of usual length", "score": 0.5,
              "reason": 'because of "Another title" (stream)'} for k in range(10)]

    @app.get("/healthz")
    async def healthz():
        return {}

    @app.post("/v1/recommendations")
    async def recommendations(request: Request):
        await request.json()
        return {"version": "none", "known": True, "items": items}

    service = serve.deployment(name="recommendations")(serve.ingress(app)(type("Empty", (), {})))
    return service.options(ray_actor_options={"num_cpus": 1}, **Scaling().options()).bind()

server.application = application
"""
_SERVE = """
import sys
from serve.server import serve_forever
from serve.settings import load_settings
serve_forever(sys.argv[1], port=int(sys.argv[2]), settings=load_settings({"store": sys.argv[3] or None}))
"""
_UVICORN = """
import sys
import uvicorn
from recsys_ray.serving.recommender import Recommender
from serve.app import create_app
from serve.live import LiveAnswers

class Live:
    recommender, refused, examples = Recommender.load(sys.argv[1]), None, False
    answers = LiveAnswers(None)

uvicorn.run(create_app(Live()), port=int(sys.argv[2]), log_level="warning")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--folder", type=Path, help="keep the bundle here, and use it again")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="watch the endpoint's memory for so long instead")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = given.folder or Path(scratch)
        bundle = _bundle(run, given.items, given.users)
        recommender = Recommender.load(bundle, warm=False)
        bodies = questions([user_id for user_id, _ in recommender.users.spread(20_000)])
        items = [item.item_id for item in recommender.recommend(k=500)]
        del recommender
        print(f"{given.items:,} items, {given.users:,} users, {os.cpu_count()} cores with the generator beside")
        if given.soak:
            _soak(bundle, bodies, items, given.soak, given.seconds, Path(scratch) / "live.db")
            return
        peaks: dict[str, float] = {}
        live, filtered = "recsys-ray, filters and events", _with_filters(bodies)
        servers = {"empty deployment": _EMPTY + _SERVE, "recsys-ray": _SERVE, live: _SERVE, "app on uvicorn": _UVICORN}
        half, plain = 0.0, bodies
        for name, script in servers.items():
            store = f"sqlite://{scratch}/live.db" if name == live else ""
            bodies = filtered if name == live else plain
            with _running(script, bundle, store) as url, _events(url if store else "", plain, items):
                print(f"{name}, first answers: {_first(url, bodies)}")
                closed(url, bodies, 16, 3)  # to warm up
                one, many = closed(url, bodies, 1, given.seconds), closed(url, bodies, 16, given.seconds)
                peaks[name] = many.rate
                half = half or many.rate / 2
                _show(f"{name}, 1 connection", one)
                _show(f"{name}, 16 connections", many, f"{many.rate / peaks['empty deployment']:.0%} of the empty one")
                for rate in dict.fromkeys((half * 0.6, many.rate / 2)):
                    _show(f"{name}, {rate:,.0f} a second come", open_loop(url, bodies, rate, given.seconds))


def _with_filters(bodies: list[str]) -> list[str]:
    """The same questions under four filters, which allow a third, a half, a fifth and a tenth of the items."""
    filters = itertools.cycle(
        [{"languages": ["en"]}, {"categories_any": ["b"]}, {"categories_all": ["c"]}, {"categories_all": ["b", "c"]}]
    )
    return [
        json.dumps(json.loads(body) | {"filter": one}, ensure_ascii=False)
        for body, one in zip(bodies, filters, strict=False)
    ]


def _first(url: str, bodies: list[str]) -> str:
    times = []
    with httpx.Client(base_url=url, headers={"content-type": "application/json"}) as client:
        client.get("/healthz")  # opens the connection
        for body in bodies[:3]:
            began = time.perf_counter()
            client.post(PATH, content=body).raise_for_status()
            times.append(time.perf_counter() - began)
    return ", ".join(f"{taken * 1e3:.1f} ms" for taken in times)


@contextmanager
def _events(url: str, bodies: list[str], items: list[str]) -> Iterator[None]:
    """Send events of the users of ``bodies`` while the block runs, ``_EVENTS`` a second; none without a URL."""
    over = threading.Event()

    def send() -> None:
        with httpx.Client(base_url=url) as client:
            for body, item_id in zip(itertools.cycle(bodies), itertools.cycle(items)):
                if over.wait(1 / _EVENTS):
                    return
                event = {"user_id": json.loads(body)["user_id"], "item_id": item_id}
                client.post("/v1/events", json={"events": [event]}).raise_for_status()

    with ThreadPoolExecutor(1) as beside:
        sent = beside.submit(send) if url else None
        try:
            yield
        finally:
            over.set()
    if sent is not None:
        sent.result()


def _soak(bundle: Path, bodies: list[str], items: list[str], seconds: float, trial: float, store: Path) -> None:
    """Answers and events for ``seconds``; memory grows with caches at first, and should stay where it is afterwards."""
    with _running(_SERVE, bundle, f"sqlite://{store}") as url, _events(url, bodies, items):
        closed(url, bodies, 16, 3)  # to warm up
        rate = 0.8 * closed(url, bodies, 16, trial).rate
        print(f"{rate:,.0f} questions and {_EVENTS} events a second; {_memory()}", flush=True)
        for minute in range(1, math.ceil(seconds / 60) + 1):
            load = open_loop(url, bodies, rate, min(60.0, seconds - 60 * (minute - 1)))
            _show(f"minute {minute}", load, _memory())


def _memory() -> str:
    """Of the replicas of this process' servers: their own, and with the files that they map."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith("ray::ServeReplica"):
                facts = process.memory_full_info()
                found.append(f"{facts.uss / 2**20:,.1f} MB, {facts.rss / 2**20:,.1f} MB with mapped files")
    return "; ".join(found)


def _show(name: str, load: Load, more: str = "") -> None:
    times = f"p50 {load.p50 * 1e3:>7.2f} ms   p99 {load.p99 * 1e3:>7.2f} ms   failed {load.failed}"
    print(f"{name:<42} {load.rate:>8,.0f} answers/s   {times}   {more}", flush=True)


def _bundle(run: Path, items: int, users: int) -> Path:
    if not (run / "bundles" / "current.json").exists():
        third = items // 3
        shape = third, third, items - 2 * third
        world = make_world(run, shape, users, 128, 384, memory=0.1, history=50, latent=32)
        as_by_default = world.config.model_copy(update={"index": IndexConfig()})
        replace(world, config=as_by_default).bundle()
    return Bundle.open(run).path


@contextmanager
def _running(script: str, bundle: Path, store: str = "") -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        words = [sys.executable, "-c", script, str(bundle), str(port), store]
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 300
            while not _answers(url):
                if time.monotonic() > deadline or process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"the server did not start:\n{log.read()}")
                time.sleep(0.2)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(90)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()
