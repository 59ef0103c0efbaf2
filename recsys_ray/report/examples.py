"""Example lists for the report: users with their history and every model's list, and the share of the lists that goes
to popular items. Read from the ranking tasks' scratch files; nothing is ranked again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recsys_ray.data.tables import Events
from recsys_ray.evaluation.metrics import CUTOFF
from recsys_ray.evaluation.queries import Setting, Survey, known_before, part_of
from recsys_ray.evaluation.segments import TIERS, Queries
from recsys_ray.report.labels import Row, contest, ordered
from recsys_ray.storage.artifacts import load_arrays, write_json

EXAMPLES = "examples.json"
POPULARITY = "popularity.json"

# Who is shown, in turns: where the served model finds what the best baseline misses, where that finds what it misses,
# where both do, where neither does, and users about whom little is known.
_TURNS = ("ours", "rival", "both", "neither", "ours", "rival", "new_to_type", "cold")
_POOL = 24  # candidates of a kind whose histories are looked at
_TELLING = 3  # earlier events from which a history says something
_SHOWN_HISTORY = 12
_EVERY_TYPE = "all"


def write_gallery(setting: Setting, survey: Survey, rows: Sequence[Row], examples: int, out: Path) -> None:
    """Write ``examples.json`` (unless ``examples`` is 0) and ``popularity.json`` into ``out``.

    Memory: the hits of two models over all queries, and one shard's lists at a time.

    Args:
        rows: those of metrics.json; they name the models, and which two are compared.
        examples: how many users to show.
    """
    models = ordered(rows, "model")
    if not models:
        return
    served, rival = contest(rows)
    hit = {name: np.zeros(len(survey.queries), dtype=bool) for name in (served, rival) if name}
    counts: dict[str, np.ndarray] = {}
    for shard in survey.users:
        first = survey.query_offset[shard]
        for name in models:
            part = load_arrays(part_of(setting, name, shard))
            heads = part["heads"]
            query = np.repeat(np.arange(first, first + len(heads)), heads.shape[1])
            counts[name] = counts.get(name, 0) + _tier_counts(setting, survey, heads.ravel(), query)
            if name in hit:
                hit[name][first + part["hit_query"][part["hit_rank"] < CUTOFF].astype(np.int64)] = True
    write_json(out / POPULARITY, _popularity(setting, survey, counts))
    if examples and served and rival:
        write_json(out / EXAMPLES, _examples(setting, survey, models, served, rival, hit, examples))


# --- how much falls on popular items ----------------------------------------------------------------------------------


def _groups(queries: Queries) -> dict[str, np.ndarray]:
    """Segments of users, bool [queries]."""
    everyone = np.ones(len(queries), dtype=bool)
    return {"all": everyone, "warm": queries.warm, "new_to_type": queries.new_to_type, "cold": ~queries.warm}


def _tier_counts(setting: Setting, survey: Survey, items: np.ndarray, query: np.ndarray) -> np.ndarray:
    """int64 [groups, types, TIERS]: how many of the items are of each tier.

    Args:
        items: int [n], gids; -1 for none.
        query: int64 [n], the query that each item belongs to.
    """
    items, query = items[items >= 0], query[items >= 0]
    types = len(setting.catalogue.types)
    kind = survey.queries.item_type[query].astype(np.int64) * TIERS + survey.facts.tier[items]
    groups = _groups(survey.queries).values()
    counts = [np.bincount(kind[member[query]], minlength=types * TIERS) for member in groups]
    return np.stack(counts).reshape(len(counts), types, TIERS)


def _popularity(setting: Setting, survey: Survey, counts: dict[str, np.ndarray]) -> dict[str, Any]:
    queries, types = survey.queries, setting.catalogue.types
    sizes = {}
    for number, name in enumerate(types):
        first, last = setting.catalogue.range_of(number)
        sizes[name] = np.bincount(survey.facts.tier[first:last], minlength=TIERS).tolist()
    sizes[_EVERY_TYPE] = np.sum(list(sizes.values()), axis=0).tolist()
    return {
        "places": CUTOFF,
        "items_by_tier": sizes,
        "recommended": {name: _shares(setting, queries, count) for name, count in counts.items()},
        "chosen": _shares(setting, queries, _tier_counts(setting, survey, queries.truth_item, queries.truth_query)),
    }


def _shares(setting: Setting, queries: Queries, counts: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """segment -> item type -> share of each tier; absent where there is nothing to share."""
    found: dict[str, dict[str, list[float]]] = {}
    for group, of_types in zip(_groups(queries), counts, strict=True):
        by_type = dict(zip(setting.catalogue.types, of_types, strict=True)) | {_EVERY_TYPE: of_types.sum(axis=0)}
        found[group] = {
            name: [round(float(c / count.sum()), 6) for c in count] for name, count in by_type.items() if count.sum()
        }
    return found


# --- users and their lists --------------------------------------------------------------------------------------------


def _examples(
    setting: Setting,
    survey: Survey,
    models: Sequence[str],
    served: str,
    rival: str,
    hit: dict[str, np.ndarray],
    wanted: int,
) -> dict[str, Any]:
    queries = survey.queries
    ours, theirs, warm = hit[served], hit[rival], queries.warm
    compared = warm if warm.any() else np.ones(len(queries), dtype=bool)
    kinds = {
        "ours": compared & ours & ~theirs,
        "rival": compared & ~ours & theirs,
        "both": compared & ours & theirs,
        "neither": compared & ~ours & ~theirs,
        "new_to_type": queries.new_to_type,
        "cold": ~warm,
    }
    pools = {name: _pool(setting, number, mask) for number, (name, mask) in enumerate(kinds.items())}
    history = _histories(setting, survey, queries.uid[np.concatenate(list(pools.values()))])
    chosen = _choose(queries, pools, history, wanted)
    shown = [_example(setting, survey, models, kind, query, history) for kind, query in chosen]
    gids = {gid for example in shown for gid in _gids(example)}
    names = _user_ids(setting, queries.uid[[query for _, query in chosen]])
    for example in shown:
        example["user_id"] = names[example.pop("uid")]
    return {
        "served": served,
        "rival": rival,
        "segment": "warm" if warm.any() else "all",
        "lists": {name: int(kinds[name].sum()) for name in ("ours", "rival", "both", "neither")},
        "users": shown,
        "items": _items(setting, sorted(gids)),
    }


def _pool(setting: Setting, number: int, mask: np.ndarray) -> np.ndarray:
    """int64 [<= _POOL]: some queries of the mask, in random order."""
    return np.random.default_rng([setting.data_seed, number]).permutation(np.flatnonzero(mask))[:_POOL]


def _histories(setting: Setting, survey: Survey, uids: np.ndarray) -> dict[int, Events]:
    """uid -> events before the test period, in order of time. Only these users' rows stay."""
    found: dict[int, Events] = {}
    for shard, users in survey.users.items():
        wanted = np.intersect1d(users, uids)
        if not len(wanted):
            continue
        events = known_before(Events.read(shard), setting.test_from, wanted)
        for uid in wanted:  # sorted by (uid, timestamp)
            found[int(uid)] = events.select(slice(*np.searchsorted(events.uid, [uid, uid + 1])))
    return found


