"""Models in the comparison that are not fitted here: two-tower models, and ready-made lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from recsys_ray.core.errors import DataError
from recsys_ray.core.offsets import offsets_of, spread
from recsys_ray.data.tables import Tables
from recsys_ray.evaluation.ranking import Scorer, UserBatch, popular_where
from recsys_ray.storage.store import Place

ORACLE = "oracle"


@runtime_checkable
class TowerModel(Protocol):
    """What evaluation needs of a trained two-tower model."""

    @property
    def item_vectors(self) -> np.ndarray:
        """float32 [items, d]."""
        ...

    def scorer(self, users: UserBatch) -> Scorer:
        """Scores of ranges of items, as of the start of the test period."""
        ...

    def unknown(self, users: UserBatch) -> np.ndarray:
        """bool [users]: users with neither history nor a trait."""
        ...


@dataclass(frozen=True)
class Tower:
    """A two-tower model. Users about whom nothing is known get what is popular, as in serving."""

    name: str
    model: TowerModel
    popular: np.ndarray  # [items]

    def scorer(self, users: UserBatch) -> Scorer:
        return popular_where(self.model.unknown(users), self.model.scorer(users), self.popular)


@dataclass(frozen=True)
class ReadyLists:
    """Rankings that exist already, one a user and item type: the demo world's oracle."""

    name: str
    key: np.ndarray  # int64 [lists], uid * types + item type, ascending
    offsets: np.ndarray  # int64 [lists + 1]
    gid: np.ndarray  # int64, best first inside a list
    types: int

    def lists(self, uid: np.ndarray, item_type: np.ndarray) -> np.ndarray:
        """bool: is there a ranking for this user and type?"""
        return np.isin(uid * np.int64(self.types) + item_type, self.key)

    def scorer(self, users: UserBatch) -> Scorer:
        begin = self.offsets[np.searchsorted(self.key, users.uid * self.types)]
        length = self.offsets[np.searchsorted(self.key, (users.uid + 1) * self.types)] - begin
        row = np.repeat(np.arange(len(users)), length)
        place = spread(begin, length)
        gid = self.gid[place]

        def score(first: int, last: int) -> Tensor:
            scores = torch.full((len(users), last - first), -torch.inf)
            here = (gid >= first) & (gid < last)
            # Earlier in the flat array is earlier in the list, and only order counts.
            value = torch.from_numpy((begin[row] - place)[here]).float()
            scores[torch.from_numpy(row[here]), torch.from_numpy(gid[here] - first)] = value
            return scores

        return score


def read_oracle(path: Place, ingest: Tables, item_types: tuple[str, ...]) -> ReadyLists:
    """The demo world's best rankings (columns user_id, item_type, item_ids) in uids and gids.

    Raises:
        DataError: the table cannot be read, or names items that are not in the catalogue.
    """
    try:
        table = path.dataset().to_table(columns=["user_id", "item_type", "item_ids"])
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"data.oracle: {path} cannot be read as user_id, item_type, item_ids: {error}") from error
    uid = pc.fill_null(pc.index_in(table["user_id"], value_set=ingest.user_ids), -1).to_numpy()
    types = pc.fill_null(pc.index_in(table["item_type"], value_set=pa.array(item_types)), -1).to_numpy()
    known = (uid >= 0) & (types >= 0)  # of others, ingest kept no event: there is no query to answer
    key = np.where(known, uid.astype(np.int64) * len(item_types) + types, -1)
    order = np.argsort(key, kind="stable")[np.count_nonzero(~known) :]
    lists = table["item_ids"].combine_chunks().take(order)
    gid = pc.fill_null(pc.index_in(lists.flatten(), value_set=ingest.item_ids), -1).to_numpy().astype(np.int64)
    if (gid < 0).any():
        raise DataError(f"data.oracle: {path} contains items that are not in the catalogue; generate the data again")
    length = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    offsets = offsets_of(length)
    return ReadyLists(ORACLE, key[order], offsets, gid, len(item_types))
