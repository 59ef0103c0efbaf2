"""What runs shard by shard, in Ray tasks: the survey, and every model's ranking.

A task holds one shard of interactions and ``batch_size`` rows of scores; the model is in the object store once. A task
writes its result to a file, so that an interrupted evaluation continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import ray
import torch

from recsys_ray.cluster.pool import in_parallel
from recsys_ray.core.progress import Progress
from recsys_ray.data.tables import Events
from recsys_ray.evaluation.given import ORACLE
from recsys_ray.evaluation.queries import Setting, Survey, known_before, merge_survey, part_of, survey_shard
from recsys_ray.evaluation.ranking import Recommender, Stranger, rank_queries, stranger_name
from recsys_ray.evaluation.segments import ItemFacts, Queries, segment_queries, segment_truths
from recsys_ray.storage.artifacts import load_arrays, save_arrays


def survey_shards(setting: Setting, max_users: int | None, progress: Progress, cpus: int) -> Survey:
    shards, shared = setting.ingest.shards, ray.put(setting)
    with progress.task("queries", total=len(shards), unit="shards") as task:
        for _ in in_parallel([(survey_shard, shared, shard) for shard in shards], cpus):
            task.advance()
    return merge_survey(setting, max_users)


def rank_shards(
    setting: Setting,
    survey: Survey,
    models: Mapping[str, Callable[[], Recommender]],
    strangers: bool,
    progress: Progress,
    cpus: int,
) -> list[str]:
    """Rank with every model and, with ``strangers``, also by another user's history.

    Returns:
        The names of the ranked models, in the order of the table.
    """
    shards, shared, facts = setting.ingest.shards, ray.put(setting), ray.put(survey.facts)
    personal = [name for name in models if strangers and not name.startswith("popularity") and name != ORACLE]
    names = [name for name in models if name != ORACLE] + [stranger_name(name) for name in personal]
    names += [ORACLE] if ORACLE in models else []
    with progress.task("ranking", total=len(names) * len(shards), unit="shards") as task:
        for name, build in models.items():
            model: Recommender | None = None
            for turn in (name, stranger_name(name)) if name in personal else (name,):
                waiting = [shard for shard in shards if not part_of(setting, turn, shard).exists()]
                task.advance(len(shards) - len(waiting), detail=turn)
                if not waiting:
                    continue
                model = model or build()
                asked = ray.put(model if turn == name else Stranger(model))
                jobs = [(_rank_shard, shared, facts, asked, turn, shard, survey.users[shard]) for shard in waiting]
                for _ in in_parallel(jobs, cpus):
                    task.advance(detail=turn)
    return names


def _rank_shard(
    setting: Setting, facts: ItemFacts, model: Recommender, name: str, shard: Path, uids: np.ndarray
) -> None:
    """Rank for the queries of ``uids`` and write where the truths stand."""
    torch.set_num_threads(1)
    queries = Queries.from_arrays(load_arrays(part_of(setting, "survey", shard))).keep_users(uids)
    history = known_before(Events.read(shard), setting.test_from, uids)
    member = segment_queries(queries, segment_truths(queries, facts))
    users = setting.ingest.users(np.unique(queries.uid))
    found = rank_queries(model, queries, member, history, users, setting.catalogue, setting.batch_size)
    arrays: dict[str, np.ndarray] = {
        "hit_query": found.hit_query.astype(np.int32),
        "hit_rank": found.hit_rank.astype(np.int16),
        "hit_truth": found.hit_truth.astype(np.int32),
        "covered": np.packbits(found.covered, axis=1),
        "heads": found.heads,
    }
    save_arrays(part_of(setting, name, shard), arrays)
