"""The two-tower stage: Ray Data builds the examples, the DGL partitions provide item features, Ray Train trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from safetensors import SafetensorError
from torch import nn

from recsys_ray.cluster.train import Checkpoints, Worker, run_workers
from recsys_ray.config import Config, TwoTowerConfig
from recsys_ray.core.clock import is_leave_one_out
from recsys_ray.core.errors import DataError
from recsys_ray.core.offsets import offsets_of
from recsys_ray.core.precision import Precision, choose_precision
from recsys_ray.core.progress import Progress
from recsys_ray.core.seeds import seed_from
from recsys_ray.data.tables import Events, Tables
from recsys_ray.graph.activity import ACTIVITY, COLUMNS
from recsys_ray.graph.dgl.client import GraphClient, partition_client
from recsys_ray.graph.edges import PAIRED
from recsys_ray.graph.snapshots import Snapshot, snapshots_of
from recsys_ray.scoring.choices import Choices, choices_file, write_choices
from recsys_ray.scoring.choose import Moment
from recsys_ray.scoring.memory import Memory, memory_file
from recsys_ray.scoring.ridge import fit_memories
from recsys_ray.scoring.scorer import ScoreSpec
from recsys_ray.storage.artifacts import LAST, MANIFEST, SCRATCH, Artifact, load_arrays, read_json, write_json
from recsys_ray.storage.checkpoint import read_state
from recsys_ray.storage.outputs import current_folder
from recsys_ray.two_tower.batches import ItemFeatures, batches_in, country_index
from recsys_ray.two_tower.examples import (
    HistoryRules,
    build_queries,
    training_examples,
    user_columns,
    validation_examples,
)
from recsys_ray.two_tower.recency import with_recency
from recsys_ray.two_tower.rows import Examples, from_table, join, take, to_table
from recsys_ray.two_tower.scores import ASKED, Periods, unseen_shares, write_towers
from recsys_ray.two_tower.towers import ALL, TowerSpec, TwoTower
from recsys_ray.two_tower.training import TowerTask, TowerTrainer, refit, start, train_epochs

VARIANTS = {"hgnn": True, "text_only": False}  # folder -> with HGNN embeddings
_REPORT_EVERY = 10  # steps
_MAX_QUERIES = 10_000  # validation queries an epoch, over all workers


def train_two_tower(
    config: Config, ingest: Artifact, featurize: Artifact, graph: Artifact, hgnn: Artifact, out: Path,
    progress: Progress, cpus: int, hosts: int,
) -> dict[str, Any]:  # fmt: skip
    """Train the two-tower, and the one without HGNN, into ``out`` (docs/architecture.md).

    An interrupted run continues at its last epoch.

    Raises:
        DataError: no example lies between the first cut and the validation period.
    """
    snapshots = snapshots_of(graph.counts)
    spec = _spec(config, ingest, featurize, hgnn)
    workers = config.two_tower.workers or hosts
    datasets, counts = _datasets(config, ingest, snapshots, spec)
    if counts["examples"] < workers:
        raise DataError(
            "no training example lies between the first snapshot and the validation period; lower graph.first_cut, "
            "or move split.valid_from"
        )
    variants = [name for name, with_hgnn in VARIANTS.items() if with_hgnn or config.two_tower.ablation]
    write_specs(out, variants, spec)
    tables = Tables(ingest.path)
    if config.two_tower.trends or config.two_tower.unseen:
        write_choices(config, tables, snapshots, out, cpus)
    if config.two_tower.memory:
        fit_memories(tables.ntype, graph.path, PAIRED, out, progress)
    told = _Spec(
        config=config.two_tower,
        seed=seed_from(config.seed, "two_tower"),
        precision=choose_precision(config.two_tower.precision),
        graph=graph.path.resolve(),
        hgnn=hgnn.path.resolve(),
        ingest=ingest.path.resolve(),
        vocabularies={k: list(ingest.counts[k]) for k in ("languages", "categories")},
        out=out.resolve(),
        variants=variants,
        snapshots={s.index: s.name for s in snapshots},
        periods=_periods(config, ingest.counts, snapshots),
        trends=config.two_tower.trends and not is_leave_one_out(ingest.counts),
    )
    with progress.task("two-tower", unit="steps", may_stop_early=True) as task:
        run_workers(
            _run_worker,
            told,
            name=f"two_tower-{out.name}",
            seed=told.seed,
            workers=workers,
            cpus=max(1, cpus // workers),
            scratch=out / SCRATCH,
            task=task,
            datasets=datasets,
        )
    last = {v: read_json(out / v / "metrics.json")[-1:] for v in variants}
    return {"workers": workers, "precision": told.precision, **counts, "last": last}


def _periods(config: Config, counts: Mapping[str, Any], snapshots: Sequence[Snapshot]) -> Periods | None:
    """None if examples do not show the share of unseen items: with features_as_of=window no target is unseen, and the
    paper's loss has no softmax."""
    if not config.two_tower.unseen or config.two_tower.loss != "softmax" or config.graph.features_as_of != "example":
        return None
    valid, test = counts["valid_from"], counts["test_from"]
    since = {s.index: valid - s.time for s in snapshots if s.name.startswith("cut")}
    if is_leave_one_out(counts):  # folds of users, each of all the time
        since = {max(since): 0}
    return Periods(counts["end"] - test, test - valid, since)


