"""What a server kept goes into the next run as tables that ingest reads as they are."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
from pipeline_world import call

from recsys_ray.data.reading import find_source, read_batches
from serve.store import LiveEvent, LiveItem, open_store


@pytest.fixture
def uri(tmp_path) -> str:
    return f"sqlite://{tmp_path}/live.db"


def test_events_and_items_are_tables(uri, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.export_events._AT_ONCE", 2)
    store = open_store(uri)
    events = [LiveEvent(f"e{number}", f"u{number}", "i", "stream", 1_700_000_000 + number) for number in range(5)]
    store.add_events(events)
    record = {"item_type": "music", "title": "A song", "categories": ["a", "b"], "published_at": 1_700_000_000}
    store.put_item(LiveItem("new", {**record, "hidden": True}))
    store.put_item(LiveItem("other", record))
    store.put_item(LiveItem("gone", None))
    for _ in range(2):  # again, in the place of the first
        made = call("export-events", "--store", uri, "--out", tmp_path / "out")
        assert made.returncode == 0 and "5 events, 2 items" in made.stderr, made.stderr
    rows = [
        row
        for fragment in find_source("interactions", str(tmp_path / "out" / "interactions")).fragments
        for batch in read_batches(fragment)
        for row in batch.table.to_pylist()
    ]
    assert sorted(row["user_id"] for row in rows) == [f"u{number}" for number in range(5)]
    items = pq.read_table(tmp_path / "out" / "items.parquet").to_pylist()
    assert {item["item_id"]: item["available"] for item in items} == {"new": False, "other": True}
    assert items[1]["categories"] == ["a", "b"] and items[1]["published_at"] == 1_700_000_000
    assert find_source("items", str(tmp_path / "out" / "items.parquet")).fragments
    assert len(list((tmp_path / "out" / "interactions").iterdir())) == 3


def test_a_mistyped_store_is_a_sentence_and_no_empty_export(tmp_path):
    made = call("export-events", "--store", f"sqlite://{tmp_path}/typo.db", "--out", tmp_path / "out")
    assert made.returncode != 0 and f"there is no store {tmp_path}/typo.db" in made.stderr
    assert not list(tmp_path.iterdir())


def test_events_are_forgotten_by_time_and_by_user(uri):
    store = open_store(uri)
    store.add_events([LiveEvent(f"e{day}", f"u{day}", "i", "stream", 1_714_521_600 + day * 86_400) for day in range(4)])
    made = call("forget-events", "--store", uri, "--before", "2024-05-02")  # day 1
    assert made.returncode == 0 and "1 events deleted" in made.stderr
    made = call("forget-events", "--store", uri, "--user", "u2")
    assert made.returncode == 0 and "1 events deleted" in made.stderr and "u2" not in made.stderr
    assert [event.user_id for event in store.events_after("", 10)[0]] == ["u1", "u3"]
    for words, told in (([], "name what to delete"), (["--before", "soon"], "is not a time")):
        made = call("forget-events", "--store", uri, *words)
        assert made.returncode != 0 and told in made.stderr
