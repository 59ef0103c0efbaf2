"""The evaluate stage: every recommender ranks the whole catalogue of a type for every test query, shard by shard.

One Ray task surveys a shard (its queries, its item counts). Baselines are tuned on the validation period, trial by
trial. Then, model by model, one task a shard ranks. A task holds one shard of interactions and ``batch_size`` rows of
scores; the model lies in the object store once. What a task finds is a file, so that a killed evaluation goes on where
it was. Only counts, queries and hits reach the driver.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from recsys_ray.artifacts import fingerprint, load_arrays, save_arrays, write_json
from recsys_ray.config import Config
from recsys_ray.evaluation.baselines import Baseline, chosen_baselines
from recsys_ray.evaluation.baselines.towers import ORACLE, Tower, TowerScorer, read_oracle
from recsys_ray.evaluation.fitting import Job, fit_for_test, prepare_validation
from recsys_ray.evaluation.recommenders import Recommender, rank_queries
from recsys_ray.evaluation.segments import ItemFacts, Queries, segment_queries, segment_truths
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
from recsys_ray.evaluation.summary import summarise
from recsys_ray.evaluation.tasks import alone, cpus_of_one_host, in_parallel
from recsys_ray.evaluation.tuning import Tuned, tune, untuned
from recsys_ray.progress import Progress


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
    """Compare all recommenders on the test period; write ``metrics.json``, ``tuning.json`` and ``report.html``.

    Args:
        towers: two-tower models by the name that they get in the table, in the table's order.
        out: a work folder on storage that every node sees. Finished parts in its ``_scratch`` are used again.
        cpus: tasks at once, one thread each; and threads of a baseline's fit.
        run_dir: where the report finds the other stages' facts, and where what baselines need long for is kept
            (``cache/evaluation``); default: beside ``ingest_dir``.

    Returns:
        Counts for the manifest.

    Raises:
        ArtifactError: an input is missing or damaged.
        DataError: the oracle names items that are not in the catalogue.
        UserError: a baseline is asked for whose package is not installed.
    """
    from recsys_ray.evaluation.report import write_report  # tasks import this module and draw nothing

    baselines = [baseline for baseline in chosen_baselines(config) if hgnn_dir or "hgnn" not in baseline.inputs]
    setting = prepare(config, Path(ingest_dir).resolve(), Path(out).resolve())
    run_dir = Path(run_dir or setting.ingest.parent).resolve()
    shards = sorted((setting.ingest / "interactions").glob("shard-*.parquet"))
    survey = _survey(setting, shards, config.evaluate.max_users, progress, cpus)
    job = Job(config, setting, shards, Path(featurize_dir).resolve(), Path(hgnn_dir).resolve() if hgnn_dir else None)
    threads = cpus_of_one_host(cpus)
    folders = {baseline.name: _baseline_folder(job, baseline, run_dir) for baseline in baselines}
    tuned = _tune_all(job, baselines, folders, progress, threads)
    places = {
        name: folders[name] / f"test-{fingerprint('test', found.params, {})[:16]}" for name, found in tuned.items()
    }
    setting = replace(setting, places=places)
    models = _models(job, baselines, tuned, towers, threads)
    _rank_all(setting, shards, survey, models, progress, cpus)
    oracle = models[ORACLE]() if ORACLE in models else None
    rows = summarise(setting, shards, survey, list(models), config.evaluate.bootstrap, oracle)
    write_json(Path(out) / "metrics.json", rows)
    write_json(Path(out) / "tuning.json", {name: found.as_record() for name, found in tuned.items()})
    write_report(Path(out) / "report.html", rows, config, run_dir, {name: t.note for name, t in tuned.items()})
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
        "tuning": {name: _tuning_counts(found) for name, found in tuned.items()},
    }


def _survey(setting: Setting, shards: list[Path], max_users: int | None, progress: Progress, cpus: int) -> Survey:
    shared = ray.put(setting)
    with progress.task("survey", total=len(shards), unit="shards") as task:
        for _ in in_parallel([(survey_shard, shared, shard) for shard in shards], cpus):
            task.advance()
    return merge_survey(setting, shards, max_users)


def _tune_all(
    job: Job, baselines: list[Baseline], folders: Mapping[str, Path], progress: Progress, threads: int
) -> dict[str, Tuned]:
    """Choose every baseline's parameters, one baseline after the other."""
    tuned = {}
    asked = alone(prepare_validation, job, cpus=1)
    for baseline in baselines:
        folder = folders[baseline.name]
        found = tune(job, baseline, folder, progress, threads) if asked else untuned(job, baseline)
        if found.capped:
            progress.say(f"    {baseline.name}: {found.note}")
        tuned[baseline.name] = found
    return tuned


