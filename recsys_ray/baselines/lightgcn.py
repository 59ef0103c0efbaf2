"""LightGCN (He et al., SIGIR 2020): embeddings of users and items, averaged over the layers of a linear propagation
along the bipartite graph.

    E^(k+1) = D^-1/2 A D^-1/2 E^(k),    e = mean over k of e^(k),    score(u, i) = e_u . e_i

Implemented here as two sparse products per layer over weights that are normalised once; PyTorch Geometric would be a
large dependency for this one model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from recsys_ray.baselines.histories import HistoryRule, item_ranges, join_parts
from recsys_ray.baselines.interface import Baseline, Choice, KnownData, Params, Real, Space, Watch, Whole
from recsys_ray.baselines.propagation import SparseMap, symmetric
from recsys_ray.baselines.sampling import batch_size, bpr_loss, softmax_loss, train
from recsys_ray.cluster.train import generator_for
from recsys_ray.config import Config
from recsys_ray.data.tables import Catalogue
from recsys_ray.evaluation.ranking import Scorer, UserBatch, as_tensor, popular_where

_EPOCHS = 100
_BATCH = 16_384
_NEGATIVES = 512
_INIT = 0.1


@dataclass(frozen=True)
class LightGcn:
    """Vectors of items, and of the users who were fitted; for others, one step of the propagation from their history.

    With ``joint`` false a user is as many nodes as there are item types, each linked to that type's items alone: the
    models of the types then share nothing.
    """

    key: np.ndarray  # int64 [user nodes], ascending: uid, or uid * types + type
    user_vectors: np.ndarray  # float32 [user nodes, d]
    item_vectors: np.ndarray  # float32 [items, d]
    degree: np.ndarray  # float32 [items]: links of an item
    catalogue: Catalogue
    joint: bool
    popularity: np.ndarray  # [items]
    rule: HistoryRule
    name: str = "lightgcn"

    def scorer(self, users: UserBatch) -> Scorer:
        histories = self.rule.matrix(users, len(self.popularity))
        types = len(self.catalogue.types)
        parts = []
        for number, (first, last) in enumerate(item_ranges(self.catalogue, self.joint)):
            key = users.uid if self.joint else users.uid * types + number
            parts.append((first, last, self._answer(key, histories[:, first:last].tocsr(), first, last)))
        return join_parts(parts, len(users))

    def _answer(self, key: np.ndarray, histories: sp.csr_matrix, begin: int, end: int) -> Scorer:
        """Scores of the items ``begin <= gid < end`` by user nodes ``key``, of which ``histories`` has the items."""
        degree = self.degree[begin:end]
        share = np.divide(1.0, degree, out=np.zeros_like(degree), where=degree > 0) ** 0.5
        length = np.maximum(np.asarray(histories.sum(1)).ravel(), 1.0) ** 0.5
        vectors = (histories @ (share[:, None] * self.item_vectors[begin:end])) / length[:, None]
        empty = np.asarray(histories @ share).ravel() == 0
        place = np.minimum(np.searchsorted(self.key, key), len(self.key) - 1)
        fitted = self.key[place] == key if len(self.key) else np.zeros(len(key), dtype=bool)
        vectors[fitted] = self.user_vectors[place[fitted]]

        def score(first: int, last: int) -> Tensor:
            return torch.from_numpy(vectors.astype(np.float32)) @ as_tensor(self.item_vectors[first:last]).T

        return popular_where(empty & ~fitted, score, self.popularity)


class Propagation(nn.Module):
    """Embeddings of user nodes and items, and the layers over them."""

    def __init__(self, links: sp.csr_matrix, width: int, layers: int, init: torch.Generator) -> None:
        super().__init__()
        users, items = links.shape
        self.layers = layers
        self.users = nn.Parameter(_INIT * torch.randn(users, width, generator=init))
        self.items = nn.Parameter(_INIT * torch.randn(items, width, generator=init))
        self._to_users = SparseMap(symmetric(links).tocsr())
        self._to_items = self._to_users.transposed

    def forward(self) -> tuple[Tensor, Tensor]:
        """Vectors of user nodes and of items, means over the layers."""
        user: Tensor = self.users
        item: Tensor = self.items
        user_sum, item_sum = user, item
        for _ in range(self.layers):
            user, item = self._to_users(item), self._to_items(user)
            user_sum, item_sum = user_sum + user, item_sum + item
        return user_sum / (self.layers + 1), item_sum / (self.layers + 1)


def _space(config: Config) -> Space:
    return {
        "joint": Choice(True, (True, False)),
        "width": Whole(64, 32, 128, log=True),
        "layers": Whole(2, 1, 3),
        "loss": Choice("softmax", ("softmax", "bpr")),
        "learning_rate": Real(0.01, 0.001, 0.05, log=True),
        "decay": Real(1e-4, 1e-6, 1e-2, log=True),
    }


def _fit(data: KnownData, params: Params, seed: int, threads: int, watch: Watch | None = None) -> LightGcn:
    rule = HistoryRule(data.config.graph.max_history)
    row, event, _ = rule.entries(data.users)
    uid, gid = data.users.uid[row], data.users.gid[event].astype(np.int64)
    types = len(data.catalogue.types)
    keys = uid if params["joint"] else uid * types + data.catalogue.type_of(gid)
    key, node = np.unique(keys, return_inverse=True)
    links = sp.csr_matrix((np.ones(len(gid), np.float32), (node, gid)), shape=(len(key), data.catalogue.items))
    model = Propagation(links, params["width"], params["layers"], generator_for(seed, "lightgcn", "weights"))
    degree = np.asarray(links.sum(0), dtype=np.float32).ravel()
    popularity = data.popularity(data.config.graph.window_days)

    def current() -> LightGcn:
        with torch.no_grad():
            users, items = (vectors.numpy().copy() for vectors in model())
        return LightGcn(key, users, items, degree, data.catalogue, params["joint"], popularity, rule)

    def losses(epoch: int) -> Iterator[Tensor]:
        draw = generator_for(seed, "lightgcn", epoch)
        return _losses(model, torch.from_numpy(node), torch.from_numpy(gid), data.catalogue, params, draw)

    train(torch.optim.Adam(model.parameters(), params["learning_rate"]), params["epochs"], losses, watch, current)
    return current()


def _losses(
    model: Propagation, node: Tensor, gid: Tensor, catalogue: Catalogue, params: Params, draw: torch.Generator
) -> Iterator[Tensor]:
    """One epoch: the loss of each batch of links, once the step before has been taken."""
    size = batch_size(len(gid), _BATCH)
    for chosen in torch.randperm(len(gid), generator=draw).split(size):
        users, items = model()
        queries, positive = embedding(node[chosen], users), gid[chosen]
        if params["loss"] == "softmax":
            loss = softmax_loss(queries, positive, items, catalogue, _NEGATIVES, draw)
        else:
            loss = bpr_loss(queries, positive, items, catalogue, draw)
        own = embedding(node[chosen], model.users).square().sum() + embedding(positive, model.items).square().sum()
        yield (loss + 0.5 * params["decay"] * own) / len(chosen)


LIGHTGCN = Baseline(
    name="lightgcn",
    note="LightGCN over users and items, tuned; epochs by validation.",
    space=_space,
    fit=_fit,
    seeded=True,
    max_epochs=_EPOCHS,
)
