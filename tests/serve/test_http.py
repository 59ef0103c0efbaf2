"""HTTP end to end: real Ray Serve in processes of its own, asked through a socket."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
import yaml
from bundle_world import FORGOTTEN, LONELY, STRANGE_IDS, World, make_world
from server_process import free_port, running, wait_for

from recsys_ray.bundle.release import promote, rollback
from recsys_ray.serving.recommender import Recommender
from recsys_ray.serving.requests import Question
from recsys_ray.storage.outputs import find_bundle
from recsys_ray.storage.store import Place

TYPES = ["audiobook", "music", "podcast"]
SERVE = """
import sys
from pathlib import Path
from recsys_ray.core.errors import UserError
from serve.server import serve_forever
try:
    serve_forever(sys.argv[1], port=int(sys.argv[2]))
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""
CLUSTER = """
import sys
from recsys_ray.cluster.session import ray_session
from recsys_ray.config import RayConfig
import ray
with ray_session(RayConfig(num_cpus=4, object_store_mb=128, dashboard=True)):
    print(ray.worker.global_worker.node.webui_url, flush=True)
    sys.stdin.read()
"""


def python(script: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", script, *map(str, arguments)]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"))
    made.bundle()
    return made


@pytest.fixture(scope="module")
def recommender(world) -> Recommender:
    return Recommender.load(world.root)


@pytest.fixture(scope="module")
def server(world, tmp_path_factory) -> Iterator[tuple[str, Path, subprocess.Popen]]:
    log, port = tmp_path_factory.mktemp("log") / "serve.log", free_port()
    with running(python(SERVE, world.root / "bundles" / "current", port), log) as process:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, log, process)
        yield url, log, process


@pytest.fixture
def http(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server[0], timeout=30) as client:
        yield client


def ask(http: httpx.Client, **body) -> list[str]:
    response = http.post("/v1/recommendations", json=body)
    assert response.status_code == 200, response.text
    return [item["item_id"] for item in response.json()["items"]]


def test_answers_are_those_of_the_library(http, world, recommender):
    for user_id in (*world.user_ids[:8], LONELY, FORGOTTEN, "nobody"):
        response = http.post("/v1/recommendations", json={"user_id": user_id, "k": 7}).json()
        expected = recommender.answer(Question(user_id, k=7))
        assert response.pop("request_id")
        items = response.pop("items")
        told = {name: value for name, value in vars(expected).items() if name != "items"}
        assert response == {**told, "variant": None, "degraded": False}
        assert [{**item, "score": pytest.approx(item["score"], abs=1e-5)} for item in items] == [
            vars(item) for item in expected.items
        ]


def test_filters_hold_over_http(http, world):
    user_id = world.user_ids[5]
    first = ask(http, user_id=user_id, k=5)
    assert not set(first) & world.seen(user_id)
    rest = ask(http, user_id=user_id, k=5, exclude=first[:2])
    assert rest[:3] == first[2:]
    assert all(item.startswith(("audio", "music")) for item in ask(http, item_types=["audiobook", "music"], k=50))
    history = [{"item_id": item_id, "event": "stream", "timestamp": 1_699_000_000} for item_id in STRANGE_IDS]
    assert not set(ask(http, history=history, age=40, country="SE", tastes={"music": [1, 0, 0, 0]}, k=500)) & {
        *STRANGE_IDS
    }


@pytest.mark.parametrize("item_id", [*STRANGE_IDS, "podcast-00001"])
def test_similar_of_any_id(http, recommender, item_id):
    response = http.get(f"/v1/items/{quote(item_id, safe='')}/similar", params={"k": 4, "item_type": ["music"]})
    assert response.status_code == 200
    assert response.json()["items"] == [vars(item) for item in recommender.similar(item_id, 4, ["music"])]


def test_refusals_are_problem_details_through_the_proxy(http):
    for method, path, body, status in (
        ("POST", "/v1/recommendations", b'{"age": false}', 422),
        ("POST", "/v1/recommendations", b"{", 400),
        ("POST", "/v1/recommendations", b" " * (17 << 20), 413),
        ("GET", "/v1/recommendations", b"", 405),
        ("GET", "/v1/items/none/similar", b"", 404),
        ("GET", "/v2", b"", 404),
    ):
        response = http.request(method, path, content=body, headers={"content-type": "application/json"})
        assert response.status_code == status, (path, body[:20])
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["status"] == status and response.json()["detail"]
        assert response.headers.get_list("x-request-id") == [response.json()["request_id"]]


def test_facts_page_and_documentation(http, world, recommender):
    assert http.get("/healthz").json() == {"status": "ok", "version": recommender.version}
    version = http.get("/v1/version").json()
    assert version["items"] == 120 and version["users"] == len(world.user_ids)
    assert version["recall"] == dict.fromkeys(TYPES, 1.0) and version["refused"] is None
    examples = http.get("/v1/examples").json()
    assert examples and all(example["history"] for example in examples)
    page = http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page.text)
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/recommendations", "/v1/items/{item_id}/similar", "/healthz", "/v1/version"} <= set(paths)


def test_logs_have_requests_and_no_ids_of_users(http, world):
    user = world.user_ids[4]
    assert http.get(f"/v1/users/{quote(user, safe='')}/history").json()["history"]
    assert ask(http, user_id=user, history=[{"item_id": STRANGE_IDS[0]}])
    logged = [
        path.read_text(errors="replace")
        for folder in Path("/tmp/ray").glob("session_2*")
        if folder.stat().st_mtime > world.root.stat().st_mtime
        for path in folder.glob("logs/**/*")
        if path.is_file()
    ]
    assert any('"route": "/v1/recommendations", "status": 200' in text for text in logged)
    for secret in (user, quote(user), quote(user, safe=""), STRANGE_IDS[0]):
        assert not any(secret in text for text in logged), secret


