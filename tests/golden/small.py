"""The figures that are kept of the small run of ``pipeline_world``.

``figures.json`` beside this file has them from the day when a change of the metrics was last meant.
"""

from __future__ import annotations

import json
from pathlib import Path

from recsys_ray.evaluation.given import ORACLE
from recsys_ray.storage.outputs import current_output

FILE = Path(__file__).parent / "figures.json"
# How far a figure may be from the kept one. On one machine only the last digits move: with one CPU instead of two,
# 0.00002 of a loss and of an MRR. Another processor adds up in another order, which can exchange two items that score
# alike: one of 157 queries is 0.0064 of HR@10, one of 460 items 0.0022 of the coverage.
TOLERANCES = {"loss": 0.02, "valid_loss": 0.02, "hr_at_10": 0.013, "coverage_at_100": 0.011}
TOLERANCE = 0.006  # NDCG and MRR; counts must be equal
MEASURES = ("hr_at_10", "ndcg_at_10", "mrr_at_100", "coverage_at_100")
SHOWN = {("all", "all"), ("all", "warm")}


def changes(kept: dict[str, float], found: dict[str, float]) -> list[str]:
    """A line for each figure that is missing, new or further away than its tolerance."""
    lines = []
    for name in sorted(kept.keys() | found.keys()):
        before, now = kept.get(name), found.get(name)
        if before is None or now is None:
            lines.append(f"{name}: {'new' if before is None else 'missing'}")
            continue
        exact = isinstance(before, int) and isinstance(now, int)
        allowed = 0 if exact else TOLERANCES.get(name.rsplit(".", 1)[-1], TOLERANCE)
        if abs(now - before) > allowed:
            lines.append(f"{name}: {before:.6g} before, {now:.6g} now")
    return lines


def figures_of(run: Path) -> dict[str, float]:
    """What each stage of a finished run made, one name a figure; whole numbers are counts."""
    ingest, graph, hgnn = (current_output(run, stage).counts for stage in ("ingest", "graph", "hgnn"))
    figures: dict[str, float] = {"ingest.users": ingest["users"]}
    figures |= {f"ingest.{kind}": n for kind, n in zip(ingest["item_types"], ingest["items_per_type"], strict=True)}
    figures |= {f"graph.{snapshot}": sum(edges.values()) for snapshot, edges in graph["edges"].items()}
    figures["hgnn.valid_loss"] = hgnn["last"][0]["valid_loss"]
    for model, last in current_output(run, "two_tower").counts["last"].items():
        figures |= {f"two_tower.{model}.{measure}": last[0][measure] for measure in ("loss", "valid_ndcg_at_100")}
    for row in json.loads((current_output(run, "evaluation").path / "metrics.json").read_text(encoding="utf-8")):
        if row["model"] != ORACLE and (row["item_type"], row["segment"]) in SHOWN:  # the oracle is the world's
            place = f"evaluation.{row['model']}.{row['item_type']}.{row['segment']}"
            figures |= {f"{place}.{measure}": row[measure] for measure in ("queries", *MEASURES)}
    return figures
