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

from recsys_ray.baselines import Baseline, chosen_baselines
from recsys_ray.baselines.fitting import PATIENCE, Job, fit_for_test, prepare_validation
from recsys_ray.baselines.popularity import Popularity
from recsys_ray.baselines.tuning import Tuned, tune, untuned
from recsys_ray.cluster.pool import alone, cpus_of_one_host, in_parallel
from recsys_ray.config import Config
from recsys_ray.core.progress import Progress
from recsys_ray.data.files import find_paths
from recsys_ray.data.tables import Events
from recsys_ray.evaluation.given import ORACLE, ReadyLists, Tower, TowerModel, read_oracle
from recsys_ray.evaluation.queries import (
    LAYOUT,
    Setting,
    Survey,
    known_before,
    merge_survey,
    part_of,
    prepare,
    survey_shard,
)
from recsys_ray.evaluation.ranking import Recommender, Stranger, rank_queries, stranger_name
from recsys_ray.evaluation.results import DIFFERENCES, HITS, MAIN, against_all
from recsys_ray.evaluation.segments import ItemFacts, Queries, segment_queries, segment_truths
from recsys_ray.evaluation.summary import summarise
from recsys_ray.report.examples import write_gallery
from recsys_ray.report.item_map import MAP, draw_map, item_spaces, sample_items
from recsys_ray.storage.artifacts import fingerprint, load_arrays, save_arrays, write_json

REPORT = "report.html"


