"""Refusals over HTTP: problem details that name the field."""

from __future__ import annotations

import asyncio
import re
import time
from types import SimpleNamespace

import httpx
import pytest
from app_client import Client
from bundle_world import STRANGE_IDS, make_world

from recsys_ray.serving.recommender import Recommender
from serve.app import create_app
from serve.live import LiveAnswers
from serve.settings import Settings

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def recommender(tmp_path_factory) -> Recommender:
    return Recommender.load(make_world(tmp_path_factory.mktemp("world")).bundle().path)


@pytest.fixture(scope="module")
def http(recommender) -> Client:
    return client(recommender)


def client(recommender, **settings) -> Client:
    live = SimpleNamespace(recommender=recommender, refused=None, examples=True, answers=LiveAnswers(None))
    return Client(create_app(live, Settings(**settings)))


def refused(response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == status and problem["title"] and problem["detail"]
    assert re.fullmatch("[0-9a-f]{32}", problem["request_id"])
    return problem


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"k": 0}, ["k"]),
        ({"k": 501}, ["k"]),
        ({"k": "many"}, ["k"]),
        ({"k": True}, ["k"]),
        ({"k": "3"}, ["k"]),
        ({"k": 2.5}, ["k"]),
        ({"user": "x"}, ["user"]),
        ({"user_id": True}, ["user_id"]),
        ({"user_id": "x" * 513}, ["user_id"]),
        ({"history": [{"item_id": STRANGE_IDS[0], "event": "strem"}]}, ["history", 0, "event"]),
        ({"history": [{"item_id": STRANGE_IDS[0], "timestamp": 1.7e12}]}, ["history", 0, "timestamp"]),
        ({"history": [{"item_id": STRANGE_IDS[0], "timestamp": "yesterday"}]}, ["history", 0, "timestamp"]),
        ({"history": [{"event": "stream"}]}, ["history", 0, "item_id"]),
        ({"history": [{"item_id": "x"}] * 10_001}, ["history"]),
        ({"item_types": ["films"]}, ["item_types", 0]),
        ({"item_types": []}, ["item_types"]),
        ({"quotas": {"music": 0}}, ["quotas", "music"]),
        ({"filter": {"language": "de"}}, ["filter", "language"]),
        ({"include_seen": 1}, ["include_seen"]),
        ({"diversity": 1.1}, ["diversity"]),
        ({"age": 200}, ["age"]),
        ({"age": False}, ["age"]),
        ({"tastes": {"music": [1.0]}}, ["tastes", "music"]),
        ({"tastes": {"films": [1.0]}}, ["tastes", "films"]),
        ({"exclude": "abc"}, ["exclude"]),
        ([], []),
    ],
)
def test_bad_requests_name_the_field(http, body, field):
    problem = refused(http.post("/v1/recommendations", json=body), 422)
    assert problem["errors"][0]["loc"] == ["body", *field] and problem["errors"][0]["msg"]


def test_what_products_write_is_understood(http):
    plain = {"history": [{"item_id": "podcast-00001", "timestamp": 1_699_920_000}], "user_id": "7", "k": 4}
    untidy = {"history": [{"item_id": "podcast-00001", "timestamp": "2023-11-14T00:00:00Z"}], "user_id": 7, "k": 4.0}
    expected = http.post("/v1/recommendations", json=plain).json()["items"]
    assert len(expected) == 4
    for moment in ("2023-11-14T00:00:00Z", "2023-11-14T01:00:00+01:00", "2023-11-14", 1_699_920_000.0):
        untidy["history"][0]["timestamp"] = moment
        assert http.post("/v1/recommendations", json=untidy).json()["items"] == expected


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 422),
        (b"{", 400),
        (b"[]", 422),
        (b"\xff\xfe", 400),
        (b"[" * 100_000, 400),  # deeper than the parser goes
        (b'{"k": ' + b"1" * 5000 + b"}", 400),  # longer than an int may be
        (b'{"age": NaN}', 422),
        (b'{"age": 1e400}', 422),
        (b'{"user_id": "\\ud800"}', 422),
        (b'{"history": [{"item_id": "\\ud800"}]}', 422),
    ],
)
def test_bodies_that_cannot_be_read_are_refused(http, content, status):
    refused(http.post("/v1/recommendations", content=content, headers=JSON), status)


