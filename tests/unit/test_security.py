"""Who is let in over HTTP, and what is told of it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import io
import json
import logging
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import jwt
import pytest
from app_client import Client
from bundle_world import STRANGE_IDS, make_world
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from fastapi import FastAPI
from fastapi.testclient import TestClient

from pipelines.cli import main
from recsys_ray.core.errors import ConfigError, UserError
from recsys_ray.serving.recommender import Recommender
from serve.app import create_app
from serve.live import LiveAnswers
from serve.logs import JsonLines
from serve.security import make_key, read_keys
from serve.settings import Settings, load_settings

ISSUER, AUDIENCE = "https://login.example", "recsys"


@pytest.fixture(scope="module")
def recommender(tmp_path_factory) -> Recommender:
    return Recommender.load(make_world(tmp_path_factory.mktemp("world")).bundle().path)


def app_of(recommender, **settings) -> FastAPI:
    live = SimpleNamespace(recommender=recommender, refused=None, examples=True, answers=LiveAnswers(None))
    return create_app(live, Settings(**settings))


def client(recommender, **settings) -> Client:
    return Client(app_of(recommender, **settings))


def status(http: Client, **headers: str) -> int:
    return http.post("/v1/recommendations", json={"k": 1}, headers=headers).status_code


def test_only_keys_of_the_file_are_answered(recommender, tmp_path):
    path = tmp_path / "folder" / "keys.jsonl"
    key, other = make_key(path, "shop", ["read"]), make_key(path, "till", ["events"])
    http = client(recommender, keys=str(path))
    assert status(http, authorization=f"Bearer {key}") == status(http, **{"x-api-key": key}) == 200
    assert status(http, authorization=f"Bearer {other}") == 403
    for wrong in ("", "x", key[:-1] + ("A" if key[-1] != "A" else "B"), f"rr_{'0' * 12}_{'A' * 43}", "é"):
        response = http.post("/v1/recommendations", json={}, headers={"x-api-key": wrong.encode()})
        assert response.status_code == 401, wrong
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["content-type"] == "application/problem+json"
    assert status(http, authorization=f"Basic {key}") == 401
    assert http.get("/healthz").status_code == http.get("/").status_code == 200  # for the balancer, and to enter a key


def test_every_route_but_those_without_data_is_guarded(recommender, tmp_path):
    make_key(tmp_path / "keys", "shop", ["read"])
    http = client(recommender, keys=str(tmp_path / "keys"))
    document = http.get("/openapi.json").json()
    answered = set()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            response = http.request(method.upper(), path.replace("{", "").replace("}", ""))
            if response.status_code != 401:
                answered.add(path)
            assert ("security" in operation) == (response.status_code == 401)
    assert answered == {"/healthz"}


def test_the_file_holds_no_key_and_is_closed_to_others(tmp_path):
    path = tmp_path / "keys.jsonl"
    key = make_key(path, "shop", ["read", "events", "read"], "5/second")
    said = path.read_text()
    assert key not in said and key.rsplit("_", 1)[1] not in said
    assert json.loads(said)["scopes"] == ["read", "events"]
    assert path.stat().st_mode & 0o077 == 0
    assert make_key(path, "shop", ["read"]) != key


def test_a_key_is_revoked_by_removing_its_line(recommender, tmp_path):
    path = tmp_path / "keys.jsonl"
    first, second = make_key(path, "a", ["read"]), make_key(path, "b", ["read"])
    http = client(recommender, keys=str(path))
    assert status(http, **{"x-api-key": first}) == 200
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[1])
    time.sleep(1.1)
    assert status(http, **{"x-api-key": first}) == 401
    assert status(http, **{"x-api-key": second}) == 200
    path.write_text("{")  # a file that cannot be read lets nobody else in, and shuts nobody out
    os.utime(path, (1, 1))
    time.sleep(1.1)
    assert status(http, **{"x-api-key": second}) == 200
    assert status(http, **{"x-api-key": first}) == 401


def test_a_key_may_be_used_so_often(recommender, tmp_path):
    path = tmp_path / "keys.jsonl"
    slow, other = make_key(path, "slow", ["read"], "3/minute"), make_key(path, "other", ["read"])
    http = client(recommender, keys=str(path), rate="50/minute")
    assert [status(http, **{"x-api-key": slow}) for _ in range(4)] == [200, 200, 200, 429]
    response = http.get("/v1/version", headers={"x-api-key": slow})
    assert response.status_code == 429 and 1 <= int(response.headers["retry-after"]) <= 61
    assert {status(http, **{"x-api-key": other}) for _ in range(50)} == {200}
    assert status(http, **{"x-api-key": other}) == 429


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server (make system-packages)")
def test_replicas_count_together_in_redis(recommender, tmp_path):
    socket = tmp_path / "redis.sock"
    command = ["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not socket.exists():
            assert process.poll() is None
            time.sleep(0.02)
        key = make_key(tmp_path / "keys", "shop", ["read"], "4/hour")
        settings = {"keys": str(tmp_path / "keys"), "rate_store": f"redis+unix://{socket}"}
        with contextlib.ExitStack() as stack:
            replicas = [stack.enter_context(TestClient(app_of(recommender, **settings))) for _ in range(2)]
            asked = [http.get("/v1/version", headers={"x-api-key": key}) for http in replicas * 3]
            assert [answer.status_code for answer in asked] == [200] * 4 + [429] * 2
            process.terminate()
            process.wait(20)
            answer = replicas[0].get("/v1/version", headers={"x-api-key": key})
            assert answer.status_code == 503 and answer.headers["retry-after"]  # closed, not open to all
    finally:
        process.kill()


def keys_of_an_issuer(folder: Path) -> tuple[bytes, Path]:
    made = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private = made.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = made.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "public.pem").write_bytes(public)
    return private, folder / "public.pem"


def test_tokens_of_the_issuer_are_answered_and_no_others(recommender, tmp_path):
    private, public = keys_of_an_issuer(tmp_path)
    stranger, _ = keys_of_an_issuer(tmp_path.joinpath("other").mkdir() or tmp_path / "other")
    settings = {"algorithms": ["RS256"], "audience": AUDIENCE, "issuer": ISSUER, "key_file": str(public)}
    http = client(recommender, jwt=settings)
    good = {"sub": "shop", "aud": AUDIENCE, "iss": ISSUER, "exp": time.time() + 60, "scope": "openid read"}

    def ask(claims: dict, key=private, algorithm="RS256") -> int:
        return status(http, authorization=f"Bearer {jwt.encode(claims, key, algorithm)}")

    assert ask(good) == 200
    assert ask({**good, "scope": "events"}) == 403
    assert ask({**good, "scope": ["read"]}) == 403
    for bad in ({"aud": "other"}, {"iss": "other"}, {"exp": time.time() - 60}, {"nbf": time.time() + 60}):
        assert ask({**good, **bad}) == 401, bad
    for missing in ("aud", "iss", "exp", "sub"):
        assert ask({name: value for name, value in good.items() if name != missing}) == 401, missing
    assert ask(good, stranger) == 401
    assert ask(good, algorithm="RS512") == 401
    assert ask(good, None, "none") == 401
    # The public key, which everybody has, taken for a secret:
    head, body, _ = jwt.encode(good, "x" * 32, "HS256").split(".")
    signed = hmac.new(public.read_bytes(), f"{head}.{body}".encode(), hashlib.sha256).digest()
    forged = f"{head}.{body}.{base64.urlsafe_b64encode(signed).rstrip(b'=').decode()}"
    assert status(http, authorization=f"Bearer {forged}") == 401


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"keys": "/none"}, "make-key"),
        ({"jwt": {"algorithms": ["RS256"], "audience": "a", "issuer": "i", "key_file": "/none"}}, "key_file"),
        ({"jwt": {"algorithms": ["none"], "audience": "a", "issuer": "i", "key_file": "x"}}, "algorithms"),
        ({"jwt": {"algorithms": ["RS256", "HS256"], "audience": "a", "issuer": "i", "key_file": "x"}}, "one kind"),
        ({"jwt": {"algorithms": ["RS256"], "audience": "", "issuer": "i", "key_file": "x"}}, "audience"),
        ({"rate": "often"}, "100/second"),
        ({"open": True, "rate_store": "nothing://"}, "rate_store"),
        ({"opened": True}, "known: "),
        ({}, "open: true"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(settings, sentence):
    with pytest.raises(ConfigError) as caught:
        load_settings(settings).check()
    assert sentence in str(caught.value)


def test_settings_come_from_a_file(tmp_path):
    (tmp_path / "serve.yaml").write_text("open: true\nrate: 7/minute\n")
    assert load_settings(tmp_path / "serve.yaml").rate == "7/minute"
    (tmp_path / "serve.yaml").write_text("rates: 7/minute\n")
    with pytest.raises(ConfigError, match=r"serve\.yaml: rates"):
        load_settings(tmp_path / "serve.yaml")


def test_the_settings_for_a_laptop_are_settings():
    settings = load_settings(Path(__file__).parents[2] / "configs/serve/laptop.yaml").at("127.0.0.1")
    settings.check()
    assert sum(variant["share"] for variant in settings.variants) == 1


def test_only_this_machine_may_ask_without_a_key():
    assert Settings().at("127.0.0.1").open
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(ConfigError, match="make-key"):
            Settings().at(host)
        assert Settings(keys="keys").at(host) == Settings(keys="keys")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [("{", "line 2"), ('{"id": "x"}', "line 2"), ("[1]", "line 2")],
)
def test_a_damaged_key_file_names_the_line(tmp_path, line, sentence):
    path = tmp_path / "keys.jsonl"
    make_key(path, "shop", ["read"])
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(ConfigError, match=sentence):
        Settings(keys=str(path)).check()
    with pytest.raises(ConfigError, match=sentence):
        make_key(path, "other", ["read"])


def test_make_key_refuses_what_it_does_not_know(tmp_path):
    with pytest.raises(UserError, match="known: read"):
        make_key(tmp_path / "keys", "shop", ["write"])
    with pytest.raises(UserError, match="100/second"):
        make_key(tmp_path / "keys", "shop", ["read"], "often")
    assert not (tmp_path / "keys").exists()


def test_the_command_line_makes_keys_and_refuses_open_doors(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["make-key", str(tmp_path / "keys"), "--name", "shop", "--scope", "events"])
    assert ended.value.code == 0
    assert read_keys(tmp_path / "keys").popitem()[1].scopes == ("events",)
    assert capsys.readouterr().out.startswith("rr_")
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--bundle", str(tmp_path), "--host", "0.0.0.0"])
    assert ended.value.code == 2
    assert "make-key" in capsys.readouterr().err


def test_the_log_has_requests_and_no_ids_of_users(recommender, tmp_path):
    key = make_key(tmp_path / "keys", "shop", ["read"])
    http, said = client(recommender, keys=str(tmp_path / "keys")), io.StringIO()
    handler, logger = logging.StreamHandler(said), logging.getLogger("recsys_ray.serve")
    handler.setFormatter(JsonLines())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        headers = {"x-api-key": key, "x-request-id": "mine"}
        body = {"user_id": "secret user", "history": [{"item_id": STRANGE_IDS[0]}]}
        answer = http.post("/v1/recommendations", json=body, headers=headers).json()["request_id"]
        http.get("/v1/users/secret user/history", headers=headers)
        http.get("/v1/items/secret user/similar", headers=headers)
        http.get("/secret user", headers=headers)
        http.post("/v1/recommendations", json={**body, "k": "secret user"})
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    lines = [json.loads(line) for line in said.getvalue().splitlines()]
    assert [line["status"] for line in lines] == [200, 200, 404, 404, 401]
    assert [line["route"] for line in lines[:2]] == ["/v1/recommendations", "/v1/users/{user_id:path}/history"]
    assert all(line["request_id"] == "mine" and line["caller"] == "shop" for line in lines[:3])
    assert all(line["ms"] > 0 for line in lines) and lines[0]["version"] == recommender.version
    assert lines[0]["answer"] == answer and lines[1]["answer"] is None
    for secret in ("secret", STRANGE_IDS[0], key):
        assert secret not in said.getvalue()
