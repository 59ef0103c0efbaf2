"""Which model hit which query. An evaluation keeps this so that seeds can be averaged and models compared on the same
queries.

The file ``hits.safetensors`` has, for each query, the user, the item type, a hash of its truths and one bit for each
segment it is in; for each model, one bit for each segment in which a truth was in the top ten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from recsys_ray.core.errors import ArtifactError
from recsys_ray.core.seeds import splitmix64
from recsys_ray.evaluation.metrics import pooled_interval, widen
from recsys_ray.evaluation.segments import SEGMENTS, Queries
from recsys_ray.storage.artifacts import load_arrays, save_arrays

HITS = "hits.safetensors"
DIFFERENCES = "differences.json"
MAIN = "2t_hgnn"  # what the other models are compared with
EVERY_TYPE = "all"  # rows over the queries of all item types
MEANS = ("hr_at_10", "ndcg_at_10", "mrr_at_100", "mrr_at_100_hits", "coverage_at_100", "share_of_oracle")

Row = dict[str, Any]


@dataclass(frozen=True)
class Hits:
    """The queries of one evaluation, and who hit them."""

    types: tuple[str, ...]
    uid: np.ndarray  # int64 [queries]
    item_type: np.ndarray  # int16 [queries], index into types
    truths: np.ndarray  # uint64 [queries]: a hash of the query's truths; equal where the same was asked
    member: np.ndarray  # bool [segments, queries]: the query has a truth in the segment
    hit: dict[str, np.ndarray] = field(default_factory=dict)  # model -> bool [segments, queries]
    asked: dict[str, np.ndarray] = field(default_factory=dict)  # models that rank for some queries only: bool [queries]

    @classmethod
    def of(cls, queries: Queries, types: tuple[str, ...], member: np.ndarray) -> Hits:
        """No model yet. ``member``: bool [segments, queries]."""
        hashes = np.zeros(len(queries), np.uint64)
        np.add.at(hashes, queries.truth_query, splitmix64(queries.truth_item, 0))
        return cls(types, queries.uid, queries.item_type, hashes, member)

    def save(self, path: Path) -> None:
        arrays = {"uid": self.uid, "item_type": self.item_type, "truths": self.truths.view(np.int64)}
        arrays["member"] = np.packbits(self.member, axis=1)
        arrays |= {f"hit.{name}": np.packbits(hit, axis=1) for name, hit in self.hit.items()}
        arrays |= {f"asked.{name}": np.packbits(asked) for name, asked in self.asked.items()}
        save_arrays(path, arrays, {"types": "\n".join(self.types), "models": "\n".join(self.hit)})

    @classmethod
    def load(cls, path: Path) -> Hits:
        """Read a file.

        Raises:
            ArtifactError: it is missing or damaged.
        """
        arrays = load_arrays(path)
        with safe_open(path, framework="numpy") as file:
            types, models = (file.metadata()[name].split("\n") for name in ("types", "models"))
        count = len(arrays["uid"])

        def bits(prefix: str) -> dict[str, np.ndarray]:
            found = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
            return {name: np.unpackbits(packed, axis=-1, count=count).astype(bool) for name, packed in found.items()}

        truths = arrays["truths"].view(np.uint64)
        member, found = bits("member")[""], bits("hit.")
        hit = {name: found[name] for name in models if name}  # in the order of the table
        return cls(tuple(types), arrays["uid"], arrays["item_type"], truths, member, hit, bits("asked."))

    def __len__(self) -> int:
        return len(self.uid)

    def chosen(self, item_type: str, segments: Sequence[str], *models: str) -> np.ndarray:
        """int64 [n]: the queries of a type and of any of these segments which all of the models were asked."""
        mask = self.member[_columns(segments)].any(axis=0)
        if item_type != EVERY_TYPE:
            mask &= self.item_type == self.types.index(item_type)
        for model in models:
            mask &= self.asked.get(model, True)
        return np.flatnonzero(mask)

    def hit_in(self, model: str, segments: Sequence[str]) -> np.ndarray:
        """bool [queries]: a truth of any of these segments is among the model's first ten."""
        return np.asarray(self.hit[model][_columns(segments)].any(axis=0))


def _columns(segments: Sequence[str]) -> list[int]:
    return [SEGMENTS.index(name) for name in segments]