def write_specs(out: Path, variants: Sequence[str], spec: TowerSpec) -> None:
    """Each variant's spec, for the workers. One that an earlier attempt finished keeps its own: it holds
    validation's choices."""
    for variant in variants:
        (out / variant).mkdir(parents=True, exist_ok=True)
        if not is_whole(out / variant):
            (spec if VARIANTS[variant] else replace(spec, hgnn_dim=0)).save(out / variant / "spec.json")


def is_whole(variant: Path) -> bool:
    """Whether a variant's training has ended: its metrics are written last."""
    return (variant / "metrics.json").exists()


def _spec(config: Config, ingest: Artifact, featurize: Artifact, hgnn: Artifact) -> TowerSpec:
    facts, everything = ingest.counts, config.two_tower.inputs == ALL
    return TowerSpec(
        num_types=len(facts["item_types"]),
        events=list(facts["events"]),
        text_dim=featurize.counts["text_dim"],
        hgnn_dim=hgnn.counts["out_dim"],
        activity_dim=COLUMNS,
        num_countries=len(facts["countries"]),
        num_languages=len(facts["languages"]),
        num_categories=len(facts["categories"]),
        tastes=dict(facts["taste"]),
        layers=list(config.two_tower.layers),
        id_dim=config.two_tower.id_dim if everything else 0,
        id_rows=min(sum(facts["items_per_type"]), config.two_tower.id_items),
        num_items=sum(facts["items_per_type"]),
        id_dropout=config.two_tower.id_dropout,
        last_item=config.two_tower.last_item if everything else False,
        item_types=list(facts["item_types"]),
        countries=list(facts["countries"]),
        dropout=config.two_tower.dropout,
        history=config.two_tower.history,
        window_days=config.graph.window_days,
        inputs=config.two_tower.inputs,
    )


@dataclass(frozen=True)
class _RowMaker:
    """What a Ray Data task needs to make the examples or queries of a shard. Moments are unix seconds."""

    positives: list[int]  # codes of events
    snapshots: list[Snapshot]
    rules: HistoryRules
    valid_from: int
    test_from: int
    ingest: Tables
    tastes: dict[str, int]
    countries: list[str]

    def rows(self, events: Events, kind: str) -> dict[str, np.ndarray]:
        """``kind``: train, valid (queries) or refit (the validation period's examples)."""
        if kind == "train":
            part = training_examples(events, self.positives, self.snapshots, self.valid_from, self.rules)
        elif kind == "refit":
            part = validation_examples(events, self.positives, self.snapshots, self.test_from, self.rules)
        else:
            part = build_queries(events, self.positives, self.valid_from, self.test_from, self.rules)
        columns = user_columns(self.ingest, part["uid"], self.tastes)
        part["country_index"] = country_index(self.countries, columns.pop("country"))
        return {**part, **columns}


def _make_rows(batch: Any, maker: _RowMaker, kind: str) -> pa.Table:
    return to_table(join([maker.rows(Events.read(str(shard)), kind) for shard in batch["shard"]]))


