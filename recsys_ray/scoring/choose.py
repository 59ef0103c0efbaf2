"""What validation chooses of the score: the memory's weight and ridge, and the trends' weights.

Every choice maximises the same measure of the same score: NDCG@100 of the validation queries, each one new item of a
user, ranked inside its item type without the items of the user's history. HR@10 is told beside it. So does early
stopping, and so does ``recsys-ray tune``.

First the memory is chosen, with the unseen items at their share; then, with this memory, the trends of each type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor

from recsys_ray.cluster.train import sum_over_ranks
from recsys_ray.scoring import trends, unseen
from recsys_ray.scoring.choices import Choices, nobody_had
from recsys_ray.scoring.memory import RIDGES, WEIGHTS, Memory, Recalled
from recsys_ray.scoring.scorer import MEMORY, TRENDS, UNSEEN, ScoreSpec

DEPTH = 100  # places that gain something
_TOP = 10
_ODDS_CELLS = 1 << 24  # scores held at once where shares are told


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
    """What is known of all items at a snapshot.

    Attributes:
        memory: with all of ``RIDGES``; None: there is none.
        choices: see recsys_ray/scoring/choices.py.
        with_trends: whether the last weeks tell something.
        shares: of each type, of what comes after the snapshot, the part of unseen items; None for a type without
            training examples; empty: unseen items are left alone.
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
        """The gids of a type, which lie together."""
        return slice(*np.searchsorted(self.ntype, [kind, kind + 1]).tolist())

    def unseen(self, gids: slice) -> Bool[Tensor, "n"]:
        """Which of these items nobody had."""
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
    scores: Float[Tensor, "B N"],
    target: Int64[Tensor, "B"],
    recalled: Recalled,
    first: int,
    weights: Sequence[float],
    unseen: Bool[Tensor, "N"] | None = None,
    shifts: Float[np.ndarray, "weights ridges"] | None = None,
) -> Float[Tensor, "B weights ridges"]:
    """The target's place, from 0, with each weight and ridge of the memory; look-alikes of a target stand before it by
    half: they do not all rank first. Places from ``DEPTH`` on are counted up to some number above it.

    Overwrites ``scores``. Of the items that the memory does not raise the best ``2 * DEPTH`` are enough to know.

    Args:
        scores: of the towers and item terms, -inf for the history; column 0 is the item with gid ``first``.
        target: columns.
        unseen: columns of the items that nobody had.
        shifts: what is added to these, with each weight and ridge.
    """
    count = scores.shape[1]
    unseen = torch.zeros(count, dtype=torch.bool) if unseen is None else unseen
    shifts = np.zeros((len(weights), recalled.value.shape[1])) if shifts is None else shifts
    here = (recalled.gid >= first) & (recalled.gid < first + count)
    row, column, value = (
        torch.from_numpy(part[here]) for part in (recalled.user, recalled.gid - first, recalled.value)
    )
    everyone = torch.arange(len(target))
    own, raised, is_target = scores[everyone, target], scores[row, column], column == target[row]
    scores[row, column] = -torch.inf
    scores[everyone, target] = -torch.inf
    few = min(2 * DEPTH, count)
    new = scores[:, unseen].topk(min(few, int(unseen.sum())), dim=1).values
    scores[:, unseen] = -torch.inf
    rest = scores.topk(few, dim=1).values
    found = torch.zeros(len(target), len(weights), value.shape[1])
    for place, weight in enumerate(weights):
        for ridge in range(value.shape[1]):
            shift = float(shifts[place, ridge])
            with_it = raised + weight * value[:, ridge] + shift * unseen[column]
            mine = own + shift * unseen[target]
            mine = mine.index_put((row[is_target],), with_it[is_target])
            ahead = _before(rest, mine) + _before(new + shift, mine)
            rival, limit = with_it[~is_target], mine[row[~is_target]]
            found[:, place, ridge] = ahead.index_add(0, row[~is_target], (rival > limit).float() + (rival == limit) / 2)
    return found