def test_a_body_comes_as_json_and_not_too_large(recommender, http):
    refused(http.post("/v1/recommendations", content=b"{}"), 415)
    refused(http.post("/v1/recommendations", content=b"{}", headers={"content-type": "text/plain"}), 415)
    small = client(recommender, max_body=100)
    assert small.post("/v1/recommendations", content=b"{}" + b" " * 98, headers=JSON).status_code == 200
    refused(small.post("/v1/recommendations", content=b"{}" + b" " * 99, headers=JSON), 413)

    async def in_pieces():  # of a length that is not known before
        for _ in range(11):
            yield b" " * 10

    refused(small.post("/v1/recommendations", content=in_pieces(), headers=JSON), 413)


def test_unknown_things_are_not_found(http):
    assert refused(http.get("/v1/items/none/similar"), 404)["errors"][0]["loc"] == ["path", "item_id"]
    for query, place in (("k=0", "k"), ("k=1_0", "k"), ("k=x", "k"), ("item_type=x", "item_type")):
        problem = refused(http.get(f"/v1/items/podcast-00001/similar?{query}"), 422)
        assert problem["errors"][0]["loc"][:2] == ["query", place]
    refused(http.get("/v2"), 404)
    response = http.get("/v1/recommendations")
    refused(response, 405)
    assert response.headers["allow"] == "POST"


def test_failures_of_ours_say_nothing_of_the_inside(recommender, monkeypatch, caplog):
    def fail(*_args, **_named):
        raise ZeroDivisionError("sec" + "ret")

    monkeypatch.setattr(recommender, "answers", fail)
    response = client(recommender).post("/v1/recommendations", json={})
    problem = refused(response, 500)
    told = next(record.fields for record in caplog.records if record.message == "failure")
    assert "secret" not in response.text + str(told)
    assert told["request_id"] == problem["request_id"] and told["error"] == "ZeroDivisionError"
    assert any("in fail" in line for line in told["stack"])


def test_who_waits_too_long_is_refused(recommender, monkeypatch):
    """Long lists are computed alone, so the second waits for the first."""
    compute = recommender.answers
    monkeypatch.setattr(recommender, "answers", lambda *given: time.sleep(0.3) or compute(*given))
    transport = httpx.ASGITransport(client(recommender, timeout=0.1).app)

    async def both() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await asyncio.gather(*(http.post("/v1/recommendations", json={"k": 500}) for _ in range(2)))

    first, second = asyncio.run(both())
    assert first.status_code == 200
    refused(second, 503)
    assert second.headers["retry-after"] == "1"


def test_a_request_keeps_the_id_that_it_brings(http):
    assert http.get("/v2", headers={"x-request-id": "mine-1"}).json()["request_id"] == "mine-1"
    for bad in ("a b", "x" * 129, "{}"):
        assert http.get("/v2", headers={"x-request-id": bad}).json()["request_id"] != bad
    assert len({http.get("/v2").json()["request_id"] for _ in range(20)}) == 20


def test_the_document_has_refusals_as_they_come(http):
    document = http.get("/openapi.json").json()
    answers = document["paths"]["/v1/recommendations"]["post"]["responses"]
    assert {"200", "400", "413", "415", "422", "503"} <= set(answers)
    for name, described in document["components"]["responses"].items():
        (content,) = described["content"].items()
        assert content[0] == "application/problem+json" and name == f"Problem{content[1]['example']['status']}"
    assert "HTTPValidationError" not in document["components"]["schemas"]
