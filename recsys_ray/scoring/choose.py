"""What validation chooses for the score: the memory's weight, ridge and users that texts stand for, and the weights of
the trends.

Every choice maximises the same measure of the same score: NDCG@100 of the validation queries, each a new item of a
user, ranked within its item type without the items of the user's history. HR@10 is only reported. Early stopping and
``recsys-ray tune`` use the same measure.

The memory's weight and ridge are chosen first, without texts and with the unseen items at their share; then what texts
add to it; then the trend of each type, with this memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor

from recsys_ray.cluster.train import sum_over_ranks
from recsys_ray.scoring import trends, unseen
from recsys_ray.scoring.choices import Choices, nobody_had
from recsys_ray.scoring.memory import RIDGES, TEXT_USERS, WEIGHTS, Memory, Recalled
from recsys_ray.scoring.scorer import TRENDS, UNSEEN, ScoreSpec

DEPTH = 100  # places that gain something
_TOP = 10
_ODDS_CELLS = 1 << 24  # scores held in memory at once when shares are computed


@dataclass(frozen=True)
class Users:
    """Some users with their histories."""

    vectors: Float[Tensor, "B d"]  # of the user tower
    row: Int[np.ndarray, "events"]  # place among the users of each event, ascending
    history: Int[np.ndarray, "events"]  # gids of any type, of each user oldest first

    def __len__(self) -> int:
        return len(self.vectors)

    def part(self, begin: int, end: int) -> Users:
        """The users ``begin <= row < end``."""
        events = slice(*np.searchsorted(self.row, [begin, end]))
        return Users(self.vectors[begin:end], self.row[events] - begin, self.history[events])

    def without_history(self, scores: Float[Tensor, "B n"], first: int) -> Float[Tensor, "B n"]:
        """-inf for what the user has; column 0 is the item with gid ``first``. Overwrites ``scores``."""
        inside = (self.history >= first) & (self.history < first + scores.shape[1])
        scores[self.row[inside], self.history[inside] - first] = -torch.inf
        return scores


@dataclass(frozen=True)
class Queries(Users):
    """Users who are asked about one item type, whose gids are ``first`` and the following."""

    first: int
    count: int  # items of the type
    target: Int64[Tensor, "B"]  # place in the type of what the user chose


@dataclass(frozen=True)
class Moment:
    """The items at a snapshot.

    Attributes:
        memory: with all of ``RIDGES``; None: there is none.
        choices: see recsys_ray/scoring/choices.py.
        with_trends: whether trends are used.
        shares: expected share of unseen items after the snapshot, by type; None for a type without training examples;
            empty: unseen items are not adjusted.
    """

    ntype: Int[np.ndarray, "N"]
    memory: Memory | None
    choices: Choices | None = None
    with_trends: bool = False
    shares: unseen.Shares = ()

    @property
    def types(self) -> int:
        return int(self.ntype.max(initial=-1)) + 1

    def range_of(self, kind: int) -> slice:
        """The gids of a type, which are contiguous."""
        return slice(*np.searchsorted(self.ntype, [kind, kind + 1]).tolist())

    def unseen(self, gids: slice) -> Bool[Tensor, "n"]:
        """Which of these items are unseen."""
        if self.choices is None:
            return torch.zeros(gids.stop - gids.start, dtype=torch.bool)
        return torch.from_numpy(nobody_had(self.choices[:, gids]))


class Chosen(NamedTuple):
    """What validation chose, and HR@10 and NDCG@100 with it (NaN where there is no query)."""

    spec: ScoreSpec
    hit_rate: float
    gain: float


def gain_of(places: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """NDCG@100 of lists with one truth, by its place from 0."""
    return ((places < DEPTH) / torch.log2(places + 2)).double()


def places(
    scores: Float[Tensor, "B N"], target: Int64[Tensor, "B"], recalled: Recalled, first: int, weights: Sequence[float]
) -> Float[Tensor, "B weights ridges"]:
    """The target's place, from 0, with each weight and ridge of the memory; look-alikes of a target stand before it by
    half: they do not all rank first. Places from ``DEPTH`` on are counted up to some number above it.

    Overwrites ``scores``. Of the items that the memory does not raise the best ``2 * DEPTH`` are enough to know.

    Args:
        scores: of the towers and item terms, -inf for the history; column 0 is the item with gid ``first``.
        target: columns.
    """
    count = scores.shape[1]
    here = (recalled.gid >= first) & (recalled.gid < first + count)
    row, column, value = (
        torch.from_numpy(part[here]) for part in (recalled.user, recalled.gid - first, recalled.value)
    )
    everyone = torch.arange(len(target))
    own, raised, is_target = scores[everyone, target], scores[row, column], column == target[row]
    scores[row, column] = -torch.inf
    scores[everyone, target] = -torch.inf
    rest = scores.topk(min(2 * DEPTH, count), dim=1).values
    found = torch.zeros(len(target), len(weights), value.shape[1])
    for place, weight in enumerate(weights):
        for ridge in range(value.shape[1]):
            with_it = raised + weight * value[:, ridge]
            mine = own.index_put((row[is_target],), with_it[is_target])
            rival, limit = with_it[~is_target], mine[row[~is_target]]
            ahead = (rest > mine[:, None]).sum(1) + (rest == mine[:, None]).sum(1) / 2
            found[:, place, ridge] = ahead.index_add(0, row[~is_target], (rival > limit).float() + (rival == limit) / 2)
    return found


def unseen_term(
    users: Users, vectors: Float[Tensor, "N d"], moment: Moment, temperature: float
) -> Float32[np.ndarray, "N"]:
    """The unseen-share term of each item (recsys_ray/scoring/unseen.py): one number for the unseen items of a type, so
    that they have their share on average over ``users``; in types without training examples also a popularity
    correction for the other items. 0 if no shares are known, or if a type has only unseen items or none."""
    given = np.zeros(len(vectors), np.float32)
    if not len(moment.shares) or not len(users):
        return given
    assert moment.choices is not None
    for kind in range(moment.types):
        gids = moment.range_of(kind)
        new, had = moment.unseen(gids), moment.choices[0, gids]
        share = moment.shares[kind] if kind < len(moment.shares) else None
        popular = torch.zeros(len(had))
        if share is None:
            share = unseen.share_of_events(had)
            popular = unseen.popular_in_type(vectors[gids], had, users.vectors.mean(0), temperature)
        if new.any() and not new.all():
            odds, step = [], max(1, _ODDS_CELLS // len(new))
            for begin in range(0, len(users), step):
                some = users.part(begin, min(begin + step, len(users)))
                scores = some.without_history(some.vectors @ vectors[gids].T + popular, gids.start) / temperature
                odds.append(scores[:, new].logsumexp(1) - scores[:, ~new].logsumexp(1))
            popular += new * temperature * unseen.shift_to_share(share, torch.cat(odds))
        given[gids] = popular.numpy()
    return given


def expected_shares(
    queries: Sequence[Queries], vectors: Float[Tensor, "N d"], moment: Moment, temperature: float
) -> Float[Tensor, "N"]:
    """The sum over users of the towers' softmax over the type's items that are not unseen, without those of the
    history; 0 for unseen items."""
    shares = torch.zeros(len(vectors), dtype=torch.float64)
    for asked in queries:
        gids = slice(asked.first, asked.first + asked.count)
        new = moment.unseen(gids)
        if new.all():
            continue
        scores = asked.without_history(asked.vectors @ vectors[gids].T / temperature, asked.first)
        scores[:, new] = -torch.inf
        shares[gids] += scores.softmax(1).nan_to_num().double().sum(0)  # NaN: the history has them all
    return shares


def trend_ratios(
    queries: Sequence[Queries], vectors: Float[Tensor, "N d"], moment: Moment, temperature: float, all_ranks: bool
) -> Float32[np.ndarray, "N"]:
    """log r of every item (recsys_ray/scoring/trends.py), by these users; ``all_ranks``: by those of all ranks."""
    assert moment.choices is not None
    expected = expected_shares(queries, vectors, moment, temperature)
    expected = sum_over_ranks(expected) if all_ranks else expected
    return trends.log_ratios(moment.choices, expected.numpy(), moment.ntype)


def item_terms(
    queries: Sequence[Queries], users: Users, vectors: Float[Tensor, "N d"], moment: Moment, spec: ScoreSpec
) -> dict[str, Float32[np.ndarray, "N"]]:
    """The item terms as of a snapshot, as the spec has them. By this rank's users.

    Args:
        queries: some users by queried item type, for trends.
        users: some users, for the share of unseen items.
    """
    found = dict[str, Float32[np.ndarray, "N"]]()
    if any(spec.trends):
        ratios = trend_ratios(queries, vectors, moment, spec.temperature, all_ranks=False)
        weight = np.zeros(moment.types, np.float32)
        weight[: len(spec.trends)] = spec.trends
        found[TRENDS] = weight[moment.ntype] * np.float32(spec.temperature) * ratios
    if len(moment.shares):
        found[UNSEEN] = unseen_term(users, vectors, moment, spec.temperature)
    return found


def recalled_by(asked: Queries, memory: Memory | None, half_life: float | None) -> Recalled:
    """The items of the queried type that the memory raises for these histories; nothing without a memory."""
    if memory is None:
        return Recalled.nothing()
    return memory.recall(asked.row, asked.history, half_life, slice(asked.first, asked.first + asked.count))


@torch.no_grad()
def choose(
    queries: Sequence[Queries],
    some: Sequence[Queries],
    users: Users,
    vectors: Float[Tensor, "N d"],
    moment: Moment,
    spec: ScoreSpec,
) -> Chosen:
    """What validation chooses. Over all ranks, and the same on each.

    Args:
        queries: of the validation period.
        some: a sample of them, from which trends are computed.
        users: users of the sample, for the share of unseen items.
        vectors: of the items as of the validation period, by towers that were not trained on it.
        moment: as of the validation period.
        spec: temperature and half-life.
    """
    number = sum_over_ranks(torch.tensor(float(sum(map(len, queries))), dtype=torch.float64))
    if not number:
        return Chosen(spec, float("nan"), float("nan"))
    given = torch.from_numpy(unseen_term(users, vectors, moment, spec.temperature))
    weights, ridges = (WEIGHTS, RIDGES) if moment.memory is not None else ((0.0,), (0.0,))
    scaled = [spec.temperature * weight for weight in weights]
    hits, gains = _sums(queries, vectors, given, moment.memory, spec.half_life, scaled)
    weight, ridge = (gains == gains.max()).nonzero()[0].tolist()  # of equal ones the smallest
    spec = replace(spec, memory=scaled[weight], ridge=ridges[ridge])
    hit, gain = hits[weight, ridge], gains[weight, ridge]
    memory = None
    if moment.memory is not None and spec.memory:
        ways = moment.memory.at(spec.ridge, TEXT_USERS)
        hits, gains = (part[0] for part in _sums(queries, vectors, given, ways, spec.half_life, [spec.memory]))
        best = int(gains.argmax())  # of equal ones the fewest
        hit, gain, spec = hits[best], gains[best], replace(spec, text_users=TEXT_USERS[best])
        memory = moment.memory.at(spec.ridge, [spec.text_users])
    if moment.with_trends:
        ratios = torch.from_numpy(trend_ratios(some, vectors, moment, spec.temperature, all_ranks=True))
        spec, hit, gain = _with_trends(queries, vectors, given, ratios, memory, moment, spec)
    return Chosen(spec, float(hit / number), float(gain / number))


def _sums(
    queries: Sequence[Queries],
    vectors: Float[Tensor, "N d"],
    given: Float[Tensor, "N"],
    memory: Memory | None,
    half_life: float | None,
    weights: Sequence[float],
) -> tuple[Float[Tensor, "weights columns"], Float[Tensor, "weights columns"]]:
    """Hits and gains with each weight and column of the memory, over all queries of all ranks."""
    columns = 1 if memory is None else memory.coefficient.shape[1]
    found = [_places_of(asked, vectors, [given], memory, half_life, weights)[0] for asked in queries]
    at = torch.cat(found or [torch.zeros(0, len(weights), columns)])
    return sum_over_ranks((at < _TOP).sum(0).double()), sum_over_ranks(gain_of(at).sum(0))


def _with_trends(
    queries: Sequence[Queries],
    vectors: Float[Tensor, "N d"],
    given: Float[Tensor, "N"],
    ratios: Float[Tensor, "N"],
    memory: Memory | None,
    moment: Moment,
    spec: ScoreSpec,
) -> tuple[ScoreSpec, Float[Tensor, ""], Float[Tensor, ""]]:
    """The spec with the weight of each type's trend, and the hits and gains with it. ``memory``: what was chosen."""
    ways = [given + weight * spec.temperature * ratios for weight in trends.WEIGHTS]
    hits, gains = torch.zeros(2, moment.types, len(ways), dtype=torch.float64)
    together = torch.zeros(moment.types, len(ways), len(ways), dtype=torch.float64)
    for asked in queries:
        kind = int(moment.ntype[asked.first])
        at = _places_of(asked, vectors, ways, memory, spec.half_life, [spec.memory])[:, :, 0, 0].T
        gained = gain_of(at)
        hits[kind] += (at < _TOP).sum(0)
        gains[kind] += gained.sum(0)
        together[kind] += gained.T @ gained
    hits, gains, together = (sum_over_ranks(part) for part in (hits, gains, together))
    told = [first_as_good(*of_type) > 0 for of_type in zip(gains, together, strict=True)]
    best = [int(own.argmax()) if tells else 0 for own, tells in zip(gains, told, strict=True)]
    spec = replace(spec, trends=[trends.WEIGHTS[way] for way in best] if any(best) else [])
    hit, gain = (part[torch.arange(moment.types), torch.tensor(best)].sum() for part in (hits, gains))
    return spec, hit, gain


