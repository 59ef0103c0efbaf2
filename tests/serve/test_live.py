"""What happened a moment ago is in the next answer: events, new items, deleted ones, on every replica; and what is said
when the store is gone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import apsw
import numpy as np
import pytest
from fastapi.testclient import TestClient
from late_world import Late, make_late
from replica import Replica

from recsys_ray.core.errors import UserError
from recsys_ray.scoring.memory import NO_RAISERS
from recsys_ray.serving.live import LiveVectors
from recsys_ray.serving.recommender import Recommender
from serve.app import create_app
from serve.live import Variant, assign, variants_of
from serve.routes.changes import wilson
from serve.store import LiveItem, StoreError

VARIANTS = (Variant("plain", 0.5), Variant("diverse", 0.5, diversity=0.5))


@pytest.fixture(scope="module")
def late(tmp_path_factory) -> Late:
    return make_late(tmp_path_factory.mktemp("late"))


@pytest.fixture
def uri(tmp_path) -> str:
    return f"sqlite://{tmp_path}/live.db"


@pytest.fixture
def two(late, uri) -> Iterator[tuple[TestClient, TestClient]]:
    """Two replicas over one store."""
    with (
        TestClient(create_app(Replica(late.bundle, uri))) as first,
        TestClient(create_app(Replica(late.bundle, uri))) as second,
    ):
        yield first, second


def ask(http: TestClient, **fields) -> list[str]:
    response = http.post("/v1/recommendations", json={"k": 500, **fields})
    assert response.status_code == 200, response.text
    return [item["item_id"] for item in response.json()["items"]]


def test_the_next_answer_knows_an_event_on_any_replica(two, late):
    first, second = two
    user = late.whole.user_ids[1]
    for who in (user, "someone new", 4711):
        before = ask(second, user_id=who)
        event = {"user_id": who, "item_id": before[0], "event_id": f"e-{who}"}
        for new in (1, 0):  # a repeat is harmless
            assert first.post("/v1/events", json={"events": [event]}).json() == {"received": 1, "new": new}
        after = second.post("/v1/recommendations", json={"user_id": who, "k": 500}).json()
        names = [item["item_id"] for item in after["items"]]
        assert before[0] not in names and names != before[1:] and not after["cold"] and not after["degraded"]
        assert any(item["because"] == before[0] for item in after["items"])


def test_a_history_has_events_of_the_store_before_those_of_the_bundle(two, late):
    first, second = two
    user = Recommender.load(late.bundle).example_users(1)[0]
    path = f"/v1/users/{quote(user, safe='')}/history"
    before = second.get(path, params={"limit": 50}).json()
    assert before["history"] and not before["degraded"]
    moment, (older, newer) = 1_700_000_500, ask(second, user_id=user)[:2]
    events = [
        {"user_id": user, "item_id": older, "timestamp": moment},
        {"user_id": user, "item_id": "not there", "timestamp": moment + 1},
        {"user_id": user, "item_id": newer, "timestamp": moment + 2},
    ]
    assert first.post("/v1/events", json={"events": events}).json()["new"] == 3
    after = second.get(path, params={"limit": 50}).json()["history"]
    assert [event["item_id"] for event in after[:2]] == [newer, older]
    assert after[0]["timestamp"] == moment + 2 and after[0]["item_type"] and after[0]["title"]
    assert after[2:] == before["history"][: len(after) - 2]
    assert len(second.get(path, params={"limit": 1}).json()["history"]) == 1


def test_an_event_that_cannot_be_is_refused_and_none_is_kept(two, late):
    first, _ = two
    good = {"user_id": "u", "item_id": "anything"}
    for field, value in (("event", "strem"), ("timestamp", "yesterday"), ("timestamp", 4e12), ("user_id", None)):
        told = first.post("/v1/events", json={"events": [good, {**good, field: value}]})
        assert told.status_code == 422 and told.json()["errors"][0]["loc"][:4] == ["body", "events", 1, field]
    assert first.post("/v1/events", json={"events": []}).status_code == 422
    assert first.post("/v1/events", json={"events": [good]}).json()["new"] == 1


def test_a_new_item_can_be_recommended_and_a_deleted_one_is_gone(two, late):
    first, second = two
    title = "Title of music-00001"
    record = {"item_type": "music", "title": title, "language": "de", "categories": ["a"]}
    assert "new/1" not in ask(second, user_id=late.whole.user_ids[1])
    told = first.put("/v1/items/new/1", json=record)
    assert told.status_code == 200 and told.json()["change"] == 1, told.text
    assert "new/1" in ask(second, user_id=late.whole.user_ids[1])
    assert "new/1" in ask(second, user_id="x", history=[{"item_id": "music-00001"}], filter={"languages": ["de"]})
    facts = second.get("/v1/items/new/1").json()
    assert facts["title"] == title and facts["item_type"] == "music"
    assert second.get("/v1/items/new/1/similar").status_code == 200
    gone = ask(second, user_id="x")[0]
    for item_id in ("new/1", gone):
        assert first.delete(f"/v1/items/{quote(item_id, safe='')}").status_code == 200
        for fields in ({"user_id": late.whole.user_ids[1]}, {"user_id": "x"}, {"include_seen": True}):
            assert item_id not in ask(second, **fields)
        assert second.get(f"/v1/items/{quote(item_id, safe='')}").status_code == 404
    assert gone not in [item["item_id"] for item in second.get("/v1/popular", params={"k": 500}).json()["items"]]


def test_a_new_item_of_an_unknown_type_is_refused(two):
    told = two[0].put("/v1/items/x", json={"item_type": "film", "title": "A film"})
    assert told.status_code == 422 and told.json()["errors"][0]["loc"] == ["body", "item_type"]


def test_items_that_another_bundle_embedded(late, uri):
    """They are told as outdated; a hidden one stays away whatever made its vectors."""
    replica = Replica(late.bundle, uri)
    with TestClient(create_app(replica)) as http:
        record = {"item_type": "music", "title": "Title of music-00001"}
        known = ask(http, user_id="x")[0]
        for item_id, told in (
            ("new", record),
            ("hidden", {**record, "hidden": True}),
            (known, {**record, "hidden": True}),
        ):
            assert http.put(f"/v1/items/{quote(item_id, safe='')}", json=told).status_code == 200
        assert replica.answers.outdated(replica.recommender) == []
        replica.recommender = Recommender.load(late.bundle)
        replica.recommender.artifact.manifest["counts"]["base"] = "another run's"
        found = ask(http, user_id="x")
        assert not {"new", "hidden", known} & set(found)
        assert [item.item_id for item in replica.answers.outdated(replica.recommender)] == ["new"]


def test_changes_outlive_a_restart(late, uri):
    with TestClient(create_app(Replica(late.bundle, uri))) as http:
        http.put("/v1/items/new", json={"item_type": "music", "title": "Title of music-00001"})
        event = {"user_id": "u", "item_id": "music-00001"}
        http.post("/v1/events", json={"events": [event]})
        before = ask(http, user_id="u")
    with TestClient(create_app(Replica(late.bundle, uri))) as http:
        assert ask(http, user_id="u") == before and "new" in before and "music-00001" not in before


def test_without_the_store_answers_go_on_and_events_are_not_swallowed(late, uri, tmp_path):
    replica = Replica(late.bundle, uri)
    with TestClient(create_app(replica)) as http:
        assert replica.answers.store is not None
        replica.answers.store.close()
        told = http.post("/v1/recommendations", json={"user_id": late.whole.user_ids[1]})
        assert told.status_code == 200 and told.json()["degraded"] and len(told.json()["items"]) == 10
        told = http.post("/v1/events", json={"events": [{"user_id": "u", "item_id": "i"}]})
        user = quote(replica.recommender.example_users(1)[0], safe="")
        past = http.get(f"/v1/users/{user}/history").json()
        assert past["degraded"] and past["history"]
        assert told.status_code == 503 and told.headers["retry-after"] and "cannot be used" in told.json()["detail"]
    with TestClient(create_app(Replica(late.bundle, None))) as http:
        told = http.post("/v1/events", json={"events": [{"user_id": "u", "item_id": "i"}]})
        assert told.status_code == 503 and "--store" in told.json()["detail"]
        assert not http.post("/v1/recommendations", json={}).json()["degraded"]


@pytest.mark.parametrize("column, value", [("vectors", b"none"), ("record", "[]"), ("record", '{"available": 1}')])
def test_a_damaged_item_in_the_store_costs_only_itself(late, uri, column, value):
    """It might have been deleted or hidden, so it does not come; what changes after it does."""
    record, user = {"item_type": "music", "title": "Title of music-00001"}, late.whole.user_ids[1]
    with TestClient(create_app(Replica(late.bundle, uri))) as http:
        known = ask(http, user_id=user)[0]
        for item_id in (known, "next"):
            assert http.put(f"/v1/items/{quote(item_id, safe='')}", json=record).status_code == 200
    db = apsw.Connection(uri.removeprefix("sqlite://"))
    db.execute(f"UPDATE items SET {column} = ? WHERE item_id = ?", (value, known))
    db.close()
    replica = Replica(late.bundle, uri)
    with TestClient(create_app(replica)) as http:
        told = http.post("/v1/recommendations", json={"user_id": user, "k": 500}).json()
        names = [item["item_id"] for item in told["items"]]
        assert not told["degraded"] and known not in names and "next" in names
        assert replica.answers.store is not None and replica.answers.store.damaged == 1
        assert http.put(f"/v1/items/{quote(known, safe='')}", json=record).status_code == 200
        assert known in ask(http, user_id=user), "put again"


def test_vectors_of_another_width_are_another_models(late, uri):
    replica = Replica(late.bundle, uri)
    with TestClient(create_app(replica)) as http:
        assert replica.answers.store is not None
        ours = replica.recommender.artifact.counts["base"]
        wrong = LiveVectors(ours, np.ones(3, np.float32), np.ones(3, np.float32), NO_RAISERS).pack()
        replica.answers.store.put_item(LiveItem("new", {"item_type": "music", "title": "x"}, wrong))
        told = http.post("/v1/recommendations", json={"user_id": late.whole.user_ids[1], "k": 500}).json()
        assert "new" not in [item["item_id"] for item in told["items"]] and not told["degraded"]
        assert [item.item_id for item in replica.answers.outdated(replica.recommender)] == ["new"]


def test_variants_are_stable_and_counted(late, uri):
    with TestClient(create_app(Replica(late.bundle, uri, VARIANTS))) as http:
        given: dict[str, list[dict]] = {}
        for number in range(60):
            told = http.post("/v1/recommendations", json={"user_id": f"u{number}", "k": 5}).json()
            assert told["variant"] == assign(VARIANTS, f"u{number}").name
            given.setdefault(told["variant"], []).append(told)
        assert min(map(len, given.values())) > 15
        for told in given["plain"][:7]:
            event = {"user_id": "u", "item_id": told["items"][0]["item_id"], "request_id": told["request_id"]}
            http.post("/v1/events", json={"events": [event, {**event, "event": "preview"}]})
        figures = {one["variant"]: one for one in http.get("/v1/variants").json()}
        assert figures["plain"]["answers"] == len(given["plain"]) and figures["plain"]["followed"] == 7
        assert figures["diverse"]["followed"] == 0 and figures["diverse"]["low"] == 0.0
        assert figures["plain"]["low"] < 7 / len(given["plain"]) < figures["plain"]["high"]


def test_shares_of_variants_must_add_up():
    assert (
        variants_of([{"name": "a", "share": 0.3}, {"name": "b", "share": 0.7, "popularity": 0.1}])[1].popularity == 0.1
    )
    for told, sentence in (
        ([{"name": "a", "share": 0.3}], "add up to 1"),
        ([{"name": "a", "share": 1.5}, {"name": "b", "share": -0.5}], "add up to 1"),
        ([{"name": "a", "share": 0.5}, {"name": "a", "share": 0.5}], "same name"),
        ([{"name": "a", "shares": 1}], "a variant has the fields name, share"),
    ):
        with pytest.raises(UserError, match=sentence):
            variants_of(told)


def test_intervals_of_shares():
    assert wilson(0, 0) == (None, None)
    low, high = wilson(10, 100)
    assert low == pytest.approx(0.0552, abs=1e-4) and high == pytest.approx(0.1744, abs=1e-4)


def test_a_store_that_cannot_be_opened_is_said_at_the_start(late, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        Replica(late.bundle, f"sqlite://{Path(tmp_path / 'file' / 'live.db')}")
