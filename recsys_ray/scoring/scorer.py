"""A trained two-tower as evaluation sees it: item vectors of a snapshot, user vectors from histories."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from recsys_ray.core.snapshots import DAY
from recsys_ray.scoring.memory import RIVALS, Memory, Recalled, memory_file, one_row_a_user, place_kept
from recsys_ray.scoring.unseen import known_shift, popular_where_untrained, share_of_events, shift_of_each
from recsys_ray.storage.artifacts import load_arrays
from recsys_ray.two_tower.batches import country_index
from recsys_ray.two_tower.features import ItemTables, UserInputs
from recsys_ray.two_tower.towers import UserTower, load_item_ids, load_user_tower

if TYPE_CHECKING:
    from recsys_ray.evaluation.given import Remember
    from recsys_ray.evaluation.ranking import UserBatch

_ITEMS = 32_768  # whose scores are held at once


@dataclass
class TrainedTower:
    """Travels to Ray tasks: arrays and one small module. Fulfils ``TowerScorer`` of the evaluation."""

    item_vectors: np.ndarray  # float32 [items, d]
    tower: UserTower
    text: np.ndarray  # float16 [items, t]
    hgnn: np.ndarray | None  # float32 [items, h], as of the snapshot
    ntype: np.ndarray  # int64 [items]
    available: np.ndarray  # bool [items]
    ids: np.ndarray | None  # float32 [items, d], the items' own vectors
    moment: int  # the snapshot's time: a history reaches back from here
    memory: Memory | None = None  # as of the snapshot; None: the towers alone
    trend: np.ndarray | None = None  # float32 [items]: what every user's score has beside the inner product (trends.py)

    @staticmethod
    def open(
        folder: Path, text: np.ndarray, hgnn: np.ndarray | None, ntype: np.ndarray, available: np.ndarray, moment: int
    ) -> TrainedTower:
        """The towers of ``folder`` with the item vectors of the test snapshot.

        Raises:
            ArtifactError: the folder is not whole.
        """
        stored = load_arrays(folder / "items" / "test.safetensors")
        tower, ids = load_user_tower(folder), load_item_ids(folder)
        memory = None
        if tower.spec.memory or tower.spec.blank_share:
            memory = Memory.load(memory_file(folder.parent, "test")).at(tower.spec.ridge)
        hgnn = hgnn if tower.spec.hgnn_dim else None
        arrays = text, hgnn, ntype, available, ids
        return TrainedTower(stored["vector"], tower, *arrays, moment, memory, stored.get("trend"))

    @torch.no_grad()
    def user_vectors(self, users: UserBatch) -> Float[Tensor, "users d"]:
        """Unit vectors of the users, by their latest events inside the window."""
        kept = self._kept(users)
        lengths = np.bincount(users.rows[kept], minlength=len(users))
        needed, place = np.unique(users.gid[kept], return_inverse=True)
        tables = ItemTables(
            text=torch.from_numpy(self.text[needed]).float(),
            hgnn=None if self.hgnn is None else torch.from_numpy(self.hgnn[needed]),
            ntype=torch.from_numpy(self.ntype[needed]),
            ids=None if self.ids is None else torch.from_numpy(self.ids[needed]),
        )
        age, country, tastes = self._traits(users)
        inputs = UserInputs(
            gids=torch.from_numpy(place.astype(np.int64)),
            events=torch.from_numpy(users.event[kept].astype(np.int64)),
            offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)),
            age=age,
            country=country,
            tastes=tastes,
        )
        return self.tower(inputs, tables)

    def unknown(self, users: UserBatch) -> np.ndarray:
        """See ``TowerScorer``."""
        age, country, tastes = self._traits(users)
        nothing = torch.isnan(age) & (country < 0)
        for taste in tastes.values():
            nothing &= torch.isnan(taste).all(1)
        lengths = np.bincount(users.rows[self._kept(users)], minlength=len(users))
        return nothing.numpy() & (lengths == 0)

    def remember(self, users: UserBatch, vectors: Float[Tensor, "users d"]) -> Remember | None:
        """See ``TowerScorer``."""
        if self.memory is None:
            return None if self.trend is None else self._add_given
        kept, weight = self._kept(users), self.tower.spec.memory
        memory, recalled = self.memory, self.memory.recall(users.rows[kept], users.gid[kept], self.tower.spec.half_life)
        raise_of = weight * torch.from_numpy(recalled.value[:, 0])
        shifts: dict[int, Tensor] = {}  # of each item type that was asked for
        bars: dict[int, tuple[Tensor, Tensor]] = {}  # likewise

        def add(first: int, last: int, scores: Tensor) -> None:
            self._add_given(first, last, scores)
            fresh = np.flatnonzero(memory.is_blank(np.arange(first, last)))
            if len(fresh):
                kind = int(self.ntype[first])
                if kind not in bars:
                    shifts[kind] = self._shift(users, vectors, kind)
                    bars[kind] = self._bars(users, vectors, kind, recalled, raise_of, shifts[kind])
                scores[:, fresh] += shifts[kind][:, None]
                scores[:, fresh] += place_kept(scores[:, fresh], *bars[kind])
            here = (recalled.gid >= first) & (recalled.gid < last)
            scores[recalled.user[here], recalled.gid[here] - first] += raise_of[here]

        return add

    def _add_given(self, first: int, last: int, scores: Tensor) -> None:
        scores += self._given[first:last]

    @cached_property
    def _given(self) -> Float[Tensor, "items"]:
        """What every user's score of an item has beside the inner product: its trend (trends.py), and what items of
        types without training examples are given (blank.py)."""
        trend = np.zeros(len(self.ntype), np.float32) if self.trend is None else self.trend
        if self.memory is None:
            return torch.from_numpy(trend)
        spec = self.tower.spec
        shifts = [known_shift(spec.blank_share, spec.blank_shift, "test", kind) for kind in range(self.ntype.max() + 1)]
        given = self.memory.users, shifts, spec.mean_user.get("test"), spec.temperature
        return torch.from_numpy(trend + popular_where_untrained(self.item_vectors, self.ntype, *given))

    def _scores(self, users: UserBatch, vectors: Float[Tensor, "users d"], kind: int) -> Iterator[tuple[int, Tensor]]:
        """The scores of a type before the memory, range by range with the range's first gid; -inf where an item may not
        come."""
        gids = np.flatnonzero(self.ntype == kind)
        for start in range(int(gids[0]), int(gids[-1]) + 1, _ITEMS):
            stop = min(start + _ITEMS, int(gids[-1]) + 1)
            scores = vectors @ torch.from_numpy(np.array(self.item_vectors[start:stop])).float().T
            scores += self._given[start:stop]
            scores[:, ~self.available[start:stop]] = -torch.inf
            own = (users.gid >= start) & (users.gid < stop)
            scores[users.rows[own], users.gid[own] - start] = -torch.inf
            yield start, scores

    def _shift(self, users: UserBatch, vectors: Float[Tensor, "users d"], kind: int) -> Float[Tensor, "users"]:
        """What blank items of a type are given (blank.py)."""
        assert self.memory is not None
        spec = self.tower.spec
        shift = known_shift(spec.blank_share, spec.blank_shift, "test", kind)
        if shift is not None:
            return torch.full((len(users),), shift)
        sums = torch.full((2, len(users)), -torch.inf)  # of the others and of blank items
        for start, scores in self._scores(users, vectors, kind):
            blank = torch.from_numpy(self.memory.is_blank(np.arange(start, start + scores.shape[1])))
            for place, part in enumerate((~blank, blank)):
                sums[place] = torch.logaddexp(sums[place], (scores[:, part] / spec.temperature).logsumexp(1))
        share = share_of_events(self.memory.users[self.ntype == kind])
        return shift_of_each(sums[1], sums[0], share, spec.temperature)

    def _bars(
        self,
        users: UserBatch,
        vectors: Float[Tensor, "users d"],
        kind: int,
        recalled: Recalled,
        raise_of: Tensor,
        shift: Float[Tensor, "users"],
    ) -> tuple[Float[Tensor, "users k"], Float[Tensor, "users k"]]:
        """The best scores of a type without and with the memory, as :func:`place_kept` wants them: of the ``RIVALS``
        best by the towers, blank ones shifted, those that are not blank, and as many with the memory."""
        assert self.memory is not None
        rivals, blank, not_raised = list[Tensor](), list[Tensor](), list[Tensor]()
        with_it = torch.full((len(recalled.gid),), -torch.inf)
        for start, scores in self._scores(users, vectors, kind):
            stop = start + scores.shape[1]
            fresh = self.memory.is_blank(np.arange(start, stop))
            scores[:, fresh] += shift[:, None]
            top = scores.topk(min(RIVALS, stop - start), dim=1)
            rivals.append(top.values)
            blank.append(torch.from_numpy(fresh)[top.indices])
            here = np.flatnonzero((recalled.gid >= start) & (recalled.gid < stop))
            place = recalled.user[here], recalled.gid[here] - start
            with_it[here] = scores[place] + raise_of[here]
            scores[place], scores[:, fresh] = -torch.inf, -torch.inf
            not_raised.append(scores.topk(min(RIVALS, stop - start), dim=1).values)
        candidates = torch.cat(rivals, 1)
        best = candidates.topk(min(RIVALS, candidates.shape[1]), dim=1)
        new = torch.cat(blank, 1).gather(1, best.indices)
        raised = one_row_a_user(torch.from_numpy(recalled.user), with_it, len(users))
        after = torch.cat([*not_raised, raised], 1).topk(best.values.shape[1], dim=1).values
        return best.values.masked_fill(new, -torch.inf).sort(1, descending=True).values, after

    def _kept(self, users: UserBatch) -> np.ndarray:
        """bool [events]: the latest ones inside the window."""
        spec = self.tower.spec
        kept = np.repeat(users.offsets[1:], np.diff(users.offsets)) - np.arange(len(users.gid)) <= spec.history
        if spec.window_days is not None:
            kept &= users.timestamp >= self.moment - spec.window_days * DAY
        return kept

    def _traits(self, users: UserBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        spec, count = self.tower.spec, len(users)
        if users.users is None:
            tastes = {name: torch.full((count, dim), torch.nan) for name, dim in spec.tastes.items()}
            return torch.full((count,), torch.nan), torch.full((count,), -1), tastes
        ages = np.array([np.nan if a is None else a for a in users.users.column("age").to_pylist()], np.float32)
        countries = np.array([c or "" for c in users.users.column("country").to_pylist()], dtype=str)
        tastes = {}
        for name, dim in spec.tastes.items():
            rows = [row or [np.nan] * dim for row in users.users.column(name).to_pylist()]
            tastes[name] = torch.from_numpy(np.asarray(rows, np.float32).reshape(count, dim))
        return torch.from_numpy(ages), torch.from_numpy(country_index(spec.countries, countries)), tastes
