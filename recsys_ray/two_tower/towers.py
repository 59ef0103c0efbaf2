"""The two towers: three fully connected layers each, unit-norm outputs, one vector space for all item types
(paper A, section 3.3; paper B, section 3).

Ours, not the papers': a linear path beside the layers. It starts as the same principal directions of text and HGNN
embedding in both towers, while the layers start at zero. So before its first step the two-tower recommends the nearest
neighbours of the user's items, new items included, and training continues from there. ``TowerSpec.inputs`` of "paper"
are those of paper A alone, without the linear path.

Shape suffixes: B users, N items of a table, n flat history events, T text dimension, H HGNN dimension, D output.
Imports neither dgl nor transformers, because serving replicas run the user tower.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from recsys_ray.core.errors import ArtifactError
from recsys_ray.core.precision import Precision
from recsys_ray.two_tower.features import ItemRows, ItemTables, UserInputs

METRIC = "inner_product"
_SMALL = 16  # width of the embeddings of country, language, category and item type
_ID_SCALE = 8.0  # Adam moves an entry by about the learning rate a step: this many times that
_ID_START = 0.1  # size of an item's own vector before the first step
_AGE_SCALE = 50.0  # years; brings ages to about one

ALL, PAPER = "all", "paper"  # what the towers read: all that helps, or what paper A feeds and no more

Directions = tuple[Float[Tensor, "d"], Float[Tensor, "k d"]]  # a mean, and orthonormal axes around it


@dataclass(frozen=True)
class TowerSpec:
    """All that is needed to build the towers again."""

    num_types: int
    events: list[str]
    text_dim: int
    hgnn_dim: int  # 0: the two-tower without HGNN
    activity_dim: int
    num_countries: int
    num_languages: int
    num_categories: int
    tastes: dict[str, int]
    layers: list[int]
    item_types: list[str] = field(default_factory=list)
    countries: list[str] = field(default_factory=list)
    dropout: float = 0.0
    hgnn_dropout: float = 0.0
    history: int = 50
    window_days: int | None = None
    metric: str = METRIC
    id_dim: int = 0  # 0: items have no vectors of their own
    id_rows: int = 0  # how many have one
    num_items: int = 0
    id_dropout: float | None = 0.0  # None: training chooses
    last_item: bool | None = False  # None: to be chosen before the towers are built
    recent: list[float] = field(default_factory=list)  # half-lives, in places, of further means of the history
    cold_start: bool = True  # trained on empty histories too: every user's first event is an example
    inputs: str = ALL

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path) -> TowerSpec:
        try:
            return TowerSpec(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{path} is not a valid tower description ({error}); run the stage that wrote it again"
            ) from error


class Dropout(nn.Module):
    """Dropout by one random byte an entry, the share rounded to 1/256. ``nn.Dropout`` draws a number for each entry, on
    a CPU by one thread: it took a fifth of a training step."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.dropped = round(share * 256)

    def forward(self, x_BF: Float[Tensor, "B F"]) -> Float[Tensor, "B F"]:
        if not self.training or not self.dropped:
            return x_BF
        words = torch.empty(-(-x_BF.numel() // 8), dtype=torch.int64, device=x_BF.device).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: x_BF.numel()].view_as(x_BF) > self.dropped - 1  # 256 does not fit a byte
        return x_BF * kept * (256 / max(256 - self.dropped, 1))


class _Layers(nn.Module):
    """Fully connected layers with ReLU between them, beside a linear path if there is one; unit-norm outputs.

    Attributes:
        bf16: whether they compute in bf16 while they train. Answers are always fp32's.
    """

    def __init__(self, in_dim: int, spec: TowerSpec) -> None:
        super().__init__()
        self.bf16 = False
        parts: list[nn.Module] = []
        width = in_dim
        for out in spec.layers:
            parts += [Dropout(spec.dropout), nn.Linear(width, out), nn.ReLU()]
            width = out
        self.deep = nn.Sequential(*parts[:-1])
        self.linear = nn.Linear(in_dim, width) if spec.inputs == ALL else None

    def forward(self, x_BF: Float[Tensor, "B F"]) -> Float[Tensor, "B D"]:
        if self.bf16 and self.training:
            with torch.autocast(x_BF.device.type, torch.bfloat16):
                out_BD = self._outputs(x_BF.bfloat16()).float()
        else:
            out_BD = self._outputs(x_BF)
        return F.normalize(out_BD, dim=-1)

    def _outputs(self, x_BF: Tensor) -> Tensor:
        return self.deep(x_BF) if self.linear is None else self.deep(x_BF) + self.linear(x_BF)

    @torch.no_grad()
    def start(self, blocks: list[tuple[int, Directions]]) -> None:
        """Silence the layers; let each block of inputs (its first column) pass along its directions."""
        if self.linear is None:
            return
        last = self.deep[-1]
        assert isinstance(last, nn.Linear)
        for parameter in (last.weight, last.bias, self.linear.weight, self.linear.bias):
            parameter.zero_()
        row = 0
        for column, (mean, axes) in blocks:
            count, dim = axes.shape
            self.linear.weight[row : row + count, column : column + dim] = axes / dim**0.5  # inputs: _unit_variance
            self.linear.bias[row : row + count] = -axes @ mean
            row += count


def principal_directions(vectors: Float[Tensor, "N d"], count: int) -> Directions:
    """The mean and the ``count`` (at most d) directions of largest variance."""
    mean = vectors.mean(0)
    centred = (vectors - mean).double()
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors  # ascending variance
    return mean, axes.T.flip(0)[: min(count, vectors.shape[1])].float()


class UserTower(nn.Module):
    """Features of a user: the mean text vector of the history, the mean HGNN embedding of all items and of those of
    each type, the mean of the learned item vectors, all three of the last item and in means of the latest, how much of
    each type; and age, country and taste vectors, each of which may be absent (zeros and a flag).

    Paper A's are the mean HGNN embedding of the items of each type, in which all events weigh the same; and age,
    country and taste vectors."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.event_weight = nn.Parameter(torch.zeros(len(spec.events)))  # log weight: a stream may say more
        self.country = _small_embedding(spec.num_countries + 1)
        weighed = len(spec.events) > 1 and spec.inputs == ALL  # one event has nothing to be weighed against
        self.event_weight.requires_grad_(weighed)
        width = spec.num_types * spec.hgnn_dim + 2 + _SMALL + sum(dim + 1 for dim in spec.tastes.values())
        if spec.inputs == ALL:
            means = 1 + bool(spec.last_item) + len(spec.recent)  # of all, the last item, of the latest
            width += means * (spec.text_dim + spec.hgnn_dim + spec.id_dim) + 2 * spec.num_types
        self.hide = Dropout(spec.hgnn_dropout)
        self.layers = _Layers(width, spec)

    def forward(self, inputs: UserInputs, tables: ItemTables) -> Float[Tensor, "B D"]:
        """Unit vectors. ``inputs.gids`` are rows of ``tables``."""
        return self.layers(self._features(inputs, tables))

    def _features(self, inputs: UserInputs, tables: ItemTables) -> Float[Tensor, "B width"]:
        users, kinds, everything = len(inputs.offsets) - 1, self.spec.num_types, self.spec.inputs == ALL
        row_n = torch.repeat_interleave(torch.arange(users), inputs.offsets.diff())
        weight_n = self.event_weight.exp()[inputs.events]
        vectors = [_unit_variance(table.float()) for table in (tables.text, tables.hgnn) if table is not None]
        if self.spec.id_dim:
            assert tables.ids is not None
            vectors.append(tables.ids)
        kind_n = tables.ntype[inputs.gids]
        known_n = kind_n < kinds  # a type added later counts in the means over all types only
        bag_n, order = torch.sort((row_n * kinds + kind_n)[known_n], stable=True)
        parts, latest = [], []
        if everything:
            bags = _Bags.together([_Bags(inputs.gids, weight_n, row_n, users), *self._of_the_latest(inputs, row_n)])
            means = [bags.means(table).view(-1, users, table.shape[1]).unbind() for table in vectors]
            all_, *latest = zip(*means, strict=True)
            parts += self._hidden(all_)
        if self.spec.hgnn_dim:
            each_type = _Bags(inputs.gids[known_n][order], weight_n[known_n][order], bag_n, users * kinds)
            parts.append(self.hide(each_type.means(vectors[1]).view(users, -1)))
        for made in latest:
            parts += self._hidden(made)
        if everything:
            counts = torch.bincount(bag_n, minlength=users * kinds).view(users, kinds).float()
            parts += [torch.log1p(counts), (counts > 0).float()]
        return torch.cat([*parts, *self._traits(inputs)], 1)

    def _of_the_latest(self, inputs: UserInputs, row_n: Int64[Tensor, "n"]) -> list[_Bags]:
        users, bags = len(inputs.offsets) - 1, []
        if self.spec.last_item:
            full = torch.nonzero(inputs.offsets.diff() > 0).squeeze(1)
            last = inputs.gids[inputs.offsets[1:][full] - 1]
            bags.append(_Bags(last, torch.ones(len(last)), full, users))
        for half_life in self.spec.recent:
            bags.append(_Bags(inputs.gids, recent_weights(inputs.offsets, half_life), row_n, users))
        return bags

    def _hidden(self, made: Sequence[Tensor]) -> list[Tensor]:
        """Of text, HGNN embedding and the items' own vectors (:meth:`TwoTower.start_near` relies on the order)."""
        return [self.hide(part) if place == 1 and self.spec.hgnn_dim else part for place, part in enumerate(made)]

    def _traits(self, inputs: UserInputs) -> list[Tensor]:
        """Age, country and taste vectors."""
        known = ~torch.isnan(inputs.age)
        parts = [torch.stack([torch.nan_to_num(inputs.age) / _AGE_SCALE * known, known.float()], 1)]
        parts.append(self.country(inputs.country + 1))
        for name, dim in self.spec.tastes.items():
            taste = inputs.tastes.get(name)
            taste = torch.full((len(inputs.age), dim), float("nan")) if taste is None else taste
            known = ~torch.isnan(taste).any(1, keepdim=True)
            parts += [torch.nan_to_num(taste) * known, known.float()]
        return parts


class ItemTower(nn.Module):
    """Text vector, HGNN embedding, own vector, activity, item type, language and categories of an item; paper A has
    text, HGNN embedding, language and categories."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.kind = _small_embedding(spec.num_types) if spec.inputs == ALL else None
        self.language = _small_embedding(spec.num_languages + 1)
        self.category = nn.EmbeddingBag.from_pretrained(
            _small_embedding(spec.num_categories + 1).weight.detach(), freeze=False, mode="mean"
        )
        self.hide = Dropout(spec.hgnn_dropout)
        width = spec.text_dim + spec.hgnn_dim + spec.id_dim + 2 * _SMALL
        width += spec.activity_dim + _SMALL if spec.inputs == ALL else 0
        self.layers = _Layers(width, spec)

    def forward(self, rows: ItemRows) -> Float[Tensor, "N D"]:
        """Unit vectors."""
        vectors = [rows.text] if rows.hgnn is None else [rows.text, rows.hgnn]
        parts = [_unit_variance(vector) for vector in vectors]
        if rows.hgnn is not None:
            parts[1] = self.hide(parts[1])
        if self.spec.id_dim:
            assert rows.ids is not None
            parts.append(rows.ids)
        if self.kind is not None:
            known = rows.ntype < self.spec.num_types  # a type added later has no type embedding
            parts += [rows.activity, self.kind(rows.ntype.where(known, 0)) * known[:, None]]
        parts.append(self.language(rows.language))
        parts.append(self.category(rows.categories, rows.category_offsets))
        return self.layers(torch.cat(parts, 1))


class ItemIds(nn.Module):
    """A learned vector for each item with training examples, shared by both towers (ours; the item embedding of
    matrix factorisation). Zeros stand for all other items and, now and then in training, for any: the towers must not
    lean on it alone."""

    row: Tensor  # int64 [items]: the item's row in the table; 0: none

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.dropout = spec.id_dropout or 0.0
        self.register_buffer("row", torch.zeros(spec.num_items, dtype=torch.int64))
        self.vector = nn.Embedding(spec.id_rows + 1, spec.id_dim, padding_idx=0)
        nn.init.normal_(self.vector.weight, std=_ID_START / _ID_SCALE)
        self.forget()

    @torch.no_grad()
    def forget(self) -> None:
        """Every item is new."""
        self.row.zero_()
        self.vector.weight[0] = 0.0

    def assign(self, examples: Float[Tensor, "items"]) -> None:
        """Give vectors to the items with the most training examples."""
        order = torch.argsort(examples, descending=True, stable=True)[: self.vector.num_embeddings - 1]
        chosen = torch.sort(order[examples[order] > 0]).values
        self.row.zero_()
        self.row[chosen] = torch.arange(1, len(chosen) + 1)

    def forward(self, owners: Int64[Tensor, "N"]) -> Float[Tensor, "N d"]:
        """Vectors of these gids, with entries of about one; zeros for -1."""
        rows = torch.where(owners >= 0, self.row[owners], 0)
        vectors = self.vector(rows) * _ID_SCALE
        if not self.training or not self.dropout:
            return vectors
        kept = torch.rand(len(owners), 1) >= self.dropout
        return vectors * kept / (1 - self.dropout)


class GivenIds(nn.Module):
    """Vectors that are there already, row = gid, in the place of :class:`ItemIds`."""

    def __init__(self, ids: Float[Tensor, "items d"]) -> None:
        super().__init__()
        self.vectors = ids

    def forward(self, owners: Int64[Tensor, "N"]) -> Float[Tensor, "N d"]:
        return self.vectors[owners] * (owners >= 0)[:, None]


class TwoTower(nn.Module):
    """Both towers, as one module for training and for saving."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.user, self.item = UserTower(spec), ItemTower(spec)
        self.ids: nn.Module | None = ItemIds(spec) if spec.id_dim else None

    def forward(
        self, inputs: UserInputs, tables: ItemTables, rows: ItemRows
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "N D"]]:
        return self.users(inputs, tables), self.items(rows)

    def users(self, inputs: UserInputs, tables: ItemTables) -> Float[Tensor, "B D"]:
        """Unit vectors of users; ``inputs.gids`` are rows of ``tables``."""
        if self.ids is not None:
            assert tables.owners is not None
            tables = replace(tables, ids=self.ids(tables.owners))
        return self.user(inputs, tables)

    def items(self, rows: ItemRows) -> Float[Tensor, "N D"]:
        """Unit vectors of items."""
        return self.item(rows if self.ids is None else replace(rows, ids=self.ids(rows.owners)))

    def train_in(self, precision: Precision) -> None:
        """The precision of the layers while they train."""
        for tower in (self.user, self.item):
            tower.layers.bf16 = precision == "bf16"

    def start_near(self, text_NT: Float[Tensor, "N T"], hgnn_NH: Float[Tensor, "N H"] | None) -> None:
        """Start as nearest neighbours, given the vectors of a sample of items: half of the output's width to either."""
        spec = self.user.spec
        room = spec.layers[-1]
        text = principal_directions(text_NT, room if hgnn_NH is None else room - room // 2)
        blocks = [(0, text)]  # text comes first in both towers, the HGNN embedding (of all items) after it
        if hgnn_NH is not None:
            blocks.append((spec.text_dim, principal_directions(hgnn_NH, room // 2)))
        for tower in (self.user, self.item):
            tower.layers.start(blocks)


def _unit_variance(vectors: Float[Tensor, "*N d"]) -> Float[Tensor, "*N d"]:
    """Entries of a unit vector are about 1 / sqrt(d), too small beside flags and embeddings to be learned from."""
    return vectors * vectors.shape[-1] ** 0.5


def _small_embedding(rows: int) -> nn.Embedding:
    embedding = nn.Embedding(rows, _SMALL)
    nn.init.normal_(embedding.weight, std=0.1)  # the default of 1 would drown the vectors
    return embedding


@dataclass(frozen=True)
class _Bags:
    """Weighted rows of a table, some in each bag."""

    gids: Int64[Tensor, "n"]
    weight: Float[Tensor, "n"]
    bag: Int64[Tensor, "n"]  # ascending
    count: int

    @staticmethod
    def together(each: Sequence[_Bags]) -> _Bags:
        """The bags of one after those of the other: one pass over a table serves all of them."""
        shifts = itertools.accumulate((one.count for one in each), initial=0)
        bag = torch.cat([one.bag + shift for one, shift in zip(each, shifts, strict=False)])
        gids, weight = torch.cat([one.gids for one in each]), torch.cat([one.weight for one in each])
        return _Bags(gids, weight, bag, sum(one.count for one in each))

    def means(self, table: Float[Tensor, "N d"]) -> Float[Tensor, "count d"]:
        """The weighted mean of each bag; zeros where there is nothing."""
        starts = torch.searchsorted(self.bag, torch.arange(self.count))
        total = F.embedding_bag(self.gids, table, starts, mode="sum", per_sample_weights=self.weight)
        weight = torch.zeros(self.count).index_add(0, self.bag, self.weight)
        return total / weight.clamp(min=1e-12)[:, None]


def recent_weights(offsets: Int64[Tensor, "bags_plus_1"], half_life: float) -> Float[Tensor, "n"]:
    """1 for a user's last event, half of it for the one ``half_life`` places before."""
    back = torch.repeat_interleave(offsets[1:], offsets.diff()) - 1 - torch.arange(int(offsets[-1]))
    return 0.5 ** (back / half_life)


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


def load_item_ids(folder: Path) -> np.ndarray | None:
    """The items' own vectors in ``folder``, float32 [items, id_dim], row = gid; None where the towers have none."""
    spec = TowerSpec.load(folder / "spec.json")
    if not spec.id_dim:
        return None
    ids = ItemIds(spec)
    _load(ids, folder, "ids.")
    return ids(torch.arange(spec.num_items)).numpy()


def _load(module: nn.Module, folder: Path, prefix: str) -> None:
    try:
        weights = load_file(folder / "model.safetensors")
        module.load_state_dict({n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)})
    except (OSError, RuntimeError) as error:
        raise ArtifactError(f"the towers in {folder} cannot be loaded ({error}); train them again") from error
    module.eval().requires_grad_(False)