def evaluate(
    config: Config,
    ingest_dir: Path,
    featurize_dir: Path,
    hgnn_dir: Path | None,
    towers: Mapping[str, Callable[[], TowerModel]],
    out: Path,
    progress: Progress,
    cpus: int,
    run_dir: Path | None = None,
    cache: Path | None = None,
    spent: Callable[[], tuple[float, float]] | None = None,
) -> dict[str, Any]:
    """Compare all recommenders on the test period; write into ``out`` the figures (``metrics.json``), who hit what
    (``hits.safetensors``, ``differences.json``), ``tuning.json``, ``report.html`` and what the page shows beside them
    (``examples.json``, ``popularity.json``, ``map.json``).

    Args:
        towers: how to open two-tower models, by the name that they get in the table, in the table's order.
        out: a work folder on storage that every node sees. Finished parts in its ``_scratch`` are used again.
        cpus: tasks at once, one thread each; and threads of a baseline's fit.
        run_dir: where the report finds the other stages' facts; default: the folder that ``ingest_dir`` is in.
        cache: where trials and rankings of baselines are kept for later evaluations; default: ``run_dir``'s.
        spent: tells the seconds and the peak memory in MB of this stage so far, for the report.

    Returns:
        Counts for the manifest.

    Raises:
        ArtifactError: an input is missing or damaged.
        DataError: the oracle names items that are not in the catalogue.
        UserError: a baseline is asked for whose package is not installed.
    """
    from recsys_ray.report.write import write_report  # tasks import this module and draw nothing

    baselines = [baseline for baseline in chosen_baselines(config) if hgnn_dir or "hgnn" not in baseline.inputs]
    out = Path(out).resolve()
    setting = prepare(config, Path(ingest_dir).resolve(), out)
    run_dir = Path(run_dir or setting.ingest.folder.parent).resolve()
    kept = Path(cache or run_dir / "cache").resolve() / "evaluation"
    shards = setting.ingest.shards
    survey = _survey(setting, shards, config.evaluate.max_users, progress, cpus)
    job = Job(config, setting, shards, Path(featurize_dir).resolve(), Path(hgnn_dir).resolve() if hgnn_dir else None)
    threads = cpus_of_one_host(cpus)
    tuned, places = _tune(job, baselines, kept, progress, threads)
    setting = replace(setting, places=places)
    models = _models(job, baselines, tuned, towers, survey, threads)
    names = _rank(setting, shards, survey, models, config.evaluate.strangers, progress, cpus)
    oracle = _oracle(job)() if config.data.oracle else None
    rows, hits = summarise(setting, shards, survey, names, config.evaluate.bootstrap, oracle)
    write_json(out / "metrics.json", rows)
    hits.save(out / HITS)
    write_json(out / DIFFERENCES, against_all([hits], MAIN, config.evaluate.bootstrap, setting.seed))
    write_json(out / "tuning.json", {name: found.as_record() for name, found in tuned.items()})
    write_gallery(setting, shards, survey, rows, config.evaluate.examples, out)
    gids = sample_items(setting.catalogue, config.evaluate.map_items, setting.data_seed)
    with progress.task("map of the items", total=1) as task:
        drawn = {name: build().item_vectors for name, build in list(towers.items())[-1:]}
        spaces = item_spaces(gids, setting.catalogue.items, job.featurize, job.hgnn, drawn)
        alone(draw_map, setting, survey.facts, gids, spaces, out / MAP, cpus=1)
        task.advance()
    write_report(out / REPORT, rows, config, run_dir, out, spent)
    if not rows:
        progress.say(
            "    nothing to evaluate: no user has a positive event on an item that was new to the user in the test "
            "period; metrics.json is empty (split.test_from, split.test_days)"
        )
    return {
        "models": names,
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


# --- baselines --------------------------------------------------------------------------------------------------------


def _tune(
    job: Job, baselines: list[Baseline], kept: Path, progress: Progress, threads: int
) -> tuple[dict[str, Tuned], dict[str, Path]]:
    """Each baseline's parameters, and the folder for its rankings."""
    tuned, places = dict[str, Tuned](), dict[str, Path]()
    asked = alone(prepare_validation, job, cpus=1)
    for baseline in baselines:
        folder = _baseline_folder(job, baseline, kept)
        found = tune(job, baseline, folder, progress, threads) if asked else untuned(job, baseline)
        tuned[baseline.name] = found
        places[baseline.name] = folder / f"test-{fingerprint('test', [LAYOUT, found.params], {})[:16]}"
        if found.capped:
            progress.say(f"    {baseline.name}: {found.note}")
    return tuned, places


def _tuning_counts(tuned: Tuned) -> dict[str, Any]:
    return {
        "trials": len(tuned.trials),
        "capped": tuned.capped,
        "seconds": round(sum(trial["seconds"] for trial in tuned.trials), 1),
        "valid_hr_at_10": tuned.best["hr_at_10"] if tuned.best else None,
        "params": tuned.params,
    }


def _baseline_folder(job: Job, baseline: Baseline, kept: Path) -> Path:
    """Where trials and rankings of a baseline are kept. They do not depend on the method's own models, so another
    evaluation of the run or of its variants uses them again; the name has a hash of all that they do depend on."""
    inputs = {"ingest": job.setting.ingest.folder, "featurize": job.featurize, "hgnn": job.hgnn}
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
        "seed": config.seed if baseline.seeded else None,
        "data_seed": config.data_seed,
        **({"patience": PATIENCE} if baseline.max_epochs else {}),
    }
    key = fingerprint(baseline.name, decisive, prints)[:16]
    return kept / f"{baseline.name}-{key}"


# --- models and tasks -------------------------------------------------------------------------------------------------


def _models(
    job: Job,
    baselines: list[Baseline],
    tuned: Mapping[str, Tuned],
    towers: Mapping[str, Callable[[], TowerModel]],
    survey: Survey,
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
        models[name] = partial(_tower, name, tower, survey.popular)
    for days, count in survey.windows.items():
        models[f"popularity_{days}"] = partial(Popularity, count, f"popularity_{days}")
    if job.config.data.oracle:
        models[ORACLE] = _oracle(job)
    return models


def _tower(name: str, open_towers: Callable[[], TowerModel], popular: np.ndarray) -> Tower:
    return Tower(name, open_towers(), popular)


def _oracle(job: Job) -> Callable[[], ReadyLists]:
    types = job.setting.catalogue.types
    (path,) = find_paths("oracle", job.config.data.oracle or "")
    return partial(read_oracle, path, job.setting.ingest, types)


def _rank(
    setting: Setting,
    shards: list[Path],
    survey: Survey,
    models: Mapping[str, Callable[[], Recommender]],
    strangers: bool,
    progress: Progress,
    cpus: int,
) -> list[str]:
    """Rank with every model, and with ``strangers`` also with what it makes of another user's history.

    Returns:
        The names of the ranked models, in the order of the table.
    """
    shared, facts = ray.put(setting), ray.put(survey.facts)
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
