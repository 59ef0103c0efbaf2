"""The evaluate stage: every recommender ranks the whole catalogue of a type for every test query, shard by shard.

One Ray task surveys a shard (its queries, its item counts), then, model by model, one task a shard ranks. A task holds
one shard of interactions and ``batch_size`` rows of scores; the model lies in the object store once. What a task finds
is a file below ``_scratch``, so that a killed evaluation goes on where it was. Only counts, queries and hits reach the
driver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import ray
import scipy.sparse as sp
import torch

from recsys_ray.artifacts import load_arrays, save_arrays, write_json
from recsys_ray.config import Config
from recsys_ray.errors import ArtifactError, DataError, UserError
from recsys_ray.evaluation import baselines
from recsys_ray.evaluation.baselines import TowerScorer
from recsys_ray.evaluation.hits import DIFFERENCES, HITS, MAIN, against_all
from recsys_ray.evaluation.metrics import score_queries
from recsys_ray.evaluation.recommenders import Recommender, Stranger, batch_of, rank_queries, stranger_name
from recsys_ray.evaluation.segments import (
    SEGMENTS,
    Events,
    ItemFacts,
    Queries,
    find_queries,
    segment_queries,
    segment_truths,
)
from recsys_ray.evaluation.shards import (
    Setting,
    Survey,
    merge_survey,
    part_of,
    prepare,
    read_events,
    read_users,
    survey_shard,
)
from recsys_ray.evaluation.summary import ORACLE, summarise
from recsys_ray.progress import Progress

_NEIGHBOURS = 200  # item-kNN: kept per item and type of the neighbour
_ROWS_PER_BLOCK = 50_000  # item-kNN: items whose pairs are merged by one task
_TUNING_USERS = 5_000  # iALS: users of the validation period that choose its setting


def evaluate(
    config: Config,
    ingest_dir: Path,
    featurize_dir: Path,
    hgnn_dir: Path | None,
    towers: Mapping[str, TowerScorer],
    out: Path,
    progress: Progress,
    cpus: int,
    run_dir: Path | None = None,
) -> dict[str, Any]:
    """Compare all recommenders on the test period; write ``metrics.json`` and ``report.html`` into ``out``.

    Args:
        towers: two-tower models by the name that they get in the table, in the table's order.
        out: a work folder on storage that every node sees. Finished parts in its ``_scratch`` are used again.
        cpus: tasks at once; one thread each.
        run_dir: where the report finds the other stages' facts; default: beside ``ingest_dir``.

    Returns:
        Counts for the manifest.

    Raises:
        ArtifactError: an input is missing or damaged.
        DataError: the oracle names items that are not in the catalogue.
        UserError: iALS is asked for and not installed.
    """
    from recsys_ray.evaluation.report import write_report  # tasks import this module and draw nothing

    setting = prepare(config, Path(ingest_dir).resolve(), Path(out).resolve())
    shards = sorted((setting.ingest / "interactions").glob("shard-*.parquet"))
    shared = ray.put(setting)
    with progress.task("survey", total=len(shards), unit="shards") as task:
        for _ in _in_parallel([(survey_shard, shared, shard) for shard in shards], cpus):
            task.advance()
    survey = merge_survey(setting, shards, config.evaluate.max_users)
    models = _models(config, setting, shards, survey, Path(featurize_dir), hgnn_dir, towers, cpus)
    with progress.task("ranking", total=len(models) * len(shards), unit="shards") as task:
        for name, build in models.items():
            waiting = [shard for shard in shards if not part_of(setting, name, shard).exists()]
            task.advance(len(shards) - len(waiting), detail=name)
            if not waiting:
                continue
            model, facts = ray.put(build()), ray.put(survey.facts)
            jobs = [(_rank_shard, shared, facts, model, name, shard, survey.users[shard]) for shard in waiting]
            for _ in _in_parallel(jobs, cpus):
                task.advance(detail=name)
    oracle = _read_oracle(Path(config.data.oracle), setting) if config.data.oracle else None
    rows, hits = summarise(setting, shards, survey, list(models), config.evaluate.bootstrap, oracle)
    write_json(Path(out) / "metrics.json", rows)
    hits.save(Path(out) / HITS)
    differences = against_all([hits], MAIN, config.evaluate.bootstrap, setting.seed)
    write_json(Path(out) / DIFFERENCES, differences)
    write_report(Path(out) / "report.html", rows, config, run_dir or setting.ingest.parent)
    if not rows:
        progress.say(
            "    nothing to evaluate: no user has a positive event on an item that was new to the user in the test "
            "period; metrics.json is empty (split.test_from, split.test_days)"
        )
    return {
        "models": list(models),
        "queries": len(survey.queries),
        "users": len(np.unique(survey.queries.uid)),
        "hr_at_10": {r["model"]: r["hr_at_10"] for r in rows if (r["item_type"], r["segment"]) == ("all", "warm")},
    }


# --- tasks ------------------------------------------------------------------------------------------------------------


def _in_parallel(jobs: list[tuple[Any, ...]], cpus: int) -> Iterator[Any]:
    """Run ``(function, *arguments)`` as Ray tasks, ``cpus`` at a time; yields results as they come."""
    waiting, running = list(reversed(jobs)), list[Any]()
    while waiting or running:
        while waiting and len(running) < max(cpus, 1):
            function, *arguments = waiting.pop()
            running.append(ray.remote(num_cpus=1)(function).remote(*arguments))
        done, running = ray.wait(running)
        yield _result(done[0])


def _result(ref: Any) -> Any:
    """What a task returned. An error that the user can act on is raised as it was, without Ray's traceback text."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


