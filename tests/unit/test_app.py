"""The HTTP API on its own event loop, over a real recommender that is made to take its time."""

import asyncio
import threading
from types import SimpleNamespace

import httpx
from bundle_world import make_world

from recsys_ray.serving.recommender import Recommender
from serve.app import create_app


def test_requests_are_accepted_while_an_answer_is_computed(tmp_path):
    """Serve counts what a replica has accepted: were it to compute in place, no request would ever seem to wait."""
    recommender = Recommender.load(make_world(tmp_path).bundle().path)
    started, others_are_done, compute = threading.Event(), threading.Event(), recommender.answer

    def slow(**arguments):
        started.set()
        assert others_are_done.wait(20), "no other request was answered meanwhile"
        return compute(**arguments)

    recommender.answer = slow

    async def ask() -> httpx.Response:
        app = create_app(SimpleNamespace(recommender=recommender, refused=None, examples=False))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            waiting = asyncio.create_task(client.post("/v1/recommendations", json={"k": 3}))
            await asyncio.to_thread(started.wait, 20)
            assert (await client.get("/healthz")).status_code == 200
            others_are_done.set()
            return await waiting

    answer = asyncio.run(ask())
    assert answer.status_code == 200
    assert len(answer.json()["items"]) == 3
