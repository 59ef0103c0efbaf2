"""The baselines, one module per family, behind the interface of ``interface.py``."""

from __future__ import annotations

from recsys_ray.baselines.ease import EASE
from recsys_ray.baselines.hgnn_users import HGNN_USERS
from recsys_ray.baselines.ials import IALS
from recsys_ray.baselines.interface import Baseline
from recsys_ray.baselines.item_knn import ITEM_KNN
from recsys_ray.baselines.lightgcn import LIGHTGCN
from recsys_ray.baselines.popularity import POPULARITY
from recsys_ray.baselines.sasrec import SASREC
from recsys_ray.baselines.vectors import HGNN, LLM_KNN
from recsys_ray.config import BASELINES as NAMES
from recsys_ray.config import Config

_ALL = (POPULARITY, ITEM_KNN, EASE, IALS, LIGHTGCN, SASREC, LLM_KNN, HGNN, HGNN_USERS)
BASELINES: dict[str, Baseline] = {baseline.name: baseline for baseline in _ALL}
assert tuple(BASELINES) == NAMES  # the configuration checks names without loading the models

__all__ = ["BASELINES", "Baseline", "chosen_baselines"]


def chosen_baselines(config: Config) -> list[Baseline]:
    """The baselines of ``evaluate.baselines``, in the order of the table.

    Raises:
        UserError: one of them needs a package that is not installed.
    """
    chosen = [BASELINES[name] for name in NAMES if name in config.evaluate.baselines]
    for baseline in chosen:
        baseline.check()
    return chosen
