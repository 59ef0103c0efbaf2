"""The same number of trials for every baseline, chosen on the validation period alone.

Optuna's TPE sampler proposes points one after the other, after the starting points. Each finished trial is a file; a
killed evaluation asks the seeded sampler for the same points again and takes what it finds.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recsys_ray.baselines.fitting import Job, try_point
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
from recsys_ray.storage.artifacts import write_json

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
        """Trials that the time limit ended."""
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

    def as_record(self) -> dict[str, Any]:
        """For tuning.json."""
        best = self.best
        hit = best["hr_at_10"] if best else None
        return {"params": self.params, "hr_at_10": hit, "note": self.note, "trials": self.trials}

    @property
    def note(self) -> str:
        """For people: what should be known beside the model's figures."""
        if not self.trials:
            return "not tuned: the validation period has no query"
        if self.failed:
            return f"left out: no trial ended within evaluate.trial_seconds ({len(self.trials)} tried)"
        capped = f", {self.capped} of them stopped at evaluate.trial_seconds" if self.capped else ""
        return f"{len(self.trials)} trial{'s' if len(self.trials) > 1 else ''}{capped}"


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


def untuned(job: Job, baseline: Baseline) -> Tuned:
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
    try:
        trial = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return trial if trial.get("params") == params else None


def _seen(trials: list[Trial], params: Params) -> Trial | None:
    return next(({**trial, "seconds": 0.0} for trial in trials if trial["params"] == params), None)


def _distribution(dimension: Choice | Real | Whole) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.values)
    if isinstance(dimension, Whole):
        return IntDistribution(dimension.low, dimension.high, log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