def _places_of(
    asked: Queries,
    vectors: Float[Tensor, "N d"],
    ways: Sequence[Float[Tensor, "N"]],
    memory: Memory | None,
    half_life: float | None,
    weights: Sequence[float],
) -> Float[Tensor, "ways B weights ridges"]:
    """The places of the queries' targets with each of several sums of item terms. What the memory raises takes most of
    the time and is the same for all of them."""
    gids = slice(asked.first, asked.first + asked.count)
    scores, recalled = asked.vectors @ vectors[gids].T, recalled_by(asked, memory, half_life)
    found = []
    for way in ways:
        with_it = asked.without_history(scores + way[gids], asked.first)
        found.append(places(with_it, asked.target, recalled, asked.first, weights))
    return torch.stack(found)


def first_as_good(gains: Float[Tensor, "choices"], together: Float[Tensor, "choices choices"]) -> int:
    """The first choice whose gain is less than one standard error behind the most: the rule of Breiman et al.
    (Classification and Regression Trees, 1984), with the error of the difference between two choices on the same
    queries.

    Args:
        gains: sum over the queries with each choice.
        together: sum over the queries of the product of two choices' gains.
    """
    best, squares = int(gains.argmax()), together.diagonal()
    error = (squares + squares[best] - 2 * together[best]).clamp(min=0).sqrt()
    return int((gains[best] - gains <= error).nonzero()[0])
