"""The search space of ``recsys-ray tune``, and its outputs: a preset, a table, a plot. No Ray in here.

The score is the two-tower's best NDCG@100 on the validation period; the test period is never used.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from recsys_ray.config import Config, changed, field_names
from recsys_ray.core.errors import ConfigError
from recsys_ray.report.palette import PALETTE

Params = Mapping[str, float | str]  # dotted field -> number, or the text of a choice as YAML reads it


MEASURE = "valid_ndcg_at_100"  # a trial's score, at its best epoch: the measure by which training chooses, too


@dataclass(frozen=True)
class Range:
    """A number between two ends, even on a log scale where a factor matters."""

    name: str
    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    name: str
    values: tuple[Any, ...]


Dimension = Range | Choice

SPACE: tuple[Dimension, ...] = (
    Range("two_tower.temperature", 0.03, 0.3, log=True),
    Range("two_tower.learning_rate", 1e-4, 5e-3, log=True),
    Range("two_tower.dropout", 0.0, 0.5),
    Range("two_tower.log_q", 0.0, 1.0),
    Choice("two_tower.history", (50, 100, 200, 400)),
    Choice("two_tower.batch_size", (256, 512, 1024, 2048)),
    Choice("two_tower.layers", ([128], [512, 256, 128], [1024, 512, 256])),
    Choice("two_tower.id_dim", (16, 32, 64)),
    Choice("two_tower.id_dropout", (None, 0.1, 0.3, 0.5, 0.8)),
    Range("hgnn.temperature", 0.03, 0.3, log=True),
    Range("hgnn.learning_rate", 3e-5, 3e-3, log=True),
    Choice("hgnn.max_steps", (50, 100, 200, 400)),
    Choice("hgnn.min_edges", (5_000, 20_000, 80_000)),
    Choice("hgnn.signature_dim", (64, 128, 256)),
    Choice("graph.max_neighbors", (15, 30, 60)),
    Choice("graph.cuts", (3, 5, 8)),
    Choice("graph.min_support", (1, 2)),
    Choice("graph.pair_half_life", (4, 24, None)),
)


@dataclass(frozen=True)
class Trial:
    """A finished trial."""

    params: Params
    score: float | None  # None: it failed
    curve: tuple[float, ...]  # validation NDCG@100 after each epoch
    seconds: float
    stopped: bool  # ended early because others were better by then
    error: str = ""


def space_for(config: Config, only: Sequence[str] = ()) -> list[Dimension]:
    """The space around a configuration, whose own values are always in it.

    Args:
        only: beginnings of field names; default: everything.

    Raises:
        ConfigError: a field of the space is unknown, or nothing begins with one of ``only``.
    """
    known = field_names()
    for wanted in only:
        if not any(d.name.startswith(wanted) for d in SPACE):
            near = difflib.get_close_matches(wanted, [d.name for d in SPACE], n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"--only {wanted}: no tuned field begins with this{hint}")
    found: list[Dimension] = []
    for dimension in SPACE:
        if dimension.name not in known:
            raise ConfigError(f"the search space names {dimension.name!r}, which is not a field of the configuration")
        if only and not any(dimension.name.startswith(wanted) for wanted in only):
            continue
        value = value_of(config, dimension.name)
        if isinstance(dimension, Range):
            low, high = min(dimension.low, value), max(dimension.high, value)
            log = dimension.log and low > 0
            found.append(Range(dimension.name, low, high, log))
        else:
            values = dimension.values if value in dimension.values else (*dimension.values, value)
            found.append(Choice(dimension.name, values))
    return found


def value_of(config: Config, name: str) -> Any:
    """A field by its dotted name; tuples as lists, as YAML has them."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return list(value) if isinstance(value, tuple) else value


def start_of(space: Sequence[Dimension], config: Config) -> dict[str, float | str]:
    """The configuration itself as a point of the space."""
    return {
        d.name: float(value_of(config, d.name)) if isinstance(d, Range) else json.dumps(value_of(config, d.name))
        for d in space
    }


def overrides_of(params: Params) -> list[str]:
    """``NAME=VALUE`` for each parameter."""
    return [f"{name}={value if isinstance(value, str) else repr(float(value))}" for name, value in params.items()]


