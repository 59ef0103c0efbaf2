"""The metrics of a small fixed run are what they were: a change of them is meant, or a fault."""

from __future__ import annotations

import json

import pytest

from golden.small import FILE, changes, figures_of


def test_the_metrics_of_a_small_run_are_unchanged(small_run):
    kept = json.loads(FILE.read_text(encoding="utf-8"))["figures"]
    moved = changes(kept, figures_of(small_run.folder))
    assert not moved, "\n".join(
        ["", *moved, "If this is meant: make golden, and the change's description and CHANGELOG.md say what moved."]
    )


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"graph.test": 7, "a.ndcg_at_10": 0.3}, []),
        ({"graph.test": 7, "a.ndcg_at_10": 0.305}, []),
        ({"graph.test": 7, "a.ndcg_at_10": 0.31}, ["a.ndcg_at_10: 0.3 before, 0.31 now"]),
        ({"graph.test": 8, "a.ndcg_at_10": 0.3}, ["graph.test: 7 before, 8 now"]),
        ({"graph.test": 7, "b": 1}, ["a.ndcg_at_10: missing", "b: new"]),
    ],
)
def test_what_has_moved_is_named(found, said):
    assert changes({"graph.test": 7, "a.ndcg_at_10": 0.3}, found) == said