def _rank_all(
    setting: Setting,
    shards: list[Path],
    survey: Survey,
    models: Mapping[str, Callable[[], Recommender]],
    progress: Progress,
    cpus: int,
) -> None:
    """Leave a file for every model and shard; a model of which nothing is missing is not built."""
    shared = ray.put(setting)
    with progress.task("ranking", total=len(models) * len(shards), unit="shards") as task:
        for name, build in models.items():
            waiting = [shard for shard in shards if not part_of(setting, name, shard).exists()]
            task.advance(len(shards) - len(waiting), detail=name)
            if not waiting:
                continue
            model, facts = ray.put(build()), ray.put(survey.facts)
            jobs = [(_rank_shard, shared, facts, model, name, shard, survey.users[shard]) for shard in waiting]
            for _ in in_parallel(jobs, cpus):
                task.advance(detail=name)


def _tuning_counts(tuned: Tuned) -> dict[str, Any]:
    return {
        "trials": len(tuned.trials),
        "capped": tuned.capped,
        "seconds": round(sum(trial["seconds"] for trial in tuned.trials), 1),
        "valid_hr_at_10": tuned.best["hr_at_10"] if tuned.best else None,
        "params": tuned.params,
    }


def _baseline_folder(job: Job, baseline: Baseline, run_dir: Path) -> Path:
    """Where trials and rankings of a baseline are kept. They do not depend on the method's own models, so another
    evaluation of the run uses them again; the name has a hash of all that they do depend on."""
    inputs = {"ingest": job.setting.ingest, "featurize": job.featurize, "hgnn": job.hgnn}
    prints = {}
    for name in ("ingest", *baseline.inputs):
        try:
            manifest = json.loads((Path(inputs[name] or "") / "manifest.json").read_text(encoding="utf-8"))
            prints[name] = manifest["fingerprint"]
        except (OSError, KeyError, json.JSONDecodeError):  # not the output of a run: good for this evaluation only
            return job.setting.scratch / baseline.name
    config = job.config
    decisive = {
        "space": str(baseline.space(config)),
        "epochs": baseline.max_epochs,
        "evaluate": config.evaluate.model_dump(include={"max_users", "trial_seconds", "fit_users", "ease_items"}),
        "events": config.events.model_dump(),
        "window_days": config.graph.window_days,
        "max_history": config.graph.max_history,
        "seed": config.seed,
    }
    key = fingerprint(baseline.name, decisive, prints)[:16]
    return run_dir / "cache" / "evaluation" / f"{baseline.name}-{key}"


# --- models and tasks -------------------------------------------------------------------------------------------------


def _models(
    job: Job,
    baselines: list[Baseline],
    tuned: Mapping[str, Tuned],
    towers: Mapping[str, TowerScorer],
    threads: int,
) -> dict[str, Callable[[], Recommender]]:
    """How to build each recommender, in the order of the table. None is built before its turn."""
    models: dict[str, Callable[[], Recommender]] = {}
    for baseline in baselines:
        if tuned[baseline.name].failed:
            continue
        arguments = (fit_for_test, job, baseline.name, tuned[baseline.name].params, threads)
        models[baseline.name] = partial(alone, *arguments, cpus=threads)
    for name, tower in towers.items():
        models[name] = partial(Tower, name, tower)
    if job.config.data.oracle:
        types = job.setting.catalogue.types
        models[ORACLE] = partial(read_oracle, Path(job.config.data.oracle), job.setting.ingest, types)
    return models


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
