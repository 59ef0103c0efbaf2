"""Runs a study: all variants for every seed, then the page. An interrupted study continues where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from pipelines.variants import TO_COMPARE, folder_of, run_variant, variant_of
from recsys_ray.config import Config
from recsys_ray.core.errors import UserError
from recsys_ray.core.progress import Progress
from recsys_ray.data.tables import Tables
from recsys_ray.evaluation.results import HITS, Hits
from recsys_ray.stages.chain import STAGES
from recsys_ray.stages.runner import Runner
from recsys_ray.storage.artifacts import Artifact, read_json
from recsys_ray.storage.lock import run_lock
from recsys_ray.storage.outputs import current_output
from recsys_ray.studies.changed_tables import write_changed
from recsys_ray.studies.compare import judge
from recsys_ray.studies.page import write_page
from recsys_ray.studies.registry import STUDIES
from recsys_ray.studies.study import Facts, Result, Study, Variant

_LEAN = ("evaluate.baselines=default",)  # studies do not need the baselines that are slow to tune
_PLAIN = ("evaluate.map_items=0", "evaluate.examples=0")  # variants need no report pages
_TABLES = "tables"  # below the run's folder: changed interactions


def run_study(name: str, config: Config, seeds: int, out: Path, command: str, progress: Progress) -> list[str]:
    """Run every variant of a study for ``seeds`` seeds from ``config.seed`` on; returns the verdict's lines.

    The page is written after each seed. Variants are folders below ``<run_dir>/variants``, and are up to date when the
    study is run again.

    Raises:
        UserError: there is no such study, or the data do not allow it.
    """
    if name not in STUDIES:
        raise UserError(f"there is no study {name!r}; choose from {', '.join(STUDIES)}")
    with run_lock(config.run_dir):
        return _run_study(STUDIES[name], config, seeds, out, command, progress)


def _run_study(study: Study, config: Config, seeds: int, out: Path, command: str, progress: Progress) -> list[str]:
    name = study.name
    if study.needs_dates and config.split.protocol != "time":
        raise UserError(f"the study {name} needs dates, which split.protocol={config.split.protocol} does not have")
    with Runner(config, STAGES, progress) as runner:
        ingest = runner.chain(["ingest"])["ingest"]
    facts = Facts(config, ingest.counts)
    variants = study.variants(facts)
    if len(variants) < 2 and study.note(facts):
        raise UserError(f"the study {name} is not possible with these data: {study.note(facts)}")
    clock = _Clock(seeds * len(variants), progress)
    done: dict[str, list[Mapping[str, Artifact]]] = {variant.name: [] for variant in variants}
    verdict: list[str] = []
    for seed in range(config.seed, config.seed + seeds):
        for variant in variants:
            with clock.piece(f"{study.name}: {variant.label}, seed {seed}"):
                done[variant.name].append(_run(config, study, variant, seed, ingest, progress))
        results = {name: _result(outputs) for name, outputs in done.items()}
        models = list(next((r.hits[0].hit for r in results.values() if r.hits), {}))
        outcomes = judge(study.comparisons(facts, models), _evaluated(results), config.evaluate.bootstrap, config.seed)
        so_far = list(range(config.seed, seed + 1))
        verdict = write_page(out, study, facts, variants, results, outcomes, so_far, command, _data(ingest))
        progress.say(f"{len(so_far)} of {seeds} seeds -> {out / f'{study.name}.md'}")
    return verdict


def _evaluated(results: Mapping[str, Result]) -> dict[str, Result]:
    return {name: result for name, result in results.items() if result.hits}


def _run(
    config: Config, study: Study, variant: Variant, seed: int, ingest: Artifact, progress: Progress
) -> Mapping[str, Artifact]:
    """One variant with one seed."""
    overrides = [*(() if study.every_model else _LEAN), *_PLAIN, *variant.overrides, f"seed={seed}"]
    if not variant.ablation:
        overrides.append("two_tower.ablation=false")
    if variant.table is not None:
        target = Path(config.run_dir) / _TABLES / f"{study.name}-{variant.name}"
        table = write_changed(variant.table, ingest, target, config.data_seed)
        overrides.append(f"data.interactions={json.dumps(str(table))}")
    if variant.weights_of:
        trained = current_output(folder_of(config, _folder(study, variant.weights_of, seed)), STAGES["hgnn"].folder)
        weights = trained.path / "model.safetensors"
        overrides.append(f"hgnn.weights={json.dumps(str(weights))}")
    own = variant_of(config, _folder(study, variant.name, seed), overrides)
    stages = TO_COMPARE[: TO_COMPARE.index(variant.until) + 1]
    return run_variant(config, own, progress, stages)


def _folder(study: Study, variant: str, seed: int) -> str:
    return f"{study.name}-{variant}-seed-{seed}"


def _result(outputs: Sequence[Mapping[str, Artifact]]) -> Result:
    """The results of one variant, over its seeds."""
    evaluations = [made["evaluate"] for made in outputs if "evaluate" in made]
    users = pl.Series("user_id", Tables(outputs[0]["ingest"].path).user_ids)
    stages = outputs[0].keys()
    return Result(
        hits=[Hits.load(artifact.path / HITS) for artifact in evaluations],
        rows=[read_json(a.path / "metrics.json") for a in evaluations],
        user_ids=users,
        seconds={stage: [made[stage].manifest["seconds"] for made in outputs] for stage in stages},
        counts={stage: [made[stage].counts for made in outputs] for stage in stages},
    )


def _data(ingest: Artifact) -> str:
    """What the page calls the data."""
    events, items = ingest.counts["rows"]["interactions"]["kept"], sum(ingest.counts["items_per_type"])
    return f"{events:,} events, {items:,} items ({', '.join(ingest.counts['item_types'])})"


class _Clock:
    """Announces the next piece of work and estimates the remaining time."""

    def __init__(self, pieces: int, progress: Progress) -> None:
        self.pieces, self.progress = pieces, progress
        self.begun = 0
        self.spent: list[float] = []
        self._started = 0.0

    def piece(self, label: str) -> _Clock:
        self.begun += 1
        left = self.pieces - self.begun + 1
        per_piece = sum(self.spent) / len(self.spent) if self.spent else 0.0
        rest = f", about {left * per_piece / 60:,.0f} min left" if per_piece else ""
        self.progress.say(f"[{self.begun} of {self.pieces}{rest}] {label}")
        return self

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *error: object) -> None:
        seconds = time.monotonic() - self._started
        if seconds > 5:  # stages that were up to date do not predict the rest
            self.spent.append(seconds)
