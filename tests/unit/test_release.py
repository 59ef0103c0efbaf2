"""Promotion: what is served of a folder of bundles, and what is refused."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from app_client import Client
from bundle_world import World, make_world

from recsys_ray.bundle.release import (
    Limits,
    bundle_to_serve,
    folder_of_bundles,
    load_verified,
    promote,
    rollback,
    verify_once,
)
from recsys_ray.core.errors import ArtifactError, UserError
from recsys_ray.storage.store import Place
from serve.app import create_app
from serve.replica import RecommendationService
from serve.security import make_key
from serve.settings import Settings


@pytest.fixture
def world(tmp_path, monkeypatch) -> World:
    monkeypatch.setenv("RECSYS_RAY_CACHE", str(tmp_path / "cache"))
    return make_world(tmp_path / "run")


def another(world: World, seed: int = 1) -> Path:
    """A second bundle of the same run, made current; its samples differ."""
    return replace(world, config=world.config.model_copy(update={"seed": seed})).bundle().path


def test_the_newest_is_served_until_one_is_promoted(world):
    first = world.bundle().path
    assert bundle_to_serve(first.parent)[0].name == first.name
    assert folder_of_bundles(first) is None and bundle_to_serve(first)[0].name == first.name
    assert promote(first) == (first.name, None)
    second = another(world)
    assert (
        second != first and bundle_to_serve(first.parent)[0].name == bundle_to_serve(world.root)[0].name == first.name
    )
    assert promote(first.parent) == (second.name, first.name)
    assert bundle_to_serve(first.parent / "current")[0].name == second.name
    assert rollback(first.parent) == (first.name, second.name)
    assert rollback(first.parent) == (second.name, first.name)


def test_there_must_be_something_to_go_back_to(world):
    first = world.bundle().path
    with pytest.raises(UserError, match="nothing was promoted"):
        rollback(first.parent)
    promote(first)
    with pytest.raises(UserError, match="nothing was promoted"):
        rollback(first.parent)
    second = another(world)
    promote(second)
    shutil.rmtree(first)
    with pytest.raises(UserError, match=f"version {first.name}, .* no longer exists"):
        rollback(second.parent)
    (first.parent / "serving.json").write_text("{")
    with pytest.raises(ArtifactError, match="is damaged; promote a bundle again"):
        bundle_to_serve(first.parent)


def test_a_bundle_that_answers_otherwise_is_refused_unless_it_is_meant(world, tmp_path):
    first = world.bundle().path
    promote(first)
    stranger = make_world(tmp_path / "other", seed=99).bundle().path
    shutil.copytree(stranger, first.parent / "stranger")
    with pytest.raises(ArtifactError, match=r"differs too much from .*: \d+% of the top 10 items"):
        promote(first.parent / "stranger", Limits(overlap=0.9))
    assert bundle_to_serve(first.parent)[0].name == first.name
    assert promote(first.parent / "stranger", None) == ("stranger", first.name)
    assert bundle_to_serve(first.parent) == (Place(str(first.parent)) / "stranger", False)


def test_a_bundle_whose_validation_fell_is_refused(world):
    first = world.bundle().path
    promote(first)
    metrics = world.root / "two_tower" / "hgnn" / "metrics.json"
    metrics.write_text(json.dumps([{"epoch": 0, "valid_ndcg_at_100": 0.1}]))
    second = another(world)
    with pytest.raises(ArtifactError, match=r"has validation NDCG@100 0\.1000, below .* 0\.2000"):
        promote(second, Limits())
    assert bundle_to_serve(first.parent)[0].name == first.name


def test_files_are_compared_once_and_again_when_one_changed(world, monkeypatch):
    made = world.bundle().path
    verify_once(made)
    monkeypatch.setattr("recsys_ray.bundle.release.open_artifact", lambda *a, **k: pytest.fail("compared again"))
    verify_once(made)
    monkeypatch.undo()
    damage(made)
    with pytest.raises(ArtifactError, match="a different checksum"):
        verify_once(made)


def damage(bundle: Path) -> None:
    """Change a byte without changing the size."""
    path = bundle / "vectors.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_replica_swaps_to_what_is_promoted_and_keeps_what_it_has_otherwise(world):
    first = world.bundle().path
    promote(first)
    service = RecommendationService(limits=Limits(overlap=0.0))
    service._wanted = str(first.parent)

    async def start() -> None:
        await service.reconfigure({"bundle": str(first.parent)})

    asyncio.run(start())
    before = service.recommender
    service.look()
    assert service.recommender is before and service.refused is None
    second = another(world)
    service.look()
    assert service.recommender is before, "made is not promoted"
    promote(second)
    service.look()
    assert service.recommender.version == second.name and service.refused is None

    third = another(world, seed=2)
    Place(str(first.parent / "serving.json")).write(
        json.dumps({"output": third.name, "previous": second.name, "forced": False}).encode()
    )
    damage(third)
    service.look()
    assert service.recommender.version == second.name and "a different checksum" in str(service.refused)
    rollback(first.parent)
    service.look()
    assert service.recommender.version == second.name and service.refused is None


def test_a_bundle_is_promoted_over_http(world, tmp_path):
    first = world.bundle().path
    second = another(world)
    service = RecommendationService(limits=Limits(overlap=0.0))

    async def start(place: Path) -> None:
        await service.reconfigure({"bundle": str(place)})

    asyncio.run(start(first.parent))
    keys = tmp_path / "keys"
    admin, reader = (make_key(keys, scope, [scope]) for scope in ("promote", "read"))
    app = create_app(service, Settings(keys=str(keys)))
    client = Client(app, authorization=f"Bearer {admin}")
    assert Client(app, authorization=f"Bearer {reader}").post("/v1/rollback").status_code == 403
    answer = client.post("/v1/rollback")
    assert answer.status_code == 409 and "nothing to roll back to" in answer.json()["detail"]
    wanted = {"version": first.name}
    assert client.post("/v1/promote", json=wanted).json() == {"promoted": first.name, "before": second.name}
    service.look()
    assert service.recommender.version == first.name
    assert client.post("/v1/rollback").json() == {"promoted": second.name, "before": first.name}
    for version in ("../run", "a/b", ".", ""):
        assert client.post("/v1/promote", json={"version": version}).status_code == 422
    answer = client.post("/v1/promote", json={"version": "nothing"})
    assert answer.status_code == 409 and "is not a bundle" in answer.json()["detail"]
    damage(first)
    answer = client.post("/v1/promote", json={"version": first.name, "force": True})
    assert answer.status_code == 409 and "checksum" in answer.json()["detail"]
    service._recommender = None
    asyncio.run(start(second))
    answer = client.post("/v1/promote", json={"version": second.name})
    assert answer.status_code == 409 and "one bundle, not a folder" in answer.json()["detail"]


def test_a_bundle_is_loaded_from_where_it_lies(world):
    made = world.bundle()
    assert load_verified(Place(str(made.path))).version == made.counts["version"]
