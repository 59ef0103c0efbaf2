"""Variants of a run: the same configuration with other settings or another seed, in folders below the run.

``<run_dir>/variants/<name>/`` looks like a run's folder. Outputs that a variant shares with the run or with another
variant are made once, and the others point at them (:class:`recsys_ray.stages.runner.Runner`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from recsys_ray.config import Config, changed
from recsys_ray.core.progress import Progress
from recsys_ray.evaluation.results import DIFFERENCES, HITS, MAIN, Hits, against_all, pool
from recsys_ray.report.examples import EXAMPLES, POPULARITY
from recsys_ray.report.item_map import MAP
from recsys_ray.stages.chain import STAGES
from recsys_ray.stages.runner import VARIANTS, Runner, make_current
from recsys_ray.storage.artifacts import Artifact, fingerprint, publish, read_json, write_json
from recsys_ray.storage.lock import run_lock
from recsys_ray.storage.outputs import find_finished, work_folder

_OF_THE_FIRST = ("tuning.json", EXAMPLES, POPULARITY, MAP)  # what several seeds show of one of them
TO_COMPARE = tuple(name for name in STAGES if name != "index")  # a variant is compared, not served


def variant_of(config: Config, name: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a variant: its own folder below the run's."""
    return changed(config, [*overrides, f"run_dir={json.dumps(str(folder_of(config, name)))}"])


def folder_of(config: Config, name: str) -> Path:
    return Path(config.run_dir) / VARIANTS / name


def run_variant(
    config: Config, variant: Config, progress: Progress, stages: Sequence[str] = TO_COMPARE
) -> Mapping[str, Artifact]:
    """Bring a variant of the run ``config`` up to date; returns its outputs by stage. The caller holds ``run_lock`` of
    the run."""
    with Runner(variant, STAGES, progress, home=Path(config.run_dir)) as runner:
        return runner.chain(list(stages))


def run_seeds(config: Config, count: int, progress: Progress, force: bool = False) -> Artifact:
    """Run everything, train ``count`` seeds from ``config.seed`` on, and leave their mean as the run's evaluation.

    The bundle is of the first seed. Each seed's own evaluation is in ``variants/seed-<n>/evaluation``.
    """
    with run_lock(config.run_dir):
        return _run_seeds(config, count, progress, force)


def _run_seeds(config: Config, count: int, progress: Progress, force: bool) -> Artifact:
    seeds = list(range(config.seed, config.seed + count))
    if force:
        for seed in seeds:
            shutil.rmtree(folder_of(config, f"seed-{seed}"), ignore_errors=True)
    with Runner(config, STAGES, progress) as runner:
        runner.chain([name for name in STAGES if name != "evaluate"], force)
    evaluations = []
    for place, seed in enumerate(seeds, 1):
        progress.say(f"seed {seed} ({place} of {count})")
        own = variant_of(config, f"seed-{seed}", [f"seed={seed}"])
        evaluations.append(run_variant(config, own, progress)["evaluate"])
    return pool_seeds(config, seeds, evaluations, progress)


def pool_seeds(config: Config, seeds: list[int], evaluations: Sequence[Artifact], progress: Progress) -> Artifact:
    """Publish the mean of several seeds' evaluations as the evaluation of the run."""
    from recsys_ray.report.write import write_report

    stage = STAGES["evaluate"]
    inputs = {f"seed-{seed}": artifact.fingerprint for seed, artifact in zip(seeds, evaluations, strict=True)}
    settings = {"seeds": seeds, "bootstrap": config.evaluate.bootstrap}
    expected = fingerprint("evaluate seeds", settings, inputs, stage.version)
    run_dir = Path(config.run_dir)
    if made := find_finished(run_dir / stage.folder, expected[:16], expected):
        progress.say(f"mean of {len(seeds)} seeds: up to date")
        return make_current(stage, made, run_dir, run_dir)
    work = work_folder(run_dir / stage.folder, expected[:16])
    hits = [Hits.load(artifact.path / HITS) for artifact in evaluations]
    tables = [read_json(artifact.path / "metrics.json") for artifact in evaluations]
    rows = pool(tables, hits, seeds, config.evaluate.bootstrap, config.seed)
    write_json(work / "metrics.json", rows)
    write_json(work / DIFFERENCES, against_all(hits, MAIN, config.evaluate.bootstrap, config.seed))
    first = evaluations[0]
    for name in _OF_THE_FIRST:
        if (first.path / name).exists():
            shutil.copyfile(first.path / name, work / name)
    cost = {name: first.manifest[name] for name in ("seconds", "peak_memory_mb")}
    spent = cost["seconds"], cost["peak_memory_mb"]
    write_report(work / stage.page, rows, config, run_dir, work, lambda: spent)
    counts = dict(first.counts) | {
        "seeds": seeds,
        "hr_at_10": {r["model"]: r["hr_at_10"] for r in rows if (r["item_type"], r["segment"]) == ("all", "warm")},
    }
    facts = {"config": settings, "inputs": inputs, "counts": counts, **cost}
    made = publish(work, stage.name, expected, stage.version, **facts)
    progress.say(f"mean of {len(seeds)} seeds -> {work}")
    return make_current(stage, made, run_dir, run_dir)
