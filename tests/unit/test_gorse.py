"""Gorse's own client, through a socket, against its routes here."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import requests
import uvicorn
from gorse import Gorse, GorseException
from late_world import make_late
from replica import Replica

from serve.app import create_app
from serve.security import make_key
from serve.settings import Settings

NOW = "2023-11-15T00:00:00Z"  # after the end of the bundle's data


@pytest.fixture(scope="module")
def late(tmp_path_factory):
    return make_late(tmp_path_factory.mktemp("late"))


@pytest.fixture
def address(late, tmp_path) -> Iterator[str]:
    replica = Replica(late.bundle, f"sqlite://{tmp_path}/live.db")
    app = create_app(replica, Settings(keys=str(tmp_path / "keys.jsonl"), rate=None))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


@pytest.fixture
def client(address, tmp_path) -> Gorse:
    key = make_key(tmp_path / "keys.jsonl", "gorse", ["read", "events", "catalogue"])
    return Gorse(address, key, timeout=20)


@pytest.fixture(autouse=True)
def key_file(tmp_path) -> None:
    (tmp_path / "keys.jsonl").touch()


def ids(scores) -> list[str]:
    return [score.id for score in scores]


def test_feedback_is_kept_and_changes_what_comes_next(client):
    user = "somebody"
    before = client.get_recommend(user, n=5)
    assert len(before) == 5 and [one.score for one in before] == sorted((one.score for one in before), reverse=True)
    assert client.insert_feedback("stream", user, before[0].id, NOW)["RowAffected"] == 1
    assert client.insert_feedback("stream", user, before[0].id, NOW)["RowAffected"] == 0  # Gorse's key
    after = ids(client.get_recommend(user, n=50))
    assert before[0].id not in after and after[:4] != ids(before)[1:]
    many = [
        {"FeedbackType": "stream", "UserId": user, "ItemId": item_id, "Timestamp": NOW, "Comment": "none of ours"}
        for item_id in after[:3]
    ]
    assert client.insert_feedbacks(many)["RowAffected"] == 3
    assert not set(ids(client.get_recommend(user, n=50))) & set(after[:3])


def test_pages_categories_and_what_was_shown(client):
    user = "somebody"  # ids of this world's users hold slashes, which Gorse's client does not encode
    client.insert_feedback("stream", user, "music-00001", NOW)
    everything = ids(client.get_recommend(user, n=40))
    assert ids(client.get_recommend(user, n=5, offset=3)) == everything[3:8]
    plain = [item_id for item_id in everything if "#" not in item_id]
    category = next(found[0] for item_id in plain if (found := client.get_item(item_id)["Categories"]))
    for item_id in ids(client.get_recommend(user, category, n=3)):
        assert category in client.get_item(item_id)["Categories"]
    assert client.get_recommend(user, "no such category") == []
    shown = ids(client.get_recommend(user, n=5, write_back_type="stream"))
    assert not set(shown) & set(ids(client.get_recommend(user, n=40)))


def test_neighbours_and_sessions(client):
    item_id = "music-00001"
    near = client.get_neighbors(item_id, n=4)
    assert len(near) == 4 and item_id not in [one["Id"] for one in near]
    assert client.get_neighbors(item_id, n=2, offset=2) == near[2:]
    feedback = [{"FeedbackType": "stream", "UserId": "", "ItemId": item_id, "Timestamp": NOW}]
    found = [one["Id"] for one in client.session_recommend(feedback, n=5)]
    assert len(found) == 5 and item_id not in found
    assert found != ids(client.get_recommend("nobody", n=5))


def test_items_come_and_go(client):
    item = {
        "ItemId": "new",
        "IsHidden": False,
        "Categories": ["a"],
        "Timestamp": NOW,
        "Labels": {"item_type": "music", "mood": ["calm"]},
        "Comment": "Title of music-00001",
    }
    assert client.insert_item(item) == {"RowAffected": 1}
    told = client.get_item("new")
    assert told["Comment"] == item["Comment"] and told["Categories"] == ["a"] and not told["IsHidden"]
    assert told["Timestamp"] == "2023-11-15T00:00:00+00:00"
    client.insert_feedback("stream", "somebody", "music-00001", NOW)
    assert "new" in ids(client.get_recommend("somebody", n=100))
    assert client.insert_item({**item, "IsHidden": True}) == {"RowAffected": 1}
    assert "new" not in ids(client.get_recommend("somebody", n=100))
    assert client.delete_item("new") == {"RowAffected": 1}
    for call, status in (
        (lambda: client.get_item("new"), 404),
        (lambda: client.insert_item({**item, "Labels": ["calm"], "Categories": ["a"]}), 422),
        (lambda: client.insert_feedback("strem", "u", "new", NOW), 422),
        (lambda: client.get_recommend("u", n=400, offset=200), 422),
        (lambda: Gorse(client.entry_point, "wrong").get_recommend("u"), 401),
    ):
        with pytest.raises(GorseException) as caught:
            call()
        assert caught.value.status_code == status, caught.value.message


def test_the_first_version_gives_ids(client):
    headers = {"X-API-Key": client.api_key}
    found = requests.get(f"{client.entry_point}/api/recommend/nobody?n=3", headers=headers).json()
    assert len(found) == 3 and all(isinstance(item_id, str) for item_id in found)
