"""What the server measures, and where it reports it.

The app knows only a :class:`Meter`. In a replica that is Ray's, which Prometheus reads from each node's metrics port
with ``ray_`` before the names; tests use their own. Labels are routes, never paths, and item types, never ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from recsys_ray.bundle.build import CANARY
from recsys_ray.serving.answers import Answer
from recsys_ray.serving.live import LiveItems
from recsys_ray.serving.recommender import Recommender
from recsys_ray.serving.requests import Question
from recsys_ray.storage.artifacts import read_json
from serve.live import Told

_SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_MEAN_OF = 1_000  # answers that the running mean of scores looks back at


@dataclass(frozen=True)
class Metric:
    kind: Literal["counter", "gauge", "histogram"]
    name: str
    description: str
    tags: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


REQUESTS = Metric("counter", "recsys_requests_total", "requests answered", ("route", "method", "status"))
REQUEST_SECONDS = Metric(
    "histogram",
    "recsys_request_seconds",
    "time from a request's arrival in the replica to its answer",
    ("route",),
    _SECONDS,
)
STAGE_SECONDS = Metric(
    "histogram", "recsys_stage_seconds", "time by stage of answers computed together", ("stage",), _SECONDS
)
TOGETHER = Metric("histogram", "recsys_batch_size", "number of questions answered together", (), _SIZES)
ANSWERS = Metric("counter", "recsys_answers_total", "recommendations given", ("variant", "known"))
COLD = Metric("counter", "recsys_cold_answers_total", "answers to users about whom nothing is known")
EMPTY = Metric("counter", "recsys_empty_answers_total", "answers without any item")
DEGRADED = Metric("counter", "recsys_degraded_answers_total", "answers given while the store did not answer")
IGNORED = Metric("counter", "recsys_ignored_items_total", "history items that the bundle does not know")
ITEMS = Metric("counter", "recsys_items_total", "items recommended", ("item_type",))
TOP_SCORE = Metric("gauge", "recsys_top_score", "running mean of the best score of personalised answers")
REFERENCE = Metric("gauge", "recsys_reference_score", "mean best score of the bundle's canary users")
BUNDLE_END = Metric("gauge", "recsys_bundle_end_timestamp_seconds", "end of the bundle's data")
REFUSED = Metric("gauge", "recsys_bundle_refused", "1: the promoted bundle was refused")
LIVE_ITEMS = Metric("gauge", "recsys_live_items", "items added or changed since the bundle was built")
REMOVED_ITEMS = Metric("gauge", "recsys_removed_items", "items of the bundle that were removed")
EVENTS = Metric("counter", "recsys_events_total", "user events received")
STORE_UP = Metric("gauge", "recsys_store_up", "1: the event store answers")
STORE_DAMAGED = Metric("gauge", "recsys_store_damaged_rows", "damaged rows of the event store that were left out")
METRICS = [one for one in list(globals().values()) if isinstance(one, Metric)]  # all of the above
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


class Meter(Protocol):
    def record(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """Add to a counter, set a gauge, observe into a histogram."""
        ...


class Nowhere:
    def record(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        pass


class RayMeter:
    """Only inside a replica. Making a metric takes milliseconds, which the first requests should not wait for."""

    def __init__(self) -> None:
        self._made = {metric.name: _ray_metric(metric) for metric in METRICS}

    def record(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        made = self._made[metric.name]
        if metric.kind == "counter":
            made.inc(value, tags=dict(tags))
        elif metric.kind == "gauge":
            made.set(value, tags=dict(tags))
        else:
            made.observe(value, tags=dict(tags))


def _ray_metric(metric: Metric) -> Any:
    from ray.serve import metrics

    tags: Any = metric.tags  # declared as tuple[str] there, and meant otherwise
    if metric.kind == "histogram":
        return metrics.Histogram(metric.name, metric.description, list(metric.bounds), tags)
    kind = metrics.Counter if metric.kind == "counter" else metrics.Gauge
    return kind(metric.name, metric.description, tags)


class Metrics:
    """What is recorded when."""

    def __init__(self, meter: Meter | None = None) -> None:
        self._record = (meter or Nowhere()).record
        self._mean: float | None = None

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        method = method if method in _METHODS else "other"
        self._record(REQUESTS, 1, {"route": route, "method": method, "status": str(status)})
        self._record(REQUEST_SECONDS, seconds, {"route": route})

    def answers(self, told: Sequence[Told], stages: Mapping[str, float]) -> None:
        """Answers that were computed together, and the seconds that each stage took for all of them."""
        self._record(TOGETHER, len(told), {})
        for stage, seconds in stages.items():
            self._record(STAGE_SECONDS, seconds, {"stage": stage})
        answers = [one.answer for one in told]
        for (variant, known), count in Counter((one.variant, one.answer.known) for one in told).items():
            self._record(ANSWERS, count, {"variant": variant or "", "known": str(known).lower()})
        for name, count in Counter(item.item_type for answer in answers for item in answer.items).items():
            self._record(ITEMS, count, {"item_type": name})
        counts = {
            COLD: sum(answer.cold for answer in answers),
            EMPTY: sum(not answer.items for answer in answers),
            DEGRADED: sum(one.degraded for one in told),
            IGNORED: sum(len(answer.ignored) for answer in answers),
        }
        for metric, count in counts.items():
            if count:
                self._record(metric, count, {})
        for answer in answers:
            if answer.items and not answer.cold:
                score = answer.items[0].score
                self._mean = score if self._mean is None else self._mean + (score - self._mean) / _MEAN_OF
        if self._mean is not None:
            self._record(TOP_SCORE, self._mean, {})

    def events(self, count: int) -> None:
        self._record(EVENTS, count, {})

    def bundle(self, recommender: Recommender) -> None:
        """Records the new bundle and the scores of its canary users."""
        self._mean = None
        self._record(BUNDLE_END, recommender.artifact.counts["end"], {})
        users = read_json(recommender.artifact.path / CANARY)["user_ids"]
        answers = recommender.answers([Question(user_id, k=1, include_seen=False) for user_id in users])
        scores = [a.items[0].score for a in answers if isinstance(a, Answer) and a.items and not a.cold]
        if scores:
            self._record(REFERENCE, sum(scores) / len(scores), {})

    def state(self, live: LiveItems, refused: bool, store: bool | None, damaged: int) -> None:
        """``store``: whether it answers; None: there is none. ``damaged``: rows of it."""
        self._record(REFUSED, float(refused), {})
        self._record(LIVE_ITEMS, len(live.items) + len(live.changed), {})
        self._record(REMOVED_ITEMS, len(live.removed), {})
        if store is not None:
            self._record(STORE_UP, float(store), {})
            self._record(STORE_DAMAGED, damaged, {})
