"""``recsys-ray tune``: Ray Tune over the method's settings, on the validation period only.

Every trial is a variant of the run (:mod:`pipelines.variants`), so stages that trials share run once. A finished trial
is a line of ``trials.jsonl``. After an interruption the search is told of these lines, and the trial that was running
is repeated: its stages continue at their own checkpoints.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from ray.tune import Callback

from pipelines.variants import folder_of, run_variant, variant_of
from recsys_ray.cluster.session import granted_cpus, ray_session
from recsys_ray.config import Config
from recsys_ray.core.errors import UserError
from recsys_ray.core.progress import Progress
from recsys_ray.core.seeds import seed_from
from recsys_ray.stages.chain import STAGES
from recsys_ray.stages.runner import Runner
from recsys_ray.storage.artifacts import MANIFEST, read_json, write_json
from recsys_ray.storage.lock import run_lock
from recsys_ray.storage.outputs import current_folder
from recsys_ray.tuning.space import (
    MEASURE,
    Choice,
    Dimension,
    Params,
    Trial,
    best_of,
    identity,
    name_of,
    overrides_of,
    space_for,
    start_of,
    write_preset,
    write_trials,
)

_STAGES = ("ingest", "featurize", "graph", "hgnn", "two-tower")
_FOLDER = "tune"  # below the run's folder
_DONE, _RUNNING = "trials.jsonl", "running.json"
_POLL_S = 2.0
_GRACE = 4  # epochs before a trial may be stopped, and trials that it is then compared with
_CPUS_A_TRIAL = 2  # a training rank and what feeds it
_BULKY = ("hgnn", "two_tower")  # a trial's outputs that no other trial is likely to share


def tune(config: Config, count: int, out: Path, only: list[str], progress: Progress, fresh: bool = False) -> Trial:
    """Search until ``count`` trials are finished, earlier runs' included; write the preset, the table and the plot.

    Args:
        out: the preset.
        only: tune only fields with this prefix; default: the whole space.
        fresh: forget the trials of earlier runs.

    Returns:
        The best trial.

    Raises:
        UserError: every trial failed.
    """
    with run_lock(config.run_dir):
        return _tune(config, count, out, only, progress, fresh)


def _tune(config: Config, count: int, out: Path, only: list[str], progress: Progress, fresh: bool) -> Trial:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = space_for(config, only)
    folder = (Path(config.run_dir) / _FOLDER / identity(config, space)).absolute()
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    record = Record(folder, config, count, progress)
    with Runner(config, STAGES, progress) as runner:
        ingest = runner.chain(["ingest", "featurize", "graph"])["ingest"]
    if record.trials:
        progress.say(f"{len(record.trials)} of {count} trials done")
    if len(record.trials) < count:
        with ray_session(config.ray) as cpus:
            _search(config, space, record, count, cpus)
    best = best_of(record.trials)
    if best is None:
        raise UserError(f"every trial failed, the last with: {record.trials[-1].error}")
    events = ingest.counts["rows"]["interactions"]["kept"]
    items = dict(zip(ingest.counts["item_types"], ingest.counts["items_per_type"], strict=True))
    write_preset(out, config, best, record.trials, {"Data": f"{events:,} events; items: {items}"})
    write_trials(folder, record.trials)
    progress.say(f"best of {len(record.trials)} trials: validation NDCG@100 {best.score:.4f} -> {out}")
    progress.say(f"trials: {folder / 'trials.md'}, {folder / 'trials.png'}")
    return best


class Record:
    """The trials on disk: finished and running ones."""

    def __init__(self, folder: Path, config: Config, count: int, progress: Progress) -> None:
        self.folder, self.config, self.count, self.progress = folder, config, count, progress
        lines = (folder / _DONE).read_text(encoding="utf-8").splitlines() if (folder / _DONE).exists() else []
        self.trials = [_trial_from(json.loads(line)) for line in lines if line.strip()]
        self.interrupted: list[Params] = []
        if (folder / _RUNNING).exists():
            done = [dict(trial.params) for trial in self.trials]
            self.interrupted = [p for p in read_json(folder / _RUNNING) if p not in done]
        self.running: dict[str, tuple[Params, float]] = {}
        self._spent: list[float] = []

    def begin(self, trial_id: str, params: Params) -> None:
        self.running[trial_id] = (dict(params), time.monotonic())
        write_json(self.folder / _RUNNING, [params for params, _ in self.running.values()])

    def finish(self, trial_id: str, curve: list[float], error: str = "") -> None:
        """Record a trial and delete what it trained."""
        params, started = self.running.pop(trial_id)
        seconds = time.monotonic() - started
        made = current_folder(folder_of(self.config, name_of(params)) / STAGES["two-tower"].folder)
        stopped = not (made and (made / MANIFEST).exists()) and not error
        trial = Trial(params, max(curve) if curve else None, tuple(curve), round(seconds, 1), stopped, error)
        self.trials.append(trial)
        self._spent.append(seconds)
        with (self.folder / _DONE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(vars(trial)) + "\n")
        write_json(self.folder / _RUNNING, [params for params, _ in self.running.values()])
        if not self.running:  # what another trial may be using stays
            self._make_room()
        best, left = best_of(self.trials), self.count - len(self.trials)
        score = f"failed ({error})" if trial.score is None else f"NDCG@100 {trial.score:.4f}"
        self.progress.say(
            f"trial {len(self.trials)} of {self.count}: {score}, {len(curve)} epochs{', stopped early' * stopped}, "
            f"{seconds / 60:.1f} min; best {best.score if best else 0:.4f}; about "
            f"{left * sum(self._spent) / len(self._spent) / 60:,.0f} min left"
        )

    def _make_room(self) -> None:
        """Delete what finished trials trained."""
        for trial in self.trials:
            folder = folder_of(self.config, name_of(trial.params))
            for output in _BULKY:
                shutil.rmtree(folder / output, ignore_errors=True)


def _trial_from(fields: Mapping[str, Any]) -> Trial:
    return Trial(**{**fields, "curve": tuple(fields["curve"])})


# --- Ray Tune ---------------------------------------------------------------------------------------------------------


def _search(config: Config, space: list[Dimension], record: Record, count: int, cpus: int) -> None:
    """Run the trials that are missing."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # trials.jsonl is the record
    from ray import tune as ray_tune
    from ray.tune.schedulers import MedianStoppingRule

    at_once = max(1, (cpus if config.ray.address != "local" else min(cpus, granted_cpus())) // _CPUS_A_TRIAL)
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(
            ray_tune.with_parameters(_run_trial, tree=config.model_dump(mode="json"), cwd=str(Path.cwd())),
            {"CPU": 0, "memory": 2**20},  # it waits; its stages ask for the CPUs. Tune wants it to ask for something
        ),
        tune_config=ray_tune.TuneConfig(
            metric="score",
            mode="max",
            search_alg=_optuna(config, space, record),
            scheduler=MedianStoppingRule(
                time_attr="training_iteration",
                grace_period=_GRACE,
                min_samples_required=_GRACE,
                min_time_slice=10**9,  # never pause a trial for another
            ),
            num_samples=count - len(record.trials),
            max_concurrent_trials=at_once,
        ),
        run_config=ray_tune.RunConfig(
            name="search",
            storage_path=str(record.folder / "ray"),
            verbose=0,
            callbacks=[_Watch(record)],
            failure_config=ray_tune.FailureConfig(max_failures=0),
        ),
    )
    tuner.fit()
    shutil.rmtree(record.folder / "ray", ignore_errors=True)


