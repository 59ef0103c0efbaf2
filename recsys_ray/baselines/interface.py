"""The interface of all baselines: a name, a search space, and a function from what is known at a moment to a
recommender. No Ray and no model in here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from recsys_ray.config import Config
from recsys_ray.core.clock import DAY
from recsys_ray.core.errors import UserError
from recsys_ray.data.tables import Catalogue, Events
from recsys_ray.evaluation.ranking import Recommender, UserBatch, batch_of
from recsys_ray.hgnn.outputs import load_embeddings
from recsys_ray.storage.artifacts import load_arrays

Params = dict[str, Any]  # a point of a search space; plain values, so that it can be JSON


@dataclass(frozen=True)
class Choice:
    """One of some values, in no order."""

    default: Any
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Real:
    default: float
    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Whole:
    default: int
    low: int
    high: int
    log: bool = False


Space = Mapping[str, Choice | Real | Whole]

_POPULAR_NOW: Params = {"popular_days": 30, "popular_power": 0.7}


def default_point(space: Space) -> Params:
    return {name: dimension.default for name, dimension in space.items()}


def starting_points(space: Space) -> list[Params]:
    """What a search tries first: the default point and, of models that can favour what is popular now, one that does:
    few trials in many dimensions do not find the window and the power by themselves."""
    default = default_point(space)
    return [default, {**default, **_POPULAR_NOW}] if _POPULAR_NOW.keys() <= space.keys() else [default]


@dataclass(frozen=True)
class KnownData:
    """What a baseline is fitted to: everything before one moment, and nothing after it."""

    config: Config
    catalogue: Catalogue
    events: Events  # all of them before ``moment``, sorted by (uid, timestamp)
    moment: int  # unix seconds
    positive: np.ndarray  # bool [event names]
    snapshot: str  # of the graph stage, of this moment: "valid" or "test"
    featurize: Path
    hgnn: Path

    @cached_property
    def users(self) -> UserBatch:
        """Every user with an event, in ascending order of uid."""
        return batch_of(np.unique(self.events.uid), self.events)

    def popularity(self, days: int | None) -> np.ndarray:
        """int64 [items]: positive events in the last ``days`` days (None: ever)."""
        counts = self.positive[self.events.event]
        if days is not None:
            counts &= self.events.timestamp >= self.moment - days * DAY
        return np.bincount(self.events.gid[counts], minlength=self.catalogue.items)

    def text(self) -> np.ndarray:
        """float16 [items, d]: the text vectors, of unit norm."""
        return load_arrays(self.featurize / "text.safetensors")["vector"]

    def embeddings(self) -> np.ndarray:
        """float32 [items, d]: the HGNN's embeddings on the snapshot of this moment."""
        return load_embeddings(self.hgnn, self.snapshot, self.catalogue.items).numpy()


Watch = Callable[[int, Callable[[], Recommender]], bool]
"""Called after every epoch (counted from 1) with a way to get the model as it is now; True: stop here."""


@runtime_checkable
class Fit(Protocol):
    def __call__(
        self, data: KnownData, params: Params, seed: int, threads: int, watch: Watch | None = None
    ) -> Recommender:
        """Fit with every random draw from ``seed``, on at most ``threads`` threads.

        A model that is trained by epochs takes ``params["epochs"]`` of them, or fewer where ``watch`` says so.
        """
        ...


@dataclass(frozen=True)
class Baseline:
    """A baseline: a model in the comparison that is not part of the method."""

    name: str  # in the configuration and in metrics.json
    note: str  # one line for the report
    space: Callable[[Config], Space]  # the default point is what is tried first
    fit: Fit
    inputs: tuple[str, ...] = ()  # outputs it reads in addition to ingest: featurize, hgnn
    module: str | None = None  # a package that has to be there
    extra: str | None = None  # the extra of this project that brings it
    seeded: bool = False  # the fit draws: another seed makes another model
    max_epochs: int | None = None  # for models trained by epochs; validation finds how many are best

    def check(self) -> None:
        """
        Raises:
            UserError: a package is missing; the sentence says how to install it.
        """
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            raise UserError(
                f"the baseline {self.name!r} needs the package {self.module!r}: "
                f"pip install -c constraints.txt -e '.[{self.extra}]', or remove it from evaluate.baselines"
            )


def values_with(values: tuple[Any, ...], default: Any) -> Choice:
    """A choice among ``values``, and ``default`` if it is none of them."""
    return Choice(default, values if default in values else (*values, default))
