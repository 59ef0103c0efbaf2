"""One validated configuration tree for all stages.

Every stage reads its own section. A preset is a YAML file with the same tree; any field can be overridden with a
dotted path (``hgnn.hidden_dim=64``). An unknown field or a wrong type is a :class:`ConfigError` that names the field
and suggests the nearest one.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from recsys_ray.core.errors import ConfigError

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Paths = str | Annotated[list[str], Field(min_length=1)]


def _as_utc(value: datetime | None) -> datetime | None:
    """A date without a time zone is UTC, so that a preset means the same on every machine."""
    if value is not None and value.tzinfo is None:
        return value.replace(tzinfo=UTC)
    return value


def _no_short_number(value: Any) -> Any:
    """A bare year, or 20240131, would be read as unix seconds in 1970."""
    if isinstance(value, str | int) and str(value).strip().isdecimal() and len(str(value).strip()) < 9:
        raise ValueError("write a date as 2024-01-31")
    return value


Moment = Annotated[datetime | None, BeforeValidator(_no_short_number), AfterValidator(_as_utc)]


BASELINES = (
    "popularity", "item_knn", "ease", "ials", "lightgcn", "sasrec", "llm_knn", "hgnn", "hgnn_w_users",
)  # fmt: skip
DEFAULT_BASELINES = ("popularity", "item_knn", "llm_knn", "hgnn")  # seconds each, and need no extra


def _baseline_names(value: Any) -> Any:
    """``all``, ``default``, ``a,b`` or a list of names to a tuple of names."""
    if isinstance(value, str):
        value = {"all": BASELINES, "default": DEFAULT_BASELINES}.get(value) or [
            n for n in value.split(",") if n.strip()
        ]
    if not isinstance(value, list | tuple):
        return value
    names = [str(name).strip() for name in value]
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise ValueError(f"unknown baseline {unknown[0]!r}; choose from {', '.join(BASELINES)}, all and default")
    return tuple(name for name in BASELINES if name in names)


Baselines = Annotated[tuple[str, ...], BeforeValidator(_baseline_names)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """Where the tables are. Each is a Parquet or CSV file, a folder of them, a pattern, or a list of these."""

    items: Paths = Field("data/items", description="items: item_id, item_type, title, ...")
    interactions: Paths = Field("data/interactions", description="interactions: user_id, item_id, event, timestamp")
    users: Paths | None = Field(None, description="users (optional): user_id, age, country, taste vectors")
    oracle: str | None = Field(
        None, description="the demo data's ideal rankings; evaluation reports shares of their hits"
    )
    now: Moment = Field(None, description="rows later than this count as from the future; default: the clock")
    max_bad_share: Share = Field(0.05, description="stop if a larger share of a table's rows is quarantined")
    leave_out: list[str] = Field(
        [], description="kinds of bad rows to accept, however many, as ingest names them: [unknown item]"
    )
    shards: Positive = Field(8, description="number of interaction files, split by user; raise it for large data")
    item_types: list[str] | None = Field(
        None, min_length=1, description="only items of these types and their interactions; default: all"
    )


class EventsConfig(Section):
    """What each event name means. An event in none of the lists is quarantined."""

    positives: list[str] = Field(["stream"], min_length=1, description="events to predict")
    edges: list[str] = Field(["stream"], min_length=1, description="events that create co-interaction edges")
    weak: list[str] = Field(
        ["follow", "preview", "intent_to_pay"], description="weak signals: part of a user's history, never a target"
    )
    ignore: list[str] = Field([], description="events to skip, counted but not quarantined")


class SplitConfig(Section):
    """time: one global split, training < valid_from <= validation < test_from <= test. leave_one_out: each user's last
    new positive item is the test, the one before it validation."""

    protocol: Literal["time", "leave_one_out"] = "time"
    test_from: Moment = Field(None, description="first moment of the test period; default: test_days before the end")
    valid_from: Moment = Field(None, description="first moment of validation; default: valid_days before test_from")
    test_days: int | None = Field(None, gt=0, description="default: 14, more for sparse data, fewer for dense data")
    valid_days: int | None = Field(None, gt=0, description="default: as test_days")


class TextConfig(Section):
    """Title, description and categories through a transformers encoder, mean-pooled and L2-normalised."""

    model: str = Field(
        "packaged",
        description="'packaged' (MiniLM-L6, no download), a folder, a hub id, or 'random' vectors",
    )
    fields: list[Literal["title", "description", "categories"]] = ["title", "description", "categories"]
    max_tokens: Positive = 128
    batch_size: Positive = Field(128, description="texts per encoder step, after sorting by length")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 if the hardware supports it")
    workers: int | None = Field(None, gt=0, description="encoder actors; default: one per granted CPU (or GPU)")


class GraphConfig(Section):
    """Co-interactions (of all the past, or inside a window) become a heterogeneous item graph, once per snapshot."""

    window_days: Positive | None = Field(None, description="how far back history counts (papers: 90); null: everything")
    features_as_of: Literal["example", "window"] = Field(
        "example",
        description="example: features as of each training example's time (several snapshots); "
        "window: one window for features and targets, as in the papers",
    )
    cuts: Positive = Field(
        5,
        description="training snapshots; each serves the examples until the next one (leave_one_out: folds of users; "
        "each snapshot excludes one fold and serves its examples)",
    )
    first_cut: Share = Field(
        0.2, description="share of training events before the first cut, used for graphs only (not in leave_one_out)"
    )
    relations: Literal["all", "same_type", "cross_type"] | list[tuple[str, str]] = Field(
        "all", description="pairs of item types that get edges: all, same_type, cross_type, or a list of pairs"
    )
    min_support: Positive = Field(1, description="users that must share a pair of items to create an edge")
    max_history: Positive = Field(100, description="latest items of a user that form pairs")
    pair_half_life: float | None = Field(
        24.0,
        gt=0,
        description="distance of two items in a history at which their pair counts half (from the later to the earlier "
        "item half of that); null: all pairs count alike",
    )
    max_neighbors: Positive = Field(30, description="neighbours kept per item and relation, highest weight first")
    text_users: float = Field(
        3.0,
        ge=0,
        description="users that the items with the nearest texts are taken to share with an item, in addition to those "
        "counted; 0: edges are co-interactions alone, as in the papers",
    )
    partitions: int | None = Field(None, gt=0, description="DGL partitions; default: one per host of the cluster")


class HgnnConfig(Section):
    """The graph network over items (paper A, section 3.2)."""

    encoder: Literal["propagation", "graphsage"] = Field(
        "propagation",
        description="propagation: text and structure in channels of their own, over whole neighbourhoods; graphsage: "
        "the papers' GraphSAGE over sampled neighbours",
    )
    out_dim: int = Field(256, ge=2, description="width of the embedding; propagation: half of it is structure")
    signature_dim: Positive = Field(
        256, description="propagation: random signs that stand for an item in its neighbours' sums"
    )
    hidden_dim: Positive = Field(128, description="graphsage: width of the first layer")
    aggregator: Literal["max", "mean"] = Field("max", description="graphsage: max-pool as in the papers, or mean")
    weights_by: Literal["kinship", "relation"] = Field(
        "relation",
        description="graphsage: relation: weights for every pair of types, as in the papers; kinship: one set of "
        "weights for relations within types and one for those between types, which later types can use",
    )
    fanouts: tuple[Positive, Positive] = Field(
        (8, 5), description="graphsage: sampled neighbours per relation: first hop, second hop"
    )
    loss: Literal["softmax", "max_margin"] = Field("softmax", description="in-batch softmax, or the papers' max-margin")
    temperature: float = Field(0.2, gt=0, description="for loss=softmax")
    margin: float = Field(0.2, gt=0, description="for loss=max_margin")
    negatives: Positive = Field(64, description="for loss=max_margin: random catalogue negatives, shared by a batch")
    balanced: bool = Field(True, description="balanced multi-link sampler; false: every edge in every epoch")
    min_edges: Positive = Field(
        20_000, description="balanced: no relation is undersampled below this many edges per epoch"
    )
    max_steps: int | None = Field(100, gt=0, description="maximum steps per epoch; null: no limit")
    batch_size: Positive = Field(2048, description="supervision edges per step and worker")
    epochs: Positive = 4
    patience: Positive = Field(2, description="stop after this many epochs without a better validation loss")
    valid_share: Share = Field(0.1, description="edges held out for early stopping")
    learning_rate: float = Field(1e-4, gt=0, description="for graphsage set 1e-3, as in the papers")
    weights: str | None = Field(
        None, description="model.safetensors of an earlier hgnn output: embed with these weights, do not train"
    )
    workers: int | None = Field(None, gt=0, description="Ray Train workers; default: one per host")

    @property
    def state_dim(self) -> int:
        """Width of the state that an item keeps and sends after the first layer."""
        return self.out_dim + self.out_dim // 2 if self.encoder == "propagation" else self.hidden_dim

    @property
    def knows_later_types(self) -> bool:
        """Whether the weights apply to item types that come after the training."""
        return self.encoder == "propagation" or self.weights_by == "kinship"


class TwoTowerConfig(Section):
    """User and item towers over text vectors and HGNN embeddings (paper A, section 3.3)."""

    inputs: Literal["all", "paper"] = Field(
        "all",
        description="paper: only what paper A feeds the towers, and no linear path beside their layers; without "
        "activity, item type, mean text, last item, learned item vectors, and weights of events",
    )
    layers: tuple[Positive, ...] = Field((512, 256, 128), description="fully connected layers of both towers")
    loss: Literal["softmax", "paper"] = Field(
        "softmax", description="in-batch softmax with log-Q correction, or the loss printed in paper A"
    )
    temperature: float = Field(0.1, gt=0)
    log_q: float = Field(1.0, ge=0, le=1, description="strength of the log-Q correction: 1 full, 0 none")
    dropout: Share = Field(0.1, description="before every layer, in training")
    history: Positive = Field(200, description="latest events of a user used as features")
    last_item: bool | None = Field(
        None,
        description="also use the last item and, if histories are long, means over the latest events; "
        "null: chosen on the validation period",
    )
    id_dim: Positive = Field(32, description="width of the learned item vectors, which start at the HGNN embeddings")
    id_items: Positive = Field(
        200_000, description="items that learn a part of their vector of their own, those with the most examples first"
    )
    id_dropout: Share | None = Field(
        None, description="share of these parts hidden in a training step; null: from how often items occur"
    )
    memory: bool = Field(True, description="co-interaction memory: graph edges raise scores, weighted by validation")
    trends: bool = Field(True, description="recent popularity moves scores, weighted by validation")
    unseen: bool = Field(True, description="calibrate the share of unseen items to that of past periods")
    batch_size: Positive = 1024
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the layers in training; auto: bf16 if the hardware supports it"
    )
    epochs: Positive = 40
    patience: Positive = Field(3, description="stop after this many epochs without a better validation NDCG@100")
    learning_rate: float = Field(5e-4, gt=0)
    refit: bool = Field(True, description="train one more epoch that includes the validation period's examples")
    averaging: Share = Field(0.99, description="decay of the moving average of the weights; 0: no averaging")
    ablation: bool = Field(True, description="also train the two-tower without HGNN, as a baseline")
    workers: int | None = Field(None, gt=0, description="Ray Train workers; default: one per host")


class IndexConfig(Section):
    """ANN index per item type (inner product), and popularity."""

    exact_up_to: Positive = Field(
        10_000, description="exact search up to this many items of a type; above, 4-bit codes select candidates"
    )
    recall: Share = Field(0.99, description="as many candidates as this recall@10 and @100 against exact search needs")
    min_recall: Share = Field(0.9, description="do not publish if the recall stays below this one")
    popular_days: Positive | None = Field(
        90, description="days over which popularity is counted, for users about whom nothing is known; null: all"
    )


class EvaluateConfig(Section):
    max_users: int | None = Field(None, gt=0, description="evaluate a seeded sample of this many users; default: all")
    bootstrap: Positive = Field(1000, description="resamples for the 95 % intervals")
    batch_size: Positive = 512
    baselines: Baselines = Field(
        DEFAULT_BASELINES,
        validate_default=True,
        description="baselines: a list or 'a,b' of names, 'default', or 'all' (needs the extra)",
    )
    trials: Positive = Field(12, description="tuning trials of each baseline, on the validation period")
    trial_seconds: float | None = Field(None, gt=0, description="time limit of a baseline's trial; default: none")
    fit_users: Positive = Field(1_000_000, description="baselines are fitted to a seeded sample of this many users")
    ease_items: Positive = Field(20_000, description="maximum items in an EASE^R model; memory: 6 bytes x items^2")
    popularity_days: list[Positive] = Field([], description="further popularity baselines, over these numbers of days")
    strangers: bool = Field(
        False, description="also query every model with another user's history, to measure what is not personal"
    )
    examples: int = Field(12, ge=0, description="example users in the report; 0: none")
    map_items: int = Field(2400, ge=0, description="sampled items on the report's map of the embeddings; 0: no map")


class ProbeConfig(Section):
    """How useful the embeddings are for other tasks (recsys-ray probe)."""

    folds: int = Field(5, ge=2, description="cross-validation folds over the items")
    items: Positive = Field(10_000, description="maximum items to classify, a seeded sample")
    pairs: Positive = Field(20_000, description="maximum item pairs to look up, a seeded sample")


class RayConfig(Section):
    address: str = Field("local", description="'local' starts Ray here; 'auto' or an address joins a cluster")
    num_cpus: int | None = Field(None, gt=0, description="CPUs of a local Ray; default: those of this process")
    object_store_mb: Positive = 512
    dashboard: bool = False
    metrics_port: int | None = Field(
        None, ge=1, le=65535, description="port where Prometheus reads a local Ray; default: any free port"
    )


class Config(Section):
    """The whole tree. ``run_dir`` receives one folder per stage."""

    run_dir: str = "runs/default"
    seed: int = Field(0, description="seed of all training, baselines included")
    data_seed: int = Field(
        0, description="seed of the graph's ties, partitions and user samples: the same for all training seeds"
    )
    data: DataConfig = DataConfig()
    events: EventsConfig = EventsConfig()
    split: SplitConfig = SplitConfig()
    text: TextConfig = TextConfig()
    graph: GraphConfig = GraphConfig()
    hgnn: HgnnConfig = HgnnConfig()
    two_tower: TwoTowerConfig = TwoTowerConfig()
    index: IndexConfig = IndexConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    probe: ProbeConfig = ProbeConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        overlap = set(self.events.ignore) & {*self.events.positives, *self.events.edges, *self.events.weak}
        if overlap:
            raise ValueError(f"events.ignore lists {sorted(overlap)}, which another list of events also contains")
        if set(self.events.positives) & set(self.events.weak):
            raise ValueError("an event cannot be both in events.positives and in events.weak")
        if self.split.valid_from and self.split.test_from and self.split.valid_from >= self.split.test_from:
            raise ValueError("split.valid_from must be before split.test_from")
        if self.split.protocol == "leave_one_out":
            self._leave_one_out_fits()
        return self

    def _leave_one_out_fits(self) -> None:
        """Leave-one-out orders events within each user and has no days, so settings in days have no meaning."""
        protocol = "split.protocol=leave_one_out"
        if self.graph.window_days is not None:
            raise ValueError(f"{protocol} has no days, so a window has no meaning: set graph.window_days=null")
        if self.split.valid_from or self.split.test_from:
            raise ValueError(f"{protocol} has no dates: remove split.valid_from and split.test_from")
        if self.graph.features_as_of == "example" and self.graph.cuts < 2:
            raise ValueError(
                f"{protocol} excludes one of graph.cuts user folds from each graph: set graph.cuts to at least 2"
            )
        if self.data.oracle:
            raise ValueError(f"{protocol}: data.oracle is for the split by time; set it to null")


class _Loader(yaml.SafeLoader):
    """YAML in which a scalar is text or null. The fields know their types: ``positives: [3, on]`` names two events, and
    a folder may be called 2024-06-01."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.endswith((":null", ":merge"))]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def load_config(path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML preset, apply dotted overrides (``["hgnn.epochs=3"]``), validate.

    Raises:
        ConfigError: the file cannot be read, a field is unknown or a value does not fit; the message names the field.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = _read_yaml(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"{path} must hold a mapping of sections, not a {type(loaded).__name__}")
        tree = loaded or {}
    return _validated(tree, overrides, str(path) if path else "the configuration")