def pool(
    tables: Sequence[Sequence[Row]], hits: Sequence[Hits], seeds: Sequence[int], resamples: int, seed: int
) -> list[Row]:
    """Rows of metrics.json over several training seeds: means, intervals that cover users and seeds, and ``seeds`` and
    ``per_seed`` (HR@10 of each).

    Args:
        tables: the rows of each seed's evaluation.
        hits: their hits, on the same queries.

    Raises:
        ArtifactError: the seeds were not evaluated on the same queries.
    """
    _check_same_queries(hits)
    places = [{_place(row): row for row in rows} for rows in tables]
    pooled = []
    for place, first in places[0].items():
        if not all(place in other for other in places):
            continue
        rows = [other[place] for other in places]
        model, item_type, segment = place
        chosen = hits[0].chosen(item_type, [segment], model)
        values = np.stack([h.hit_in(model, [segment])[chosen] for h in hits]).astype(np.int64)
        low, high = pooled_interval(values, hits[0].uid[chosen], resamples, seed)
        row = dict(first)
        row |= {name: _mean([r[name] for r in rows]) for name in MEANS if name in first}
        row |= {"hr_at_10_low": max(low, 0.0), "hr_at_10_high": min(high, 1.0)}
        if all("ndcg_at_10_low" in r for r in rows):  # outputs of older versions have no interval
            row |= _ndcg_interval(rows)
        row |= {"seeds": list(seeds), "per_seed": [r["hr_at_10"] for r in rows]}
        pooled.append(row)
    return pooled


def _ndcg_interval(rows: Sequence[Row]) -> Row:
    """Over users and seeds. The users' part is the mean of the seeds' own intervals, which is not too narrow."""
    lows, means, highs = (np.array([r[f"ndcg_at_10{end}"] for r in rows]) for end in ("_low", "", "_high"))
    low, high = widen(means, float(lows.mean()), float(highs.mean()))
    return {"ndcg_at_10_low": max(low, 0.0), "ndcg_at_10_high": min(high, 1.0)}


def _place(row: Row) -> tuple[str, str, str]:
    return row["model"], row["item_type"], row["segment"]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _check_same_queries(hits: Sequence[Hits]) -> None:
    for other in hits[1:]:
        if not (np.array_equal(other.uid, hits[0].uid) and np.array_equal(other.truths, hits[0].truths)):
            raise ArtifactError("the seeds were evaluated on different queries; run them again with one configuration")


def against_all(hits: Sequence[Hits], model: str, resamples: int, seed: int) -> list[Row]:
    """HR@10 of ``model`` minus that of every other one, on the same queries, by item type and segment (rows of
    differences.json). Several hits: one for each training seed."""
    if not hits or model not in hits[0].hit:
        return []
    rows = []
    for other in hits[0].hit:
        for item_type, segment in _all_places(hits[0]) if other != model else ():
            chosen = hits[0].chosen(item_type, [segment], model, other)
            if len(chosen):
                ours = np.stack([h.hit_in(model, [segment])[chosen] for h in hits])
                theirs = np.stack([h.hit_in(other, [segment])[chosen] for h in hits])
                place = {"model": model, "against": other, "item_type": item_type, "segment": segment}
                rows.append(place | difference(ours, theirs, hits[0].uid[chosen], resamples, seed))
    return rows


def _all_places(hits: Hits) -> Iterator[tuple[str, str]]:
    for item_type in (EVERY_TYPE, *hits.types):
        for segment in SEGMENTS:
            yield item_type, segment


def difference(
    ours: np.ndarray, theirs: np.ndarray, users: np.ndarray, resamples: int, seed: int, level: float = 0.95
) -> Row:
    """The paired difference of two hit rates and its interval over users and seeds.

    Args:
        ours, theirs: bool [seeds, queries]: the same queries, the same seeds in the same order.
        users: int64 [queries].
    """
    apart = ours.astype(np.int64) - theirs.astype(np.int64)
    low, high = pooled_interval(apart, users, resamples, seed, level)
    base = float(theirs.mean())
    return {
        "users": len(np.unique(users)),
        "queries": len(users),
        "hr_at_10": float(ours.mean()),
        "hr_at_10_against": base,
        "difference": float(apart.mean()),
        "low": low,
        "high": high,
        "relative": float(apart.mean()) / base if base else None,
        "per_seed": [float(value) for value in apart.mean(axis=1)],
    }
