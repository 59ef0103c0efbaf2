"""Moments in time at which the item graph is built, so that nothing sees its own future (docs/architecture.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from recsys_ray.config import GraphConfig
from recsys_ray.errors import DataError

DAY = 86_400


@dataclass(frozen=True)
class Snapshot:
    """Interactions with ``start <= timestamp < time`` make its graph.

    ``examples`` is the half-open interval of the two-tower examples that use it, or None.
    """

    name: str
    index: int
    time: int
    start: int
    examples: tuple[int, int] | None = None


def plan_snapshots(config: GraphConfig, counts: Mapping[str, Any]) -> list[Snapshot]:
    """Snapshots for the counts of an ingest manifest, in order of time.

    Raises:
        DataError: there is nothing to train on before ``valid_from``.
    """
    valid, test, end = counts["valid_from"], counts["test_from"], counts["end"]
    days: Sequence[tuple[int, int]] = [(day, n) for day, n in counts["days"] if day * DAY < valid]
    if not days or not sum(n for _, n in days):
        raise DataError(
            "no positive event lies before the validation period; set split.valid_from and split.test_from to "
            "dates inside the data, or check events.positives"
        )
    first = days[0][0] * DAY
    if config.features_as_of == "window":
        start = first if config.window_days is None else max(first, valid - config.window_days * DAY)
        cuts = [(valid, (start, valid))]
    else:
        moments = sorted({_quantile(days, _share(config, k)) for k in range(config.cuts)})
        cuts = [(time, (time, following)) for time, following in zip(moments, [*moments[1:], valid], strict=True)]
    planned: list[tuple[str, int, tuple[int, int] | None]]
    planned = [(f"cut{k}", time, examples) for k, (time, examples) in enumerate(cuts)]
    planned += [("valid", valid, (valid, test)), ("test", test, None), ("serve", end, None)]
    back = None if config.window_days is None else config.window_days * DAY
    return [
        Snapshot(name, index, time, first if back is None else time - back, examples)
        for index, (name, time, examples) in enumerate(planned)
    ]


def snapshots_of(counts: Mapping[str, Any]) -> list[Snapshot]:
    """The snapshots that a graph manifest records."""
    return [
        Snapshot(s["name"], s["index"], s["time"], s["start"], tuple(s["examples"]) if s["examples"] else None)
        for s in counts["snapshots"]
    ]


def as_records(snapshots: Sequence[Snapshot]) -> list[dict[str, Any]]:
    return [asdict(snapshot) for snapshot in snapshots]


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
