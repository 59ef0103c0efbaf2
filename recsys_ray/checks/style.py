"""How much of the demo data's hidden style item vectors hold: what users like in an item and its text does not tell.

R2 of ridge regression on standardised vectors in five folds, for items with few, some and many users. No Ray in here.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from recsys_ray.config import Config
from recsys_ray.core.errors import UserError
from recsys_ray.data.files import table_fingerprint
from recsys_ray.data.tables import Tables
from recsys_ray.demo.world import WorldSpec, catalogue_of
from recsys_ray.storage.artifacts import Artifact

BANDS = ((1, 9), (10, 49), (50, None))  # users of an item, from and to
_FOLDS = 5
_MIN_ITEMS = 50  # in a band
_PENALTIES = np.logspace(0, 5, 11)


def band_name(band: tuple[int, int | None]) -> str:
    low, high = band
    return f"{low} to {high} users" if high else f"{low} users or more"


def read_style(config: Config, ingest: Artifact) -> tuple[np.ndarray | None, str]:
    """The true style of every item, float32 [items, d], row = gid; or None and why there is none."""
    items = config.data.items
    world = Path(items).parent / "world.json" if isinstance(items, str) else None
    if world is None or not world.is_file():
        return None, "only demo data have a known style"
    try:
        if table_fingerprint("items", items) != ingest.manifest["inputs"]["items"]:
            return None, f"the run was made from other items than {items}"
    except UserError as error:
        return None, str(error)
    catalogue = catalogue_of(WorldSpec(**json.loads(world.read_text(encoding="utf-8"))["spec"]))
    row = {item: place for place, item in enumerate(catalogue.item_ids().tolist())}
    return catalogue.style[[row[item] for item in Tables(ingest.path).item_ids.to_pylist()]], ""


def explained(vectors: np.ndarray, style: np.ndarray, users: np.ndarray) -> list[float | None]:
    """R2 in each of ``BANDS``; None in a band of too few items.

    Args:
        vectors: [items, d].
        style: [items, k].
        users: int [items], how many users an item has.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import cross_val_predict

    table = np.asarray(vectors, np.float64)
    table = (table - table.mean(0)) / (table.std(0) + 1e-9)
    found: list[float | None] = []
    for low, high in BANDS:
        chosen = (users >= low) & (users <= (high or np.inf))
        if chosen.sum() < _MIN_ITEMS:
            found.append(None)
            continue
        truth = style[chosen]
        guessed = cross_val_predict(RidgeCV(_PENALTIES), table[chosen], truth, cv=_FOLDS)
        found.append(float(1 - ((truth - guessed) ** 2).sum() / ((truth - truth.mean(0)) ** 2).sum()))
    return found
