"""The command line over a small demo world: what the tests of the whole pipeline call and how they configure it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from pipelines.cli import main
from recsys_ray.storage.outputs import current_output

BASELINES = {"popularity", "item_knn", "llm_knn", "hgnn", "oracle"}
TABLES = ("items", "interactions", "users", "oracle")
EVENTS, SEED = 6000, 0  # of the demo world
# A run whose every stage matters; tests/golden keeps its figures.
SMALL: dict[str, Any] = {
    "seed": 0,
    "data": {"now": "2026-01-02", "shards": 2},
    "text": {"precision": "fp32"},  # bfloat16 would tie the figures to the hardware that has it
    "split": {"test_days": 45, "valid_days": 45},  # the more queries, the less one of them weighs
    "graph": {"cuts": 2, "first_cut": 0.4, "partitions": 1},
    "hgnn": {"out_dim": 64, "signature_dim": 32, "epochs": 2, "min_edges": 4000, "workers": 1},
    "two_tower": {"layers": [64, 32], "epochs": 3, "batch_size": 128, "precision": "fp32", "workers": 1},
    "evaluate": {"bootstrap": 50, "trials": 2, "map_items": 0, "examples": 0},
    "ray": {"num_cpus": 2, "object_store_mb": 256},
}


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", *map(str, words)]


def call(*words: object) -> subprocess.CompletedProcess[str]:
    """The command line in this process, and on its Ray where one is up."""
    arguments, code = [str(word) for word in words], 0
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors:
        try:
            main(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())


def call_apart(*words: object, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=timeout)


def make_data(folder: Path) -> None:
    """The demo world's tables in ``folder``."""
    done = call("demo-data", "--out", folder, "--events", EVENTS, "--seed", SEED)
    assert done.returncode == 0, done.stderr


def make_run(config: Path) -> subprocess.CompletedProcess[str]:
    """Every stage; returns what the command printed."""
    done = call("run", "--config", config)
    assert done.returncode == 0, done.stderr[-6000:]
    return done


def configure(root: Path, world: Path, name: str, /, **changes: dict) -> Path:
    """A configuration file for a run in ``root/name``."""
    tree = {**SMALL, **{section: {**SMALL.get(section, {}), **changed} for section, changed in changes.items()}}
    tree["data"] = {**{table: str(world / table) for table in TABLES}, **tree["data"]}
    (root / f"{name}.yaml").write_text(yaml.safe_dump({"run_dir": str(root / name), **tree}), encoding="utf-8")
    return root / f"{name}.yaml"


def output(run: Path, stage: str) -> Path:
    """The current output of a stage."""
    return current_output(run, stage).path


def metrics_of(run: Path) -> list[dict]:
    return json.loads((output(run, "evaluation") / "metrics.json").read_text(encoding="utf-8"))
