"""The stages in order: what each reads, what decides its output, and how all of them or one is run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recsys_ray.bundle.build import VERSION as BUNDLE_VERSION
from recsys_ray.bundle.build import build_bundle
from recsys_ray.bundle.bundle import Bundle
from recsys_ray.config import Config
from recsys_ray.core.errors import ArtifactError, UserError
from recsys_ray.core.progress import Progress
from recsys_ray.data.ingest import ingest
from recsys_ray.graph.stage import build_graph
from recsys_ray.hgnn.stage import train_hgnn
from recsys_ray.stages import evaluate
from recsys_ray.stages.runner import Context, Runner, Stage
from recsys_ray.storage.artifacts import Artifact, open_artifact, sha256
from recsys_ray.storage.outputs import find_bundle
from recsys_ray.storage.working_copy import working_copy
from recsys_ray.text.featurize import featurize
from recsys_ray.two_tower.stage import train_two_tower

# -- 1: source tables in, clean and dense tables out -----------------------------------------------------------------


def _ingest_settings(config: Config) -> dict[str, Any]:
    """The tables' location is not part of it: ``source_fingerprint`` identifies them by content."""
    data = config.data.model_dump(mode="json", exclude={"items", "interactions", "users", "oracle"})
    return {"data": data, "events": config.events.model_dump(), "split": config.split.model_dump(mode="json")}


INGEST = Stage(
    name="ingest",
    folder="ingest",
    summary="validate the tables, quarantine bad rows, split by time",
    inputs=(),
    settings=_ingest_settings,
    run=lambda context: ingest(context.config, context.out, context.progress),
    version=2,  # ids, times, lists, repeated rows and malformed records are read otherwise
    sources=lambda c: {"items": c.data.items, "interactions": c.data.interactions, "users": c.data.users},
)

# -- 2: a text vector for every item ---------------------------------------------------------------------------------


def _featurize(context: Context) -> dict[str, Any]:
    (tables,) = context.folders
    return featurize(context.config, tables, context.out, context.cache / "text", context.progress, context.cpus)


FEATURIZE = Stage(
    name="featurize",
    folder="featurize",
    summary="encode titles, descriptions and categories",
    inputs=("ingest",),
    settings=lambda config: {"text": config.text.model_dump(exclude={"workers"})},
    run=_featurize,
    version=1,
)

# -- 3: co-interactions become a heterogeneous item graph in DGL partitions ------------------------------------------


def _graph_settings(config: Config) -> dict[str, Any]:
    return {"graph": config.graph.model_dump(), "edges": config.events.edges, "seed": config.data_seed}


def _graph(context: Context) -> dict[str, Any]:
    tables, text = context.folders
    return build_graph(context.config, tables, text, context.out, context.progress, context.cpus, context.hosts)


GRAPH = Stage(
    name="graph",
    folder="graph",
    summary="build the item graph, split it into partitions",
    inputs=("ingest", "featurize"),
    settings=_graph_settings,
    run=_graph,
    version=4,  # edges that texts tell
)

# -- 4: train the HGNN, or take trained weights, and embed every item on every snapshot ------------------------------


def _hgnn_settings(config: Config) -> dict[str, Any]:
    """Given weights are identified by content, not by location: the stage publishes them again in its own folder."""
    weights = config.hgnn.weights
    if weights and not Path(weights).is_file():
        raise ArtifactError(
            f"hgnn.weights: there is no file at {weights}; name the model.safetensors of an hgnn folder"
        )
    given = sha256(Path(weights)) if weights else None
    return {"hgnn": config.hgnn.model_dump() | {"weights": given}, "seed": config.seed}


def _hgnn(c: Context) -> dict[str, Any]:
    tables, text, graph = c.inputs.values()
    return train_hgnn(c.config, tables, text, graph, c.out, c.progress, c.cpus, c.hosts)


