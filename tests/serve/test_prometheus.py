"""A real Prometheus that reads a running server: every panel of the dashboard has data, every alert can be computed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from bundle_world import make_world
from server_process import free_port, running, wait_for

ROOT = Path(__file__).parents[2]
SERVE = """
import sys
from serve.server import serve_forever
from serve.settings import load_settings
serve_forever(sys.argv[1], port=int(sys.argv[2]), settings=load_settings(sys.argv[3]))
"""


def expressions() -> dict[str, str]:
    """Of the dashboard, by panel and legend, over a window that a test can fill."""
    board = json.loads((ROOT / "configs/grafana/recsys-ray.json").read_text())
    return {
        f"{panel['title']} / {target['legendFormat']}": target["expr"].replace("$__rate_interval", "1m")
        for panel in board["panels"]
        for target in panel["targets"]
    }


@pytest.mark.slow
def test_every_panel_and_alert_has_data(tmp_path):
    world = make_world(tmp_path / "world")
    world.bundle()
    began = time.time()
    port, metrics, prometheus, log = free_port(), free_port(), free_port(), tmp_path / "serve.log"
    settings = {"metrics_port": metrics, "store": f"sqlite:///{tmp_path}/live.db", "traces": 1.0}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    config = yaml.safe_load((ROOT / "configs/prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s"}
    config["rule_files"] = [str(ROOT / "configs/prometheus/alerts.yml")]
    config["scrape_configs"] = [
        {**config["scrape_configs"][0], "static_configs": [{"targets": [f"127.0.0.1:{metrics}"]}]}
    ]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb"]
    command += [f"--web.listen-address=127.0.0.1:{prometheus}", "--log.level=warn"]
    arguments = (str(world.root), str(port), str(tmp_path / "settings.yaml"))
    with (
        running([sys.executable, "-c", SERVE, *arguments], log) as server,
        (tmp_path / "prometheus.log").open("w") as out,
    ):
        url = f"http://127.0.0.1:{port}"
        wait_for(url, log, server)
        reader = subprocess.Popen(command, stdout=out, stderr=out)
        try:
            missing = wait_until_all_answer(url, f"http://127.0.0.1:{prometheus}", world)
            assert not missing, f"{missing}\n{(tmp_path / 'prometheus.log').read_text()[-2000:]}"
            assert server.poll() is None
            assert traced(began), "no span of a request was written"
        finally:
            reader.terminate()
            reader.wait(30)


def traced(since: float) -> bool:
    """Whether a replica that started after ``since`` has written a span of a recommendation."""
    files = Path("/tmp/ray").glob("session_*/logs/serve/spans/replica_recsys-ray_*")
    fresh = [file for file in files if file.stat().st_mtime >= since]
    return any('"http.route": "/v1/recommendations"' in file.read_text() for file in fresh)


def wait_until_all_answer(url: str, prometheus: str, world: Any) -> list[str]:
    """Ask the server for some of everything, until each expression has data; returns those that never had."""
    wanted = expressions()
    deadline = time.monotonic() + 120
    with httpx.Client(base_url=url, timeout=30) as http, httpx.Client(base_url=prometheus, timeout=30) as reader:
        while wanted and time.monotonic() < deadline:
            for user in [*world.user_ids[:20], "nobody"]:
                assert http.post("/v1/recommendations", json={"user_id": user}).status_code == 200
            http.post("/v1/recommendations", json={"user_id": world.user_ids[0], "allow": []})
            http.post("/v1/recommendations", json={"history": [{"item_id": "unknown"}]})
            http.get("/v1/popular")
            time.sleep(1)
            for name, expression in list(wanted.items()):
                try:
                    told = reader.get("/api/v1/query", params={"query": expression}).json()
                except httpx.TransportError:  # it is still starting
                    break
                assert told["status"] == "success", (name, told)
                values = [float(one["value"][1]) for one in told["data"]["result"]]
                if values and all(value == value for value in values):  # not a number: nothing has happened yet
                    del wanted[name]
        groups = reader.get("/api/v1/rules").json()["data"]["groups"]
        wanted |= {rule["name"]: rule["lastError"] for rule in groups[0]["rules"] if rule["health"] == "err"}
        assert len(groups[0]["rules"]) == 10
    return list(wanted)
