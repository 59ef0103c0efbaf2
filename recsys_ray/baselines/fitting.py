"""Fits a baseline and scores a point of its search space on the validation period. This is what runs inside a task.

A baseline is fitted in one process to at most ``evaluate.fit_users`` users (a seeded sample if there are more), which
bounds its memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recsys_ray.baselines import BASELINES
from recsys_ray.baselines.interface import KnownData, Params
from recsys_ray.config import Config
from recsys_ray.data.tables import Events
from recsys_ray.evaluation.metrics import score_queries
from recsys_ray.evaluation.queries import Setting, known_before
from recsys_ray.evaluation.ranking import Recommender, rank_queries
from recsys_ray.evaluation.segments import SEGMENTS, Queries, find_queries
from recsys_ray.storage.artifacts import load_arrays, save_arrays

_TUNING_USERS = 5_000  # warm users of the validation period by whom parameters are chosen
PATIENCE = 5  # epochs without a better HR@10 before a trial stops: some models rank by popularity alone at first


@dataclass(frozen=True)
class Job:
    """What every fit of an evaluation needs to know."""

    config: Config
    setting: Setting
    featurize: Path
    hgnn: Path

    @property
    def validation(self) -> Path:
        return self.setting.scratch / "validation.safetensors"


def read_known(job: Job, moment: int, snapshot: str) -> KnownData:
    """All that happened before ``moment``, of the users that baselines are fitted to."""
    setting, limit = job.setting, job.config.evaluate.fit_users
    users = setting.ingest.num_users
    sample = None
    if users > limit:
        sample = np.sort(np.random.default_rng(setting.data_seed).choice(users, limit, replace=False))
    parts = []
    for events in map(Events.read, setting.ingest.shards):
        known = events.before(moment)
        parts.append(known if sample is None else known.select(np.isin(known.uid, sample)))
    whole = Events.join(parts)
    return KnownData(job.config, setting.catalogue, whole, moment, setting.positive, snapshot, job.featurize, job.hgnn)


def prepare_validation(job: Job) -> int:
    """Store the validation queries of a sample of warm users, and these users' earlier events.

    Returns:
        The number of queries.
    """
    if not job.validation.exists():
        setting, shards, asked = job.setting, job.setting.ingest.shards, []
        for events in map(Events.read, shards):
            found = find_queries(events, setting.catalogue, setting.positive, setting.valid_from, setting.test_from)
            asked.append(found.keep_users(found.uid[found.warm]))
        users = np.unique(np.concatenate([part.uid for part in asked]))
        chosen = np.random.default_rng(setting.data_seed).permutation(users)[:_TUNING_USERS]
        queries = Queries.join([part.keep_users(chosen) for part in asked])
        known = Events.join([known_before(events, setting.valid_from, chosen) for events in map(Events.read, shards)])
        history = {f"history_{name}": column for name, column in vars(known).items()}
        save_arrays(job.validation, {**queries.as_arrays(), **history})
    return len(load_arrays(job.validation)["uid"])


@dataclass
class Watcher:
    """Scores a model after each epoch; stops it when it gets no better, or is out of time."""

    score: Callable[[Recommender], float]
    deadline: float  # of time.monotonic
    curve: list[float] = field(default_factory=list)
    out_of_time: bool = False

    def __call__(self, epoch: int, model: Callable[[], Recommender]) -> bool:
        self.curve.append(self.score(model()))
        self.out_of_time = time.monotonic() > self.deadline
        return self.out_of_time or len(self.curve) - self.best_epoch >= PATIENCE

    @property
    def best_epoch(self) -> int:
        return int(np.argmax(self.curve)) + 1


def try_point(job: Job, name: str, params: Params, threads: int) -> dict[str, Any]:
    """Fit to what was known when the validation period began, and score it there.

    Returns:
        hr_at_10 (of a model that is trained by epochs: the best epoch's), seconds, capped; also epochs and curve.
    """
    started = time.monotonic()
    limit = job.config.evaluate.trial_seconds
    deadline = started + limit if limit else float("inf")
    torch.set_num_threads(threads)
    data = read_known(job, job.setting.valid_from, "valid")
    scorer = _validation_scorer(job)
    baseline = BASELINES[name]
    if baseline.max_epochs is None:
        model = baseline.fit(data, params, job.setting.seed, threads)
        result: dict[str, Any] = {"hr_at_10": scorer(model), "capped": False}
    else:
        watcher = Watcher(scorer, deadline)
        baseline.fit(data, {**params, "epochs": baseline.max_epochs}, job.setting.seed, threads, watcher)
        result = {"hr_at_10": max(watcher.curve), "epochs": watcher.best_epoch, "curve": watcher.curve}
        result["capped"] = watcher.out_of_time
    return {**result, "seconds": round(time.monotonic() - started, 1)}


def _validation_scorer(job: Job) -> Callable[[Recommender], float]:
    arrays = load_arrays(job.validation)
    queries = Queries.from_arrays(arrays)
    history = Events(*(arrays[f"history_{name}"] for name in Events.__dataclass_fields__))
    member = np.zeros((len(queries), len(SEGMENTS)), dtype=bool)
    truths = np.bincount(queries.truth_query, minlength=len(queries))

    def score(model: Recommender) -> float:
        catalogue = job.setting.catalogue
        found = rank_queries(model, queries, member, history, None, catalogue, job.setting.batch_size)
        return float(score_queries(truths, found.hit_query, found.hit_rank).hit.mean())

    return score


def fit_for_test(job: Job, name: str, params: Params, threads: int) -> Recommender:
    """Fit again, to everything before the test period."""
    torch.set_num_threads(threads)
    data = read_known(job, job.setting.test_from, "test")
    return BASELINES[name].fit(data, params, job.setting.seed, threads)
