"""One rank's share of two-tower training: plain torch over any :class:`FeatureSource`, with or without other ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from recsys_ray.cluster.train import largest_over_ranks, mean_over_ranks, run_epochs, sum_over_ranks
from recsys_ray.config import TwoTowerConfig
from recsys_ray.core.seeds import seed_from
from recsys_ray.scoring.choose import Chosen, Moment, Queries, Users, choose
from recsys_ray.scoring.scorer import ScoreSpec
from recsys_ray.two_tower.batches import (
    Batch,
    FeatureSource,
    ItemFeatures,
    batches_in,
    epoch_batches,
    make_batch,
    tables_for,
    user_inputs,
)
from recsys_ray.two_tower.loss import inclusion_log_q, paper_loss, sampled_softmax
from recsys_ray.two_tower.rows import Examples, histories_of, join
from recsys_ray.two_tower.towers import TowerSpec, TwoTower

_ITEM_CHUNK = 8192
_QUERY_CHUNK = 512
_TERM_SAMPLE = 2_000  # users from whom the item terms are computed
_START_SAMPLE = 20_000  # items whose directions of variance the towers start with
_ENOUGH = 12  # examples of an item with which its own vector is as good as half known


@dataclass
class TowerTask:
    """One variant's training on one rank. ``later``: examples of the validation period, for the refit; ``moment``: what
    the score's terms know at the validation's snapshot; ``score``: what is chosen of the score before training."""

    spec: TowerSpec
    source: FeatureSource
    catalogue: ItemFeatures
    examples: Examples
    queries: Examples
    later: Examples
    snapshot_names: dict[int, str]
    moment: Moment
    score: ScoreSpec = field(default_factory=ScoreSpec)


def start(model: TwoTower, task: TowerTask, seed: int) -> None:
    """Let a fresh model start as nearest neighbours (:meth:`TwoTower.start_near`), and give the items that occur in
    examples a part of their own in their vectors; the same on every rank."""
    if model.ids is not None:
        items = len(task.catalogue.ntype)
        chosen = np.bincount(task.examples["target"], minlength=items)
        touched = np.bincount(task.examples["history"], minlength=items)
        chosen, touched = sum_over_ranks(torch.from_numpy(np.stack([chosen, touched])).double())
        model.ids.assign(chosen + touched)
        if task.spec.id_dropout is None:
            model.ids.dropout = share_unknown(chosen)
    last = int(max(task.examples["snapshot"], default=0))
    rows = np.random.default_rng(seed_from(seed, "start")).permutation(len(task.catalogue.ntype))
    gids = torch.from_numpy(np.sort(rows[:_START_SAMPLE]))
    tables = tables_for(task.source, task.spec, task.catalogue, task.snapshot_names[last], gids)
    assert tables.text is not None
    model.start_near(tables.text.float(), tables.hgnn)


def share_unknown(chosen: Float[Tensor, "items"]) -> float:
    """The default share of learned vectors hidden in a training step: the uncertainty of the target's vector, k / (n +
    k) with n other examples of it, averaged over all examples.

    Half of them on Amazon's reviews, where an item has a dozen, a sixth in a shop whose items have three dozen: towers
    that serve new items must learn to work without the vector, but only as often as they will have to.

    Args:
        chosen: how many examples each item is the target of.
    """
    unknown = chosen * _ENOUGH / ((chosen - 1).clamp(min=0) + _ENOUGH)
    return float(unknown.sum() / chosen.sum().clamp(min=1))


def sample_of_queries(task: TowerTask) -> Int[np.ndarray, "n"]:
    """Rows of some validation queries of this rank, from whose users the item terms are computed."""
    number = len(task.queries["target"])
    return np.arange(number)[:: -(-number // _TERM_SAMPLE) or 1]


class TowerTrainer:
    """Steps and validation of the two-tower.

    Attributes:
        model: the weights that the optimizer moves.
        averaged: their exponential moving average: steadier than any one step's, and what is validated and kept.
    """

    def __init__(
        self, model: TwoTower, network: nn.Module, task: TowerTask, config: TwoTowerConfig, seed: int, rank: int = 0
    ) -> None:
        self.model, self.network, self.task, self.config = model, network, task, config
        self.averaged = copy.deepcopy(model).requires_grad_(False).eval()
        self.seed, self.rank = seed, rank
        self.steps = largest_over_ranks(batches_in(task.examples["snapshot"], config.batch_size))
        self.share = {index: self._share(index) for index in sorted(task.snapshot_names)}

    def _share(self, snapshot: int) -> Float[Tensor, "items"]:
        """Each item's share of a snapshot's examples, over all ranks: batches are of one snapshot, so this is how
        likely the item is to turn up in one of them."""
        targets = self.task.examples["target"][self.task.examples["snapshot"] == snapshot]
        counts = torch.bincount(torch.from_numpy(targets).long(), minlength=len(self.task.catalogue.ntype))
        counts = sum_over_ranks(counts.double())
        return (counts / counts.sum().clamp(min=1)).float()

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Loss of one batch."""
        users, items = self.network(batch.inputs, batch.tables, batch.rows)
        share = self.share[batch.snapshot][batch.candidates]
        if self.config.loss == "paper":
            return paper_loss(users, items, batch.target, share, batch.not_negative)
        log_q = self.config.log_q * inclusion_log_q(share, len(batch.target))
        return sampled_softmax(users, items, batch.target, log_q, batch.not_negative, self.config.temperature)

    @property
    def weights(self) -> nn.Module:
        """All that a checkpoint must hold of the towers."""
        return nn.ModuleDict({"trained": self.model, "averaged": self.averaged})

    @torch.no_grad()
    def average(self, steps: int) -> None:
        """Add the weights after ``steps`` steps to the average; the first ones count less."""
        rate = 1 - min(self.config.averaging, (1 + steps) / (10 + steps))
        for averaged, trained in zip(self.averaged.parameters(), self.model.parameters(), strict=True):
            averaged.lerp_(trained, rate)

    def batch(self, rows: np.ndarray) -> Batch:
        task = self.task
        return make_batch(task.examples, rows, task.spec, task.source, task.catalogue, task.snapshot_names)

    @torch.no_grad()
    def validate(self) -> Chosen:
        """What validation chooses of the score, and how good it is then: full ranking inside the target's type, seen
        items left out; each query is one new item of a user. Over all ranks."""
        task, model, rows = self.task, self.averaged, np.arange(len(self.task.queries["target"]))
        some = sample_of_queries(task)
        vectors = item_vectors(model, task.source, task.catalogue, "valid") if len(rows) else torch.zeros(0, 0)
        return choose(
            queries_by_type(model, task, "valid", rows),
            queries_by_type(model, task, "valid", some),
            users_of(model, task, "valid", some),
            vectors,
            task.moment,
            task.score,
        )


