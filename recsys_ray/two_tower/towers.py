"""The two towers: three fully connected layers each, unit-norm outputs, one vector space for all item types
(paper A, section 3.3; paper B, section 3).

Shape suffixes: B users, N items of a table, n flat history events, T text dimension, H HGNN dimension, D output.
Imports neither dgl nor transformers: the user tower runs in a serving replica.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from recsys_ray.errors import ArtifactError
from recsys_ray.two_tower.inputs import ItemTables, UserInputs

METRIC = "inner_product"
_SMALL = 16  # width of the embeddings of country, language, category and item type
_AGE_SCALE = 50.0  # years; brings ages to about one


@dataclass(frozen=True)
class TowerSpec:
    """All that is needed to build the towers again."""

    num_types: int
    events: list[str]
    text_dim: int
    hgnn_dim: int  # 0: the two-tower without HGNN
    num_countries: int
    num_languages: int
    num_categories: int
    tastes: dict[str, int]
    layers: list[int]
    item_types: list[str] = field(default_factory=list)
    countries: list[str] = field(default_factory=list)
    dropout: float = 0.0
    history: int = 50
    window_days: int | None = None
    metric: str = METRIC
    cold_start: bool = True  # trained on empty histories too: every user's first event is an example

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path) -> TowerSpec:
        try:
            return TowerSpec(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} is no description of towers: {error}") from error


def _perceptron(in_dim: int, layers: list[int], dropout: float) -> nn.Sequential:
    parts: list[nn.Module] = []
    for width in layers:
        parts += [nn.Dropout(dropout), nn.Linear(in_dim, width), nn.ReLU()]
        in_dim = width
    return nn.Sequential(*parts[:-1])


class UserTower(nn.Module):
    """A user is what they touched: per item type the mean HGNN embedding, over all types the mean text vector, how
    much of each type; and age, country and taste vectors, each of which may be absent (zeros and a flag)."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.event_weight = nn.Parameter(torch.zeros(len(spec.events)))  # log weight: a stream may say more
        self.country = _small_embedding(spec.num_countries + 1)
        width = spec.text_dim + spec.num_types * (spec.hgnn_dim + 2) + 2 + _SMALL
        width += sum(dim + 1 for dim in spec.tastes.values())
        self.layers = _perceptron(width, spec.layers, spec.dropout)

    def forward(self, inputs: UserInputs, tables: ItemTables) -> Float[Tensor, "B D"]:
        """Unit vectors. ``inputs.gids`` are rows of ``tables``."""
        return F.normalize(self.layers(self._features(inputs, tables)), dim=-1)

    def _features(self, inputs: UserInputs, tables: ItemTables) -> Float[Tensor, "B width"]:
        users = len(inputs.offsets) - 1
        lengths = inputs.offsets.diff()
        row_n = torch.repeat_interleave(torch.arange(users), lengths)
        weight_n = self.event_weight.exp()[inputs.events]
        kind_n = tables.ntype[inputs.gids]
        parts = []
        if tables.text is not None:
            parts.append(_unit_variance(_mean(tables.text, inputs.gids, weight_n, row_n, users)))
        for kind in range(self.spec.num_types if self.spec.hgnn_dim else 0):
            assert tables.hgnn is not None
            of_kind = (kind_n == kind).nonzero().squeeze(1)
            mean = _mean(tables.hgnn, inputs.gids[of_kind], weight_n[of_kind], row_n[of_kind], users)
            parts.append(_unit_variance(mean))
        counts = torch.bincount(row_n * self.spec.num_types + kind_n, minlength=users * self.spec.num_types)
        counts = counts.view(users, self.spec.num_types).float()
        parts += [torch.log1p(counts), (counts > 0).float()]
        known = ~torch.isnan(inputs.age)
        parts.append(torch.stack([torch.nan_to_num(inputs.age) / _AGE_SCALE * known, known.float()], 1))
        parts.append(self.country(inputs.country + 1))
        for name, dim in self.spec.tastes.items():
            taste = inputs.tastes.get(name)
            taste = torch.full((users, dim), float("nan")) if taste is None else taste
            known = ~torch.isnan(taste).any(1, keepdim=True)
            parts += [torch.nan_to_num(taste) * known, known.float()]
        return torch.cat(parts, 1)