def _before(scores: Float[Tensor, "B k"], limit: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    return (scores > limit[:, None]).sum(1) + (scores == limit[:, None]).sum(1) / 2


def unseen_log_odds(
    scores: Float[Tensor, "B N"],
    recalled: Recalled,
    first: int,
    weights: Sequence[float],
    unseen: Bool[Tensor, "N"],
    temperature: float,
) -> Float[Tensor, "B weights ridges"]:
    """Log-odds of the unseen items in each user's softmax over a type, with each weight and ridge of the memory; not
    finite where a user has only one kind of items. Arguments as :func:`places`."""
    here = (recalled.gid >= first) & (recalled.gid < first + scores.shape[1])
    row, column, value = (
        torch.from_numpy(part[here]) for part in (recalled.user, recalled.gid - first, recalled.value)
    )
    largest = scores.amax(1, keepdim=True).clamp(min=-1e30)
    part = ((scores - largest) / temperature).exp().double()
    base = torch.stack([part[:, ~unseen].sum(1), part[:, unseen].sum(1)])  # [2, B]
    own, kind = part[row, column], unseen[column].long()
    found = torch.zeros(len(scores), len(weights), value.shape[1], dtype=torch.float64)
    for place, weight in enumerate(weights):
        for ridge in range(value.shape[1]):
            added = own * torch.expm1(weight * value[:, ridge].double() / temperature)
            others, new = base.index_put((kind, row), added, accumulate=True).log()
            found[:, place, ridge] = new - others
    return found


def unseen_shifts(
    users: Users,
    vectors: Float[Tensor, "N d"],
    item_terms: Float[Tensor, "N"],
    moment: Moment,
    recalled: Callable[[Users], Recalled],
    weights: Sequence[float],
    temperature: float,
) -> Float[np.ndarray, "types weights ridges"]:
    """What the unseen items of each type are given, with each weight and ridge of the memory, so that they have their
    share in the mean over ``users`` (recsys_ray/scoring/unseen.py); 0 where there are only such items, or none.

    Args:
        item_terms: the other item terms.
        recalled: what histories bring to mind.
    """
    ridges = recalled(users.part(0, 0)).value.shape[1]
    found = np.zeros((moment.types, len(weights), ridges))
    if not len(moment.shares) or not len(users):
        return found
    assert moment.choices is not None
    for kind in range(moment.types):
        gids = moment.range_of(kind)
        new = moment.unseen(gids)
        if not new.any() or new.all():
            continue
        share = moment.shares[kind] if kind < len(moment.shares) else None
        share = unseen.share_of_events(moment.choices[0, gids]) if share is None else share
        odds = []
        step = max(1, _ODDS_CELLS // len(new))
        for begin in range(0, len(users), step):
            some = users.part(begin, min(begin + step, len(users)))
            scores = some.without_history(some.vectors @ vectors[gids].T + item_terms[gids], gids.start)
            odds.append(unseen_log_odds(scores, recalled(some), gids.start, weights, new, temperature))
        together = torch.cat(odds)
        for place in np.ndindex(len(weights), ridges):
            found[(kind, *place)] = temperature * unseen.shift_to_share(share, together[(slice(None), *place)])
    return found


def popular_where_untrained(
    users: Users, vectors: Float[Tensor, "N d"], moment: Moment, temperature: float
) -> Float[Tensor, "N"]:
    """What the items of types without training examples are given because of how many had each; 0 in all others."""
    given = torch.zeros(len(vectors))
    if not len(users) or moment.choices is None:
        return given
    for kind in range(moment.types if len(moment.shares) else 0):
        if kind >= len(moment.shares) or moment.shares[kind] is None:
            gids = moment.range_of(kind)
            mean = users.vectors.mean(0)
            given[gids] = unseen.popular_in_type(vectors[gids], moment.choices[0, gids], mean, temperature)
    return given


def expected_shares(
    queries: Sequence[Queries], vectors: Float[Tensor, "N d"], moment: Moment, temperature: float
) -> Float[Tensor, "N"]:
    """The sum over users of the towers' softmax over those items of the type that somebody had, without those of the
    history; 0 for items that nobody had."""
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


def trend_term(
    ratios: Float32[np.ndarray, "N"], spec: ScoreSpec, ntype: Int[np.ndarray, "N"]
) -> Float32[np.ndarray, "N"]:
    """w * T * log r of every item."""
    weight = np.zeros(int(ntype.max(initial=-1)) + 1, np.float32)
    weight[: len(spec.trends)] = spec.trends
    return weight[ntype] * np.float32(spec.temperature) * ratios


def item_terms(
    queries: Sequence[Queries],
    users: Users,
    vectors: Float[Tensor, "N d"],
    moment: Moment,
    spec: ScoreSpec,
    recalled: Callable[[Users], Recalled],
    left_out: str = "",
) -> dict[str, Float32[np.ndarray, "N"]]:
    """The item terms as of a snapshot, as the spec has them. By this rank's users.

    Args:
        queries: some users by the type that they are asked about, for trends.
        users: some users, for the share of unseen items.
        recalled: what histories bring to mind, with the spec's ridge (:func:`recall_of`).
        left_out: a term that is not part of the score.
    """
    found = dict[str, Float32[np.ndarray, "N"]]()
    added = popular_where_untrained(users, vectors, moment, spec.temperature)
    if moment.with_trends and any(spec.trends) and left_out != TRENDS:
        ratios = trend_ratios(queries, vectors, moment, spec.temperature, all_ranks=False)
        found[TRENDS] = trend_term(ratios, spec, moment.ntype)
    if len(moment.shares) and left_out != UNSEEN:
        rest = added + torch.from_numpy(found[TRENDS]) if TRENDS in found else added
        recalled = recall_of(None, 0.0) if left_out == MEMORY else recalled
        shifts = unseen_shifts(users, vectors, rest, moment, recalled, [spec.memory], spec.temperature)[:, 0, 0]
        new = nobody_had(moment.choices) if moment.choices is not None else np.zeros(len(vectors), bool)
        found[UNSEEN] = added.numpy() + np.where(new, shifts[moment.ntype], 0).astype(np.float32)
    return found


def recall_of(memory: Memory | None, half_life: float) -> Callable[[Users], Recalled]:
    """What users' histories bring to mind; nothing where there is no memory."""
    if memory is None:
        return lambda users: Recalled.nothing()
    return lambda users: memory.recall(users.row, users.history, half_life)


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
        some: a sample of them, by which trends are told.
        users: those of the sample, by whom it is told what unseen items are given.
        vectors: of the items as of the validation period, by towers that were not trained on it.
        moment: as of the validation period.
        spec: temperature and half-life.
    """
    number = sum_over_ranks(torch.tensor(float(sum(map(len, queries))), dtype=torch.float64))
    if not number:
        return Chosen(spec, float("nan"), float("nan"))
    added = popular_where_untrained(users, vectors, moment, spec.temperature)
    weights, ridges = (WEIGHTS, RIDGES) if moment.memory is not None else ((0.0,), (0.0,))
    scaled = [spec.temperature * weight for weight in weights]
    recalled = recall_of(moment.memory, spec.half_life)
    hits, gains = (part.sum(0) for part in _by_type(queries, users, vectors, added, moment, recalled, scaled, spec)[:2])
    weight, ridge = (gains == gains.max()).nonzero()[0].tolist()  # of equal ones the smallest
    spec = replace(spec, memory=scaled[weight], ridge=ridges[ridge])
    hit, gain = float(hits[weight, ridge]), float(gains[weight, ridge])
    if moment.with_trends:
        ratios = trend_ratios(some, vectors, moment, spec.temperature, all_ranks=True)
        one = moment.memory.at(spec.ridge) if moment.memory is not None and spec.memory else None
        ways = [added + w * spec.temperature * torch.from_numpy(ratios) for w in trends.WEIGHTS]
        recalled = recall_of(one, spec.half_life)
        parts = [_by_type(queries, users, vectors, way, moment, recalled, [spec.memory], spec) for way in ways]
        hits = torch.stack([part[0][:, 0, 0] for part in parts], 1)
        gains = torch.stack([part[1][:, 0, 0] for part in parts], 1)  # [types, ways]
        each = [torch.cat([own[kind] for _, _, own in parts], 1) for kind in range(moment.types)]  # [queries, ways]
        together = sum_over_ranks(torch.stack([own.T @ own for own in each]))
        told = [first_as_good(gains[kind], together[kind]) > 0 for kind in range(moment.types)]
        best = [int(gains[kind].argmax()) if told[kind] else 0 for kind in range(moment.types)]
        hit, gain = (float(sum(part[kind, way] for kind, way in enumerate(best))) for part in (hits, gains))
        spec = replace(spec, trends=[trends.WEIGHTS[way] for way in best] if any(best) else [])
    return Chosen(spec, hit / float(number), gain / float(number))


def _by_type(
    queries: Sequence[Queries],
    users: Users,
    vectors: Float[Tensor, "N d"],
    added: Float[Tensor, "N"],
    moment: Moment,
    recalled: Callable[[Users], Recalled],
    weights: Sequence[float],
    spec: ScoreSpec,
) -> tuple[Float[Tensor, "types weights ridges"], Float[Tensor, "types weights ridges"], list[Float[Tensor, "n one"]]]:
    """With each weight and ridge of the memory the sums over all ranks' queries about each type of hits among the first
    ten and of NDCG@100; and the latter of each of this rank's queries, where there is one weight and ridge."""
    shifts = unseen_shifts(users, vectors, added, moment, recalled, weights, spec.temperature)
    hits, gains = torch.zeros(2, *shifts.shape, dtype=torch.float64)
    each: list[list[Tensor]] = [[torch.zeros(0, 1, dtype=torch.float64)] for _ in range(moment.types)]
    for asked in queries:
        gids, kind = slice(asked.first, asked.first + asked.count), int(moment.ntype[asked.first])
        scores = asked.without_history(asked.vectors @ vectors[gids].T + added[gids], asked.first)
        at = places(scores, asked.target, recalled(asked), asked.first, weights, moment.unseen(gids), shifts[kind])
        gain = gain_of(at)
        hits[kind] += (at < _TOP).sum(0)
        gains[kind] += gain.sum(0)
        if shifts[kind].size == 1:
            each[kind].append(gain[:, 0])
    return sum_over_ranks(hits), sum_over_ranks(gains), [torch.cat(parts) for parts in each]


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
