"""HTTP end to end: real Ray Serve in processes of its own, asked through a socket."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import yaml
from bundle_world import FORGOTTEN, LONELY, STRANGE_IDS, World, make_world

from recsys_ray.bundle.build import find_bundle
from recsys_ray.serving.recommender import Recommender

TYPES = ["audiobook", "music", "podcast"]
SERVE = """
import sys
import tempfile
from pathlib import Path
from recsys_ray.core.errors import UserError
from serve.deployment import serve_forever
try:
    serve_forever(sys.argv[1], port=int(sys.argv[2]))
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""
CLUSTER = """
import sys
import tempfile
from recsys_ray.cluster.session import ray_session
from recsys_ray.config import RayConfig
import ray
with ray_session(RayConfig(num_cpus=4, object_store_mb=128, dashboard=True)):
    print(ray.worker.global_worker.node.webui_url, flush=True)
    sys.stdin.read()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(*arguments: str, log: Path, **pipes: Any) -> Iterator[subprocess.Popen]:
    """A process of ours, ended as a user would."""
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-c", *arguments], stderr=out, start_new_session=True, **pipes)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()


def wait_for(url: str, log: Path, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/healthz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise AssertionError(f"nothing answers at {url}:\n{log.read_text()}")


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
    with running(SERVE, str(world.root / "bundles" / "current"), str(port), log=log) as process:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, log)
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
        expected = recommender.answer(user_id, k=7)
        assert response == {
            "version": expected.version,
            "known": expected.known,
            "items": [vars(item) for item in expected.items],
        }


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


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"k": 0}, ["k"]),
        ({"k": 501}, ["k"]),
        ({"k": "many"}, ["k"]),
        ({"user": "x"}, ["user"]),
        ({"user_id": 3}, ["user_id"]),
        ({"history": [{"item_id": STRANGE_IDS[0]}, {"item_id": "no such"}]}, ["history", 1, "item_id"]),
        ({"history": [{"item_id": STRANGE_IDS[0], "event": "strem"}]}, ["history", 0, "event"]),
        ({"history": [{"item_id": STRANGE_IDS[0], "timestamp": 1.7e12}]}, ["history", 0, "timestamp"]),
        ({"history": [{"event": "stream"}]}, ["history", 0, "item_id"]),
        ({"item_types": ["films"]}, ["item_types", 0]),
        ({"item_types": []}, ["item_types"]),
        ({"age": 200}, ["age"]),
        ({"tastes": {"music": [1.0]}}, ["tastes", "music"]),
        ({"tastes": {"films": [1.0]}}, ["tastes", "films"]),
        ({"exclude": "abc"}, ["exclude"]),
    ],
)
def test_bad_requests_name_the_field(http, body, field):
    response = http.post("/v1/recommendations", json=body)
    assert response.status_code == 422
    problem = response.json()["detail"][0]
    assert problem["loc"] == ["body", *field] and problem["msg"]


def test_bodies_that_are_not_json_are_refused(http):
    for content in (b"", b"{", b"[]", b'{"age": NaN}', b'{"history": [{"item_id": "\\ud800"}]}', b"\xff\xfe"):
        response = http.post("/v1/recommendations", content=content, headers={"content-type": "application/json"})
        assert 400 <= response.status_code < 500, content
        assert response.json()["detail"]


def test_unknown_things_are_not_found(http):
    response = http.get("/v1/items/none/similar")
    assert response.status_code == 404 and response.json()["detail"][0]["loc"] == ["path", "item_id"]
    assert http.get("/v1/items/podcast-00001/similar", params={"k": 0}).status_code == 422
    response = http.get("/v1/items/podcast-00001/similar", params={"item_type": "x"})
    assert response.status_code == 422 and response.json()["detail"][0]["loc"][:2] == ["query", "item_type"]
    assert http.get("/v2").status_code == 404
    assert http.get("/v1/recommendations").status_code == 405


def test_facts_page_and_documentation(http, world, recommender):
    assert http.get("/healthz").json() == {"status": "ok", "version": recommender.version}
    version = http.get("/v1/version").json()
    assert version["items"] == 120 and version["users"] == len(world.user_ids)
    assert version["recall_at_10"] == dict.fromkeys(TYPES, 1.0) and version["refused"] is None
    examples = http.get("/v1/examples").json()
    assert examples and all(example["history"] for example in examples)
    page = http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page.text)
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/recommendations", "/v1/items/{item_id}/similar", "/healthz", "/v1/version"} <= set(paths)


def test_many_at_once(http, world, recommender):
    expected = {user_id: [item.item_id for item in recommender.recommend(user_id)] for user_id in world.user_ids}
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda user_id: (user_id, ask(http, user_id=user_id)), world.user_ids * 4))
    assert all(items == expected[user_id] for user_id, items in found)


def test_a_taken_port_is_one_sentence(server, world, tmp_path):
    port = server[0].rsplit(":", 1)[1]
    with running(SERVE, str(world.root), port, log=tmp_path / "log") as process:
        assert process.wait(60) == 2
    last = (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert last.startswith(f"cannot listen at 127.0.0.1:{port}")


def test_z_ctrl_c_ends_it(server):
    """Last in this file: it ends the server of the others."""
    url, log, process = server
    assert re.search(r"curl -s http://127.0.0.1:\d+/v1/recommendations .*\"user_id\": ", log.read_text())
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert process.wait(60) == 0
    assert time.monotonic() - started < 45
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/healthz")


def test_sigterm_ends_it_as_ctrl_c_does(world, tmp_path):
    log, port = tmp_path / "log", free_port()
    before = own_folders()
    with running(SERVE, str(world.root), str(port), log=log) as process:
        wait_for(f"http://127.0.0.1:{port}", log)
        made = own_folders() - before
        assert made
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    said = log.read_text()
    assert "Stopping ..." in said and "SIGTERM received" not in said
    assert not made & own_folders()


def own_folders() -> set[Path]:
    """The temporary folders of servers that run."""
    return set(Path(tempfile.gettempdir()).glob("recsys-ray-*"))


def test_a_new_bundle_is_swapped_in_place(world, tmp_path):
    """`serve deploy configs/serve.yaml`, then the same file with another bundle: no request fails meanwhile."""
    old = find_bundle(world.root)
    new = make_world(tmp_path / "next", per_type=(30, 40, 60), seed=1).bundle().path.resolve()
    damaged = tmp_path / "damaged"
    (damaged / "user_tower").mkdir(parents=True)
    (damaged / "manifest.json").write_text("{")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with running(CLUSTER, log=tmp_path / "log", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        dashboard = f"http://{process.stdout.readline().decode().strip()}"
        deploy(tmp_path, dashboard, port, old)
        wait_for(url, tmp_path / "log")
        assert httpx.get(f"{url}/v1/version").json()["version"] == old.name
        assert httpx.get(f"{url}/v1/examples").json() == []
        deploy(tmp_path, dashboard, port, new)
        until(url, lambda facts: facts["version"] == new.name and facts["items"] == 130)
        deploy(tmp_path, dashboard, port, damaged)
        until(url, lambda facts: facts["version"] == new.name and "damaged" in (facts["refused"] or ""))
        assert httpx.post(f"{url}/v1/recommendations", json={}).status_code == 200


def deploy(folder: Path, dashboard: str, port: int, bundle: Path) -> None:
    config = yaml.safe_load(Path("configs/serve.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
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