@dataclass(frozen=True)
class ItemRows:
    """What the item tower sees of N items."""

    text: Float[Tensor, "N T"]
    hgnn: Float[Tensor, "N H"] | None
    ntype: Int64[Tensor, "N"]
    language: Int64[Tensor, "N"]  # 0: unknown
    categories: Int64[Tensor, "c"]  # flat
    category_offsets: Int64[Tensor, "N"]


class ItemTower(nn.Module):
    """Text vector, HGNN embedding, item type, language and categories of an item."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.kind = _small_embedding(spec.num_types)
        self.language = _small_embedding(spec.num_languages + 1)
        self.category = nn.EmbeddingBag.from_pretrained(
            _small_embedding(spec.num_categories + 1).weight.detach(), freeze=False, mode="mean"
        )
        self.layers = _perceptron(spec.text_dim + spec.hgnn_dim + 3 * _SMALL, spec.layers, spec.dropout)

    def forward(self, rows: ItemRows) -> Float[Tensor, "N D"]:
        """Unit vectors."""
        vectors = [rows.text] if rows.hgnn is None else [rows.text, rows.hgnn]
        parts = [_unit_variance(vector) for vector in vectors]
        parts += [self.kind(rows.ntype), self.language(rows.language)]
        parts.append(self.category(rows.categories, rows.category_offsets))
        return F.normalize(self.layers(torch.cat(parts, 1)), dim=-1)


class TwoTower(nn.Module):
    """Both towers, as one module for training and for saving."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.user, self.item = UserTower(spec), ItemTower(spec)

    def forward(
        self, inputs: UserInputs, tables: ItemTables, rows: ItemRows
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "N D"]]:
        return self.user(inputs, tables), self.item(rows)


def _unit_variance(vectors: Float[Tensor, "N d"]) -> Float[Tensor, "N d"]:
    """Entries of a unit vector are about 1 / sqrt(d), too small beside flags and embeddings to be learned from."""
    return vectors * vectors.shape[1] ** 0.5


def _small_embedding(rows: int) -> nn.Embedding:
    embedding = nn.Embedding(rows, _SMALL)
    nn.init.normal_(embedding.weight, std=0.1)  # the default of 1 would drown the vectors
    return embedding


def _mean(
    table: Float[Tensor, "N d"],
    gids: Int64[Tensor, "n"],
    weight: Float[Tensor, "n"],
    row: Int64[Tensor, "n"],
    users: int,
) -> Float[Tensor, "users d"]:
    """Weighted mean of table rows for each user; zeros for a user with none. ``row`` ascends."""
    starts = torch.searchsorted(row, torch.arange(users))
    total = F.embedding_bag(gids, table.float(), starts, mode="sum", per_sample_weights=weight)
    weights = torch.zeros(users).index_add(0, row, weight)
    return total / weights.clamp(min=1e-12)[:, None]


def load_user_tower(folder: Path) -> UserTower:
    """The user tower of ``folder`` (``model.safetensors`` and ``spec.json``), ready to answer."""
    tower = UserTower(TowerSpec.load(folder / "spec.json"))
    _load(tower, folder, "user.")
    return tower


def load_towers(folder: Path) -> TwoTower:
    """Both towers of ``folder``, ready to answer."""
    towers = TwoTower(TowerSpec.load(folder / "spec.json"))
    _load(towers, folder, "")
    return towers


def _load(module: nn.Module, folder: Path, prefix: str) -> None:
    try:
        weights = load_file(folder / "model.safetensors")
        module.load_state_dict({n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)})
    except (OSError, RuntimeError) as error:
        raise ArtifactError(f"the towers in {folder} cannot be loaded ({error}); train them again") from error
    module.eval().requires_grad_(False)
