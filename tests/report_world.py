"""A made-up run for the report: figures of several models, users, a map, training, with names that mean harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recsys_ray.baselines.tuning import Tuned
from recsys_ray.report.labels import SEGMENT_NAMES
from recsys_ray.storage.outputs import current_folder, set_current

EVIL = "</script><script>document.title='harmed'</script><img src=x onerror=alert(1)>$m$ \"'&"
MODELS = ("popularity", "item_knn", "hgnn", "two_tower_text_only", "2t_hgnn", EVIL, "oracle")
TYPES = ("all", "book", "podcast [new]")
USER_SEGMENTS = ("all", "warm", "new_to_type", "cold")


def rows(seeds: int = 0) -> list[dict[str, Any]]:
    """Rows of metrics.json; with ``seeds`` they are pooled ones."""
    found = []
    for number, model in enumerate(MODELS):
        for kind, item_type in enumerate(TYPES):
            for place, segment in enumerate(SEGMENT_NAMES):
                hit = 0.0123 * (number + 1) + 0.001 * place + 0.0001 * kind
                row = {
                    "model": model,
                    "item_type": item_type,
                    "segment": segment,
                    "users": 1234,
                    "queries": 2345,
                    "hr_at_10": hit,
                    "hr_at_10_low": hit - 0.002,
                    "hr_at_10_high": hit + 0.003,
                    "ndcg_at_10": hit / 2,
                    "ndcg_at_10_low": hit / 2 - 0.001,
                    "ndcg_at_10_high": hit / 2 + 0.001,
                    "mrr_at_100": hit / 3,
                    "mrr_at_100_hits": 0.2,
                    "coverage_at_100": 0.1 * (number + 1),
                    "share_of_oracle": 0.1 * (number + 1),
                }
                if seeds:
                    row |= {"seeds": list(range(seeds)), "per_seed": [hit + 0.001 * k for k in range(seeds)]}
                found.append(row)
    return found


def output(run: Path, stage: str) -> Path:
    """The current output of a stage, begun if there is none."""
    if current_folder(run / stage) is None:
        set_current(run / stage, run / stage / "made")
    return run / stage / "made"


def write_run(run: Path) -> Path:
    """The files beside the figures that a finished run has; returns ``run``."""
    day = 86_400
    counts = {
        "item_types": list(TYPES[1:]), "items_per_type": [60, 40], "events": ["stream", EVIL], "users": 98765,
        "valid_from": 80 * day, "test_from": 90 * day, "end": 100 * day, "days": [[d, d % 9] for d in range(100)],
        "rows": {"items": {"read": 100, "kept": 100}},
    }  # fmt: skip
    _write(output(run, "ingest") / "manifest.json", {"counts": counts, "seconds": 75, "peak_memory_mb": 1500})
    epochs = [{"epoch": k, "loss": 2.0 - 0.1 * k, "valid_loss": 2.1 - 0.1 * k} for k in range(5)]
    _write(output(run, "hgnn") / "metrics.json", epochs)
    (output(run, "two_tower") / "hgnn").mkdir(parents=True)
    (output(run, "two_tower") / "hgnn" / "metrics.json").write_text("damaged")
    epoch = {"epoch": 0, "loss": 1.0, "valid_hr_at_10": 0.25, "valid_ndcg_at_100": 0.2}
    _write(output(run, "two_tower") / "text_only" / "metrics.json", [epoch])
    spec = {"item_types": list(TYPES[1:]), "last_item": True, "recent": [4.0], "id_dropout": None}
    _write(output(run, "two_tower") / "hgnn" / "spec.json", spec)
    score = {"memory": 0.05, "temperature": 0.1, "ridge": 30.0, "half_life": 4.0, "text_users": 10.0,
             "trends": [0.75, 0.0], "unseen_share": [0.0213, None]}  # fmt: skip
    _write(output(run, "two_tower") / "hgnn" / "score.json", score)
    _write(output(run, "evaluation") / "tuning.json", {"item_knn": _search()})
    _write(output(run, "evaluation") / "popularity.json", _popularity())
    _write(output(run, "evaluation") / "map.json", _map())
    _write(output(run, "evaluation") / "examples.json", _examples())
    return run


def differences() -> list[dict[str, Any]]:
    """Rows of differences.json: the served model against each other one."""
    value = {row["model"]: row["hr_at_10"] for row in rows() if row["item_type"] == "all" and row["segment"] == "warm"}
    return [
        {
            "model": "2t_hgnn", "against": model, "item_type": "all", "segment": "warm", "relative": None,
            "difference": value["2t_hgnn"] - hit, "low": value["2t_hgnn"] - hit - 0.001,
            "high": value["2t_hgnn"] - hit + 0.001, "per_seed": [value["2t_hgnn"] - hit],
        }
        for model, hit in value.items()
        if model != "2t_hgnn"
    ]  # fmt: skip


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _search() -> dict[str, Any]:
    trials = [
        {"params": {"neighbours": n}, "hr_at_10": n / 1000, "seconds": 30.0, "capped": n == 50} for n in (50, 200)
    ]
    return Tuned({"neighbours": 200}, trials).as_record()


def _popularity() -> dict[str, Any]:
    shares = {segment: {t: [0.4, 0.3, 0.15, 0.1, 0.05] for t in TYPES} for segment in USER_SEGMENTS}
    return {
        "places": 10,
        "items_by_tier": {t: [2, 5, 10, 20, 63] for t in TYPES},
        "recommended": dict.fromkeys(MODELS, shares),
        "chosen": shares,
    }


def _map() -> dict[str, Any]:
    items = range(100)
    near = [[(k + j) % 100 for j in range(1, 7)] for k in items]
    grid = {"x": [k % 10 / 5 - 1 for k in items], "y": [k // 10 / 5 - 1 for k in items], "near": near, "same_type": 0.9}
    return {
        "types": list(TYPES[1:]),
        "catalogue": 100,
        "id": [f"item-{k}" for k in items],
        "title": [EVIL if k == 3 else f"Title {k}" for k in items],
        "type": [int(k >= 60) for k in items],
        "tier": [k % 5 for k in items],
        "unseen": [int(k % 7 == 0) for k in items],
        "spaces": {"hgnn": grid, "2t_hgnn": {**grid, "x": grid["y"], "y": grid["x"]}, "text": grid},
    }


def _examples() -> dict[str, Any]:
    lists = {model: [(7 * place + number) % 100 for place in range(10)] for number, model in enumerate(MODELS)}
    users = [
        {
            "kind": kind,
            "item_type": "book",
            "events": 2,
            "history": [{"gid": 3, "event": 1, "timestamp": 86_400 * 40}, {"gid": 50, "event": 0, "timestamp": 0}],
            "truths": [lists["2t_hgnn"][2], 3],
            "recommended": lists,
            "user_id": f"user-{number} {EVIL}",
        }
        for number, kind in enumerate(("ours", "rival", "neither", "cold"))
    ]
    items = {
        k: {"item_id": f"item-{k}", "item_type": "book", "title": EVIL if k == 3 else f"Title {k}"} for k in range(100)
    }
    return {
        "served": "2t_hgnn",
        "rival": EVIL,
        "segment": "warm",
        "lists": {"ours": 10, "rival": 5, "both": 20, "neither": 65},
        "users": users,
        "items": items,
    }
