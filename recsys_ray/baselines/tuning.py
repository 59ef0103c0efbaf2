"""Tunes every baseline with the same number of trials, on the validation period only.

After the starting points, Optuna's TPE sampler proposes points one after the other. Each finished trial is a file; an
interrupted evaluation asks the seeded sampler for the same points again and reuses the files it finds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recsys_ray.baselines.fitting import PATIENCE, Job, prepare_validation, try_point
from recsys_ray.baselines.interface import (
    Baseline,
    Choice,
    Params,
    Real,
    Space,
    Whole,
    default_point,
    starting_points,
)
from recsys_ray.cluster.pool import alone
from recsys_ray.core.progress import Progress
from recsys_ray.evaluation.queries import LAYOUT
from recsys_ray.storage.artifacts import fingerprint, json_or_none, write_json

_RANDOM_TRIALS = 5  # before the sampler begins to learn; the same for any number of trials
_GRACE_S = 30.0  # a trial that has not stopped by itself at twice its time and this is ended

Trial = dict[str, Any]  # params, hr_at_10 (None: ended without one), seconds, capped; also epochs and curve


@dataclass(frozen=True)
class Tuned:
    """A baseline's parameters for the test, and how they were found."""

    params: Params
    trials: list[Trial] = field(default_factory=list)

    @property
    def capped(self) -> int:
        """Trials stopped by the time limit."""
        return sum(trial["capped"] for trial in self.trials)

    @property
    def failed(self) -> bool:
        """Every trial was ended before it had a result: a fit to more data would take longer still."""
        return bool(self.trials) and self.best is None

    @property
    def best(self) -> Trial | None:
        """The earliest of the best trials."""
        finished = [trial for trial in self.trials if trial["hr_at_10"] is not None]
        return max(finished, key=lambda trial: trial["hr_at_10"], default=None)

    @property
    def counts(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "trials": len(self.trials),
            "capped": self.capped,
            "seconds": round(sum(trial["seconds"] for trial in self.trials), 1),
            "valid_hr_at_10": self.best["hr_at_10"] if self.best else None,
            "params": self.params,
        }

    def as_record(self) -> dict[str, Any]:
        """For tuning.json."""
        best = self.best
        hit = best["hr_at_10"] if best else None
        return {"params": self.params, "hr_at_10": hit, "note": self.note, "trials": self.trials}

    @property
    def note(self) -> str:
        """A note for readers of the model's figures."""
        if not self.trials:
            return "not tuned: the validation period has no queries"
        if self.failed:
            return f"omitted: no trial finished within evaluate.trial_seconds ({len(self.trials)} tried)"
        capped = f", {self.capped} of them stopped at evaluate.trial_seconds" if self.capped else ""
        return f"{len(self.trials)} trial{'s' if len(self.trials) > 1 else ''}{capped}"


def tune_all(
    job: Job, baselines: list[Baseline], prints: Mapping[str, str], kept: Path, progress: Progress, threads: int
) -> tuple[dict[str, Tuned], dict[str, Path]]:
    """Each baseline's parameters, and the folder for its rankings.

    Args:
        prints: fingerprints of the stages' outputs.
        kept: where trials and rankings are kept for later evaluations.
    """
    tuned, places = dict[str, Tuned](), dict[str, Path]()
    asked = alone(prepare_validation, job, cpus=1)
    for baseline in baselines:
        folder = _folder_of(job, baseline, prints, kept)
        found = tune(job, baseline, folder, progress, threads) if asked else _untuned(job, baseline)
        tuned[baseline.name] = found
        places[baseline.name] = folder / f"test-{fingerprint('test', [LAYOUT, found.params], {})[:16]}"
        if found.capped:
            progress.say(f"    {baseline.name}: {found.note}")
    return tuned, places


def _folder_of(job: Job, baseline: Baseline, prints: Mapping[str, str], kept: Path) -> Path:
    """Where trials and rankings of a baseline are kept. They do not depend on the method's own models, so another
    evaluation of the run or of its variants uses them again; the name has a hash of all that they do depend on."""
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
    read = {name: prints[name] for name in ("ingest", *baseline.inputs)}
    return kept / f"{baseline.name}-{fingerprint(baseline.name, decisive, read)[:16]}"


def tune(job: Job, baseline: Baseline, folder: Path, progress: Progress, threads: int) -> Tuned:
    """Try ``evaluate.trials`` points on what ``prepare_validation`` wrote; ``folder`` holds a file for each that is
    finished."""
    space = baseline.space(job.config)
    folder.mkdir(parents=True, exist_ok=True)
    limit = job.config.evaluate.trial_seconds
    patience = 2 * limit + _GRACE_S if limit else None

    def attempt(params: Params) -> Trial:
        try:
            result = alone(try_point, job, baseline.name, params, threads, cpus=threads, seconds=patience)
        except TimeoutError:
            result = {"hr_at_10": None, "seconds": patience, "capped": True}
        return {"params": params, **result}

    number = job.config.evaluate.trials
    with progress.task(f"tuning {baseline.name}", total=number, unit="trials") as task:

        def show(trials: list[Trial]) -> None:
            best = Tuned({}, trials).best
            task.update(len(trials), detail=f"best HR@10 {best['hr_at_10']:.4f}" if best else "")

        trials = search(space, number, job.setting.data_seed, folder, attempt, show)
    best = Tuned({}, trials).best or {"params": default_point(space)}
    epochs = {"epochs": best["epochs"]} if "epochs" in best else {}
    return Tuned({**best["params"], **epochs}, trials)


def _untuned(job: Job, baseline: Baseline) -> Tuned:
    """The default point, where the validation period has nothing to choose by."""
    epochs = {"epochs": baseline.max_epochs} if baseline.max_epochs else {}
    return Tuned({**default_point(baseline.space(job.config)), **epochs})


def search(
    space: Space,
    number: int,
    seed: int,
    folder: Path,
    attempt: Callable[[Params], Trial],
    show: Callable[[list[Trial]], None] = lambda trials: None,
) -> list[Trial]:
    """``number`` trials, in order; those whose file lies in ``folder`` are not run again, nor is a point that was
    tried before."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_RANDOM_TRIALS, multivariate=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for point in starting_points(space):
        study.enqueue_trial(point)
    distributions = {name: _distribution(dimension) for name, dimension in space.items()}
    trials: list[Trial] = []
    for k in range(number):
        asked = study.ask(distributions)
        params = {name: asked.params[name] for name in space}
        path = folder / f"trial-{k:03d}.json"
        trial = _read_trial(path, params) or _seen(trials, params) or attempt(params)
        write_json(path, trial)
        trials.append(trial)
        if trial["hr_at_10"] is None:
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(asked, trial["hr_at_10"])
        show(trials)
    return trials


def _read_trial(path: Path, params: Params) -> Trial | None:
    """A finished trial of these parameters, or None."""
    trial = json_or_none(path)
    return trial if trial and trial["params"] == params else None


def _seen(trials: list[Trial], params: Params) -> Trial | None:
    return next(({**trial, "seconds": 0.0} for trial in trials if trial["params"] == params), None)


def _distribution(dimension: Choice | Real | Whole) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.values)
    if isinstance(dimension, Whole):
        return IntDistribution(dimension.low, dimension.high, log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
