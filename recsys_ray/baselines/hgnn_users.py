"""HGNN with users as nodes (paper A's HGNN-w-users): a two-layer heterogeneous GraphSAGE over the graph of users and
items, trained on the whole graph to predict its links.

    m_i  = P x_i + S s_i                                       an item's text x_i, and random signs s_i for its identity
    u0   = mean_t over types of  mean over i in N_t(u) of m_i  users have no features: they start as their items
    u1   = relu( W u0 + sum over t of mean over i in N_t(u) of relu(V_t m_i) )
    h_i  = relu( W_t P x_i + mean over u in N(i) of relu(Z u0) )
    z_u  = W' u1 + sum over t of mean over i in N_t(u) of relu(V'_t h_i),    normalised
    z_i  = W'_t h_i + mean over u in N(i) of relu(Z' u1),                    normalised

The score is z_u . z_i. Paper A gives no details; the choices follow our HGNN (docs/method.md): mean aggregation,
signatures, square weights that start as the identity, and a softmax over negatives of the positive's type. Each step
removes the links to be predicted from the graph. A user's vector is computed from the history alone, so users outside
the graph have one too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, normalize, relu

from recsys_ray.baselines.histories import (
    HistoryRule,
    empty_rows,
    history_rule,
    history_space,
    training_matrix,
)
from recsys_ray.baselines.interface import Baseline, KnownData, Params, Real, Space, Watch, Whole
from recsys_ray.baselines.propagation import SparseMap, row_means
from recsys_ray.baselines.sampling import softmax_loss, train
from recsys_ray.cluster.train import generator_for
from recsys_ray.config import Config
from recsys_ray.core.seeds import seed_from
from recsys_ray.data.tables import Catalogue
from recsys_ray.evaluation.ranking import Scorer, UserBatch, as_tensor, popular_where
from recsys_ray.hgnn.graphsage import start_as_average

_EPOCHS = 20
_FOLDS = 10  # steps an epoch: each predicts a tenth of the links from the others
_NEGATIVES = 512


class PerType(nn.Module):
    """A linear map of its own for each item type; items of a type stand together."""

    def __init__(self, width: int, bounds: np.ndarray) -> None:
        super().__init__()
        self.sizes = np.diff(bounds).tolist()
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in self.sizes)

    def forward(self, items: Tensor) -> Tensor:
        return torch.cat([m(part) for m, part in zip(self.maps, items.split(self.sizes), strict=True)])


class UserItemGraph(nn.Module):
    """The weights, and the passes over a graph that is given as sparse means."""

    def __init__(self, text_dim: int, width: int, bounds: np.ndarray) -> None:
        super().__init__()
        self.project = nn.Linear(text_dim, width)
        self.sign = nn.Linear(width, width, bias=False)
        self.user_own, self.user_own2 = nn.Linear(width, width), nn.Linear(width, width)
        self.item_own, self.item_own2 = PerType(width, bounds), PerType(width, bounds)
        self.to_user, self.to_user2 = PerType(width, bounds), PerType(width, bounds)
        self.to_item, self.to_item2 = nn.Linear(width, width), nn.Linear(width, width)
        start_as_average(self)

    def forward(self, text: Tensor, signs: Tensor, to_users: SparseMap, to_items: SparseMap) -> tuple[Tensor, Tensor]:
        """(z_u of all users, z_i of all items)."""
        z_item, tables = self.items(text, signs, to_users, to_items)
        return self.users(to_users, *tables), z_item

    def items(
        self, text: Tensor, signs: Tensor, to_users: SparseMap, to_items: SparseMap
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """z_i, and the three tables of items over which a user's vector takes its means."""
        own = self.project(text)
        sent = own + self.sign(signs)
        first = relu(self.to_user(sent))
        u0 = to_users(sent)
        u1 = relu(self.user_own(u0) + to_users(first))
        h = relu(self.item_own(own) + to_items(relu(self.to_item(u0))))
        z_item = normalize(self.item_own2(h) + to_items(relu(self.to_item2(u1))), dim=1)
        return z_item, (sent, first, relu(self.to_user2(h)))

    def users(self, to_users: SparseMap, sent: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """z_u of the rows of ``to_users``."""
        u1 = relu(self.user_own(to_users(sent)) + to_users(first))
        return normalize(self.user_own2(u1) + to_users(second), dim=1)


@dataclass
class HgnnUsers:
    """Item vectors, and what a user's vector is computed from."""

    item_vectors: np.ndarray  # float32 [items, d]
    tables: tuple[np.ndarray, np.ndarray, np.ndarray]  # float32 [items, d] each
    model: UserItemGraph
    bounds: np.ndarray  # int64 [types + 1]
    popularity: np.ndarray  # [items]
    rule: HistoryRule
    name: str = "hgnn_w_users"

    def scorer(self, users: UserBatch) -> Scorer:
        histories = self.rule.matrix(users, len(self.popularity))
        means = SparseMap(means_per_type(histories, self.bounds))
        with torch.no_grad():
            vectors = self.model.users(means, *(as_tensor(table) for table in self.tables))

        def score(first: int, last: int) -> Tensor:
            return vectors @ as_tensor(self.item_vectors[first:last]).T

        return popular_where(empty_rows(histories), score, self.popularity)


def means_per_type(links: sp.csr_matrix, bounds: np.ndarray) -> sp.csr_matrix:
    """Each row's entries divided by their sum inside the entry's item type: one product is then the sum of the means
    over each type's items."""
    rows = np.repeat(np.arange(links.shape[0]), np.diff(links.indptr))
    kind = np.searchsorted(bounds, links.indices, side="right") - 1
    group = rows * (len(bounds) - 1) + kind
    total = np.bincount(group, weights=links.data, minlength=links.shape[0] * (len(bounds) - 1))
    return sp.csr_matrix((links.data / total[group], links.indices, links.indptr), shape=links.shape)


def _space(config: Config) -> Space:
    return {
        "width": Whole(128, 64, 256, log=True),
        "learning_rate": Real(3e-3, 5e-4, 2e-2, log=True),
        "temperature": Real(0.1, 0.03, 0.3, log=True),
        **history_space(config),
    }


def _fit(data: KnownData, params: Params, seed: int, threads: int, watch: Watch | None = None) -> HgnnUsers:
    links = training_matrix(data, {"weak": params.get("weak", 1.0)})
    text = torch.from_numpy(data.text().astype(np.float32))
    random = generator_for(seed, "hgnn_w_users", "signs")
    signs = torch.randint(0, 2, (len(text), params["width"]), generator=random) * 2.0 - 1.0
    signs /= params["width"] ** 0.5
    bounds = data.catalogue.bounds
    popularity, rule = data.popularity(data.config.graph.window_days), history_rule(data, params)
    whole = _maps(links, bounds)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from(seed, "hgnn_w_users"))
        model = UserItemGraph(text.shape[1], params["width"], bounds)

    def current() -> HgnnUsers:
        with torch.no_grad():
            vectors, tables = model.items(text, signs, *whole)
        kept = tuple(table.numpy() for table in tables)
        return HgnnUsers(vectors.numpy(), (kept[0], kept[1], kept[2]), model, bounds, popularity, rule)

    def losses(epoch: int) -> Iterator[Tensor]:
        draw = generator_for(seed, "hgnn_w_users", epoch)
        return _losses(model, text, signs, links, data.catalogue, params["temperature"], draw)

    train(torch.optim.Adam(model.parameters(), params["learning_rate"]), params["epochs"], losses, watch, current)
    return current()