def name_of(params: Params) -> str:
    """The folder of a trial's run: the same parameters, the same folder."""
    return "tune-" + hashlib.sha256(json.dumps(dict(sorted(params.items()))).encode()).hexdigest()[:12]


def identity(config: Config, space: Sequence[Dimension]) -> str:
    """Changes with all that a score depends on besides the trial's parameters; earlier trials then do not count."""
    tree = config.model_dump(mode="json", exclude={"run_dir", "ray", "evaluate", "index"})
    text = json.dumps([MEASURE, tree, [repr(d) for d in space]], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the highest score."""
    scored = [trial for trial in trials if trial.score is not None and not math.isnan(trial.score)]
    return max(scored, key=lambda trial: trial.score or 0.0, default=None)


def write_preset(path: Path, config: Config, best: Trial, trials: Sequence[Trial], facts: Mapping[str, Any]) -> None:
    """The best trial's configuration: the fields that differ from the defaults, and in a comment how it came about."""
    of_tuning = {"run_dir", "seed", "ray"}
    chosen = changed(config, overrides_of(best.params))
    tree = chosen.model_dump(mode="json", exclude=of_tuning, exclude_defaults=True)
    start = next((t.score for t in trials if dict(t.params) == start_of(_space(config, best), config)), None)
    lines = [
        f"Found by recsys-ray tune: {len(trials)} trials, {sum(t.stopped for t in trials)} of them stopped early, "
        f"{sum(t.seconds for t in trials) / 3600:.1f} hours.",
        f"Validation NDCG@100 of the two-tower {best.score:.4f}"
        + (f", of the initial configuration {start:.4f}." if start is not None else "."),
        *(f"{name}: {value}" for name, value in facts.items()),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"# {line}\n" for line in lines) + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def _space(config: Config, best: Trial) -> list[Dimension]:
    return [d for d in space_for(config) if d.name in best.params]


def write_trials(folder: Path, trials: Sequence[Trial]) -> None:
    """``trials.md``, best first, and ``trials.png``: the best score over the trials, and every field against it."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(trials[0].params) if trials else []
    order = sorted(range(len(trials)), key=lambda k: -(trials[k].score or -1.0))
    lines = [
        f"| rank | trial | valid NDCG@100 | epochs | minutes | {' | '.join(names)} |",
        "|---:" * 5 + "|---" * len(names) + "|",
    ]
    for place, k in enumerate(order, 1):
        trial = trials[k]
        score = trial.error or "failed" if trial.score is None else f"{trial.score:.4f}"
        epochs = f"{len(trial.curve)}{' (stopped)' if trial.stopped else ''}"
        values = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in trial.params.values()]
        lines.append(f"| {place} | {k + 1} | {score} | {epochs} | {trial.seconds / 60:.1f} | {' | '.join(values)} |")
    (folder / "trials.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _draw(folder / "trials.png", trials, names)


def _draw(path: Path, trials: Sequence[Trial], names: Sequence[str]) -> None:
    scored = [(k + 1, trial) for k, trial in enumerate(trials) if trial.score is not None]
    if not scored:
        return
    columns = 4
    rows = 1 + -(-len(names) // columns)
    with mpl.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12.0, 2.4 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(rows, columns)
        axes = figure.add_subplot(grid[0, :])
        scores = [trial.score or 0.0 for _, trial in scored]
        axes.plot([k for k, _ in scored], scores, "o", color=PALETTE[0], markersize=4)
        best = [max(scores[: k + 1]) for k in range(len(scores))]
        axes.step([k for k, _ in scored], best, where="post", color=PALETTE[3])
        axes.set_xlabel("trial")
        axes.set_ylabel("validation NDCG@100")
        for number, name in enumerate(names):
            axes = figure.add_subplot(grid[1 + number // columns, number % columns])
            values = [trial.params[name] for _, trial in scored]
            if all(isinstance(value, str) for value in values):
                known = sorted({str(value) for value in values}, key=lambda v: (len(v), v))
                axes.set_xticks(range(len(known)), known)
                axes.plot([known.index(str(value)) for value in values], scores, "o", color=PALETTE[2], markersize=3)
            else:
                axes.plot([float(value) for value in values], scores, "o", color=PALETTE[2], markersize=3)
            axes.set_title(name, loc="left")
        figure.savefig(path, dpi=110, metadata={"Software": None})
