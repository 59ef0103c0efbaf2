"""Search by typing: items by words of titles and ids, users by the beginning of their ids."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from bundle_world import STRANGE_IDS, World, categories_of, language_of, make_world
from fastapi.testclient import TestClient
from replica import Replica

from recsys_ray.serving.recommender import Recommender
from recsys_ray.serving.search import ItemSearch
from serve.app import create_app
from serve.live import LiveAnswers, Variant

TITLES = ["The Sea", "Deep sea, deep night", "Höra: Ärger", "Night of the seagull", "", "Sea"]
IDS = ["film-1", "film-2", "film-3", "song-1", "song-2", "song 1/b"]
NONE = np.empty(0, np.int64)


@pytest.fixture(scope="module")
def index() -> ItemSearch:
    return ItemSearch(pa.array(IDS), pa.array(TITLES), np.array([3, 0, 1, 2, 4, 5]))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("sea", [3, 0, 1, 5]),  # in the given order
        ("SEA ni", [3, 1]),  # every word, in any order
        ("gull", [3]),  # inside a word, as no word begins so
        ("hora arger", [2]),  # without accents
        ("Höra", [2]),
        ("song-1", [3, 5]),
        ("film-2", [1]),
        ("nothing", []),
        ("", []),
        (" -!", []),
        ("%", []),
    ],
)
def test_words_find_items(index, text, found):
    assert index.find(text, 10, NONE) == found


def test_limit_and_barred(index):
    assert index.find("sea", 2, NONE) == [3, 0]
    assert index.find("sea", 2, np.array([0, 3])) == [1, 5]
    assert ItemSearch(pa.array([], pa.string()), pa.array([], pa.string()), NONE).find("a", 3, NONE) == []


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"))
    made.bundle()
    return made


@pytest.fixture(scope="module")
def recommender(world) -> Recommender:
    return Recommender.load(world.root)


def served(recommender: Recommender, examples: bool = True) -> TestClient:
    live = SimpleNamespace(recommender=recommender, refused=None, examples=examples, answers=LiveAnswers(None))
    return TestClient(create_app(live))


@pytest.fixture(scope="module")
def http(recommender) -> Iterator[TestClient]:
    with served(recommender) as client:
        yield client


def test_items_over_http_come_the_most_popular_first(http, world, recommender):
    found = http.get("/v1/search", params={"q": "title music", "limit": 50}).json()
    assert found["version"] == recommender.version and found["users"] == []
    music = [item_id for item_id in world.item_ids if item_id.startswith("music")]
    rank = recommender.popularity.counted.rank
    assert [item["item_id"] for item in found["items"]] == sorted(music, key=lambda i: rank[recommender.find(i)])
    one = http.get("/v1/search", params={"q": STRANGE_IDS[0], "kind": "item"}).json()["items"]
    assert [item["item_id"] for item in one] == [STRANGE_IDS[0]] and one[0]["available"]
    assert http.get("/v1/search", params={"q": "x", "limit": 51}).status_code == 422
    assert http.get("/v1/search", params={"q": "x", "kind": "film"}).status_code == 422


def test_users_by_the_beginning_of_their_ids(http, world, recommender):
    found = http.get("/v1/search", params={"q": "üser/00", "kind": "user", "limit": 7}).json()
    assert found["items"] == []
    assert found["users"] == sorted(user for user in world.user_ids if user.startswith("üser/00"))[:7]
    with served(recommender, examples=False) as closed:
        asked = [closed.get("/v1/search", params={"q": q}).json()["users"] for q in ("üser/00", found["users"][0])]
    assert asked == [[], found["users"][:1]]  # a server that does not show users confirms only a whole id


def test_what_filters_may_name(http, world):
    found = http.get("/v1/filters").json()
    languages = [language for item_id in world.item_ids if (language := language_of(item_id))]
    assert found["languages"] == {name: languages.count(name) for name in set(languages)}
    categories = [name for item_id in world.item_ids for name in categories_of(item_id)]
    assert found["categories"] == {name: categories.count(name) for name in "abc"}
    assert next(iter(found["categories"])) == "a"


def test_removed_items_are_not_found(world):
    recommender = Recommender.load(world.root)
    recommender.apply(1, [STRANGE_IDS[0]], [])
    assert recommender.search(STRANGE_IDS[0]) == []


def test_a_named_variant_answers_and_is_not_counted(world, tmp_path):
    variants = (Variant("plain", 0.5), Variant("popular", 0.5, popularity=1.0))
    replica = Replica(world.root, f"sqlite://{tmp_path}/live.db", variants)
    with TestClient(create_app(replica)) as http:

        def ask(**body):
            return http.post("/v1/recommendations", json={"user_id": world.user_ids[1], **body}).json()

        own = ask()["variant"]
        told = {name: ask(variant=name) for name in ("plain", "popular")}
        assert {name: answer["variant"] for name, answer in told.items()} == {"plain": "plain", "popular": "popular"}
        assert told["plain"]["items"] != told["popular"]["items"]
        wrong = http.post("/v1/recommendations", json={"variant": "none"})
        assert wrong.status_code == 422 and "known: plain, popular" in wrong.json()["detail"]
        counted = {one["variant"]: one["answers"] for one in http.get("/v1/variants").json()}
    assert counted == {"plain": 0, "popular": 0} | {own: 1}
