"""What is counted of requests and answers, and that dashboard and alerts ask for nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from bundle_world import make_world
from fastapi.testclient import TestClient
from replica import Replica

from serve import metrics
from serve.app import create_app
from serve.metrics import Metric

ROOT = Path(__file__).parents[2]
STAGES = {"store", "features", "tower", "search", "rules"}


class Remembered:
    """Sums of counters, last values of gauges, all values of histograms; by name and values of tags."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], Any] = {}

    def record(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        assert set(tags) == set(metric.tags), metric.name
        key = (metric.name, *(tags[name] for name in metric.tags))
        if metric.kind == "histogram":
            self.values.setdefault(key, []).append(value)
        else:
            self.values[key] = value + (self.values.get(key, 0) if metric.kind == "counter" else 0)

    def __getitem__(self, key: tuple[str, ...] | str) -> Any:
        return self.values.get((key,) if isinstance(key, str) else key)


@pytest.fixture
def world(tmp_path):
    made = make_world(tmp_path / "world")
    made.bundle()
    return made


def test_requests_and_answers_are_counted(world, tmp_path):
    counted = Remembered()
    replica = Replica(world.root, f"sqlite:///{tmp_path}/live.db")
    user = world.user_ids[1]
    with TestClient(create_app(replica, meter=counted)) as http:
        for body in ({"user_id": user}, {}, {"user_id": user, "allow": []}, {"history": [{"item_id": "gone"}]}):
            assert http.post("/v1/recommendations", json=body).status_code == 200
        http.post("/v1/recommendations", json={"k": 0})
        http.get("/v1/users/someone/history")
        http.get("/nowhere")
        http.request("BREW", "/healthz")
        assert http.post("/v1/events", json={"events": [{"user_id": "u", "item_id": "i"}] * 3}).status_code == 200
        http.post("/v1/recommendations:batch", json={"questions": [{"user_id": user}] * 5})
    route = "/v1/recommendations"
    assert counted["recsys_requests_total", route, "POST", "200"] == 4
    assert counted["recsys_requests_total", route, "POST", "422"] == 1
    assert counted["recsys_requests_total", "/v1/users/{user_id:path}/history", "GET", "200"] == 1
    assert counted["recsys_requests_total", "none", "GET", "404"] == 1
    assert counted["recsys_requests_total", "none", "other", "405"] == 1
    assert len(counted["recsys_request_seconds", route]) == 5 and min(counted["recsys_request_seconds", route]) > 0
    assert counted["recsys_answers_total", "", "true"] == 7 and counted["recsys_answers_total", "", "false"] == 2
    assert counted["recsys_cold_answers_total"] == 2 and counted["recsys_empty_answers_total"] == 1
    assert counted["recsys_ignored_items_total"] == 1 and counted["recsys_degraded_answers_total"] is None
    assert sum(counted["recsys_items_total", name] or 0 for name in replica.recommender.item_types) == 80
    assert counted["recsys_batch_size"][-1] == 5 and sum(counted["recsys_batch_size"]) == 9
    best = replica.recommender.recommend(user, k=1)[0].score
    assert counted["recsys_top_score"] == pytest.approx(best, rel=1e-5)
    assert counted["recsys_events_total"] == 3
    for stage in STAGES:
        assert all(seconds >= 0 for seconds in counted["recsys_stage_seconds", stage])
    assert sum(counted["recsys_stage_seconds", "tower"]) > 0 and sum(counted["recsys_stage_seconds", "search"]) > 0
    # Of what is told outside nothing names a user or an item.
    assert not [key for key in counted.values if user in key or "gone" in key]


def test_gauges_tell_the_state(world, tmp_path):
    counted, uri = Remembered(), f"sqlite:///{tmp_path}/live.db"
    replica = Replica(world.root, uri)
    with TestClient(create_app(replica, meter=counted)) as http:
        assert http.delete(f"/v1/items/{world.item_ids[5]}").status_code == 200
    with TestClient(create_app(replica, meter=counted)) as http:  # it looks when it starts
        for _ in range(50):
            http.get("/healthz")
            if counted["recsys_removed_items"] == 1:
                break
    assert counted["recsys_removed_items"] == 1 and counted["recsys_live_items"] == 0
    assert counted["recsys_bundle_end_timestamp_seconds"] == replica.recommender.artifact.counts["end"]
    assert counted["recsys_bundle_refused"] == 0 and counted["recsys_store_up"] == 1
    assert counted["recsys_store_damaged_rows"] == 0
    canaries = json.loads((replica.recommender.artifact.path / "canary.json").read_text())["user_ids"]
    best = [replica.recommender.recommend(user_id, k=1)[0].score for user_id in canaries]
    assert counted["recsys_reference_score"] == pytest.approx(sum(best) / len(best), rel=1e-5)


def test_answers_without_the_store_are_degraded(world, tmp_path):
    counted = Remembered()
    replica = Replica(world.root, f"sqlite:///{tmp_path}/live.db")
    replica.answers.store.close()
    with TestClient(create_app(replica, meter=counted)) as http:
        assert http.post("/v1/recommendations", json={}).json()["degraded"]
        for _ in range(50):
            http.get("/healthz")
            if counted["recsys_store_up"] is not None:
                break
    assert counted["recsys_degraded_answers_total"] == 1 and counted["recsys_store_up"] == 0


@pytest.mark.parametrize("path", ["configs/grafana/recsys-ray.json", "configs/prometheus/alerts.yml"])
def test_dashboard_and_alerts_ask_for_what_is_counted(path):
    declared = [one for one in vars(metrics).values() if isinstance(one, Metric)]
    assert declared == metrics.METRICS
    known = {f"ray_{one.name}" for one in declared if one.kind != "histogram"}
    known |= {
        f"ray_{one.name}_{part}" for one in declared if one.kind == "histogram" for part in ("sum", "count", "bucket")
    }
    asked = set(re.findall(r"\bray_recsys_\w+", (ROOT / path).read_text()))
    assert asked and asked <= known