def _datasets(
    config: Config, ingest: Artifact, snapshots: list[Snapshot], spec: TowerSpec
) -> tuple[dict[str, Any], dict[str, int]]:
    """Ray Data sets of training examples, validation queries and the validation period's examples (for the refit), one
    task an interactions shard."""
    import ray.data

    tables = Tables(ingest.path.resolve())
    maker = _RowMaker(
        positives=tables.codes(config.events.positives),
        snapshots=snapshots,
        rules=HistoryRules(config.two_tower.history, config.graph.window_days, config.graph.features_as_of),
        valid_from=ingest.counts["valid_from"],
        test_from=ingest.counts["test_from"],
        ingest=tables,
        tastes=spec.tastes,
        countries=spec.countries,
    )
    shards = [{"shard": str(p)} for p in tables.shards]
    # The same rows go to the same worker after a restart.
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    datasets = {}
    for kind in ("train", "valid", "refit") if config.two_tower.refit else ("train", "valid"):
        source = ray.data.from_items(shards, override_num_blocks=len(shards))
        datasets[kind] = source.map_batches(
            cast(Any, _make_rows),  # Ray's types know no further arguments
            batch_size=1,
            fn_kwargs={"maker": maker, "kind": kind},
            batch_format="numpy",
        ).materialize()
    return datasets, {"examples": datasets["train"].count(), "queries": datasets["valid"].count()}


def _collect(name: str, order: tuple[str, ...]) -> Examples:
    """This worker's part of a data set, in memory, in an order that does not depend on how it arrived."""
    import ray.train

    shard = ray.train.get_dataset_shard(name)
    parts = list(shard.iter_batches(batch_size=65_536, batch_format="pyarrow", prefetch_batches=1))
    if not parts:
        return {}
    joined = join([from_table(part) for part in parts])
    return take(joined, np.lexsort([joined[key] for key in order[::-1]]))


def load_catalogue(ingest: Tables, activity: str | Path, languages: list[str], categories: list[str]) -> ItemFeatures:
    """Narrow features of all items, by gid."""
    frame = pl.from_arrow(ingest.items("ntype", "language", "categories"))
    assert isinstance(frame, pl.DataFrame)
    return catalogue_of(frame, load_arrays(Path(activity)), languages, categories)


def catalogue_of(
    frame: pl.DataFrame, activity: Mapping[str, np.ndarray], languages: list[str], categories: list[str]
) -> ItemFeatures:
    """Narrow features of the rows of ``frame`` (ntype, language, categories); ``activity``: snapshot -> table.

    A language or category outside the vocabulary counts as unknown.
    """
    codes = {name: number + 1 for number, name in enumerate(languages)}
    language = frame["language"].replace_strict(codes, default=0, return_dtype=pl.Int64).fill_null(0)
    lists = frame["categories"].fill_null([])
    known = {name: number + 1 for number, name in enumerate(categories)}
    flat = lists.explode(empty_as_null=False).replace_strict(known, default=0, return_dtype=pl.Int64)
    offsets = offsets_of(lists.list.len().to_numpy())
    return ItemFeatures(
        torch.from_numpy(frame["ntype"].cast(pl.Int64).to_numpy().copy()),
        torch.from_numpy(language.to_numpy().copy()),
        torch.from_numpy(flat.to_numpy().astype(np.int64)),
        torch.from_numpy(offsets),
        {snapshot: torch.from_numpy(table) for snapshot, table in activity.items()},
    )


def epochs_so_far(folder: Path, variant: str) -> list[dict[str, Any]]:
    """The epochs of a training, under way or finished. ``folder``: that of the stage, in the run's."""
    at_work = [output for output in folder.glob("*/") if not (output / MANIFEST).exists()]
    for output in at_work or filter(None, [current_folder(folder)]):
        if (output / variant / "metrics.json").exists():
            history: list[dict[str, Any]] = read_json(output / variant / "metrics.json")
            return history
        with suppress(OSError, SafetensorError):  # none yet, or replaced or removed at this moment
            return list(read_state(output / SCRATCH / variant / LAST)["history"])
    return []