def item_vectors(
    model: TwoTower, source: FeatureSource, catalogue: ItemFeatures, snapshot: str
) -> Float[Tensor, "N D"]:
    """Vectors of all items as of a snapshot."""
    chunks = []
    with torch.no_grad():
        for gids in torch.arange(len(catalogue.ntype)).split(_ITEM_CHUNK):
            tables = tables_for(source, model.user.spec, catalogue, snapshot, gids)
            assert tables.text is not None
            chunks.append(model.items(catalogue.rows(gids, snapshot, tables.text, tables.hgnn)))
    return torch.cat(chunks)


def learned_vectors(
    model: TwoTower, source: FeatureSource, catalogue: ItemFeatures, snapshot: str
) -> Float[Tensor, "N d"] | None:
    """The learned vectors of all items as of a snapshot; None where the towers read none."""
    if model.ids is None:
        return None
    chunks = []
    with torch.no_grad():
        for gids in torch.arange(len(catalogue.ntype)).split(_ITEM_CHUNK):
            hgnn = source.features(f"hgnn_{snapshot}", gids) if model.user.spec.hgnn_dim else None
            chunks.append(model.ids(catalogue.owners(gids, snapshot), hgnn))
    return torch.cat(chunks)


def user_vectors(
    model: TwoTower, source: FeatureSource, catalogue: ItemFeatures, snapshot: str, examples: Examples, rows: np.ndarray
) -> Float[Tensor, "B D"]:
    """Vectors of the users of these rows, with item features as of a snapshot."""
    users = user_inputs(examples, rows, model.user.spec)
    needed, place = torch.unique(users.gids, return_inverse=True)
    tables = tables_for(source, model.user.spec, catalogue, snapshot, needed)
    with torch.no_grad():
        return model.users(replace(users, gids=place), tables)


