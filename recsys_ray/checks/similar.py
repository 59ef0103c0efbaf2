"""Do similar items get common users later? Looks up item pairs first shared in the test period among each other's
nearest neighbours as of before it. No Ray in here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch

from recsys_ray.data.tables import Catalogue, Events
from recsys_ray.evaluation.metrics import bootstrap_interval
from recsys_ray.evaluation.ranking import as_tensor
from recsys_ray.graph.pairs import Window, edge_hash, key_bits, latest_items, pair_keys

CUTOFFS = (10, 100)
_CELLS = 1 << 25  # scores held at once: 128 MB
_PAIRS_AT_ONCE = 2_000


@dataclass(frozen=True)
class Period:
    """The test period, and what makes two items belong together. Moments are unix seconds."""

    valid_from: int
    test_from: int
    end: int
    codes: Sequence[int]  # events that make edges
    max_history: int  # latest items of a user that make pairs
    seed: int


def shared_pairs(shard: Path, period: Period, catalogue: Catalogue, limit: int) -> np.ndarray:
    """Pairs (a < b) of one item type that a user of the shard has events with in the test period, int64 [2, pairs].

    Of more than ``limit``, those with the smallest hashes: a uniform sample, which shards can merge.
    """
    events, items = Events.read(shard).of(period.codes), catalogue.items
    window = Window(period.test_from, period.end)
    latest = latest_items(events.uid, events.gid, events.timestamp, window, period.max_history, items)
    found = np.empty((2, 0), np.int64)
    for keys in pair_keys(*latest, window, items):
        pair = np.stack(np.divmod(np.unique(keys >> sum(key_bits(items))), items))
        found = merge_pairs([found, pair[:, catalogue.type_of(pair[0]) == catalogue.type_of(pair[1])]], limit, period)
    return found


def merge_pairs(parts: Sequence[np.ndarray], limit: int, period: Period) -> np.ndarray:
    """The ``limit`` distinct pairs with the smallest hashes, int64 [2, pairs]."""
    pairs = np.unique(np.concatenate(parts, axis=1), axis=1)
    order = np.argsort(edge_hash(pairs[0], pairs[1], period.seed), kind="stable")
    return pairs[:, order[:limit]]


def survey_past(shard: Path, period: Period, pairs: np.ndarray, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether a user of the shard had both items of a pair before the test period, bool [pairs]; and which items had
    an event before the validation period, bool [items]."""
    events = Events.read(shard)
    trained = np.bincount(events.before(period.valid_from).gid, minlength=items) > 0
    wanted, place = np.unique(pairs, return_inverse=True)
    a, b = place.reshape(pairs.shape)
    past = events.before(period.test_from).of(period.codes)
    past = past.select(np.isin(past.gid, wanted))
    users, row = np.unique(past.uid, return_inverse=True)
    column = np.searchsorted(wanted, past.gid)
    shape = (max(len(users), 1), max(len(wanted), 1))
    touched = sp.csc_array((np.ones(len(row), np.float32), (row, column)), shape=shape)
    known = np.zeros(pairs.shape[1], bool)
    for start in range(0, len(known), _PAIRS_AT_ONCE):
        chosen = slice(start, start + _PAIRS_AT_ONCE)
        known[chosen] = np.asarray(touched[:, a[chosen]].multiply(touched[:, b[chosen]]).sum(axis=0)).ravel() > 0
    return known, trained


def ranks(vectors: np.ndarray, query: np.ndarray, answer: np.ndarray, catalogue: Catalogue) -> np.ndarray:
    """Rank (from 0) of each answer among the items of its type by cosine with the query item, which is left out.

    Of equals half count as ahead: look-alikes do not all rank first. float64 [pairs].
    """
    found = np.empty(len(query))
    for kind in range(len(catalogue.types)):
        first, last = catalogue.range_of(kind)
        mine = np.flatnonzero((query >= first) & (query < last))
        if not len(mine):
            continue
        mine = mine[np.argsort(query[mine], kind="stable")]
        table = torch.nn.functional.normalize(as_tensor(vectors[first:last]).float(), dim=1)
        for rows in np.array_split(mine, -(-len(mine) * (last - first) // _CELLS)):
            asked = torch.from_numpy(query[rows] - first)
            scores = table[asked] @ table.T
            scores[torch.arange(len(rows)), asked] = -torch.inf
            own = scores.gather(1, torch.from_numpy(answer[rows] - first)[:, None])
            found[rows] = ((scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2).numpy()
    return found


def score_pairs(
    rank: np.ndarray, query: np.ndarray, answer: np.ndarray, trained: np.ndarray, catalogue: Catalogue,
    resamples: int, seed: int,
) -> list[dict[str, float | int | str]]:  # fmt: skip
    """Recall by item type and segment, with 95 % intervals over query items; empty groups are left out.

    ``unseen``: one of the two had no event before the validation period. ``chance_at_*``: of any order.
    """
    kinds = catalogue.type_of(query)
    sizes = np.diff(catalogue.bounds)[kinds]
    unseen = ~trained[query] | ~trained[answer]
    rows: list[dict[str, float | int | str]] = []
    for name, of_type in [
        ("all", np.ones(len(query), bool)),
        *((t, kinds == k) for k, t in enumerate(catalogue.types)),
    ]:
        for segment, members in (("all", of_type), ("unseen", of_type & unseen)):
            if not members.any():
                continue
            row: dict[str, float | int | str] = {"item_type": name, "segment": segment, "pairs": int(members.sum())}
            for k in CUTOFFS:
                hit = rank[members] < k
                low, high = bootstrap_interval(hit, query[members], resamples, seed)
                row |= {f"recall_at_{k}": float(hit.mean()), f"recall_at_{k}_low": low, f"recall_at_{k}_high": high}
                row[f"chance_at_{k}"] = float(np.minimum(k / np.maximum(sizes[members] - 1, 1), 1).mean())
            rows.append(row)
    return rows
