"""A run that lies in an object store (SeaweedFS), from tables there to an answer from a bundle there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from pipeline_world import SMALL, TABLES, call, call_apart, command, configure
from s3 import weed_bucket

from recsys_ray.storage.store import Place

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def wait_for_a_checkpoint(run: subprocess.Popen, run_dir: Place) -> None:
    until = time.monotonic() + 400
    while time.monotonic() < until and run.poll() is None:
        if any(name.startswith("two_tower/") and name.endswith("/last.safetensors") for name in run_dir.files()):
            return
        time.sleep(0.5)
    raise AssertionError("no checkpoint of the two-tower came into the store")


def test_from_tables_to_an_answer(tmp_path, monkeypatch):
    """The first machine is killed in the middle of the training; another one goes on where it was."""
    world = tmp_path / "world"
    assert call_apart("demo-data", "--out", world, "--events", 8000).returncode == 0
    with weed_bucket(tmp_path / "weed") as query:
        store = Place(f"s3://test/lake{query}")
        (store / "tables").upload(world)
        run_dir = store / "runs" / "mine"
        tables = {table: (store / "tables" / table).uri for table in TABLES}
        config = configure(
            tmp_path,
            world,
            "mine",
            data=SMALL["data"] | tables,
            two_tower={"epochs": 40, "patience": 40, "ablation": False},
        )
        run = ["run", "--config", config, "--set", f"run_dir={run_dir}", "--baselines", "popularity"]
        monkeypatch.setenv("RECSYS_RAY_CACHE", str(tmp_path / "first"))
        with (tmp_path / "first.log").open("w") as log:
            first = subprocess.Popen(command(*run), stdout=log, stderr=log, start_new_session=True)
            try:
                wait_for_a_checkpoint(first, run_dir)
            finally:
                if first.poll() is None:
                    os.killpg(first.pid, signal.SIGKILL)
                    first.wait()
        assert (run_dir / "lock.json").exists()

        monkeypatch.setenv("RECSYS_RAY_CACHE", str(tmp_path / "second"))
        second = call_apart(*run, timeout=900)
        assert second.returncode == 0, second.stderr
        assert "hgnn: up to date" in second.stderr and "2T-HGNN" in second.stdout
        names = set(run_dir.files())
        assert "report.html" in names
        assert [name for name in names if "_scratch" in name or name == "lock.json"] == []

        monkeypatch.setenv("RECSYS_RAY_CACHE", str(tmp_path / "third"))
        new = tmp_path / "new.csv"
        new.write_text("item_id,item_type,title\nnew-1,podcast,A garden of one's own\n")
        (store / "new.csv").write(new.read_bytes())
        made = call("embed-items", store / "new.csv", "--bundle", run_dir / "bundles")
        assert made.returncode == 0, made.stderr
        asked = call("recommend", "--bundle", run_dir, "--item", "new-1", "--type", "podcast", "--json")
        assert asked.returncode == 0, asked.stderr
        assert len(json.loads(asked.stdout)["items"]) == 10
        page = tmp_path / "results.md"
        told = call("results", run_dir, "--out", page)
        assert told.returncode == 0 and "2T-HGNN" in page.read_text(), told.stderr
        assert not (Path("s3:").exists() or (tmp_path / "s3:").exists())
