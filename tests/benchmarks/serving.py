"""The endpoint under load, beside an empty FastAPI deployment on the same Ray Serve and the same app on bare uvicorn.

make bench-serving          (or: python -m tests.benchmarks.serving --items 100000)

All three are asked in the same run, with the same settings, on the same cores as the generator of the load.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' worlds

from bundle_world import make_world

from recsys_ray.bundle.bundle import Bundle
from recsys_ray.serving.recommender import Recommender
from tests.benchmarks.load import Load, closed, open_loop, questions

_EMPTY = """
import serve.deployment as deployment

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
    return service.options(ray_actor_options={"num_cpus": 1}, **deployment.Scaling().options()).bind()

deployment.application = application
"""
_SERVE = "import sys\nfrom serve.deployment import serve_forever\nserve_forever(sys.argv[1], port=int(sys.argv[2]))\n"
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
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = given.folder or Path(scratch)
        bundle = _bundle(run, given.items, given.users)
        recommender = Recommender.load(bundle, warm=False)
        bodies = questions([user_id for user_id, _ in recommender.users.spread(20_000)])
        del recommender
        print(f"{given.items:,} items, {given.users:,} users, {os.cpu_count()} cores with the generator beside")
        peaks: dict[str, float] = {}
        servers = {"empty deployment": _EMPTY + _SERVE, "recsys-ray": _SERVE, "the app on uvicorn": _UVICORN}
        half = 0.0
        for name, script in servers.items():
            with _running(script, bundle) as url:
                closed(url, bodies, 16, 3)  # to warm up
                one, many = closed(url, bodies, 1, given.seconds), closed(url, bodies, 16, given.seconds)
                peaks[name] = many.rate
                half = half or many.rate / 2
                _show(f"{name}, 1 connection", one)
                _show(f"{name}, 16 connections", many, f"{many.rate / peaks['empty deployment']:.0%} of the empty one")
                for rate in dict.fromkeys((half * 0.6, many.rate / 2)):
                    _show(f"{name}, {rate:,.0f} a second come", open_loop(url, bodies, rate, given.seconds))


def _show(name: str, load: Load, more: str = "") -> None:
    times = f"p50 {load.p50 * 1e3:>7.2f} ms   p99 {load.p99 * 1e3:>7.2f} ms   failed {load.failed}"
    print(f"{name:<42} {load.rate:>8,.0f} answers/s   {times}   {more}", flush=True)


def _bundle(run: Path, items: int, users: int) -> Path:
    if not (run / "bundles" / "current.json").exists():
        third = items // 3
        make_world(run, (third, third, items - 2 * third), users, 128, 384, memory=0.1, history=50, latent=32).bundle()
    return Bundle.open(run).path


@contextmanager
def _running(script: str, bundle: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        words = [sys.executable, "-c", script, str(bundle), str(port)]
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
