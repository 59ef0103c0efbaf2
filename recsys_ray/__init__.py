"""recsys-ray: train a recommender on interaction logs and serve it.

>>> import recsys_ray
>>> config = recsys_ray.load_config("my.yaml")
>>> bundle = recsys_ray.run(config)
>>> recommender = recsys_ray.Recommender.load(bundle.path)
>>> len(recommender.recommend(user_id="someone new", k=10))
10

``load_config`` reads and checks a configuration, ``run`` brings every stage up to date and returns the bundle,
``Recommender`` answers from a bundle, and ``Bundle`` inspects one. Each name is imported on first use, so that
importing the package is quick and a serving process loads no training code.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recsys_ray.bundle.bundle import Bundle
    from recsys_ray.config import load_config
    from recsys_ray.serving.recommender import Recommender
    from recsys_ray.stages.chain import run

__all__ = ["Bundle", "Recommender", "load_config", "run"]

_HOMES = {
    "Bundle": "recsys_ray.bundle.bundle",
    "Recommender": "recsys_ray.serving.recommender",
    "load_config": "recsys_ray.config",
    "run": "recsys_ray.stages.chain",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
