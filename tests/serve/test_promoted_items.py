"""New items after a promotion: another run's bundle embeds them again, and what stands in the way is said truly."""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import redis
from fastapi.testclient import TestClient
from late_world import make_late
from redis_world import redis_server
from server_process import free_port

from recsys_ray.bundle.release import Limits, promote
from recsys_ray.serving.recommender import Recommender
from recsys_ray.storage.artifacts import read_json, sha256, write_json
from serve.app import create_app
from serve.replica import RecommendationService
from serve.settings import Settings

SONG = {"item_type": "music", "title": "Title of music-00001"}


@pytest.fixture
def embedder(ray_local):
    """It embeds in an actor, which is gone with the service."""
    yield
    gc.collect()


@pytest.fixture
def stack():
    with ExitStack() as made:
        yield made


def two_runs(root: Path) -> tuple[Path, Path]:
    """Bundles of two runs of one small world. Some of its users have seen nearly all that there is; those are no
    canaries."""
    late = make_late(root)
    other = replace(late.world, config=late.world.config.model_copy(update={"seed": 1})).bundle()
    for bundle in (late.bundle, other.path):
        recommender, file = Recommender.load(bundle), bundle / "canary.json"
        users = [user for user in read_json(file)["user_ids"] if recommender.recommend(user)]
        write_json(file, {"user_ids": users})
        approve(bundle, "canary.json")
        assert users
    return late.bundle, other.path


def approve(bundle: Path, name: str) -> None:
    """Take a changed file for the right one."""
    file, manifest = bundle / name, read_json(bundle / "manifest.json")
    manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_json(bundle / "manifest.json", manifest)


def names(client: TestClient) -> list[str]:
    """What somebody is recommended who liked a song: new items are in no list of what is popular."""
    told = client.post("/v1/recommendations", json={"history": [{"item_id": "music-00001"}], "k": 500})
    assert told.status_code == 200
    return [item["item_id"] for item in told.json()["items"]]


def test_new_items_are_embedded_again_when_the_store_is_back(tmp_path, monkeypatch, embedder, stack, server_log):
    """Redis is gone when a bundle of another run is promoted: it is served, and nobody says that it was refused."""
    monkeypatch.setenv("RECSYS_RAY_CACHE", str(tmp_path / "cache"))
    (first, second), port = two_runs(tmp_path / "late"), free_port()
    promote(first)
    with redis_server(tmp_path, port) as (uri, server):
        settings = Settings(store=uri, log=False, timeout=120)
        service = RecommendationService(limits=Limits(overlap=0.0), settings=settings)
        asyncio.run(service.reconfigure({"bundle": str(first.parent)}))
        client = stack.enter_context(TestClient(create_app(service, settings)))
        embedders = {ray.get_actor("recsys-ray-embedder")}  # started with the server: no item should wait for it
        for item_id in ("new", "damaged", "deleted"):
            told = client.put(f"/v1/items/{item_id}", json=SONG)
            assert told.status_code == 200, told.text
            embedders.add(ray.get_actor("recsys-ray-embedder"))
        assert len(embedders) == 1, "its models are loaded once"
        assert client.delete("/v1/items/deleted").status_code == 200
        assert {"new", "damaged"} <= set(names(client))
        db = redis.Redis.from_url(uri)
        db.hset("recsys-ray:items", "damaged", b"2 \xff")
        db.close()
        server.kill()
    promote(second)
    server_log.clear()
    for _ in range(3):
        service.look()
    assert service.recommender.version == second.name and service.refused is None
    (swapped, waits) = server_log.messages
    assert f"now serving version {second.name}, before: {first.name}" in swapped
    assert f"version {second.name} is served, but new items are missing for now" in waits
    assert "Redis does not answer" in waits
    assert "new" not in names(client)
    server_log.clear()
    with redis_server(tmp_path, port):
        time.sleep(1)  # Redis is not asked again before. An answer may ask first, as the look does
        service.look()
        assert service.refused is None and "new" in names(client)
        assert not {"damaged", "deleted"} & set(names(client))
        (damaged,) = (message for message in server_log.messages if "damaged row" in message)
        assert "change 2" in damaged
        change = service.answers.store.last_change()
        service.look()
        assert service.answers.store.last_change() == change, "once"


def test_a_replica_that_starts_embeds_again_what_it_finds(tmp_path, monkeypatch, embedder, stack):
    """The bundle that embedded a new item was replaced while no server ran."""
    monkeypatch.setenv("RECSYS_RAY_CACHE", str(tmp_path / "cache"))
    first, second = two_runs(tmp_path / "late")
    settings = Settings(store=f"sqlite://{tmp_path}/live.db", log=False, timeout=120)
    for bundle in (first, second):
        service = RecommendationService(settings=settings)
        asyncio.run(service.reconfigure({"bundle": str(bundle)}))
        client = stack.enter_context(TestClient(create_app(service, settings)))
        if bundle == first:
            assert client.put("/v1/items/new", json=SONG).status_code == 200
        else:
            assert "new" not in names(client)
            service.look()
        assert "new" in names(client)


def test_answers_need_no_models_of_the_embedder(tmp_path, monkeypatch, embedder, stack):
    """They load beside the bundle. Where they cannot, new items are refused and the rest goes on."""
    monkeypatch.setenv("RECSYS_RAY_CACHE", str(tmp_path / "cache"))
    bundle, _ = two_runs(tmp_path / "late")
    (bundle / "hgnn_model" / "config.json").write_text("{")
    approve(bundle, "hgnn_model/config.json")
    settings = Settings(store=f"sqlite://{tmp_path}/live.db", log=False, timeout=120)
    service = RecommendationService(settings=settings)
    asyncio.run(service.reconfigure({"bundle": str(bundle)}))
    client = stack.enter_context(TestClient(create_app(service, settings), raise_server_exceptions=False))
    assert names(client)
    told = client.put("/v1/items/new", json=SONG)
    assert told.status_code == 500 and told.headers["content-type"] == "application/problem+json"
    assert "new" not in names(client)
