"""``recsys-ray study embedding``: makes the simple vectors that a finished run's embedding is compared with, and ranks
by plain cosine item-kNN; the figures come from :mod:`recsys_ray.studies.embedding`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from pipelines.variants import folder_of
from recsys_ray.baselines.fitting import Job, fit_for_test, read_known
from recsys_ray.baselines.histories import training_matrix
from recsys_ray.baselines.ials import IALS
from recsys_ray.checks.classification import find_labels
from recsys_ray.checks.factors import FACTORS
from recsys_ray.checks.probe import SNAPSHOT, classify, later_pairs
from recsys_ray.checks.style import explained, read_style
from recsys_ray.cluster.pool import alone, in_parallel
from recsys_ray.cluster.session import ray_session
from recsys_ray.config import Config
from recsys_ray.core.errors import UserError
from recsys_ray.core.progress import Progress
from recsys_ray.data.tables import Tables
from recsys_ray.evaluation.queries import prepare
from recsys_ray.evaluation.results import HITS, Hits
from recsys_ray.evaluation.shards import rank_shards, survey_shards
from recsys_ray.evaluation.summary import summarise
from recsys_ray.hgnn.outputs import load_embeddings
from recsys_ray.stages.chain import STAGES
from recsys_ray.stages.runner import check_kinship
from recsys_ray.storage.artifacts import Artifact, load_arrays
from recsys_ray.storage.lock import run_lock
from recsys_ray.storage.outputs import current_folder, current_output
from recsys_ray.studies.embedding import (
    COSINE,
    HGNN,
    TARGETS,
    TEXT,
    check_labels,
    check_rankings,
    check_similar,
    check_style,
)
from recsys_ray.studies.embedding_page import Findings, print_checks, write_study

_NEIGHBOURS = 1000  # of an item in each type, for the cosine: the most that a tuned item-kNN may have


def study_embedding(config: Config, out: Path, command: str, progress: Progress) -> None:
    """Check a finished run's embedding; prints the table and writes page, plot and figures into ``out``.

    Raises:
        ArtifactError: ingest, featurize or hgnn has not run, or the stages are of different runs.
    """
    with run_lock(config.run_dir):
        stages = {name: current_output(config.run_dir, STAGES[name].folder) for name in ("ingest", "featurize", "hgnn")}
        check_kinship(stages)
        ingest, featurize, hgnn = stages.values()
        cache = Path(config.run_dir) / "cache"
        cache.mkdir(exist_ok=True)
        with ray_session(config.ray) as cpus, tempfile.TemporaryDirectory(dir=cache) as work:
            job = Job(config, prepare(config, ingest.path.resolve(), Path(work)), featurize.path, hgnn.path)
            found = _examine(job, stages, Path(work), progress, cpus)
    made = {name: artifact.fingerprint for name, artifact in stages.items()}
    run = {"run": made, "hgnn": hgnn.manifest["config"], "config": config.model_dump(mode="json")}
    counts = ingest.counts
    events, items = counts["rows"]["interactions"]["kept"], sum(counts["items_per_type"])
    data = f"{events:,} events, {items:,} items ({', '.join(counts['item_types'])})"
    write_study(out, found, run, data, command)
    print_checks(found.checks, Console(highlight=False))
    progress.say(f"embedding study: {out / 'embedding.md'}")


def _examine(job: Job, stages: Mapping[str, Artifact], work: Path, progress: Progress, cpus: int) -> Findings:
    config, tables = job.config, job.setting.ingest
    resamples, seed = config.evaluate.bootstrap, config.seed
    vectors = _vectors(job, tables, progress)
    style, absent = read_style(config, stages["ingest"])
    if absent:
        progress.say(f"    hidden style not checked: {absent}")
    users = _users_of_items(job)
    calls = [(explained, table, style, users) for table in vectors.values()] if style is not None else []
    known = dict(zip(vectors, in_parallel(calls, ordered=True), strict=False))
    pairs = later_pairs(config, tables, progress)
    ranks = {name: pairs.rank(table) for name, table in vectors.items()}
    labels, without = find_labels(tables.items("item_type", "language", "categories"))
    asked = {target: labels[target] for target in TARGETS if target in labels}
    rows = classify(config, asked, vectors, (TEXT, HGNN), work / "classification", progress)
    hits = _hits(job, stages, progress, cpus)
    checks = [
        *check_style(known, absent),
        *check_similar(pairs, ranks, resamples, seed),
        *check_labels(rows, without),
        *check_rankings(hits, tables.catalogue.types, resamples, seed),
    ]
    near = [{"vectors": name, **row} for name, rank in ranks.items() for row in pairs.score(rank, config)]
    return Findings(checks, known, near, rows)


def _vectors(job: Job, tables: Tables, progress: Progress) -> dict[str, np.ndarray]:
    """The HGNN's embedding, the text vectors, and what can be made of the interactions. float [items, d], row = gid."""
    found = {
        HGNN: load_embeddings(job.hgnn, SNAPSHOT, tables.catalogue.items).numpy(),
        TEXT: load_arrays(job.featurize / "text.safetensors")["vector"],
    }
    names = list(FACTORS)
    try:
        IALS.check()
    except UserError as error:
        names.remove(IALS.name)
        progress.say(f"    without iALS: {error}")
    with progress.task("simple vectors", total=len(names)) as task:
        for name, table in zip(names, in_parallel([(_factors, job, n) for n in names], ordered=True), strict=True):
            found[name] = table
            task.advance(detail=name)
    return found