def changed(config: Config, overrides: Sequence[str]) -> Config:
    """The same configuration with dotted overrides, validated.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    return _validated(config.model_dump(), overrides, "the changed configuration")


def _validated(tree: dict[str, Any], overrides: Sequence[str], source: str) -> Config:
    for override in overrides:
        _apply(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, source)) from error


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` in ``tree``. A text field takes the value as it is; others read it as YAML, so that lists, null
    and numbers work."""
    name, separator, text = override.partition("=")
    if not separator or not name.strip():
        raise ConfigError(f"--set needs NAME=VALUE, for example hgnn.hidden_dim=64, not {override!r}")
    *parents, leaf = name.strip().split(".")
    try:
        value = _as_text(text) if _is_text([*parents, leaf], text) else _read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML") from error
    node = tree
    for parent in parents:
        child = node.get(parent)
        if not isinstance(child, dict):
            child = node[parent] = {}
        node = child
    node[leaf] = value


def _as_text(text: str) -> str | None:
    """The text itself, without the quotes around it; nothing and ``null`` are None."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return None if text in ("", "null", "~") else text


def _is_text(names: Sequence[str], text: str) -> bool:
    """Whether the field with these names takes ``text`` as it is. A field that may also be a list does so unless the
    text begins with a bracket."""
    kind: Any = Config
    for name in names:
        if not (isinstance(kind, type) and issubclass(kind, BaseModel) and name in kind.model_fields):
            return False
        kind = kind.model_fields[name].annotation
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    only_text = set(kinds) <= {str, type(None)}
    return str in kinds and (only_text or not text.lstrip().startswith("["))


def field_names(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Dotted names of every field of the tree."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            names += [f"{prefix}{name}", *field_names(annotation, f"{prefix}{name}.")]
        else:
            names.append(f"{prefix}{name}")
    return names


def _explain(error: ValidationError, source: str) -> str:
    lines = [f"{source} is not valid:"]
    known = field_names()
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            if not near:  # right leaf in the wrong section
                near = [other for other in known if other.split(".")[-1] == name.split(".")[-1]][:1]
            hint = f"; did you mean {near[0]!r}?" if near else ""
            lines.append(f"  {name!r} is not a field{hint}")
        elif problem["loc"]:
            message = problem["msg"].lower().removeprefix("value error, ")
            lines.append(f"  {name!r}: {message}, but it is {problem['input']!r}")
        else:
            lines.append(f"  {problem['msg'].removeprefix('Value error, ')}")
    return "\n".join(lines)