def users_of(model: TwoTower, task: TowerTask, snapshot: str, rows: Int[np.ndarray, "n"]) -> Users:
    """The users of these validation queries with item features as of a snapshot."""
    parts = np.array_split(rows, -(-len(rows) // _QUERY_CHUNK)) if len(rows) else []
    vectors = [user_vectors(model, task.source, task.catalogue, snapshot, task.queries, part) for part in parts]
    if not vectors:
        return Users(torch.zeros(0, task.spec.layers[-1]), np.zeros(0, np.int64), np.zeros(0, np.int64))
    history, _, offsets = histories_of(task.queries, rows)
    return Users(torch.cat(vectors), np.repeat(np.arange(len(rows)), np.diff(offsets)), history)


def queries_by_type(
    model: TwoTower | None, task: TowerTask, snapshot: str, rows: Int[np.ndarray, "n"]
) -> list[Queries]:
    """These validation queries by the type of their target, some at a time, users in order.

    Args:
        model: None: users have vectors of no entries.
    """
    ntype, found = task.catalogue.ntype.numpy(), list[Queries]()
    kinds = ntype[task.queries["target"][rows]] if len(rows) else np.zeros(0, np.int64)
    for kind in np.unique(kinds):
        mine = rows[kinds == kind]
        mine = mine[np.argsort(task.queries["uid"][mine], kind="stable")]
        first, last = (int(end) for end in np.searchsorted(ntype, [kind, kind + 1]))
        for chunk in np.array_split(mine, -(-len(mine) // _QUERY_CHUNK)):
            history, _, offsets = histories_of(task.queries, chunk)
            row = np.repeat(np.arange(len(chunk)), np.diff(offsets))
            target = torch.from_numpy(task.queries["target"][chunk]).long() - first
            vectors = torch.zeros(len(chunk), 0)
            if model is not None:
                vectors = user_vectors(model, task.source, task.catalogue, snapshot, task.queries, chunk)
            found.append(Queries(vectors, row, history, first, last - first, target))
    return found


def run_epoch(
    trainer: TowerTrainer,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    done: int,
    on_step: Callable[[int, int, float], None] = lambda epoch, step, loss: None,
) -> float:
    """One epoch, after ``done`` steps in all; the mean loss over all ranks."""
    generator = np.random.default_rng(seed_from(trainer.seed, "two_tower", epoch, trainer.rank))
    torch.manual_seed(seed_from(trainer.seed, "dropout", epoch, trainer.rank))  # the same after a restart
    total, batch_size = 0.0, trainer.config.batch_size
    trainer.network.train()
    for step, rows in enumerate(epoch_batches(trainer.task.examples["snapshot"], batch_size, trainer.steps, generator)):
        loss = trainer.loss(trainer.batch(rows))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        trainer.average(done + step)
        total += loss.item()
        on_step(epoch, step, total / (step + 1))
    return mean_over_ranks(total / max(trainer.steps, 1))


def train_epochs(
    trainer: TowerTrainer,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    on_step: Callable[[int, int, float], None] = lambda epoch, step, loss: None,
    on_epoch: Callable[[dict[str, Any], bool], None] = lambda state, better: None,
) -> dict[str, Any]:
    """Train until the validation NDCG@100 rises no more (:func:`recsys_ray.cluster.train.run_epochs`). The state has
    ``score``, what validation chose of the score in the best epoch."""

    def one_epoch(epoch: int) -> tuple[dict[str, Any], float, dict[str, Any]]:
        loss = run_epoch(trainer, optimizer, epoch, epoch * trainer.steps, on_step)
        chosen = trainer.validate()
        metrics = {"loss": loss, "valid_hr_at_10": chosen.hit_rate, "valid_ndcg_at_100": chosen.gain}
        # No validation queries: the training loss tells.
        return metrics, chosen.gain if chosen.gain == chosen.gain else -loss, {"score": asdict(chosen.spec)}

    return run_epochs(one_epoch, trainer.config.epochs, trainer.config.patience, state, on_epoch)


def refit(
    trainer: TowerTrainer,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    on_step: Callable[[int, int, float], None] = lambda epoch, step, loss: None,
) -> TwoTower:
    """One more epoch from the best weights, with the validation period's examples among the others; the averaged
    weights. Validation has chosen the number of epochs, so its events, which are the most recent and include new items,
    can now be used. The baselines are also refitted to everything before the test."""
    first, later = trainer.task.examples, trainer.task.later
    everything = join([first, later]) if later else first
    again = TowerTrainer(
        trainer.model,
        trainer.network,
        replace(trainer.task, examples=everything),
        trainer.config,
        trainer.seed,
        trainer.rank,
    )
    run_epoch(again, optimizer, epoch, epoch * trainer.steps, on_step)
    return again.averaged