def _factors(job: Job, name: str) -> np.ndarray:
    """In a task: the interactions are in its memory alone."""
    torch.set_num_threads(1)
    had = training_matrix(read_known(job, job.setting.test_from, SNAPSHOT), {})
    return FACTORS[name](had, job.config.seed)


def _users_of_items(job: Job) -> np.ndarray:
    """How many users had an event on each item before the test period, int64 [items]."""
    return alone(_count_users, job, cpus=1)


def _count_users(job: Job) -> np.ndarray:
    items = job.setting.catalogue.items
    events = read_known(job, job.setting.test_from, SNAPSHOT).events
    return np.bincount(np.unique(events.uid * items + events.gid) % items, minlength=items)


def _hits(job: Job, stages: Mapping[str, Artifact], progress: Progress, cpus: int) -> list[Hits]:
    """Those of the run's evaluation (of each seed), and of plain cosine item-kNN on the same queries; empty if the run
    was not evaluated."""
    config = job.config
    folder = current_folder(Path(config.run_dir) / STAGES["evaluate"].folder)
    if folder is None:
        return []
    seeds = current_output(config.run_dir, STAGES["evaluate"].folder).counts.get("seeds")
    folders = [folder]
    if seeds:  # each seed's hits are in its own folder
        folders = [current_output(folder_of(config, f"seed-{seed}"), STAGES["evaluate"].folder).path for seed in seeds]
    hits = [Hits.load(each / HITS) for each in folders]
    cosine = {
        "joint": True, "neighbours": _NEIGHBOURS, "shrink": 0.0, "own": 0.5, "other": 0.5, "user_norm": 0.0,
        "history": config.two_tower.history, "half_life": None, "popular_days": config.graph.window_days,
        "popular_power": 0.0,
    }  # fmt: skip
    build = partial(alone, fit_for_test, job, "item_knn", cosine, 1, cpus=1)
    survey = survey_shards(job.setting, config.evaluate.max_users, progress, cpus)
    names = rank_shards(job.setting, survey, {COSINE: build}, False, progress, cpus)
    _, own = summarise(job.setting, survey, names, config.evaluate.bootstrap, None)
    for each in hits:
        if not (np.array_equal(each.uid, own.uid) and np.array_equal(each.truths, own.truths)):
            raise UserError("the run's evaluation asked other queries than this configuration does; evaluate again")
        each.hit[COSINE] = own.hit[COSINE]
    return hits
