"""The moments at which the item graph is built, so that no feature uses the future (docs/architecture.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from recsys_ray.config import GraphConfig
from recsys_ray.core.clock import DAY, days_before, is_leave_one_out
from recsys_ray.core.errors import DataError
from recsys_ray.core.seeds import splitmix64

_EVER = 1 << 40  # how far back a window without a start reaches in logical time: see _folds

Interval = tuple[int, int]
_Cut = tuple[int, Interval, "Fold | None"]  # moment, examples, users that it leaves out


@dataclass(frozen=True)
class Fold:
    """Part ``index`` of ``count`` of the users, by a hash of uid and seed."""

    index: int
    count: int
    seed: int

    def has(self, uid: np.ndarray) -> np.ndarray:
        """bool [n]: which users are in it."""
        return splitmix64(uid, self.seed) % np.uint64(self.count) == self.index


@dataclass(frozen=True)
class Snapshot:
    """Interactions with ``start <= timestamp < time`` make its graph; with ``without``, all but those of its users.

    ``examples`` is the half-open interval of the two-tower examples that use it, or None; with ``without``, they are
    those of its users alone.
    """

    name: str
    index: int
    time: int
    start: int
    examples: Interval | None = None
    without: Fold | None = None


def plan_snapshots(config: GraphConfig, counts: Mapping[str, Any], seed: int = 0) -> list[Snapshot]:
    """Snapshots for the counts of an ingest manifest: the training cuts, then valid, test and serve.

    Raises:
        DataError: there is nothing to train on before ``valid_from``.
    """
    valid, test, end = counts["valid_from"], counts["test_from"], counts["end"]
    if is_leave_one_out(counts):
        first, window = -_EVER, None
        cuts: Sequence[_Cut] = _folds(config, valid, seed)
    else:
        days = _training_days(counts)
        first, window = days[0][0] * DAY, config.window_days
        cuts = _moments(config, days, valid)
    planned: list[tuple[str, int, Interval | None, Fold | None]]
    planned = [(f"cut{k}", *cut) for k, cut in enumerate(cuts)]
    planned += [("valid", valid, (valid, test), None), ("test", test, None, None), ("serve", end, None, None)]
    return [
        Snapshot(name, index, time, days_before(time, window, first), examples, without)
        for index, (name, time, examples, without) in enumerate(planned)
    ]


def _training_days(counts: Mapping[str, Any]) -> list[tuple[int, int]]:
    days = [(day, n) for day, n in counts["days"] if day * DAY < counts["valid_from"]]
    if not days or not sum(n for _, n in days):
        raise DataError(
            "no positive event lies before the validation period; set split.valid_from and split.test_from to "
            "dates inside the data, or check events.positives"
        )
    return days


def _moments(config: GraphConfig, days: Sequence[tuple[int, int]], valid: int) -> list[_Cut]:
    """Cuts by time: each serves the examples up to the next one."""
    if config.features_as_of == "window":
        first = days[0][0] * DAY
        return [(valid, (max(first, days_before(valid, config.window_days, first)), valid), None)]
    moments = sorted({_quantile(days, _share(config, k)) for k in range(config.cuts)})
    return [(time, (time, after), None) for time, after in zip(moments, [*moments[1:], valid], strict=True)]


def _folds(config: GraphConfig, valid: int, seed: int) -> list[_Cut]:
    """Cuts by user (cross-fitting): the examples of a fold's users use a graph without these users' events.

    Logical times are a few steps before ``valid`` (recsys_ray/data/split.py). A pair's recency counts in 65,536ths of
    the window at the finest, so that in a window this long all pairs are equally recent: there is no "latest" between
    the events of different users.
    """
    examples = (-_EVER, valid)
    if config.features_as_of == "window":
        return [(valid, examples, None)]
    return [(valid, examples, Fold(k, config.cuts, seed)) for k in range(config.cuts)]


def training_snapshot(snapshots: Sequence[Snapshot]) -> Snapshot:
    """The graph whose edges the HGNN learns to predict: the last cut's; where cuts leave users out, that of ``valid``,
    which has all training events."""
    last = _cuts(snapshots)[-1]
    return last if last.without is None else next(s for s in snapshots if s.name == "valid")


def earlier_snapshot(snapshots: Sequence[Snapshot]) -> Snapshot:
    """A graph that lacks some of the edges of the :func:`training_snapshot`: that of the cut before; where cuts leave
    users out, the first one's; where there is one cut only, the same graph."""
    cuts = _cuts(snapshots)
    return cuts[0] if cuts[-1].without is not None else cuts[-2:][0]


def _cuts(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    return sorted((s for s in snapshots if s.name.startswith("cut")), key=lambda s: s.index)


def snapshots_of(counts: Mapping[str, Any]) -> list[Snapshot]:
    """The snapshots that a graph manifest records."""
    return TypeAdapter(list[Snapshot]).validate_python(counts["snapshots"])


def _share(config: GraphConfig, k: int) -> float:
    """Cut k of n: the events after the first cut are divided evenly."""
    return config.first_cut + (1 - config.first_cut) * k / config.cuts


def _quantile(days: Sequence[tuple[int, int]], share: float) -> int:
    """First moment of the day by which ``share`` of the events have passed."""
    total, passed = sum(n for _, n in days), 0
    for day, n in days:
        if passed + n > share * total:
            return max(day, days[0][0] + 1) * DAY
        passed += n
    return (days[-1][0] + 1) * DAY
