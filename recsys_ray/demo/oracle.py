"""The best possible ranking for the demo data, and how often it hits.

The oracle knows each user's true taste and past events, and ranks the items of a type by the probability that the
user's next discovery in the test period is that item. It does not know the future, so it cannot always be right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from recsys_ray.core.clock import DAY
from recsys_ray.demo.events import BACKGROUND, STREAM, Events, match, presence
from recsys_ray.demo.world import END, SAMPLE, START, TYPES, Ints, Users, WorldItems, WorldSpec

LIST_LENGTH = 100
HITS_AT = 10
MAX_USERS = 50_000  # of the whole world; larger worlds are sampled
_BLOCK = 2_000_000  # scores at a time: users times items


@dataclass
class Rankings:
    """One entry per (user, type) with a stream in the test period. ``user`` counts within the shard."""

    user: list[int] = field(default_factory=list)
    kind: list[int] = field(default_factory=list)
    items: list[NDArray[np.int64]] = field(default_factory=list)  # catalogue rows, best first
    # type -> [pairs with a newly streamed item, pairs of these with one in the first ten]
    counted: NDArray[np.int64] = field(default_factory=lambda: np.zeros((len(TYPES), 2), np.int64))


def rank(spec: WorldSpec, shard: int, catalogue: WorldItems, users: Users, events: Events) -> Rankings:
    """Rankings for the users of a shard that streamed in the test period (a seeded sample of them in large worlds)."""
    before = events.time < spec.test_from
    touched = np.unique(events.user[before] * len(catalogue.type) + events.item[before])
    streamed = np.unique((events.user * len(catalogue.type) + events.item)[~before & (events.event == STREAM)])
    sampled = np.random.default_rng([spec.seed, SAMPLE, shard]).random(len(users)) < MAX_USERS / spec.users
    streamed = streamed[sampled[streamed // len(catalogue.type)]]
    out = Rankings()
    for kind in range(len(TYPES)):
        items = catalogue.span(kind)
        pairs = np.divmod(streamed, len(catalogue.type))
        inside = (pairs[1] >= items.start) & (pairs[1] < items.stop)
        new = streamed[inside & ~np.isin(streamed, touched)]
        for rows in _blocks(np.unique(pairs[0][inside]), items.stop - items.start):
            known = _slots(touched, rows, items, len(catalogue.type))
            scores = _scores(spec, catalogue, users, rows, kind)
            scores[known] = 0
            order = _best(scores)
            target = np.zeros(scores.shape, bool)
            target[_slots(new, rows, items, len(catalogue.type))] = True
            hit = np.take_along_axis(target, order[:, :HITS_AT], axis=1).any(axis=1)
            has = target.any(axis=1)
            out.counted[kind] += [has.sum(), (hit & has).sum()]
            out.user += rows.tolist()
            out.kind += [kind] * len(rows)
            possible = np.take_along_axis(scores, order, axis=1) > 0
            out.items += [items.start + line[ok] for line, ok in zip(order, possible, strict=True)]
    return out


def _blocks(rows: Ints, width: int) -> Iterator[Ints]:
    step = max(1, _BLOCK // width)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _slots(codes: Ints, rows: Ints, items: slice, width: int) -> tuple[Ints, Ints]:
    """Places in the [rows, items] matrix of the (user, item) codes that are inside it. ``rows`` ascend."""
    low, high = np.searchsorted(codes, [rows[0] * width, (rows[-1] + 1) * width])
    user, item = np.divmod(codes[low:high], width)
    at = np.minimum(np.searchsorted(rows, user), len(rows) - 1)
    inside = (rows[at] == user) & (item >= items.start) & (item < items.stop)
    return at[inside], item[inside] - items.start


def _best(scores: NDArray[np.float64]) -> Ints:
    """Columns of the LIST_LENGTH highest scores of each row, best first; the first of equals wins."""
    if scores.shape[1] > LIST_LENGTH:
        top = np.sort(np.argpartition(-scores, LIST_LENGTH, axis=1)[:, :LIST_LENGTH], axis=1)
    else:
        top = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    order = np.argsort(-np.take_along_axis(scores, top, axis=1), axis=1, kind="stable")
    return np.take_along_axis(top, order, axis=1)


def _scores(spec: WorldSpec, catalogue: WorldItems, users: Users, rows: Ints, kind: int) -> NDArray[np.float64]:
    """Probability of each item of the type to be what a user turns to next in the test period, [rows, items]."""
    items, topics = catalogue.span(kind), len(catalogue.theme)
    days = spec.test_from + np.arange(spec.test_days) * DAY + DAY // 2
    visible = presence(catalogue, items, days)
    # mean over the days from the user's arrival on
    from_day = np.cumsum(visible[::-1], axis=0)[::-1] / np.arange(spec.test_days, 0, -1)[:, None]
    arrived = np.clip((users.arrival[rows] - spec.test_from) // DAY, 0, spec.test_days - 1)
    live = match(catalogue, users, rows, items) * from_day[arrived]
    starts = catalogue.cells[kind * topics : (kind + 1) * topics] - items.start
    total = np.add.reduceat(live, starts, axis=1)
    share = _topic_chances(catalogue, users, rows, kind, spec.test_from + spec.test_days * DAY // 2)
    per_topic = np.divide(share, total, out=np.zeros_like(total), where=total > 0)
    return live * per_topic[:, catalogue.topic[items]]


def _topic_chances(catalogue: WorldItems, users: Users, rows: Ints, kind: int, time: int) -> NDArray[np.float64]:
    """Probability of each topic for a discovery at a time, [rows, topics]."""
    passed = (time - START) / (END - START)
    weights = (1 - passed) * users.weights[0, kind, rows] + passed * users.weights[1, kind, rows]
    weights = weights / weights.sum(axis=1, keepdims=True)
    chances = BACKGROUND * users.themes[rows][:, catalogue.theme] * catalogue.topic_share[kind]
    chances = chances.astype(np.float64)
    np.add.at(chances, (np.arange(len(rows))[:, None], users.interests[rows]), (1 - BACKGROUND) * weights)
    return chances
