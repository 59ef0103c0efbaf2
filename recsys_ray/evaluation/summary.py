"""Combines the tasks' files into the rows of metrics.json."""

from __future__ import annotations

import numpy as np

from recsys_ray.data.tables import Catalogue
from recsys_ray.evaluation.given import ORACLE, ReadyLists
from recsys_ray.evaluation.metrics import QueryScores, bootstrap_interval, mean_interval, score_queries
from recsys_ray.evaluation.queries import Setting, Survey, part_of
from recsys_ray.evaluation.ranking import Ranked
from recsys_ray.evaluation.results import EVERY_TYPE, Hits, Row
from recsys_ray.evaluation.segments import SEGMENTS, Queries, segment_truths
from recsys_ray.storage.artifacts import load_arrays


def summarise(
    setting: Setting, survey: Survey, models: list[str], resamples: int, oracle: ReadyLists | None
) -> tuple[list[Row], Hits]:
    """Rows of the table, one a model, item type and segment that has queries; and who hit which query.

    The oracle may rank for some users only. Its own rows are over these, and a model's ``share_of_oracle`` compares
    both on the same queries.
    """
    queries = survey.queries
    masks = segment_truths(queries, survey.facts)
    truths = {name: np.bincount(queries.truth_query[mask], minlength=len(queries)) for name, mask in masks.items()}
    listed = oracle.lists(queries.uid, queries.item_type) if oracle is not None else None
    best = _read(setting, survey, ORACLE) if oracle is not None else None
    hits = Hits.of(queries, setting.catalogue.types, np.stack([truths[name] > 0 for name in SEGMENTS]))
    if listed is not None:
        hits.asked[ORACLE] = listed
    rows: list[Row] = []
    for name in models:  # one model's coverage in memory at a time
        found = _read(setting, survey, name)
        hits.hit[name] = np.zeros((len(SEGMENTS), len(queries)), dtype=bool)
        for column, segment in enumerate(SEGMENTS):
            scores = _score(truths[segment], masks[segment], found)
            hits.hit[name][column] = scores.hit
            asked = truths[segment] > 0
            if name == ORACLE and listed is not None:
                asked &= listed
            oracle_hit = _score(truths[segment], masks[segment], best).hit if best is not None else None
            for item_type in (EVERY_TYPE, *setting.catalogue.types):
                chosen = _of_type(queries, setting.catalogue, item_type) & asked
                if not chosen.any():
                    continue
                row: Row = {"model": name, "item_type": item_type, "segment": segment}
                row |= _figures(scores.select(chosen), queries.uid[chosen], resamples, setting.seed)
                row["coverage_at_100"] = _coverage(found.covered[column], setting.catalogue, item_type)
                if oracle_hit is not None and listed is not None:
                    row["share_of_oracle"] = _share(scores.hit, oracle_hit, chosen & listed)
                rows.append(row)
    return rows, hits


def _read(setting: Setting, survey: Survey, name: str) -> Ranked:
    """A model's results of all shards, queries and truths numbered as in the merged survey."""
    query, rank, truth = [], [], []
    covered = np.zeros((len(SEGMENTS), setting.catalogue.items), dtype=bool)
    for shard in survey.users:
        part = load_arrays(part_of(setting, name, shard))
        query.append(part["hit_query"].astype(np.int64) + survey.query_offset[shard])
        truth.append(part["hit_truth"].astype(np.int64) + survey.truth_offset[shard])
        rank.append(part["hit_rank"].astype(np.int64))
        covered |= np.unpackbits(part["covered"], axis=1, count=setting.catalogue.items).astype(bool)
    return Ranked(np.concatenate(query), np.concatenate(rank), np.concatenate(truth), covered)


def _score(truths: np.ndarray, mask: np.ndarray, found: Ranked) -> QueryScores:
    counts = mask[found.hit_truth]
    return score_queries(truths, found.hit_query[counts], found.hit_rank[counts])


def _of_type(queries: Queries, catalogue: Catalogue, item_type: str) -> np.ndarray:
    if item_type == EVERY_TYPE:
        return np.ones(len(queries), dtype=bool)
    return queries.item_type == catalogue.types.index(item_type)


def _figures(scores: QueryScores, users: np.ndarray, resamples: int, seed: int) -> Row:
    """Means over queries; intervals are over users."""
    low, high = bootstrap_interval(scores.hit, users, resamples, seed)
    ndcg_low, ndcg_high = mean_interval(scores.ndcg, users)
    found = scores.reciprocal_rank[scores.reciprocal_rank > 0]
    return {
        "users": len(np.unique(users)),
        "queries": len(users),
        "hr_at_10": float(scores.hit.mean()),
        "hr_at_10_low": low,
        "hr_at_10_high": high,
        "ndcg_at_10": float(scores.ndcg.mean()),
        "ndcg_at_10_low": ndcg_low,
        "ndcg_at_10_high": ndcg_high,
        "mrr_at_100": float(scores.reciprocal_rank.mean()),
        "mrr_at_100_hits": float(found.mean()) if len(found) else 0.0,
    }


def _coverage(covered: np.ndarray, catalogue: Catalogue, item_type: str) -> float:
    """Share of the items that may be recommended which were, to anyone of the segment."""
    every = item_type == EVERY_TYPE
    first, last = (0, catalogue.items) if every else catalogue.range_of(catalogue.types.index(item_type))
    available = catalogue.available[first:last]
    return float((covered[first:last] & available).sum() / max(available.sum(), 1))


def _share(hit: np.ndarray, best: np.ndarray, queries: np.ndarray) -> float | None:
    """HR@10 as a share of the oracle's on the same queries; None where the oracle has no hit."""
    reached = best[queries].sum()
    return float(hit[queries].sum() / reached) if reached else None
