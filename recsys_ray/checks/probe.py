"""Measures how useful the item embeddings are for tasks they were not trained for, compared with the text vectors.

Two probes: a linear model predicts an item's category, language and type (classification.py), and nearest neighbours
are compared with item pairs that users share only later (similar.py). All vectors are as of the test snapshot.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from recsys_ray.checks import classification, similar
from recsys_ray.checks.classification import Labels
from recsys_ray.checks.similar import Period
from recsys_ray.cluster.pool import in_parallel
from recsys_ray.config import Config
from recsys_ray.core.progress import Progress
from recsys_ray.core.seeds import seed_from
from recsys_ray.data.tables import Catalogue, Tables
from recsys_ray.hgnn.outputs import load_embeddings
from recsys_ray.storage.artifacts import SCRATCH, Artifact, load_arrays, read_json, write_json

SNAPSHOT = "test"
SINGLE = ("text", "hgnn", "tower")  # kinds of vectors
JOINED = "text+hgnn"
_OVERSAMPLE = 3  # of the item pairs of the test period, many were known before
_FIELDS = {"category": "categories"}  # target -> the field of text.fields that gives it away

Row = dict[str, Any]


def probe(
    config: Config, ingest: Artifact, featurize: Artifact, hgnn: Artifact, two_tower: Artifact, variant: str,
    out: Path, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Run both probes; writes ``metrics.json`` and ``probe.png`` into ``out``. Ray must be up.

    Finished parts in ``out``'s scratch folder are used again.

    Returns:
        Counts for the manifest: items and classes of each target, absent targets, pairs.
    """
    from recsys_ray.checks.probe_plot import draw_probe

    tables = Tables(ingest.path)
    table = tables.items("item_type", "language", "categories")
    vectors = _vectors(featurize, hgnn, two_tower, variant, len(table))
    labels, absent = classification.find_labels(table)
    for target, reason in absent.items():
        progress.say(f"    no probe of {target}: {reason}")
    fields = featurize.manifest["config"]["text"]["fields"]
    rows = classify(config, labels, vectors, (*SINGLE, JOINED), out / SCRATCH, progress)
    for row in rows:
        row["in_text"] = _FIELDS.get(row["target"]) in fields
    found = later_pairs(config, tables, progress)
    near = [{"vectors": kind, **row} for kind in SINGLE for row in found.score(found.rank(vectors[kind]), config)]
    if not near:
        progress.say("    similar items not probed: no item pair is first shared in the test period")
    metrics = {"snapshot": SNAPSHOT, "classification": rows, "similar": near, "absent": absent}
    write_json(out / "metrics.json", metrics)
    draw_probe(metrics, out / "probe.png")
    return {
        "targets": {row["target"]: {"items": row["items"], "classes": row["classes"]} for row in rows},
        "absent": absent,
        "pairs": max((row["pairs"] for row in near), default=0),
    }


def _vectors(featurize: Artifact, hgnn: Artifact, two_tower: Artifact, variant: str, items: int) -> dict[str, Any]:
    """kind -> [items, d], row = gid."""
    return {
        "text": load_arrays(featurize.path / "text.safetensors")["vector"],
        "hgnn": load_embeddings(hgnn.path, SNAPSHOT, items).numpy(),
        "tower": load_arrays(two_tower.path / variant / "items" / f"{SNAPSHOT}.safetensors")["vector"],
    }


# -- classification ------------------------------------------------------------------------------------------------