def _optuna(config: Config, space: list[Dimension], record: Record) -> Any:
    """A seeded TPE search that knows the trials of earlier runs. It starts with what was interrupted, or with the
    configuration as it is."""
    from ray.tune.search.optuna import OptunaSearch

    distributions: dict[str, Any] = {
        d.name: optuna.distributions.CategoricalDistribution([json.dumps(value) for value in d.values])
        if isinstance(d, Choice)
        else optuna.distributions.FloatDistribution(d.low, d.high, log=d.log)
        for d in space
    }
    first = [dict(params) for params in record.interrupted] or ([] if record.trials else [start_of(space, config)])
    # Another seed after every restart: the same one would draw the same points again.
    sampler = optuna.samplers.TPESampler(
        seed=seed_from(config.seed, "tune", len(record.trials)) % 2**31, multivariate=True, n_startup_trials=8
    )
    search = OptunaSearch(distributions, metric="score", mode="max", points_to_evaluate=first, sampler=sampler)
    for trial in record.trials:
        failed = trial.score is None
        search.add_evaluated_point(
            dict(trial.params), trial.score or 0.0, error=failed, intermediate_values=list(trial.curve)
        )
    return search


class _Watch(Callback):
    """Records when trials start and end."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.curves: dict[str, list[float]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks for its own way to resume, which is not used here."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.record.begin(trial.trial_id, trial.config)
        self.curves[trial.trial_id] = []

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.curves[trial.trial_id].append(float(result[MEASURE]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.record.finish(trial.trial_id, self.curves.pop(trial.trial_id))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = str(trial.get_error() or "").strip().splitlines()[-1:] or ["unknown error"]
        self.record.finish(trial.trial_id, [], error=error[0][:200])


def _run_trial(params: dict[str, Any], tree: dict[str, Any], cwd: str) -> None:
    """One trial, in an actor of Ray Tune. The stages run in an actor beside it, outside of the trial's placement group:
    inside, their tasks would have to share its zero CPUs."""
    import ray
    from ray import tune as ray_tune

    from recsys_ray.two_tower.stage import epochs_so_far

    config = Config.model_validate(tree)
    worker: Any = ray.remote(num_cpus=0, scheduling_strategy="DEFAULT")(_Stages).remote(cwd)
    running = worker.run.remote(tree, params)
    folder = Path(cwd) / folder_of(config, name_of(params)) / STAGES["two-tower"].folder
    curve: list[float] = []
    while True:
        finished = bool(ray.wait([running], timeout=_POLL_S)[0])
        if finished:
            ray.get(running)
        epochs = [epoch[MEASURE] for epoch in epochs_so_far(folder, "hgnn")]
        for figure in epochs[len(curve) :]:
            curve.append(figure)
            ray_tune.report({"score": max(curve), MEASURE: figure})
        if finished:
            return


class _Stages:
    """An actor that brings a trial's stages up to date."""

    def __init__(self, cwd: str) -> None:
        os.chdir(cwd)  # paths of the configuration mean what they mean to the driver

    def run(self, tree: dict[str, Any], params: dict[str, Any]) -> None:
        config = Config.model_validate(tree)
        variant = variant_of(
            config, name_of(params), [*overrides_of(params), "two_tower.ablation=false", "two_tower.refit=false"]
        )
        run_variant(config, variant, Progress(quiet=True), _STAGES)