def _rank_shard(
    setting: Setting, facts: ItemFacts, model: Recommender, name: str, shard: Path, uids: np.ndarray
) -> None:
    """Rank for the queries of ``uids`` and write where the truths stand."""
    torch.set_num_threads(1)
    queries = Queries.from_arrays(load_arrays(part_of(setting, "survey", shard))).keep_users(uids)
    events = read_events(shard)
    history = events.select((events.timestamp < setting.test_from) & np.isin(events.uid, uids))
    member = segment_queries(queries, segment_truths(queries, facts))
    users = read_users(setting.ingest / "users.parquet", np.unique(queries.uid))
    found = rank_queries(model, queries, member, history, users, setting.catalogue, setting.batch_size)
    arrays: dict[str, np.ndarray] = {
        "hit_query": found.hit_query.astype(np.int32),
        "hit_rank": found.hit_rank.astype(np.int16),
        "hit_truth": found.hit_truth.astype(np.int32),
        "covered": np.packbits(found.covered, axis=1),
    }
    save_arrays(part_of(setting, name, shard), arrays)


def _shard_pairs(setting: Setting, shard: Path, blocks: int) -> Any:
    events = read_events(shard)
    history = events.select(events.timestamp < setting.test_from)
    batch = batch_of(np.unique(history.uid), history)
    pairs = baselines.count_pairs(baselines.history_matrix(batch, setting.catalogue.items, setting.limit), blocks)
    return tuple(pairs) if blocks > 1 else pairs[0]


def _merge_pairs(setting: Setting, first_row: int, liked: np.ndarray, *parts: sp.csr_matrix) -> sp.csr_matrix:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    item_type = setting.catalogue.type_of(np.arange(setting.catalogue.items))
    return baselines.nearest_items(total, first_row, liked, item_type, _NEIGHBOURS)


# --- models -----------------------------------------------------------------------------------------------------------


def _models(
    config: Config,
    setting: Setting,
    shards: list[Path],
    survey: Survey,
    featurize: Path,
    hgnn: Path | None,
    towers: Mapping[str, TowerScorer],
    cpus: int,
) -> dict[str, Callable[[], Recommender]]:
    """How to build each recommender, in the order of the table. None is built before its turn."""
    history = config.two_tower.history  # the mean-vector baselines see as much of a user as the towers

    def text() -> Recommender:
        vectors = load_arrays(featurize / "text.safetensors")["vector"]
        return baselines.MeanVectors("llm_knn", vectors, survey.recent, history)

    def graph() -> Recommender:
        return baselines.MeanVectors("hgnn", _embeddings(Path(hgnn or ""), setting), survey.recent, history)

    models: dict[str, Callable[[], Recommender]] = {
        "popularity": lambda: baselines.Popularity(survey.recent),
        "item_knn": lambda: _build_item_knn(setting, shards, survey, cpus),
        "llm_knn": text,
    }
    if config.evaluate.ials:
        models["ials"] = lambda: next(_in_parallel([(_build_ials, setting, shards, survey.recent)], 1))
    if hgnn is not None:
        models["hgnn"] = graph
    for name, tower in towers.items():
        models[name] = partial(baselines.Tower, name, tower)
    for days, count in survey.windows.items():
        models[f"popularity_{days}"] = partial(baselines.Popularity, count, f"popularity_{days}")
    if config.evaluate.strangers:
        personal = {name: build for name, build in models.items() if not name.startswith("popularity")}
        models |= {stranger_name(name): partial(_as_stranger, build) for name, build in personal.items()}
    if config.data.oracle:
        models[ORACLE] = lambda: _read_oracle(Path(config.data.oracle or ""), setting)
    return models


def _as_stranger(build: Callable[[], Recommender]) -> Recommender:
    return Stranger(build())


def _embeddings(hgnn: Path, setting: Setting) -> np.ndarray:
    """float32 [items, d]: the embeddings of the test snapshot, from every partition's file."""
    parts = [load_arrays(path) for path in sorted((hgnn / "embeddings" / "test").glob("part-*.safetensors"))]
    found = sum(len(part["gid"]) for part in parts)
    if found != setting.catalogue.items:
        raise ArtifactError(f"{hgnn} has embeddings of {found} items of {setting.catalogue.items}; run hgnn again")
    vectors = np.empty((found, parts[0]["embedding"].shape[1]), dtype=np.float32)
    for part in parts:
        vectors[part["gid"]] = part["embedding"]
    return vectors


