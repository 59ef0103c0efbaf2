"""The demo data's catalogue and its users with hidden tastes. Their events are in ``events.py``.

**Items** have a topic (theme, subtopic), a style (a point on the unit sphere near one of a few scenes), a language and
a popularity. Titles tell the topic and a little of the style; the rest of the style shows only in who listens to what.
**Users** follow a few topics whose weights drift over the year, have one style taste across all types, and come from a
country (language, favourite themes) and an age (favourite themes).

Everything is a function of the seed: the catalogue has its own generator, the users of shard s have ``[seed, USERS,
s]``. BLAS matrix products are not used, because their last bits may depend on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from recsys_ray.core.clock import DAY
from recsys_ray.demo.texts import LANGUAGES, THEME_AGES, THEMES, split_topic

END = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp())  # events are before it
START = END - 365 * DAY
TYPES = ("audiobook", "music", "podcast")
AUDIOBOOK, MUSIC, PODCAST = range(3)
CATALOGUE, USERS, TEXT, SAMPLE, KNOWN = range(5)  # kinds of random draws; each has generators of its own

# country, its share of the users, its language
_COUNTRIES = (
    *(("US", 0.27, "en"), ("GB", 0.11, "en"), ("CA", 0.05, "en"), ("AU", 0.04, "en"), ("IN", 0.09, "hi")),
    *(("DE", 0.11, "de"), ("AT", 0.02, "de"), ("FR", 0.08, "fr"), ("ES", 0.05, "es"), ("MX", 0.05, "es")),
    *(("BR", 0.07, "pt"), ("JP", 0.06, "ja")),
)
COUNTRIES = tuple(name for name, _, _ in _COUNTRIES)
_ITEM_LANGUAGES = {"en": 0.64, "de": 0.09, "fr": 0.06, "es": 0.08, "pt": 0.05, "ja": 0.04, "hi": 0.04}
_STYLE_DIM, _SCENES, TASTE_DIM = 8, 8, 16
_TOPIC_SPREAD = 1.2  # standard deviation of the log of a topic's audience
_SCENE_SKEW = 1.0  # the n-th scene has n to this power times fewer users than the first
_ITEM_NOISE, _USER_NOISE = 0.2, 0.12  # distance of items and users from their scene, per dimension
_INTERESTS = 5  # topics that a user follows
_POPULARITY_SPREAD = 1.7  # standard deviation of log popularity
_TYPE_SHARE = np.array([0.0, 0.48, 0.52])  # of a user's visits, before audiobooks
_EVENTS_PER_VISIT = 0.95

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class WorldSpec:
    """Size and seed of a world; see :func:`spec_for`. ``events`` is met within a few per cent."""

    users: int
    items: dict[str, int] = field(hash=False)
    events: int
    seed: int
    topics: int
    users_per_shard: int
    test_days: int = 14
    taste_noise: float = 0.4  # beside what a taste vector knows, which is about 1 in each dimension

    @property
    def shards(self) -> int:
        return -(-self.users // self.users_per_shard)

    @property
    def test_from(self) -> int:
        """First second of the test period."""
        return END - self.test_days * DAY


def spec_for(events: int, seed: int, taste_noise: float = WorldSpec.taste_noise) -> WorldSpec:
    """The world for a number of events: users grow with it, items more slowly, topics with the items.

    Args:
        taste_noise: how little the users' taste vectors tell of what they like.

    Raises:
        ValueError: fewer than 1,000 events, too few for every part of the world to exist, or a negative seed.
    """
    if seed < 0:
        raise ValueError(f"the seed must not be negative, but is {seed}")
    if events < 1_000:
        raise ValueError(f"the demo data need at least 1,000 events, not {events}")
    users = max(40, events // 40)
    total = round(2.5 * events**0.6)
    items = {"audiobook": total // 5, "music": total * 2 // 5, "podcast": total * 2 // 5}
    topics = min(max(total // 90, len(THEMES)), len(THEMES) * 8 * 20, min(items.values()))
    return WorldSpec(users, items, events, seed, topics, min(20_000, -(-users // 8)), taste_noise=taste_noise)


@dataclass(frozen=True)
class WorldItems:
    """Hidden and visible traits of every item, sorted by (type, topic): arrays of one entry per item.

    ``cells[type * topics + topic]`` is the first item of a topic within a type; ``topic_share`` [types, topics] is how
    likely each topic is within its theme.
    """

    type: NDArray[np.int8]
    topic: NDArray[np.int32]
    number: NDArray[np.int64]  # shuffled within the type, so that ids tell nothing
    style: Floats  # [items, _STYLE_DIM], unit norm
    popularity: Floats  # log
    language: NDArray[np.int8]
    published: Ints
    withdrawn: Ints  # END where the item stays
    cells: Ints  # [types * topics + 1]
    topic_share: Floats  # [types, topics]
    theme: NDArray[np.int8]  # [topics]
    country_taste: Floats  # [countries, themes]
    scenes: Floats  # [_SCENES, _STYLE_DIM]
    projection: Floats  # [themes + _STYLE_DIM, TASTE_DIM]

    def item_ids(self) -> NDArray[np.str_]:
        return np.array([f"{TYPES[t]}-{n:07d}" for t, n in zip(self.type, self.number, strict=True)])

    def span(self, kind: int) -> slice:
        """The items of a type."""
        topics = len(self.theme)
        return slice(int(self.cells[kind * topics]), int(self.cells[(kind + 1) * topics]))


def catalogue_of(spec: WorldSpec) -> WorldItems:
    """The catalogue of a spec; the last one is kept, because every shard of a worker needs it."""
    return _catalogue(spec.seed, tuple(spec.items[name] for name in TYPES), spec.topics, spec.test_from)


@lru_cache(maxsize=1)
def _catalogue(seed: int, sizes: tuple[int, ...], topics: int, test_from: int) -> WorldItems:
    rng = np.random.default_rng([seed, CATALOGUE])
    kind = np.repeat(np.arange(3, dtype=np.int8), sizes)
    n = len(kind)
    weight, demand = np.exp(rng.normal(0, 0.3, topics)), np.exp(rng.normal(0, _TOPIC_SPREAD, topics))
    # every topic has an item in every type, so that no cell is empty
    topic = np.concatenate(
        [np.r_[:topics, rng.choice(topics, size - topics, p=weight / weight.sum())] for size in sizes]
    )
    order = np.lexsort((topic, kind))
    topic = topic[order].astype(np.int32)
    theme = np.array([split_topic(t)[0] for t in range(topics)], np.int8)
    share = np.stack([_normalised_by(demand * np.exp(rng.normal(0, 0.4, topics)), theme) for _ in TYPES])
    scenes = _unit(rng.normal(size=(_SCENES, _STYLE_DIM)))
    style = _unit(scenes[rng.integers(0, _SCENES, n)] + _ITEM_NOISE * rng.normal(size=(n, _STYLE_DIM)))
    shares = np.array([_ITEM_LANGUAGES[name] for name in LANGUAGES])
    published = _publish(kind, rng)
    gone = rng.random(n) < 0.015
    leave = published + (rng.random(n) * np.maximum(test_from - published, 1)).astype(np.int64)
    return WorldItems(
        type=kind,
        topic=topic,
        number=np.concatenate([rng.permutation(size) for size in sizes]),
        style=style,
        popularity=rng.normal(0, _POPULARITY_SPREAD, n).astype(np.float32),
        language=rng.choice(len(LANGUAGES), n, p=shares / shares.sum()).astype(np.int8),
        published=published,
        withdrawn=np.where(gone & (published < test_from), np.maximum(leave, START), END),
        cells=np.r_[0, np.cumsum(np.bincount(kind.astype(np.int64) * topics + topic, minlength=3 * topics))],
        topic_share=share.astype(np.float32),
        theme=theme,
        country_taste=rng.normal(0, 0.7, (len(COUNTRIES), len(THEMES))).astype(np.float32),
        scenes=scenes,
        projection=rng.normal(0, 1, (len(THEMES) + _STYLE_DIM, TASTE_DIM)).astype(np.float32),
    )


def _publish(kind: NDArray[np.int8], rng: np.random.Generator) -> Ints:
    """Publication times: audiobooks mostly in the second half of the year, much of the rest before the first day."""
    n = len(kind)
    in_year = rng.random(n) * 365
    before = -(rng.random(n) ** 2) * 1500
    late = 182 + rng.random(n) * 183
    old, draw = rng.random(n) < 0.6, rng.random(n)
    audiobook = np.where(draw < 0.15, 60 + rng.random(n) * 122, late)
    days = np.where(kind == AUDIOBOOK, audiobook, np.where(old, before, in_year))
    return (START + days * DAY).astype(np.int64)


@dataclass(frozen=True)
class Users:
    """Hidden and visible traits of the users of one shard: arrays of one entry per user."""

    first: int  # number of the first user
    country: NDArray[np.int8]
    language: NDArray[np.int8]
    age: Floats  # years
    arrival: Ints
    visits: Ints
    type_share: Floats  # [users, types], once audiobooks are adopted
    adopted: Ints  # when the user takes to audiobooks; END where never
    interests: NDArray[np.int32]  # [users, _INTERESTS] topics
    weights: Floats  # [2, types, users, _INTERESTS]: on the first and on the last day of the year
    themes: Floats  # [users, themes], what background visits come from
    style: Floats  # [users, _STYLE_DIM], unit norm
    taste: Floats  # [users, TASTE_DIM], what other systems know of the user's music taste

    def __len__(self) -> int:
        return len(self.arrival)


def users_of(spec: WorldSpec, catalogue: WorldItems, shard: int, rng: np.random.Generator) -> Users:
    """Draw the users of a shard."""
    first = shard * spec.users_per_shard
    n = min(spec.users_per_shard, spec.users - first)
    country = rng.choice(len(COUNTRIES), n, p=[share for _, share, _ in _COUNTRIES]).astype(np.int8)
    age = np.clip(rng.gamma(9.0, 4.2, n), 13, 90).astype(np.float32)
    affinity = catalogue.country_taste[country] + rng.normal(0, 0.9, (n, len(THEMES)))
    affinity -= 0.5 * ((age[:, None] - np.array(THEME_AGES)) / 12.0) ** 2
    themes = np.exp(affinity - affinity.max(axis=1, keepdims=True))
    themes /= themes.sum(axis=1, keepdims=True)
    audience = np.arange(1.0, _SCENES + 1) ** -_SCENE_SKEW
    style = _unit(
        catalogue.scenes[rng.choice(_SCENES, n, p=audience / audience.sum())]
        + _USER_NOISE * rng.normal(size=(n, _STYLE_DIM))
    )
    arrival = START + np.where(rng.random(n) < 0.4, rng.random(n) * 20, rng.random(n) * 364.5) * DAY
    rate = np.exp(rng.normal(0, 0.7, n) - 0.245) * (END - arrival) / (END - START)
    mean = spec.events / spec.users / _EVENTS_PER_VISIT / 0.692  # .692: average share of the year that is left
    share, adopted = _adoption(arrival.astype(np.int64), rng)
    known = _unit(np.concatenate([themes * 4, style], axis=1))
    taste = np.einsum("ut,td->ud", known, catalogue.projection)
    return Users(
        first=first,
        country=country,
        language=np.array([LANGUAGES.index(name) for _, _, name in _COUNTRIES], np.int8)[country],
        age=age,
        arrival=arrival.astype(np.int64),
        visits=np.maximum(1, rng.poisson(rate * mean)),
        type_share=share,
        adopted=adopted,
        interests=_interests(catalogue, themes, rng),
        weights=_interest_weights(n, rng),
        themes=themes.astype(np.float32),
        style=style,
        taste=_unit(taste + spec.taste_noise * rng.normal(size=taste.shape)),
    )


def _adoption(arrival: Ints, rng: np.random.Generator) -> tuple[Floats, Ints]:
    """Shares of the types, and when a user starts with audiobooks: mostly those who love podcasts."""
    n = len(arrival)
    podcast = np.clip(rng.normal(_TYPE_SHARE[PODCAST], 0.22, n), 0.03, 0.97)
    audiobook = 0.25 + 0.25 * rng.random(n)
    share = np.stack([audiobook, (1 - audiobook) * (1 - podcast), (1 - audiobook) * podcast], axis=1)
    adopts = rng.random(n) < np.where(podcast > 0.35, 0.55, 0.05)
    earliest = np.maximum(arrival + 15 * DAY, START + 75 * DAY)
    moment = earliest + rng.random(n) ** 0.7 * (END - earliest)
    return share.astype(np.float32), np.where(adopts & (earliest < END), moment, END).astype(np.int64)


def _interests(catalogue: WorldItems, themes: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int32]:
    """Topics that each user follows: a theme by affinity, then a topic of it."""
    n = len(themes)
    chosen = draw_rows(themes[:, None, :], rng.random((n, _INTERESTS)))
    return topic_in_theme(catalogue, np.full(chosen.shape, MUSIC), chosen, rng.random(chosen.shape)).astype(np.int32)


def _interest_weights(n: int, rng: np.random.Generator) -> Floats:
    """Weights of the interests at both ends of the year: drifting, and alike in all types."""
    base = rng.gamma(0.9, size=(1, n, _INTERESTS)) + 1e-6
    ends = np.concatenate([base, base * np.exp(rng.normal(0, 0.4, base.shape))])
    by_type = ends[:, None] * np.exp(rng.normal(0, 0.25, (1, 3, n, _INTERESTS)))
    return (by_type / by_type.sum(axis=-1, keepdims=True)).astype(np.float32)


def topic_in_theme(
    catalogue: WorldItems, kind: NDArray[np.int64], theme: Ints, draw: NDArray[np.float64]
) -> NDArray[np.int64]:
    """A topic of each theme, by its share within the type."""
    out = np.empty(theme.shape, np.int64)
    for k in range(len(TYPES)):
        for t in range(len(THEMES)):
            here = (kind == k) & (theme == t)
            topics = np.flatnonzero(catalogue.theme == t)
            if here.any():
                total = np.cumsum(catalogue.topic_share[k, topics].astype(np.float64))
                out[here] = topics[np.searchsorted(total[:-1], draw[here] * total[-1], side="right")]
    return out


def draw_rows(weights: NDArray[np.floating], draw: NDArray[np.float64]) -> NDArray[np.int64]:
    """Index j with probability weights[row, 0, j], once per uniform draw [rows, k]. Weights [rows, 1, n]."""
    total = np.cumsum(weights, axis=-1, dtype=np.float64)
    return (total[..., :-1] <= draw[..., None] * total[..., -1:]).sum(axis=-1)


def _normalised_by(weight: NDArray[np.float64], group: NDArray[np.int8]) -> NDArray[np.float64]:
    """Weights that sum to 1 within each group."""
    return weight / np.bincount(group, weight)[group]


def _unit(rows: NDArray[np.floating]) -> Floats:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
