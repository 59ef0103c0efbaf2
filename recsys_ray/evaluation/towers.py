"""A trained two-tower in the comparison: item vectors as of the test, user vectors from histories, and the score of
both (recsys_ray/scoring/scorer.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from recsys_ray.core.clock import DAY
from recsys_ray.core.offsets import offsets_of
from recsys_ray.data.tables import traits_of
from recsys_ray.evaluation.ranking import Scorer as RangeScorer
from recsys_ray.evaluation.ranking import UserBatch, as_tensor
from recsys_ray.scoring.memory import Memory, memory_file
from recsys_ray.scoring.scorer import LEARNED, Scorer, ScoreSpec
from recsys_ray.storage.artifacts import load_arrays
from recsys_ray.two_tower.batches import country_index
from recsys_ray.two_tower.features import ItemTables, UserInputs
from recsys_ray.two_tower.towers import UserTower, load_user_tower


@dataclass(frozen=True)
class TrainedTowers:
    """A finished variant of the two-tower stage. Travels to Ray tasks: arrays and one small module."""

    tower: UserTower
    score: Scorer  # as of the test
    text: np.ndarray  # float16 [items, t]
    hgnn: np.ndarray | None  # float32 [items, h], as of the test; None: the towers do not read it
    ntype: np.ndarray  # int64 [items]
    ids: np.ndarray | None  # float32 [items, d], the learned vectors, as of the test
    moment: int  # start of the test: a history reaches back from here

    @staticmethod
    def open(
        folder: Path, text: np.ndarray, hgnn: np.ndarray | None, ntype: np.ndarray, moment: int, left_out: str = ""
    ) -> TrainedTowers:
        """The towers of ``folder``, and their score as of the test.

        Args:
            left_out: a term that is not part of the score.

        Raises:
            ArtifactError: the folder is not whole.
        """
        items, spec = load_arrays(folder / "items" / "test.safetensors"), ScoreSpec.load(folder)
        memory = None
        if spec.memory:
            memory = Memory.load(memory_file(folder.parent, "test")).at(spec.ridge, [spec.text_users])
        tower = load_user_tower(folder)
        score = Scorer.of_items(items, spec, memory, left_out)
        hgnn = hgnn if tower.spec.reads_embeddings else None
        return TrainedTowers(tower, score, text, hgnn, ntype, items.get(LEARNED), moment)

    @property
    def item_vectors(self) -> np.ndarray:
        """float32 [items, d]: the towers' alone."""
        return self.score.wide[:, :-1]

    def scorer(self, users: UserBatch) -> RangeScorer:
        """Scores of ranges of items."""
        kept, vectors = self._kept(users), self.user_vectors(users)
        raised = self.score.raised(users.rows[kept], users.gid[kept])
        return lambda first, last: self.score.dense(vectors, raised, first, last)

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
            offsets=torch.from_numpy(offsets_of(lengths)),
            age=age,
            country=country,
            tastes=tastes,
        )
        return self.tower(inputs, tables)

    def unknown(self, users: UserBatch) -> np.ndarray:
        """bool [users]: users with neither history nor a trait."""
        age, country, tastes = self._traits(users)
        nothing = torch.isnan(age) & (country < 0)
        for taste in tastes.values():
            nothing &= torch.isnan(taste).all(1)
        lengths = np.bincount(users.rows[self._kept(users)], minlength=len(users))
        return nothing.numpy() & (lengths == 0)

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
        traits = traits_of(users.users, spec.tastes)
        tastes = {name: torch.from_numpy(traits[f"taste_{name}"]) for name in spec.tastes}
        return as_tensor(traits["age"]), torch.from_numpy(country_index(spec.countries, traits["country"])), tastes
