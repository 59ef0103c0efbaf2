"""Users and items of two colours: users like items of their own colour, of two types, and nothing else.

Whoever has learned the colours ranks the right ten items for everyone; popularity cannot.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recsys_ray.baselines import BASELINES
from recsys_ray.baselines.interface import KnownData, Params, default_point
from recsys_ray.config import Config, load_config
from recsys_ray.data.tables import Catalogue, Events
from recsys_ray.evaluation.ranking import Recommender
from recsys_ray.storage.artifacts import save_arrays

USERS, PER_TYPE, DIM = 40, 60, 16
CATALOGUE = Catalogue(("book", "song"), np.array([0, PER_TYPE, 2 * PER_TYPE]), np.ones(2 * PER_TYPE, dtype=bool))
ITEMS = CATALOGUE.items
MOMENT = 100
NO_HISTORY = USERS - 1  # this user comes without any
# What the models that are trained need to learn so small a world; the others take their default points. With more
# epochs SASRec learns which items the few users happened to touch one after the other, and mistakes come back.
TRAINED: dict[str, Params] = {
    "lightgcn": {"epochs": 5, "learning_rate": 0.05},
    "sasrec": {"epochs": 10, "learning_rate": 0.003, "width": 32, "blocks": 1, "dropout": 0.3},
    "hgnn_w_users": {"epochs": 5, "learning_rate": 0.01, "width": 64},
    "ials": {"factors": 2, "regularization": 0.1},
}


def colour_events() -> Events:
    """Each user touches 12 random items of the own colour in each type."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(USERS - 1):
        for first in (0, PER_TYPE):
            own = first + user % 2 + 2 * rng.permutation(PER_TYPE // 2)[:12]
            rows += [(user, item, time) for time, item in enumerate(own)]
    uid, gid, time = np.array(sorted(rows, key=lambda r: (r[0], r[2]))).T
    return Events(uid, gid, np.zeros(len(uid), dtype=np.int8), time)


def colour_vectors() -> np.ndarray:
    """float64 [items, DIM], unit norm: the colour and some noise."""
    vectors = np.random.default_rng(1).normal(0, 0.1, (ITEMS, DIM)) + np.eye(DIM)[np.arange(ITEMS) % 2]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_features(folder: Path) -> None:
    """What featurize and hgnn would leave: ``featurize/text.safetensors``, ``hgnn/embeddings/<snapshot>/``."""
    vectors = colour_vectors()
    save_arrays(folder / "featurize" / "text.safetensors", {"vector": vectors.astype(np.float16)})
    for snapshot in ("valid", "test"):
        part = {"gid": np.arange(ITEMS), "embedding": vectors.astype(np.float32)}
        save_arrays(folder / "hgnn" / "embeddings" / snapshot / "part-00000.safetensors", part)


def known_data(folder: Path, events: Events | None = None, config: Config | None = None) -> KnownData:
    return KnownData(
        config or load_config(),
        CATALOGUE,
        events if events is not None else colour_events(),
        MOMENT,
        np.array([True, False]),
        "test",
        folder / "featurize",
        folder / "hgnn",
    )


def fit(name: str, data: KnownData, **changed: object) -> Recommender:
    """A baseline fitted at its default point, but for what is changed."""
    params = {**default_point(BASELINES[name].space(data.config)), **TRAINED.get(name, {}), **changed}
    return BASELINES[name].fit(data, params, seed=0, threads=1)
