"""The command line over a small demo world: what the tests of the whole pipeline call and how they configure it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import yaml

from pipelines.cli import main
from recsys_ray.storage.outputs import current_output

BASELINES = {"popularity", "item_knn", "llm_knn", "hgnn", "oracle"}
TABLES = ("items", "interactions", "users", "oracle")
SMALL = {
    "data": {"now": "2026-01-02", "shards": 2},
    "graph": {"window_days": 120, "cuts": 2, "first_cut": 0.4, "max_neighbors": 10},
    "hgnn": {"hidden_dim": 64, "out_dim": 64, "signature_dim": 32, "epochs": 3, "batch_size": 1024, "min_edges": 4000},
    "two_tower": {"layers": [32, 16], "epochs": 1, "batch_size": 256, "history": 20},
    "evaluate": {"bootstrap": 50},
    "ray": {"num_cpus": 2, "object_store_mb": 128},
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


def configure(root: Path, world: Path, name: str, /, **changes: dict) -> Path:
    """A configuration file for a run in ``root/name``."""
    tree = {section: {**SMALL.get(section, {}), **changes.get(section, {})} for section in {*SMALL, *changes}}
    tree["data"] = {**{table: str(world / table) for table in TABLES}, **tree["data"]}
    (root / f"{name}.yaml").write_text(yaml.safe_dump({"run_dir": str(root / name), **tree}), encoding="utf-8")
    return root / f"{name}.yaml"


def output(run: Path, stage: str) -> Path:
    """The current output of a stage."""
    return current_output(run, stage).path


def metrics_of(run: Path) -> list[dict]:
    return json.loads((output(run, "evaluation") / "metrics.json").read_text(encoding="utf-8"))