def classify(
    config: Config,
    labels: Mapping[str, Labels],
    vectors: Mapping[str, Any],
    kinds: Sequence[str],
    scratch: Path,
    progress: Progress,
) -> list[Row]:
    """One task for each target and kind of vectors, on a sample of items that is the same for all kinds.

    Args:
        vectors: name -> [items, d], row = gid.
        kinds: names, or several of them joined by ``+``.
        scratch: where a finished fit is kept.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    calls = []
    for target, kind in itertools.product(labels, kinds):
        seed = seed_from(config.seed, "probe", target) % 2**32
        chosen = classification.sample_items(labels[target], config.probe.items, seed)
        parts = [np.asarray(vectors[name][chosen], np.float32) for name in kind.split("+")]
        task = (np.concatenate(parts, axis=1), labels[target].codes[chosen], config.probe.folds)
        facts = {"target": target, "vectors": kind, "classes": len(labels[target].names)}
        done = scratch / f"{target}-{kind}.json"
        calls.append((_classify_one, *task, config.evaluate.bootstrap, seed, facts, done))
    with progress.task("classification", len(calls), "fits") as shown:
        rows = []
        for row in in_parallel(calls, ordered=True):
            rows.append(row)
            shown.advance(detail=f"{row['target']} from {row['vectors']}: macro-F1 {row['macro_f1']:.3f}")
    return rows


def _classify_one(
    vectors: np.ndarray, classes: np.ndarray, folds: int, resamples: int, seed: int, facts: Row, done: Path
) -> Row:
    if done.exists():
        return read_json(done)
    guessed = classification.predict(vectors, classes, folds, seed)
    majority = float(np.bincount(classes).max() / len(classes))
    row = {**facts, "items": len(classes), "majority": majority}
    row |= classification.score(classes, guessed, resamples, seed)
    write_json(done, row)
    return row


# -- similar items -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LaterPairs:
    """Pairs of items that a user first had both of in the test period, each in both directions."""

    query: np.ndarray  # int64 [pairs], gid
    answer: np.ndarray  # int64 [pairs], gid
    trained: np.ndarray  # bool [items]: an event before the validation period
    catalogue: Catalogue

    def rank(self, vectors: np.ndarray) -> np.ndarray:
        """float64 [pairs]: the answer's rank among the query's neighbours; ``vectors`` [items, d]."""
        return similar.ranks(vectors, self.query, self.answer, self.catalogue)

    def score(self, rank: np.ndarray, config: Config) -> list[Row]:
        """Recall by item type and segment (:func:`similar.score_pairs`)."""
        resamples, seed = config.evaluate.bootstrap, config.seed
        return similar.score_pairs(rank, self.query, self.answer, self.trained, self.catalogue, resamples, seed)


def later_pairs(config: Config, tables: Tables, progress: Progress) -> LaterPairs:
    """A sample of the pairs of a run, the same for any kind of vectors."""
    counts, catalogue, shards = tables.counts, tables.catalogue, tables.shards
    period = Period(
        counts["valid_from"], counts["test_from"], counts["end"], tables.codes(config.events.edges),
        config.graph.max_history, seed_from(config.seed, "probe"),
    )  # fmt: skip
    limit = config.probe.pairs * _OVERSAMPLE
    with progress.task("item pairs of the test period", 2 * len(shards), "shards") as shown:

        def over_shards(function: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
            for result in in_parallel([(function, shard, period, *arguments) for shard in shards], ordered=True):
                shown.advance()
                yield result

        pairs = np.empty((2, 0), np.int64)
        for part in over_shards(similar.shared_pairs, catalogue, limit):
            pairs = similar.merge_pairs([pairs, part], limit, period)
        known, trained = np.zeros(pairs.shape[1], bool), np.zeros(catalogue.items, bool)
        for had, seen in over_shards(similar.survey_past, pairs, catalogue.items):
            known, trained = known | had, trained | seen
    a, b = pairs[:, ~known][:, : config.probe.pairs]
    return LaterPairs(np.concatenate([a, b]), np.concatenate([b, a]), trained, catalogue)


# -- what is shown -------------------------------------------------------------------------------------------------


def print_probe(metrics: Mapping[str, Any], console: Console) -> None:
    """Both probes as tables."""
    rows = metrics["classification"]
    if rows:
        table = _table("Predicting from vectors (logistic regression)", ("target", "vectors"))
        for name in ("classes", "items", "macro-F1", "95 % interval", "accuracy"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            interval = f"{row['macro_f1_low']:.3f}-{row['macro_f1_high']:.3f}"
            target = row["target"] + ("*" if row["in_text"] else "")
            cells = [str(row["classes"]), f"{row['items']:,}", f"{row['macro_f1']:.3f}", interval]
            last = row["vectors"] == JOINED
            table.add_row(target, row["vectors"], *cells, f"{row['accuracy']:.3f}", end_section=last)
        console.print(table)
        if any(row["in_text"] for row in rows):
            console.print("* part of the encoded text (text.fields)", markup=False)
    for target, reason in metrics["absent"].items():
        console.print(f"{target}: not probed, {reason}", markup=False)
    if metrics["similar"]:
        table = _table(
            "Similar items: pairs first shared by a user in the test period", ("item type", "items", "pairs")
        )
        for kind in SINGLE:
            table.add_column(f"{kind} @10", justify="right", no_wrap=True)
            table.add_column("@100", justify="right", no_wrap=True)
        for (name, segment), group in _grouped(metrics["similar"]):
            cells = [f"{row[f'recall_at_{k}']:.3f}" for row in group for k in similar.CUTOFFS]
            table.add_row(name, segment, f"{group[0]['pairs']:,}", *cells)
        console.print(table)


def _grouped(rows: Sequence[Row]) -> list[tuple[tuple[str, str], list[Row]]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["item_type"], row["segment"]), []).append(row)
    return list(groups.items())


def _table(title: str, names: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    for name in names:
        table.add_column(name, no_wrap=True)
    return table