@dataclass(frozen=True)
class _Spec:
    """The workers' specification."""

    config: TwoTowerConfig
    seed: int
    precision: Precision
    graph: Path
    hgnn: Path
    ingest: Path
    vocabularies: dict[str, list[str]]
    out: Path
    variants: list[str]
    snapshots: dict[int, str]  # index -> name
    periods: Periods | None
    trends: bool


def _run_worker(worker: Worker, told: _Spec) -> None:
    """One variant after the other, over the same servers and the same examples."""
    config, rank = told.config, worker.rank
    features = {f"hgnn_{name}": told.hgnn / "embeddings" / name for name in told.snapshots.values()}
    examples = _collect("train", ("uid", "timestamp", "target"))
    queries = _collect("valid", ("uid", "target"))
    later = _collect("refit", ("uid", "timestamp", "target")) if config.refit else {}
    queries = _sample(queries, _MAX_QUERIES // worker.world, seed_from(told.seed, "queries", rank))
    catalogue = load_catalogue(Tables(told.ingest), told.graph / ACTIVITY, **told.vocabularies)
    memory = Memory.load(memory_file(told.out, "valid")) if config.memory else None
    choices = load_arrays(choices_file(told.out)) if config.trends or config.unseen else {}
    moment = Moment(catalogue.ntype.numpy(), memory, choices.get("valid"), told.trends)
    with partition_client(told.graph, rank, worker.world, features) as client:
        for variant in told.variants:
            if is_whole(told.out / variant):  # from an earlier attempt
                continue
            spec = TowerSpec.load(told.out / variant / "spec.json")
            score = ScoreSpec(temperature=config.temperature)
            task = TowerTask(spec, client, catalogue, examples, queries, later, told.snapshots, moment, score)
            torch.manual_seed(seed_from(told.seed, variant))
            _train(worker, told, variant, task, choices, client)


def _sample(examples: Examples, count: int, seed: int) -> Examples:
    if not examples:
        return {"target": np.zeros(0, np.int32), "uid": np.zeros(0, np.int64)}
    return take(examples, np.sort(np.random.default_rng(seed).permutation(len(examples["uid"]))[:count]))


def _refit_steps(task: TowerTask, batch_size: int) -> int:
    """Of this worker: what is shown as left need not know the others'."""
    parts = [part["snapshot"] for part in (task.examples, task.later) if part]
    return batches_in(np.concatenate(parts), batch_size)


def _train(
    worker: Worker, told: _Spec, variant: str, task: TowerTask, choices: Mapping[str, Choices], client: GraphClient
) -> None:
    import ray.train.torch

    config, periods, out = told.config, told.periods, told.out / variant
    shares = {s: unseen_shares(task, s, periods, choices) for s in ("valid", *ASKED)} if periods else {}
    task.moment = replace(task.moment, shares=shares.pop("valid", ()))
    task = with_recency(task, told.seed)
    model = TwoTower(task.spec)
    model.train_in(told.precision)
    start(model, task, told.seed)
    network: nn.Module = model
    if worker.world > 1:  # the only buffer never changes
        network = ray.train.torch.prepare_model(model, parallel_strategy_kwargs={"broadcast_buffers": False})
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    trainer = TowerTrainer(model, network, task, config, told.seed, worker.rank)
    total = config.epochs * trainer.steps + (_refit_steps(task, config.batch_size) if config.refit else 0)
    checkpoints = Checkpoints(worker, told.out / SCRATCH / variant, trainer.weights, trainer.averaged, optimizer)
    state = checkpoints.resume()

    def on_step(epoch: int, step: int, loss: float) -> None:
        if step % _REPORT_EVERY == 0:
            best = "" if not state.get("best") else f", best valid NDCG@100 {state['best']:.4f}"
            worker.show(epoch * trainer.steps + step, total, f"{variant}, epoch {epoch} loss {loss:.4f}{best}")

    state = train_epochs(trainer, optimizer, state, on_step, checkpoints.save)
    checkpoints.load_best(model, optimizer)
    if config.refit:
        model = refit(trainer, optimizer, len(state["history"]), on_step)
    if worker.rank == 0:
        write_towers(out, model.eval(), task, ScoreSpec(**state["score"]), choices, shares)
        write_json(out / "metrics.json", state["history"])  # last: says that the variant is whole
    client.barrier()  # no worker looks for the next variant's files before this one's are there