HGNN = Stage(
    name="hgnn",
    folder="hgnn",
    summary="train the HGNN on the partitions, embed every item",
    inputs=("ingest", "featurize", "graph"),
    settings=_hgnn_settings,
    run=_hgnn,
    version=6,  # the serve snapshot's users of items
)

# -- 5: train the two-tower, and the one without HGNN as a baseline --------------------------------------------------


def _two_tower_settings(config: Config) -> dict[str, Any]:
    return {
        "two_tower": config.two_tower.model_dump(),
        "window_days": config.graph.window_days,
        "positives": config.events.positives,
        "seed": config.seed,
    }


def _two_tower(c: Context) -> dict[str, Any]:
    tables, text, graph, hgnn = c.inputs.values()
    return train_two_tower(c.config, tables, text, graph, hgnn, c.out, c.progress, c.cpus, c.hosts)


TWO_TOWER = Stage(
    name="two-tower",
    folder="two_tower",
    summary="train the user tower and the item tower",
    inputs=("ingest", "featurize", "graph", "hgnn"),
    settings=_two_tower_settings,
    run=_two_tower,
    version=7,  # learned vectors start at HGNN embeddings
)

# -- 6: item vectors into FAISS, and the bundle for serving ----------------------------------------------------------


def _index_settings(config: Config) -> dict[str, Any]:
    return {"index": config.index.model_dump(), "positives": config.events.positives, "seed": config.seed}


def _index(context: Context) -> dict[str, Any]:
    tables, text, hgnn, two_tower = context.folders
    out = context.run_dir / "bundles"
    bundle = build_bundle(context.config, tables, text, hgnn, two_tower, out, context.progress)
    return {"bundle": bundle.path.name, "indexes": bundle.counts["indexes"]}


def _bundle_is_live(config: Config, artifact: Artifact) -> bool:
    """The bundle is outside the stage's folder: it, or a bundle that extends it, must still exist and be live."""
    try:
        live = open_artifact(find_bundle(f"{config.run_dir}/bundles"))
    except UserError:
        return False
    return live.counts["base"] == artifact.counts["bundle"]


INDEX = Stage(
    name="index",
    folder="index",
    summary="index the item vectors, publish the bundle",
    inputs=("ingest", "featurize", "hgnn", "two-tower"),
    settings=_index_settings,
    run=_index,
    version=BUNDLE_VERSION,
    is_whole=_bundle_is_live,
    shared=False,
)

# -- all of them -------------------------------------------------------------------------------------------------------

STAGES: dict[str, Stage] = {
    stage.name: stage for stage in (INGEST, FEATURIZE, GRAPH, HGNN, TWO_TOWER, INDEX, evaluate.STAGE)
}


def run(config: Config, force: bool = False) -> Bundle:
    """Bring every stage up to date, from the tables to the evaluation, and open the bundle.

    Stages that are up to date are skipped; an interrupted one continues where it stopped. Progress goes to standard
    error. If no Ray is running, a local one is started and stopped afterwards.

    Args:
        config: from :func:`recsys_ray.load_config`.
        force: run stages even if their output is up to date.

    Raises:
        UserError: a table, a setting or an earlier output that cannot be used; the message says what to do.
    """
    progress = Progress()
    with at_work(config, progress) as here:
        run_all(here, progress, force)
        return Bundle.open(here.run_dir)


@contextmanager
def at_work(config: Config, progress: Progress) -> Iterator[Config]:
    """The configuration with a local ``run_dir``: of a run in an object store this machine's copy of its folder."""
    with working_copy(config.run_dir, progress.say) as run_dir:
        yield config.model_copy(update={"run_dir": run_dir})


def run_all(config: Config, progress: Progress, force: bool = False) -> None:
    """Every stage, skipping those that are up to date."""
    with Runner(config, STAGES, progress) as runner:
        runner.chain(list(STAGES), force)


def run_one(name: str, config: Config, progress: Progress, force: bool = False) -> None:
    """Run one stage on the current inputs in the run's folder."""
    with Runner(config, STAGES, progress) as runner:
        runner.run(name, force=force)
