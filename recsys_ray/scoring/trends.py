"""What the last weeks tell of each item that towers do not know.

Towers see how often an item was chosen of late, but as of the snapshot of an example, which lies up to months before
it: so they learn that a week's counts mean little. Where trends rule, that costs more than all that is personal
brings. So when the towers are done, each item that somebody had is given (ours, not the papers')

    trend_i = w * T * log r_i

r_i is how many times as often as the towers expect it is chosen now. It is followed through ``PERIODS``, from r_i = 1:

    r_i <- r_i * (c_i + a) / (N * p_i + a),    p_i proportional to q_i * r_i

c_i are the choices of a period, N those of the item's type together, q_i the share that the towers themselves give it:
their softmax over the type, in the mean over users. The factor is the mean of a Gamma posterior: what chance alone
explains moves little, for the prior, Gamma(a, a), is the one that fits the type's counts best (DuMouchel, Bayesian data
mining in large frequency tables, American Statistician 1999). What of an item's past the towers know enters with q_i,
so that nothing counts twice.

The weight w is chosen for each item type on the validation period; no trend, w = 0, is the choice that others have to
beat (:func:`choose_trends`). In leave-one-out there are no last weeks.

Imports neither dgl nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from scipy.optimize import minimize_scalar
from scipy.special import gammaln
from torch import Tensor

from recsys_ray.cluster.pool import in_parallel
from recsys_ray.cluster.train import sum_over_ranks
from recsys_ray.config import Config
from recsys_ray.core.snapshots import DAY, Snapshot
from recsys_ray.graph.activity import CHOSEN
from recsys_ray.scoring.memory import Memory
from recsys_ray.scoring.places import asked_by_type, gain_of, ranks_with_memory
from recsys_ray.storage.artifacts import Artifact, save_arrays
from recsys_ray.two_tower.examples import UserEvents, first_touches
from recsys_ray.two_tower.recency import first_as_good
from recsys_ray.two_tower.towers import TwoTower
from recsys_ray.two_tower.training import TowerTask, item_vectors, sample_of_queries, user_vectors

PERIODS = ((30, 7), (7, 0))  # from and to so many days before a moment, the oldest first
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # which a validation chooses from
_PRIOR = np.log(0.1), np.log(1e4)  # log of the least and the largest a


def latest_file(two_tower: Path) -> Path:
    """Where the two-tower stage keeps the choices of the last weeks: snapshot -> int32 [periods, items]."""
    return two_tower / "latest.safetensors"


def write_latest(config: Config, ingest: Artifact, snapshots: Sequence[Snapshot], out: Path, cpus: int) -> None:
    """Count the choices of the ``PERIODS`` before each of these snapshots. One task a shard of interactions."""
    items = sum(ingest.counts["items_per_type"])
    names = list(ingest.counts["events"])
    codes = [names.index(name) for name in config.events.positives if name in names]
    shards = sorted((ingest.path / "interactions").resolve().glob("shard-*.parquet"))
    moments = [snapshot.time for snapshot in snapshots]
    counts = np.zeros((len(moments), len(PERIODS), items), np.int32)
    for counted in in_parallel([(_count_shard, shard, moments, codes, items) for shard in shards], cpus):
        counts += counted
    save_arrays(latest_file(out), {snapshot.name: counts[place] for place, snapshot in enumerate(snapshots)})


def _count_shard(shard: Path, *arguments: Any) -> Int[np.ndarray, "moments periods items"]:
    return count_latest(UserEvents.read(shard), *arguments)


def count_latest(
    events: UserEvents, moments: Sequence[int], codes: Sequence[int], items: int
) -> Int[np.ndarray, "moments periods items"]:
    """How many users chose each item for the first time in each of ``PERIODS`` before each moment (unix seconds).
    ``codes``: of the positive events."""
    chosen = first_touches(events, np.isin(events.event, np.asarray(codes, events.event.dtype)))
    gid, time = events.gid[chosen], events.timestamp[chosen]
    counts = np.zeros((len(moments), len(PERIODS), items), np.int32)
    for place, moment in enumerate(moments):
        for period, (since, until) in enumerate(PERIODS):
            inside = (time >= moment - since * DAY) & (time < moment - until * DAY)
            counts[place, period] = np.bincount(gid[inside], minlength=items)
    return counts


def surplus(count: Int[np.ndarray, "n"], share: Float[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """log (c + a) / (N p + a) of a type's items, with the a that fits them best.

    Args:
        count: c, choices of a period.
        share: p, what is expected; the sum is 1.
    """
    expected = count.sum() * share

    def misfit(log_prior: float) -> float:
        """Minus the log-likelihood of the counts, negative binomial with mean ``expected``, without constants."""
        a = np.exp(log_prior)
        terms = gammaln(count + a) - gammaln(a) - count * np.log(expected + a) - a * np.log1p(expected / a)
        return -float(terms.sum())

    prior = np.exp(minimize_scalar(misfit, bounds=_PRIOR, method="bounded").x)
    return np.log((count + prior) / (expected + prior))


@torch.no_grad()
def tower_shares(model: TwoTower, task: TowerTask, snapshot: str, vectors: Float[Tensor, "N d"]) -> Float[Tensor, "N"]:
    """The sum over some of this rank's validation queries of the softmax over those items of the target's type that
    somebody had by the snapshot, without those of the history; 0 for items that nobody had."""
    shares = torch.zeros(len(vectors), dtype=torch.float64)
    blank = _blank(task, snapshot)
    for asked in asked_by_type(task.queries, sample_of_queries(task), task.catalogue.ntype.numpy()):
        mine = slice(asked.first, asked.first + asked.count)
        if blank[mine].all():
            continue
        users = user_vectors(model, task.source, task.catalogue, snapshot, task.queries, asked.rows)
        scores = asked.without_history(users @ vectors[mine].T / task.spec.temperature)
        scores[:, blank[mine]] = -torch.inf
        shares[mine] += scores.softmax(1).nan_to_num().double().sum(0)  # NaN: the history has them all
    return shares


def log_ratios(
    counts: Int[np.ndarray, "periods N"], shares: Float[Tensor, "N"], task: TowerTask, snapshot: str
) -> Float[Tensor, "N"]:
    """log r of every item; 0 for items that nobody had and for types that nobody was asked about.

    Args:
        counts: of ``PERIODS`` before the snapshot.
        shares: as :func:`tower_shares` has them.
    """
    found = np.zeros(len(shares))
    had, kinds = ~_blank(task, snapshot).numpy(), task.catalogue.ntype.numpy()
    for kind in range(task.spec.num_types):
        mine = np.flatnonzero((kinds == kind) & had & (shares.numpy() > 0))
        for count in counts[:, mine] if len(mine) else []:
            expected = shares[mine].numpy() * np.exp(found[mine])
            found[mine] += surplus(count, expected / expected.sum())
    return torch.from_numpy(found).float()


@torch.no_grad()
def _gains_with(
    model: TwoTower,
    task: TowerTask,
    vectors: Float[Tensor, "N d"],
    memory: tuple[float, float],
    given: Sequence[Float[Tensor, "N"]],
) -> tuple[Float[Tensor, "types choices"], Float[Tensor, "types choices choices"]]:
    """What validation says of several ways to move items' scores for everyone. Over all ranks.

    Args:
        model: has not been trained on the validation period.
        vectors: of the items as of it.
        memory: its weight and ridge; (0, 0): none.
        given: what each way adds to every item's scores.

    Returns:
        Of the queries about each item type the sums of NDCG@100 with each way, and of the products of two ways' NDCG.
    """
    queries, kinds, (weight, ridge) = task.queries, task.catalogue.ntype.numpy(), memory
    pairs = task.memory.at(ridge) if task.memory is not None and ridge else Memory.nothing(len(kinds))
    sizes = task.spec.num_types, len(given)
    gains, together = torch.zeros(sizes).double(), torch.zeros(*sizes, len(given)).double()
    for asked in asked_by_type(queries, np.arange(len(queries["target"])), kinds):
        mine = slice(asked.first, asked.first + asked.count)
        users = user_vectors(model, task.source, task.catalogue, "valid", queries, asked.rows)
        towers = asked.without_history(users @ vectors[mine].T)
        recalled = pairs.recall(asked.user, asked.history, task.spec.half_life)
        rest = asked.target, recalled, asked.first, torch.from_numpy(pairs.is_blank(asked.gids)), [weight]
        gain = gain_of(torch.stack([ranks_with_memory(towers + each[mine], *rest)[:, 0, 0] for each in given], 1))
        gains[kinds[asked.first]] += gain.sum(0)
        together[kinds[asked.first]] += gain.T @ gain
    return sum_over_ranks(gains), sum_over_ranks(together)


def choose_trends(
    model: TwoTower, task: TowerTask, latest: Mapping[str, np.ndarray], memory: tuple[float, float]
) -> list[float]:
    """Each item type's weight w, by NDCG@100 of its validation queries: the best, or 0 if that is less than a standard
    error behind it. Over all ranks, and the same on each.

    Args:
        model: has not been trained on the validation period.
        latest: see :func:`latest_file`.
        memory: its weight and ridge.
    """
    vectors = item_vectors(model, task.source, task.catalogue, "valid")
    shares = sum_over_ranks(tower_shares(model, task, "valid", vectors))
    ratios = log_ratios(latest["valid"], shares, task, "valid")
    ways = [w * task.spec.temperature * ratios for w in WEIGHTS]
    gains, together = _gains_with(model, task, vectors, memory, ways)
    told = [first_as_good(*of_type) > 0 for of_type in zip(gains, together, strict=True)]
    return [WEIGHTS[int(own.argmax())] if tells else 0.0 for own, tells in zip(gains, told, strict=True)]


def trend_of_all(
    model: TwoTower,
    task: TowerTask,
    snapshot: str,
    vectors: Float[Tensor, "N d"],
    counts: Int[np.ndarray, "periods N"],
) -> Float[Tensor, "N"]:
    """What is added to the scores of every item as of a snapshot, with the weights of the task's spec. By this rank's
    users.

    Args:
        vectors: of the items, as of the snapshot.
        counts: of ``PERIODS`` before it.
    """
    shares = tower_shares(model, task, snapshot, vectors)
    weight = torch.tensor(task.spec.trends)[task.catalogue.ntype]
    return weight * task.spec.temperature * log_ratios(counts, shares, task, snapshot)


def _blank(task: TowerTask, snapshot: str) -> Bool[Tensor, "N"]:
    """Which items nobody had by the snapshot."""
    return task.catalogue.activity[snapshot][:, CHOSEN] == 0