def test_many_at_once(http, world, recommender):
    expected = {user_id: [item.item_id for item in recommender.recommend(user_id)] for user_id in world.user_ids}
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda user_id: (user_id, ask(http, user_id=user_id)), world.user_ids * 4))
    assert all(items == expected[user_id] for user_id, items in found)


def test_a_taken_port_is_one_sentence(server, world, tmp_path):
    port = server[0].rsplit(":", 1)[1]
    with running(python(SERVE, world.root, port), tmp_path / "log") as process:
        assert process.wait(60) == 2
    last = (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert last.startswith(f"cannot listen at 127.0.0.1:{port}")


def test_a_promotion_under_load_is_noticed_by_nobody(server, world, tmp_path):
    """One replica; eight users who never stop asking. Each answer is the one that its bundle gives, a damaged bundle is
    refused, and the old one goes on."""
    url, old, done = server[0], find_bundle(world.root), threading.Event()
    promote(old)
    stranger = make_world(tmp_path / "other", seed=99)
    other = replace(stranger, config=stranger.config.model_copy(update={"seed": 1})).bundle().path
    new, damaged = old.parent / "new", old.parent / "damaged"
    for copy in (new, damaged):
        shutil.copytree(other, copy)
    vectors = bytearray((damaged / "vectors.safetensors").read_bytes())
    vectors[-1] ^= 1
    (damaged / "vectors.safetensors").write_bytes(vectors)
    versions = {old.name: old.name, other.name: "new"}
    users = world.user_ids[:8]
    expected = {
        (version, user): [item.item_id for item in Recommender.load(old.parent / folder).recommend(user, k=5)]
        for version, folder in versions.items()
        for user in users
    }
    assert all(expected[old.name, user] != expected[other.name, user] for user in users)

    def keep_asking(user: str) -> list[str]:
        found = []
        with httpx.Client(base_url=url, timeout=30) as client:
            while not done.is_set():
                answer = client.post("/v1/recommendations", json={"user_id": user, "k": 5})
                assert answer.status_code == 200, answer.text
                told = answer.json()
                assert [item["item_id"] for item in told["items"]] == expected[told["version"], user]
                found.append(told["version"])
        return found

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(keep_asking, user) for user in users]
        try:
            promote(new, None)
            until(url, lambda facts: facts["version"] == other.name)
            time.sleep(0.5)
            assert httpx.post(f"{url}/v1/promote", json={"version": "damaged", "force": True}).status_code == 409
            write_pointer(old.parent, "damaged")  # as if it had been whole when it was promoted
            until(url, lambda facts: "checksum" in (facts["refused"] or ""))
            assert httpx.get(f"{url}/v1/version").json()["version"] == other.name
            rollback(old.parent)
            until(url, lambda facts: facts["version"] == old.name and facts["refused"] is None)
            time.sleep(0.5)
        finally:
            done.set()
        for found in (one.result() for one in asked):
            runs = [name for name, _ in itertools.groupby(found)]
            assert runs == [old.name, other.name, old.name]


def write_pointer(bundles: Path, version: str) -> None:
    pointer = json.loads((bundles / "serving.json").read_text())
    Place(str(bundles / "serving.json")).write(json.dumps({**pointer, "output": version}).encode())


def test_ctrl_c_ends_it(server):
    """The last test that takes the server: it ends it."""
    url, log, process = server
    assert re.search(r"curl -s http://127.0.0.1:\d+/v1/recommendations .*\"user_id\": ", log.read_text())
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert process.wait(60) == 0
    assert time.monotonic() - started < 45
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/healthz")


@pytest.mark.slow
def test_a_new_bundle_is_swapped_in_place(world, tmp_path):
    """`serve deploy configs/serve/cluster.yaml`, then the same file with another bundle: no request fails meanwhile."""
    old = find_bundle(world.root)
    new = make_world(tmp_path / "next", per_type=(30, 40, 60), seed=1).bundle().path.resolve()
    damaged = tmp_path / "damaged"
    (damaged / "user_tower").mkdir(parents=True)
    (damaged / "manifest.json").write_text("{")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with running(python(CLUSTER), tmp_path / "log", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        dashboard = f"http://{process.stdout.readline().decode().strip()}"
        deploy(tmp_path, dashboard, port, old)
        wait_for(url, tmp_path / "log", process)
        assert httpx.get(f"{url}/v1/version").json()["version"] == old.name
        assert httpx.get(f"{url}/v1/examples").json() == []
        deploy(tmp_path, dashboard, port, new)
        until(url, lambda facts: facts["version"] == new.name and facts["items"] == 130)
        deploy(tmp_path, dashboard, port, damaged)
        until(url, lambda facts: facts["version"] == new.name and "damaged" in (facts["refused"] or ""))
        assert httpx.post(f"{url}/v1/recommendations", json={}).status_code == 200


def deploy(folder: Path, dashboard: str, port: int, bundle: Path) -> None:
    config = yaml.safe_load(Path("configs/serve/cluster.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"]["settings"] = {"open": True}
    deployment = config["applications"][0]["deployments"][0]
    deployment["user_config"]["bundle"] = str(bundle)
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(path), "-a", dashboard]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def until(url: str, holds) -> None:
    """Every answer on the way must be a good one."""
    deadline, facts = time.monotonic() + 60, {}
    while time.monotonic() < deadline:
        response = httpx.get(f"{url}/v1/version")
        assert response.status_code == 200
        facts = response.json()
        if holds(facts):
            return
        time.sleep(0.1)
    raise AssertionError(facts)
