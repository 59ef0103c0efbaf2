"""Events of the demo data: users visit items of their topics, stream them, follow, preview, come back.

A *visit* is a user's contact with an item. Its topic is one of the user's interests or, now and then, any topic of a
theme they like; its item is drawn from the topic's published items in proportion to
``popularity * exp(style match) * language match * novelty``.
The first visit to an item becomes a stream, a weak signal followed by a stream days later, or a weak signal alone; a
further visit becomes a stream or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recsys_ray.demo.texts import LANGUAGES
from recsys_ray.demo.world import (
    AUDIOBOOK,
    DAY,
    END,
    MUSIC,
    START,
    USERS,
    Ints,
    Users,
    WorldItems,
    WorldSpec,
    catalogue_of,
    draw_rows,
    topic_in_theme,
    users_of,
)

EVENTS = ("follow", "intent_to_pay", "preview", "stream")
FOLLOW, INTENT, PREVIEW, STREAM = range(4)
BACKGROUND = 0.47  # share of visits outside the user's interests
_STYLE_STRENGTH = 4.0  # log-odds between an item of the user's style and a neutral one
_NOVELTY, _NOVELTY_DAYS = 2.0, 21  # a new item is found this much more often while it is this young
_AGAIN = np.array([0.0, 0.6, 0.5])  # chance that a visit to a known item is a stream; else nothing happens
_FOLLOWED = np.array([0.02, 0.05, 0.1])  # chance that a stream leads to a follow
# outcomes of a discovery: stream at once, weak signal then stream, else weak signal alone
_DIRECT, _WEAK_FIRST = 0.55, 0.22
_WEAK_KINDS = np.array([[0.1, 0.5, 0.4], [0.4, 0.0, 0.6], [0.5, 0.0, 0.5]])  # type -> follow, intent_to_pay, preview


@dataclass(frozen=True)
class Events:
    """Parallel arrays, sorted by (user, time). ``user`` counts within the shard, ``item`` is a catalogue row."""

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    event: NDArray[np.int8]
    time: Ints


def shard_of(spec: WorldSpec, shard: int) -> tuple[WorldItems, Users, Events]:
    """Everything that happens to the users of one shard."""
    catalogue = catalogue_of(spec)
    rng = np.random.default_rng([spec.seed, USERS, shard])
    users = users_of(spec, catalogue, shard, rng)
    user, item, time = _visit(catalogue, users, rng)
    events = _react(catalogue, user, item, time, rng)
    if shard == 0:
        # The world's last second has an event, so that "the last 14 days" mean the same to every reader.
        events.time[np.argmax(events.time)] = END - 1
        order = np.lexsort((events.time, events.user))
        events = Events(events.user[order], events.item[order], events.event[order], events.time[order])
    return catalogue, users, events


def _visit(catalogue: WorldItems, users: Users, rng: np.random.Generator) -> tuple[Ints, Ints, Ints]:
    """Visits: user, item, time, sorted by (user, time)."""
    user = np.repeat(np.arange(len(users)), users.visits)
    time = _sessions(users, user, rng)
    order = np.lexsort((time, user))
    user, time = user[order], time[order]
    share = users.type_share[user].astype(np.float64)
    share[time < users.adopted[user], AUDIOBOOK] = 0
    kind = draw_rows(share[:, None, :], rng.random((len(user), 1)))[:, 0]
    topic = _draw_topics(catalogue, users, user, kind, time, rng)
    item = _draw_items(catalogue, users, user, kind * len(catalogue.theme) + topic, time, rng)
    found = item >= 0
    return user[found], item[found], time[found]


def _sessions(users: Users, user: Ints, rng: np.random.Generator) -> Ints:
    """Times of visits: a few sessions per user, the first on arrival, mostly in the evening."""
    sessions = np.maximum(1, users.visits // 2)
    starts = np.r_[0, np.cumsum(sessions)]
    owner = np.repeat(np.arange(len(users)), sessions)
    begin = users.arrival[owner] + (rng.random(len(owner)) * (END - 1 - users.arrival[owner])).astype(np.int64)
    evening = begin // DAY * DAY + (rng.triangular(5, 19, 24, len(owner)) * 3600).astype(np.int64)
    begin = np.where(evening >= users.arrival[owner], evening, begin)
    begin[starts[:-1]] = users.arrival
    chosen = starts[user] + (rng.random(len(user)) * sessions[user]).astype(np.int64)
    chosen[np.r_[0, np.cumsum(users.visits)[:-1]]] = starts[:-1]  # every user has an event on arrival
    return np.minimum(begin[chosen] + rng.exponential(1500, len(user)).astype(np.int64), END - 1)


def _draw_topics(
    catalogue: WorldItems, users: Users, user: Ints, kind: Ints, time: Ints, rng: np.random.Generator
) -> Ints:
    passed = ((time - START) / (END - START))[:, None]
    weights = (1 - passed) * users.weights[0, kind, user] + passed * users.weights[1, kind, user]
    slot = draw_rows(weights[:, None, :], rng.random((len(user), 1)))[:, 0]
    theme = draw_rows(users.themes[user][:, None, :].astype(np.float64), rng.random((len(user), 1)))[:, 0]
    anything = topic_in_theme(catalogue, kind, theme, rng.random(len(user)))
    return np.where(rng.random(len(user)) < BACKGROUND, anything, users.interests[user, slot])


def match(catalogue: WorldItems, users: Users, rows: Ints, items: slice) -> NDArray[np.float64]:
    """How much each of the users likes each of the items, times their popularity: positive, [rows, items]."""
    style = np.einsum("ud,id->ui", users.style[rows], catalogue.style[items])
    native = users.language[rows][:, None] == catalogue.language[items]
    second = np.where(users.language[rows] == LANGUAGES.index("hi"), 0.7, 0.3)[:, None]
    kind = int(catalogue.type[items.start])
    language = np.where(native, 1.0, np.where(catalogue.language[items] == 0, second, 0.2 if kind == MUSIC else 0.03))
    return np.exp(_STYLE_STRENGTH * style + catalogue.popularity[items]) * language


def presence(catalogue: WorldItems, items: slice, time: Ints) -> NDArray[np.float64]:
    """How visible items are at given times: 0 before publication and after withdrawal, more while new. [time, items]"""
    age = time[:, None] - catalogue.published[items]
    there = (age >= 0) & (time[:, None] < catalogue.withdrawn[items])
    return np.where(there, np.where(age < _NOVELTY_DAYS * DAY, _NOVELTY, 1.0), 0.0)


def _draw_items(
    catalogue: WorldItems, users: Users, user: Ints, cell: Ints, time: Ints, rng: np.random.Generator
) -> Ints:
    """One item per visit to a cell (a topic of a type), -1 where the cell has nothing for the user yet."""
    uniform, out = rng.random(len(user)), np.full(len(user), -1)
    order = np.lexsort((time, user, cell))
    edges = np.flatnonzero(np.diff(cell[order], prepend=-1))
    for part in np.split(order, edges[1:]):
        first = int(catalogue.cells[cell[part[0]]])
        items = slice(first, int(catalogue.cells[cell[part[0]] + 1]))
        rows, row = np.unique(user[part], return_inverse=True)
        weight = match(catalogue, users, rows, items)[row] * presence(catalogue, items, time[part])
        pick = draw_rows(weight[:, None, :], uniform[part, None])[:, 0]
        out[part] = np.where(weight[np.arange(len(part)), pick] > 0, first + pick, -1)
    return out


def _react(catalogue: WorldItems, user: Ints, item: Ints, time: Ints, rng: np.random.Generator) -> Events:
    """Visits become events. The first visit of a user to an item is a discovery; later ones may be streams again."""
    n, kind = len(user), catalogue.type[item].astype(np.int64)
    # visits are sorted by (user, time), so the first of each pair is the discovery
    new = np.zeros(n, bool)
    new[np.unique(user * len(catalogue.type) + item, return_index=True)[1]] = True
    outcome = rng.random(n)
    weak, streams = new & (outcome >= _DIRECT), outcome < np.where(new, _DIRECT + _WEAK_FIRST, _AGAIN[kind])
    signal = draw_rows(_WEAK_KINDS[kind][:, None, :], rng.random((n, 1)))[:, 0]
    later = time + np.where(weak, 3600 + rng.exponential(4 * DAY, n), 0).astype(np.int64)
    follows = new & streams & ~weak & (rng.random(n) < _FOLLOWED[kind])
    parts = (
        (np.flatnonzero(streams), STREAM, later[streams]),
        (np.flatnonzero(weak), -1, time[weak]),
        (np.flatnonzero(follows), FOLLOW, time[follows] + 600),
    )
    source = np.concatenate([rows for rows, _, _ in parts])
    code = np.concatenate([signal[rows] if event < 0 else np.full(len(rows), event) for rows, event, _ in parts])
    when = np.concatenate([moments for _, _, moments in parts])
    keep = np.flatnonzero(when < catalogue.withdrawn[item[source]])  # END at the latest
    keep = keep[np.lexsort((code[keep], item[source[keep]], when[keep], user[source[keep]]))]
    return Events(user[source[keep]], item[source[keep]], code[keep].astype(np.int8), when[keep])
