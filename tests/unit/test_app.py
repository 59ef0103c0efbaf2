"""The HTTP API on its own event loop, over a real recommender that is made to take its time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from urllib.parse import quote

import httpx
import pytest
from bundle_world import STRANGE_IDS, World, categories_of, language_of, make_world
from fastapi.testclient import TestClient

from recsys_ray.serving.filters import Filters
from recsys_ray.serving.recommender import Recommender
from serve.app import create_app
from serve.live import LiveAnswers


def test_requests_that_come_while_an_answer_is_computed_are_all_accepted_before_the_next(tmp_path):
    """Serve counts what a replica has accepted: were each computed as it comes, no request would ever seem to wait."""
    recommender = Recommender.load(make_world(tmp_path).bundle().path)
    compute, together, late = recommender.answers, [], []
    live = SimpleNamespace(recommender=recommender, refused=None, examples=False, answers=LiveAnswers(None))
    transport = httpx.ASGITransport(create_app(live))

    async def main() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            def ask() -> asyncio.Task[httpx.Response]:
                return asyncio.create_task(client.post("/v1/recommendations", json={"k": 3}))

            def watched(questions, laps):
                together.append(len(questions))
                if len(together) == 1:
                    late.extend(ask() for _ in range(5))
                return compute(questions, laps)

            recommender.answers = watched
            first = await ask()
            return [first, *await asyncio.gather(*late)]

    answers = asyncio.run(main())
    assert [len(answer.json()["items"]) for answer in answers] == [3] * 6
    assert together == [1, 5]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"), memory=0.1)
    made.bundle()
    return made


@pytest.fixture(scope="module")
def recommender(world) -> Recommender:
    return Recommender.load(world.root)


@pytest.fixture(scope="module")
def app(recommender):
    return create_app(SimpleNamespace(recommender=recommender, refused=None, examples=True, answers=LiveAnswers(None)))


@pytest.fixture(scope="module")
def http(app) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


def test_all_that_may_be_asked_reaches_the_recommender(http, world, recommender):
    body = {
        "user_id": world.user_ids[1],
        "history": [{"item_id": world.item_ids[2]}, {"item_id": "gone"}],
        "quotas": {"music": 2, "podcast": 1},
        "filter": {"languages": ["de", "en"], "categories_none": ["c"]},
        "include_seen": True,
        "diversity": 0.3,
        "popularity": -0.2,
    }
    told = http.post("/v1/recommendations", json=body).json()
    assert told["ignored"] == ["gone"] and told["known"] and not told["cold"] and len(told["request_id"]) == 32
    assert [item["item_type"] for item in told["items"]].count("music") == 2
    for item in told["items"]:
        assert language_of(item["item_id"]) and "c" not in categories_of(item["item_id"])
    expected = recommender.recommend(
        world.user_ids[1],
        history=[{"item_id": world.item_ids[2]}],
        quotas={"music": 2, "podcast": 1},
        filters=Filters(languages=("de", "en"), categories_none=("c",)),
        include_seen=True,
        diversity=0.3,
        popularity=-0.2,
    )
    assert told["items"] == [vars(item) for item in expected]


def test_a_batch_has_an_answer_or_a_problem_for_each_question(http, world, recommender):
    questions = [{"user_id": user} for user in world.user_ids] * 3
    questions[1] = {"item_types": ["films"]}
    answers = http.post("/v1/recommendations:batch", json={"questions": questions}).json()["answers"]
    assert len(answers) == len(questions)
    assert answers[1]["status"] == 422 and answers[1]["errors"][0]["loc"] == ["body", "questions", 1, "item_types", 0]
    for place in (0, 2, 100):
        expected = [item.item_id for item in recommender.recommend(questions[place]["user_id"])]
        assert [item["item_id"] for item in answers[place]["items"]] == expected
    many = http.post("/v1/recommendations:batch", json={"questions": [{}] * 1001})
    assert many.status_code == 422


def test_items_users_and_what_is_popular(http, world, recommender):
    item_id = STRANGE_IDS[0]
    told = http.get(f"/v1/items/{quote(item_id, safe='')}").json()
    assert (told["item_id"], told["item_type"], told["language"]) == (item_id, "audiobook", language_of(item_id))
    assert sorted(told["categories"]) == sorted(categories_of(item_id)) and told["available"]
    assert http.get("/v1/items/none").status_code == 404
    past = http.get(f"/v1/users/{quote(world.user_ids[1], safe='')}/history", params={"limit": 3}).json()
    assert past["history"] == [vars(event) for event in recommender.history(world.user_ids[1], 3)]
    assert http.get("/v1/users/nobody/history").json()["history"] == []
    popular = http.get("/v1/popular", params={"k": 4, "item_type": "music", "language": "de"}).json()["items"]
    assert popular == [vars(i) for i in recommender.popular(4, ["music"], filters=Filters(("de",)))]
    filters = Filters((), ("a", "b"), ("a",), ("c",), 1_690_000_000, 1_699_000_000)
    asked = {"category": ["a", "b"], "category_all": "a", "category_none": "c"}
    asked |= {"published_after": 1_690_000_000, "published_before": 1_699_000_000}
    popular = http.get("/v1/popular", params=asked).json()["items"]
    assert popular == [vars(i) for i in recommender.popular(filters=filters)]
    assert popular != [vars(i) for i in recommender.popular()]