def _build_item_knn(setting: Setting, shards: list[Path], survey: Survey, cpus: int) -> Recommender:
    """Count pairs shard by shard, merge them range by range of items."""
    items = setting.catalogue.items
    blocks = -(-items // _ROWS_PER_BLOCK)
    count = ray.remote(num_cpus=1, num_returns=blocks)(_shard_pairs)
    shared, counted = ray.put(setting), list[Any]()
    for shard in shards:
        if len(counted) >= cpus:  # no more at once than there are CPUs
            ray.wait([counted[-cpus][0]])
        refs = count.remote(shared, shard, blocks)
        counted.append(refs if blocks > 1 else [refs])
    edges = baselines.block_edges(items, blocks)
    liked = ray.put(survey.liked)
    merge = ray.remote(num_cpus=1)(_merge_pairs)
    merged = [merge.remote(shared, int(edges[k]), liked, *(refs[k] for refs in counted)) for k in range(blocks)]
    similar = sp.vstack([_result(ref) for ref in merged], format="csr")
    similar.sort_indices()
    return baselines.ItemKnn(similar.indptr, similar.indices, similar.data, survey.recent, setting.limit)


def _read_oracle(path: Path, setting: Setting) -> baselines.ReadyLists:
    """The demo world's best rankings (columns user_id, item_type, item_ids) in uids and gids."""
    try:
        table = ds.dataset(path).to_table(columns=["user_id", "item_type", "item_ids"])
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"data.oracle: {path} cannot be read as user_id, item_type, item_ids: {error}") from error
    users = pq.read_table(setting.ingest / "users.parquet", columns=["user_id"])["user_id"]
    items = pq.read_table(setting.ingest / "items.parquet", columns=["item_id"])["item_id"]
    uid = pc.fill_null(pc.index_in(table["user_id"], value_set=users), -1).to_numpy()
    types = pc.fill_null(pc.index_in(table["item_type"], value_set=pa.array(setting.catalogue.types)), -1).to_numpy()
    known = (uid >= 0) & (types >= 0)  # of others, ingest kept no event: there is no query to answer
    key = np.where(known, uid.astype(np.int64) * len(setting.catalogue.types) + types, -1)
    order = np.argsort(key, kind="stable")[np.count_nonzero(~known) :]
    lists = table["item_ids"].combine_chunks().take(order)
    gid = pc.fill_null(pc.index_in(lists.flatten(), value_set=items), -1).to_numpy().astype(np.int64)
    if (gid < 0).any():
        raise DataError(f"data.oracle: {path} names items that are not in the catalogue; generate the data again")
    length = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    offsets = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
    return baselines.ReadyLists(ORACLE, key[order], offsets, gid, len(setting.catalogue.types))


def _build_ials(setting: Setting, shards: list[Path], popularity: np.ndarray) -> Recommender:
    """Choose factors, regularisation and alpha by HR@10 on the validation period, then fit on all before the test."""
    torch.set_num_threads(1)
    parts = [read_events(shard) for shard in shards]
    events = Events(*(np.concatenate([getattr(p, name) for p in parts]) for name in Events.__dataclass_fields__))
    items = setting.catalogue.items
    queries = find_queries(events, setting.catalogue, setting.positive, setting.valid_from, setting.test_from)
    asked = np.unique(queries.uid[queries.warm])
    chosen = np.random.default_rng(setting.seed).permutation(asked)[:_TUNING_USERS]
    queries = queries.keep_users(chosen)
    member = np.zeros((len(queries), len(SEGMENTS)), dtype=bool)
    truths = np.bincount(queries.truth_query, minlength=len(queries))

    def matrix(until: int) -> tuple[Events, sp.csr_matrix]:
        history = events.select(events.timestamp < until)
        batch = batch_of(np.unique(history.uid), history)
        return history, baselines.history_matrix(batch, items, setting.limit)

    known, train = matrix(setting.valid_from)
    tried: dict[tuple[int, float, float], float] = {}

    def trial(factors: int, regularization: float, alpha: float) -> float:
        setup = (factors, regularization, alpha)
        if setup not in tried:
            fitted = baselines.fit_ials(train, *setup, seed=setting.seed)
            model = baselines.Ials(fitted, regularization, alpha, popularity, setting.limit)
            found = rank_queries(model, queries, member, known, None, setting.catalogue, setting.batch_size)
            hits = score_queries(truths, found.hit_query, found.hit_rank).hit
            tried[setup] = float(hits.mean()) if len(hits) else 0.0
        return tried[setup]

    # Regularisation and alpha at few factors, then the number of factors: a fraction of the full grid's fits.
    _, regularization, alpha = max(
        ((64, r, a) for r in (0.01, 1.0, 10.0) for a in (1.0, 5.0, 20.0)), key=lambda s: trial(*s)
    )
    factors = max((64, 128, 256), key=lambda f: trial(f, regularization, alpha))
    _, everything = matrix(setting.test_from)
    fitted = baselines.fit_ials(everything, factors, regularization, alpha, seed=setting.seed)
    return baselines.Ials(fitted, regularization, alpha, popularity, setting.limit)
