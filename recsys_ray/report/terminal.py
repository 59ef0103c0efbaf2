"""The results of a run on the terminal: one screen, at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from recsys_ray.evaluation.results import EVERY_TYPE, MAIN
from recsys_ray.evaluation.segments import TIERS
from recsys_ray.report.labels import SEGMENT_NAMES, Row, main_segment, name_of, select

_NOTE = "HR@10: lists with a hit. cov.: items in any top 100. 95 % ranges; *: without 0."
_WITHOUT_HGNN = "two_tower_text_only"
_WHERE = {"warm": "all", "new_to_type": "new type", "cold_items": "unseen items", f"tier{TIERS}": "tail"}
_PARTS = {f"{name_of(MAIN).full} without ": "  without ", "2T without ": "  without "}  # below the whole model


def print_results(metrics: Sequence[Row], differences: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print one table for warm users over all item types: each model's HR@10, NDCG@10 and coverage, and how far the
    served model is ahead of it.

    Args:
        metrics: the rows of metrics.json.
        differences: the rows of differences.json.
    """
    if not metrics:
        console.print("No results: the test period has no user that can be evaluated.")
        return
    segment = main_segment(metrics)
    rows = in_order(select(metrics, item_type=EVERY_TYPE, segment=segment))
    ahead = {row["against"]: row for row in select(differences, model=MAIN, item_type=EVERY_TYPE, segment=segment)}
    served, first = name_of(MAIN).full, rows[0]
    seeds = f", mean of {len(first['seeds'])} seeds" if first.get("seeds") else ""
    console.print(
        f"Test period, {SEGMENT_NAMES[segment]}: {first['users']:,} users, {first['queries']:,} lists{seeds}",
        style="bold",
    )
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="underline")
    table.add_column("model", no_wrap=True, max_width=19)
    for name in ("HR@10 (95 %)", "NDCG@10 (95 %)", "cov.", *([f"{served} ahead by"] if ahead else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [_share(row, "hr_at_10"), _share(row, "ndcg_at_10"), f"{row['coverage_at_100']:.0%}"]
        cells += [_ahead(ahead.get(row["model"]))] if ahead else []
        table.add_row(Text(_indented(row["model"])), *map(Text, cells), style="bold" if row["model"] == MAIN else None)
    console.print(table)
    console.print(_NOTE, style="dim", no_wrap=True, overflow="ellipsis")
    if added := _what_the_hgnn_adds(differences):
        console.print(added, no_wrap=True, overflow="ellipsis")


def _what_the_hgnn_adds(differences: Sequence[Mapping[str, Any]]) -> str:
    """``HGNN adds: all -.001, unseen items +.007*``, against the two-tower without it; a star where
    the interval does not contain zero."""
    found = {
        row["segment"]: row for row in select(differences, model=MAIN, against=_WITHOUT_HGNN, item_type=EVERY_TYPE)
    }
    parts = [
        f"{name} {_signed(row['difference'])}{'*' if row['low'] > 0 or row['high'] < 0 else ''}"
        for segment, name in _WHERE.items()
        if (row := found.get(segment))
    ]
    return f"HGNN adds: {', '.join(parts)}" if parts else ""


def in_order(rows: Sequence[Row]) -> list[Row]:
    """The served model first, then its parts, the baselines from best to worst, controls, and the oracle."""
    roles = ("served", "part", "baseline", "control", "oracle")
    return sorted(rows, key=lambda row: (roles.index(name_of(row["model"]).role), -row["hr_at_10"]))


def _indented(model: str) -> str:
    """The full name; a part of the served model is indented below it."""
    full = name_of(model).full
    for start, shorter in _PARTS.items():
        if full.startswith(start):
            return shorter + full.removeprefix(start)
    return full


def _share(row: Row, name: str) -> str:
    """``.432 .406-.459``; outputs of older versions have no interval of NDCG@10."""
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    interval = "" if low is None or high is None else f" {_short(low)}-{_short(high)}"
    return f"{_short(row[name])}{interval}"


def _ahead(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return " ".join((_signed(row["difference"]), _signed(row["low"]), "to", _signed(row["high"])))


def _short(share: float) -> str:
    """Three decimals and no zero before the point, so that a table fits 80 columns."""
    return f"{share:.3f}".removeprefix("0")


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("0.", ".", 1)