def _maps(links: sp.csr_matrix, bounds: np.ndarray) -> tuple[SparseMap, SparseMap]:
    """Means over a user's items, and over an item's users."""
    return SparseMap(means_per_type(links, bounds)), SparseMap(row_means(links.T.tocsr()).tocsr())


def _losses(
    model: UserItemGraph,
    text: Tensor,
    signs: Tensor,
    links: sp.csr_matrix,
    catalogue: Catalogue,
    temperature: float,
    draw: torch.Generator,
) -> Iterator[Tensor]:
    """One epoch: each fold of the links, predicted from the others."""
    fold = torch.randint(0, _FOLDS, (links.nnz,), generator=draw).numpy()
    user = np.repeat(np.arange(links.shape[0]), np.diff(links.indptr))
    for k in range(_FOLDS):
        hidden = fold == k
        kept = (links.data[~hidden], (user[~hidden], links.indices[~hidden]))
        shown = sp.csr_matrix(kept, shape=links.shape)
        asked = hidden & ~empty_rows(shown)[user]  # a user without any remaining link receives no messages
        if not asked.any():
            continue
        z_user, z_item = model(text, signs, *_maps(shown, catalogue.bounds))
        queries = embedding(torch.from_numpy(user[asked]), z_user) / temperature
        positive = torch.from_numpy(links.indices[asked].astype(np.int64))
        yield softmax_loss(queries, positive, z_item, catalogue, _NEGATIVES, draw) / int(asked.sum())


HGNN_USERS = Baseline(
    name="hgnn_w_users",
    note="A GraphSAGE over users and items with text features (the papers' HGNN with users as nodes), tuned; epochs by "
    "validation.",
    space=_space,
    fit=_fit,
    seeded=True,
    inputs=("featurize",),
    max_epochs=_EPOCHS,
)
