"""The two towers: three fully connected layers each, unit-norm outputs, one vector space for all item types
(paper A, section 3.3; paper B, section 3).

Ours, not the papers': both towers see the graph through each item's learned vector, which is a narrow map of its HGNN
embedding plus a part of its own (:class:`ItemVectors`). And a linear path beside the layers: it starts as the same
principal directions of text and HGNN embedding in both towers, while the layers start at zero. So before its first step
the two-tower recommends the nearest neighbours of the user's items, new items included, and training continues from
there. ``TowerSpec.inputs`` of "paper" are those of paper A alone: whole HGNN embeddings, no linear path.

Shape suffixes: B users, N items of a table, n flat history events, T text dimension, H HGNN dimension, D output.
Imports neither dgl nor transformers, because serving replicas run the user tower.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

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
_OWN_SCALE = 8.0  # Adam moves an entry by about the learning rate a step: this many times that
_OWN_START = 0.1  # size of an item's own vector before the first step
_AGE_SCALE = 50.0  # years; brings ages to about one

ALL, PAPER = "all", "paper"  # what the towers read: all that helps, or what paper A feeds and no more

Directions = tuple[Float[Tensor, "d"], Float[Tensor, "k d"]]  # a mean, and orthonormal axes around it
Block = tuple[int, Float[Tensor, "_ _"], Float[Tensor, "_"]]  # first column, weights and biases of some rows


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
    history: int = 50
    window_days: int | None = None
    metric: str = METRIC
    id_dim: int = 0  # of the items' learned vectors; 0: they have none
    id_rows: int = 0  # how many items have a part of their own
    num_items: int = 0
    id_dropout: float | None = 0.0  # None: training chooses
    last_item: bool | None = False  # None: to be chosen before the towers are built
    recent: list[float] = field(default_factory=list)  # half-lives, in places, of further means of the history
    cold_start: bool = True  # trained on empty histories too: every user's first event is an example
    inputs: str = ALL

    @property
    def reads_embeddings(self) -> bool:
        """Whether the towers read HGNN embeddings as they are."""
        return self.inputs == PAPER and self.hgnn_dim > 0

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
    def start(self, blocks: Sequence[Block]) -> None:
        """Silence the layers; let each block of inputs pass, to outputs of its own."""
        if self.linear is None:
            return
        last = self.deep[-1]
        assert isinstance(last, nn.Linear)
        for parameter in (last.weight, last.bias, self.linear.weight, self.linear.bias):
            parameter.zero_()
        row = 0
        for column, weight, bias in blocks:
            count, dim = weight.shape
            self.linear.weight[row : row + count, column : column + dim] = weight
            self.linear.bias[row : row + count] = bias
            row += count


def principal_directions(vectors: Float[Tensor, "N d"], count: int) -> Directions:
    """The mean and the ``count`` (at most d) directions of largest variance."""
    mean = vectors.mean(0)
    centred = (vectors - mean).double()
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors  # ascending variance
    return mean, axes.T.flip(0)[: min(count, vectors.shape[1])].float()


class UserTower(nn.Module):
    """Features of a user: the mean text vector of the history and the mean of its items' learned vectors, both also of
    the last item and in means of the latest, how much of each type; and age, country and taste vectors, each of which
    may be absent (zeros and a flag).

    Paper A's are the mean HGNN embedding of the items of each type, in which all events weigh the same; and age,
    country and taste vectors."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.event_weight = nn.Parameter(torch.zeros(len(spec.events)))  # log weight: a stream may say more
        self.country = _small_embedding(spec.num_countries + 1)
        weighed = len(spec.events) > 1 and spec.inputs == ALL  # one event has nothing to be weighed against
        self.event_weight.requires_grad_(weighed)
        width = 2 + _SMALL + sum(dim + 1 for dim in spec.tastes.values())
        if spec.inputs == ALL:
            means = 1 + bool(spec.last_item) + len(spec.recent)  # of all, the last item, of the latest
            width += means * (spec.text_dim + spec.id_dim) + 2 * spec.num_types
        else:
            width += spec.num_types * spec.hgnn_dim
        self.layers = _Layers(width, spec)

    def forward(self, inputs: UserInputs, tables: ItemTables) -> Float[Tensor, "B D"]:
        """Unit vectors. ``inputs.gids`` are rows of ``tables``."""
        return self.layers(self._features(inputs, tables))

    def _features(self, inputs: UserInputs, tables: ItemTables) -> Float[Tensor, "B width"]:
        users, kinds = len(inputs.offsets) - 1, self.spec.num_types
        row_n = torch.repeat_interleave(torch.arange(users), inputs.offsets.diff())
        kind_n = tables.ntype[inputs.gids]
        known_n = kind_n < kinds  # a type added later counts in the means over all types only
        bag_n = (row_n * kinds + kind_n)[known_n]
        weight_n = self.event_weight.exp()[inputs.events]
        parts = []
        if self.spec.inputs == ALL:
            vectors = [_unit_variance(tables.text.float())] if tables.text is not None else []
            if self.spec.id_dim:
                assert tables.ids is not None
                vectors.append(tables.ids)
            bags = _Bags.together([_Bags(inputs.gids, weight_n, row_n, users), *self._of_the_latest(inputs, row_n)])
            means = [bags.means(table).view(-1, users, table.shape[1]).unbind() for table in vectors]
            parts += [part for bag in zip(*means, strict=True) for part in bag]
            counts = torch.bincount(bag_n, minlength=users * kinds).view(users, kinds).float()
            parts += [torch.log1p(counts), (counts > 0).float()]
        elif self.spec.reads_embeddings:
            assert tables.hgnn is not None
            bag_n, order = torch.sort(bag_n, stable=True)
            each_type = _Bags(inputs.gids[known_n][order], weight_n[known_n][order], bag_n, users * kinds)
            parts.append(each_type.means(_unit_variance(tables.hgnn.float())).view(users, -1))
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
    """Text vector, learned vector, activity, item type, language and categories of an item; paper A has text, HGNN
    embedding, language and categories."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.kind = _small_embedding(spec.num_types) if spec.inputs == ALL else None
        self.language = _small_embedding(spec.num_languages + 1)
        self.category = nn.EmbeddingBag.from_pretrained(
            _small_embedding(spec.num_categories + 1).weight.detach(), freeze=False, mode="mean"
        )
        width = spec.text_dim + 2 * _SMALL
        width += spec.id_dim + spec.activity_dim + _SMALL if spec.inputs == ALL else spec.hgnn_dim
        self.layers = _Layers(width, spec)

    def forward(self, rows: ItemRows) -> Float[Tensor, "N D"]:
        """Unit vectors."""
        parts = [_unit_variance(rows.text)]
        if self.spec.reads_embeddings:
            assert rows.hgnn is not None
            parts.append(_unit_variance(rows.hgnn))
        if self.spec.id_dim:
            assert rows.ids is not None
            parts.append(rows.ids)
        if self.kind is not None:
            known = rows.ntype < self.spec.num_types  # a type added later has no type embedding
            parts += [rows.activity, self.kind(rows.ntype.where(known, 0)) * known[:, None]]
        parts.append(self.language(rows.language))
        parts.append(self.category(rows.categories, rows.category_offsets))
        return self.layers(torch.cat(parts, 1))


class ItemVectors(nn.Module):
    """The items' learned vectors, which both towers read: e_j = P z_j + p + d_j (ours).

    P maps an item's HGNN embedding z_j, so items that the graph shows to be alike start alike; p centres them. d_j is
    the item's own, as in matrix factorisation; only items with training examples have one. Zeros stand in the place of
    d_j for all other items and, now and then in training, for any: the towers must not lean on it alone. An item
    without interactions has no vector: of such an item the graph only repeats what its text tells. The map is narrow on
    purpose. A whole embedding tells items apart, and towers that read it learn the training items by heart.
    """

    row: Tensor  # int64 [items]: place of the item's own part in the table; 0: it has none

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.dropout = spec.id_dropout or 0.0
        self.register_buffer("row", torch.zeros(spec.num_items, dtype=torch.int64))
        self.own = nn.Embedding(spec.id_rows + 1, spec.id_dim, padding_idx=0)
        nn.init.normal_(self.own.weight, std=_OWN_START / _OWN_SCALE)
        self.map = nn.Linear(spec.hgnn_dim, spec.id_dim) if spec.hgnn_dim else None
        self.forget()

    @torch.no_grad()
    def forget(self) -> None:
        """Every item is new."""
        self.row.zero_()
        self.own.weight[0] = 0.0

    def assign(self, examples: Float[Tensor, "items"]) -> None:
        """Give parts of their own to the items with the most training examples."""
        order = torch.argsort(examples, descending=True, stable=True)[: self.own.num_embeddings - 1]
        chosen = torch.sort(order[examples[order] > 0]).values
        self.row.zero_()
        self.row[chosen] = torch.arange(1, len(chosen) + 1)

    def forward(self, owners: Int64[Tensor, "N"], hgnn: Float[Tensor, "N h"] | None) -> Float[Tensor, "N d"]:
        """The vectors of items, with entries of about one.

        Args:
            owners: gids (those that came after training have nothing of their own); -1: an item without interactions.
            hgnn: the same items' embeddings; None without HGNN.
        """
        mine = (owners >= 0) & (owners < len(self.row))
        vectors = self.own(torch.where(mine, self.row[owners.where(mine, 0)], 0)) * _OWN_SCALE
        if self.training and self.dropout:
            vectors = vectors * (torch.rand(len(owners), 1) >= self.dropout) / (1 - self.dropout)
        if self.map is None:
            return vectors
        assert hgnn is not None
        told = self.map(hgnn.float()) * hgnn.shape[1] ** 0.5  # as _unit_variance
        return vectors + told * (owners >= 0)[:, None]


class TwoTower(nn.Module):
    """Both towers, as one module for training and for saving."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.user, self.item = UserTower(spec), ItemTower(spec)
        self.ids = ItemVectors(spec) if spec.id_dim else None

    def forward(
        self, inputs: UserInputs, tables: ItemTables, rows: ItemRows
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "N D"]]:
        return self.users(inputs, tables), self.items(rows)

    def users(self, inputs: UserInputs, tables: ItemTables) -> Float[Tensor, "B D"]:
        """Unit vectors of users; ``inputs.gids`` are rows of ``tables``."""
        if self.ids is not None:
            assert tables.owners is not None
            tables = replace(tables, ids=self.ids(tables.owners, tables.hgnn))
        return self.user(inputs, tables)

    def items(self, rows: ItemRows) -> Float[Tensor, "N D"]:
        """Unit vectors of items."""
        return self.item(rows if self.ids is None else replace(rows, ids=self.ids(rows.owners, rows.hgnn)))

    def train_in(self, precision: Precision) -> None:
        """The precision of the layers while they train."""
        for tower in (self.user, self.item):
            tower.layers.bf16 = precision == "bf16"

    @torch.no_grad()
    def start_near(self, text_NT: Float[Tensor, "N T"], hgnn_NH: Float[Tensor, "N H"] | None) -> None:
        """Start as nearest neighbours, given the vectors of a sample of items. The towers' output begins with the main
        directions of the texts and ends with those of the HGNN embeddings (half of it at most), which the learned
        vectors hold."""
        spec = self.user.spec
        room, from_graph = spec.layers[-1], list[Block]()
        if self.ids is not None and self.ids.map is not None and hgnn_NH is not None:
            mean, axes = principal_directions(hgnn_NH, min(spec.id_dim, room // 2))
            self.ids.map.weight[: len(axes)] = axes
            self.ids.map.bias.zero_()
            self.ids.map.bias[: len(axes)] = -axes @ mean
            passing = torch.eye(len(axes), spec.id_dim) / spec.hgnn_dim**0.5
            from_graph.append((spec.text_dim, passing, torch.zeros(len(axes))))  # these inputs come after the text
            room -= len(axes)
        mean, axes = principal_directions(text_NT, room)
        from_text = 0, axes / spec.text_dim**0.5, -axes @ mean  # inputs: _unit_variance
        for tower in (self.user, self.item):
            tower.layers.start([from_text, *from_graph])


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


def _load(module: nn.Module, folder: Path, prefix: str) -> None:
    try:
        weights = load_file(folder / "model.safetensors")
        module.load_state_dict({n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)})
    except (OSError, RuntimeError) as error:
        raise ArtifactError(f"the towers in {folder} cannot be loaded ({error}); train them again") from error
    module.eval().requires_grad_(False)
