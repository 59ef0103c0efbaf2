"""Stage 7: every model ranks all items of a type for every test query.

One Ray task surveys a shard (its queries, its item counts). Baselines are tuned on the validation period, trial by
trial. Then, model by model, one task per shard ranks. Only counts, queries and hits reach the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from recsys_ray.baselines import chosen_baselines
from recsys_ray.baselines.fitting import Job, fit_for_test
from recsys_ray.baselines.popularity import Popularity
from recsys_ray.baselines.tuning import Tuned, tune_all
from recsys_ray.cluster.pool import alone, cpus_of_one_host
from recsys_ray.config import Config
from recsys_ray.data.files import find_paths
from recsys_ray.data.tables import Tables
from recsys_ray.evaluation.given import ORACLE, ReadyLists, Tower, TowerModel, read_oracle
from recsys_ray.evaluation.queries import Survey, prepare
from recsys_ray.evaluation.ranking import Recommender
from recsys_ray.evaluation.results import DIFFERENCES, HITS, MAIN, against_all
from recsys_ray.evaluation.shards import rank_shards, survey_shards
from recsys_ray.evaluation.summary import summarise
from recsys_ray.evaluation.towers import TrainedTowers
from recsys_ray.hgnn.outputs import load_embeddings
from recsys_ray.report.examples import write_gallery
from recsys_ray.report.item_map import MAP, draw_map, item_spaces, sample_items
from recsys_ray.report.write import write_report
from recsys_ray.scoring.scorer import TERMS, without
from recsys_ray.stages.runner import Context, Stage
from recsys_ray.storage.artifacts import load_arrays, write_json

REPORT = "report.html"
VARIANT = "hgnn"
NAMES = {"text_only": "two_tower_text_only", VARIANT: MAIN}  # two-tower variant -> name in the table


def _settings(config: Config) -> dict[str, Any]:
    return {
        "evaluate": config.evaluate.model_dump(),
        "events": config.events.model_dump(),
        "window_days": config.graph.window_days,
        "max_history": config.graph.max_history,
        "history": config.two_tower.history,
        "popular_days": config.index.popular_days,
        "seed": config.seed,
        "data_seed": config.data_seed,
    }


def _run(context: Context) -> dict[str, Any]:
    ingest, featurize, hgnn_folder, two_tower = context.folders
    text = load_arrays(featurize / "text.safetensors")["vector"]
    hgnn = load_embeddings(hgnn_folder, "test", len(text)).numpy()
    ntype = Tables(ingest).ntype.astype(np.int64)
    features = text, hgnn, ntype, context.inputs["ingest"].counts["test_from"]
    terms = [term for term in TERMS if getattr(context.config.two_tower, term)]  # also one without weight: in another
    towers: dict[str, Callable[[], TowerModel]] = {  # seed it may have one
        without(MAIN, term): partial(TrainedTowers.open, two_tower / VARIANT, *features, term) for term in terms
    }
    towers |= {
        name: partial(TrainedTowers.open, two_tower / variant, *features)
        for variant, name in NAMES.items()
        if (two_tower / variant / "metrics.json").exists()
    }
    return evaluate(context, towers)


def evaluate(context: Context, towers: Mapping[str, Callable[[], TowerModel]]) -> dict[str, Any]:
    """Compare all models on the test period; write ``metrics.json``, ``hits.safetensors``, ``differences.json``,
    ``tuning.json``, ``report.html`` and the page's further data (``examples.json``, ``popularity.json``, ``map.json``).
    Returns the manifest's counts.

    Args:
        towers: how to open the two-tower models, by their names in the table and in its order.

    Raises:
        ArtifactError: an input is missing or damaged.
        DataError: the oracle names items that are not in the catalogue.
        UserError: a configured baseline needs a package that is not installed.
    """
    config, progress, out = context.config, context.progress, context.out.resolve()
    baselines = chosen_baselines(config)
    ingest, featurize, hgnn = (context.inputs[name].path.resolve() for name in ("ingest", "featurize", "hgnn"))
    setting = prepare(config, ingest, out)
    survey = survey_shards(setting, config.evaluate.max_users, progress, context.cpus)
    job = Job(config, setting, featurize, hgnn)
    threads = cpus_of_one_host(context.cpus)
    prints = {name: artifact.fingerprint for name, artifact in context.inputs.items()}
    tuned, places = tune_all(job, baselines, prints, context.cache.resolve() / "evaluation", progress, threads)
    setting = replace(setting, places=places)
    models = _models(job, tuned, towers, survey, threads)
    names = rank_shards(setting, survey, models, config.evaluate.strangers, progress, context.cpus)
    oracle = _oracle(job) if config.data.oracle else None
    rows, hits = summarise(setting, survey, names, config.evaluate.bootstrap, oracle)
    write_json(out / "metrics.json", rows)
    hits.save(out / HITS)
    write_json(out / DIFFERENCES, against_all([hits], MAIN, config.evaluate.bootstrap, setting.seed))
    write_json(out / "tuning.json", {name: found.as_record() for name, found in tuned.items()})
    write_gallery(setting, survey, rows, config.evaluate.examples, out)
    gids = sample_items(setting.catalogue, config.evaluate.map_items, setting.data_seed)
    with progress.task("map of the items", total=1) as task:
        drawn = {name: build().item_vectors for name, build in list(towers.items())[-1:]}
        spaces = item_spaces(gids, setting.catalogue.items, featurize, hgnn, drawn)
        alone(draw_map, setting, survey.facts, gids, spaces, out / MAP, cpus=1)
        task.advance()
    write_report(out / REPORT, rows, config, context.run_dir, out, context.spent)
    if not rows:
        progress.say(
            "    nothing to evaluate: no user has a positive event on a new item in the test period; metrics.json is "
            "empty (check split.test_from and split.test_days)"
        )
    return {
        "models": names,
        "queries": len(survey.queries),
        "users": len(np.unique(survey.queries.uid)),
        "hr_at_10": {r["model"]: r["hr_at_10"] for r in rows if (r["item_type"], r["segment"]) == ("all", "warm")},
        "tuning": {name: found.counts for name, found in tuned.items()},
    }


def _models(
    job: Job,
    tuned: Mapping[str, Tuned],
    towers: Mapping[str, Callable[[], TowerModel]],
    survey: Survey,
    threads: int,
) -> dict[str, Callable[[], Recommender]]:
    """How to build each recommender, in the order of the table. None is built before its turn."""
    models: dict[str, Callable[[], Recommender]] = {}
    for name, found in tuned.items():
        if not found.failed:
            models[name] = partial(alone, fit_for_test, job, name, found.params, threads, cpus=threads)
    for name, tower in towers.items():
        models[name] = partial(_tower, name, tower, survey.popular)
    for days, count in survey.windows.items():
        models[f"popularity_{days}"] = partial(Popularity, count, f"popularity_{days}")
    if job.config.data.oracle:
        models[ORACLE] = partial(_oracle, job)
    return models


def _tower(name: str, open_towers: Callable[[], TowerModel], popular: np.ndarray) -> Tower:
    return Tower(name, open_towers(), popular)


def _oracle(job: Job) -> ReadyLists:
    (path,) = find_paths("oracle", job.config.data.oracle or "")
    return read_oracle(path, job.setting.ingest, job.setting.catalogue.types)


STAGE = Stage(
    name="evaluate",
    folder="evaluation",
    summary="evaluate the model and its baselines on the test period",
    inputs=("ingest", "featurize", "hgnn", "two-tower"),
    settings=_settings,
    run=_run,
    version=3,  # a row without each term
    sources=lambda config: {"oracle": config.data.oracle},
    page=REPORT,
)
