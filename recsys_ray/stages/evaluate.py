"""Stage 7: every recommender on the test period."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from recsys_ray.config import Config
from recsys_ray.data.tables import Tables
from recsys_ray.evaluation.given import TowerModel
from recsys_ray.evaluation.results import MAIN
from recsys_ray.evaluation.stage import REPORT, evaluate
from recsys_ray.evaluation.towers import TrainedTowers
from recsys_ray.hgnn.outputs import load_embeddings
from recsys_ray.scoring.scorer import TERMS, without
from recsys_ray.stages.peak_memory import PeakMemory
from recsys_ray.stages.runner import Context, Stage
from recsys_ray.storage.artifacts import load_arrays

VARIANT = "hgnn"
NAMES = {"text_only": "two_tower_text_only", VARIANT: MAIN}  # two-tower variant -> name in the table


def _settings(config: Config) -> dict[str, Any]:
    return {
        "evaluate": config.evaluate.model_dump(),
        "events": config.events.model_dump(),
        "window_days": config.graph.window_days,
        "max_history": config.graph.max_history,
        "history": config.two_tower.history,
        "popular_days": config.index.popular_days,
        "seed": config.seed,
        "data_seed": config.data_seed,
    }


def _run(context: Context) -> dict[str, Any]:
    started = time.monotonic()
    with PeakMemory() as memory:  # the page is a part of what is measured: it shows the peak until it is written
        return _evaluate(context, lambda: (time.monotonic() - started, memory.peak_mb))


def _evaluate(context: Context, spent: Callable[[], tuple[float, float]]) -> dict[str, Any]:
    inputs = {name: artifact.path for name, artifact in context.inputs.items()}
    text = load_arrays(inputs["featurize"] / "text.safetensors")["vector"]
    hgnn = load_embeddings(inputs["hgnn"], "test", len(text)).numpy()
    ntype = Tables(inputs["ingest"]).ntype.astype(np.int64)
    features = text, hgnn, ntype, context.inputs["ingest"].counts["test_from"]
    terms = [term for term in TERMS if getattr(context.config.two_tower, term)]  # also one without weight: in another
    towers: dict[str, Callable[[], TowerModel]] = {  # seed it may have one
        without(MAIN, term): partial(TrainedTowers.open, inputs["two-tower"] / VARIANT, *features, term)
        for term in terms
    }
    towers |= {
        name: partial(TrainedTowers.open, inputs["two-tower"] / variant, *features)
        for variant, name in NAMES.items()
        if (inputs["two-tower"] / variant / "metrics.json").exists()
    }
    return evaluate(
        context.config,
        inputs["ingest"],
        inputs["featurize"],
        inputs["hgnn"],
        towers,
        context.out,
        context.progress,
        context.cpus,
        context.run_dir,
        context.cache,
        spent,
    )


STAGE = Stage(
    name="evaluate",
    folder="evaluation",
    summary="rank the test period with every recommender",
    inputs=("ingest", "featurize", "hgnn", "two-tower"),
    settings=_settings,
    run=_run,
    version=3,  # a row without each term
    sources=lambda config: {"oracle": config.data.oracle},
    page=REPORT,
)