def _choose(
    queries: Queries, pools: dict[str, np.ndarray], history: dict[int, Events], wanted: int
) -> list[tuple[str, int]]:
    """(kind, query), each user once. Of a kind, those with a telling history first, and item types in turns."""
    chosen: list[tuple[str, int]] = []
    users: set[int] = set()
    shown = np.zeros(int(queries.item_type.max(initial=0)) + 1, dtype=np.int64)
    turn = 0
    while len(chosen) < wanted and any(len(pool) for pool in pools.values()):
        kind = _TURNS[turn % len(_TURNS)]
        turn += 1
        left = [int(query) for query in pools[kind] if int(queries.uid[query]) not in users]
        if not left:
            pools[kind] = np.zeros(0, dtype=np.int64)
            continue
        telling = [kind == "cold" or len(history[int(queries.uid[query])]) >= _TELLING for query in left]
        place = min(range(len(left)), key=lambda k: (not telling[k], shown[queries.item_type[left[k]]], k))
        chosen.append((kind, left[place]))
        users.add(int(queries.uid[left[place]]))
        shown[queries.item_type[left[place]]] += 1
    order = list(dict.fromkeys(_TURNS))
    return sorted(chosen, key=lambda pair: order.index(pair[0]))


def _example(
    setting: Setting, survey: Survey, models: Sequence[str], kind: str, query: int, history: dict[int, Events]
) -> dict[str, Any]:
    queries = survey.queries
    uid = int(queries.uid[query])
    past = history[uid]
    latest = past.select(slice(max(len(past) - _SHOWN_HISTORY, 0), None))
    shard = next(shard for shard, users in survey.users.items() if np.isin(uid, users))
    place = query - survey.query_offset[shard]
    lists = {name: load_arrays(part_of(setting, name, shard))["heads"][place] for name in models}
    return {
        "uid": uid,
        "kind": kind,
        "item_type": setting.catalogue.types[queries.item_type[query]],
        "events": len(past),
        "history": [
            {"gid": int(latest.gid[row]), "event": int(latest.event[row]), "timestamp": int(latest.timestamp[row])}
            for row in reversed(range(len(latest)))
        ],
        "truths": queries.truth_item[queries.truth_query == query].tolist(),
        "recommended": {name: head[head >= 0].tolist() for name, head in lists.items()},
    }


def _gids(example: dict[str, Any]) -> list[int]:
    lists = [gid for head in example["recommended"].values() for gid in head]
    return [*lists, *example["truths"], *(event["gid"] for event in example["history"])]


def _items(setting: Setting, gids: list[int]) -> dict[int, dict[str, Any]]:
    table = setting.ingest.items("item_id", "item_type", "title").take(gids)
    return dict(zip(gids, table.to_pylist(), strict=True))


def _user_ids(setting: Setting, uids: np.ndarray) -> dict[int, str]:
    known = np.unique(uids)
    return dict(zip(known.tolist(), setting.ingest.users(known)["user_id"].to_pylist(), strict=True))
