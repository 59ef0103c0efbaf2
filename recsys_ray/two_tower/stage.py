"""The two-tower stage: Ray Data makes the examples, the DGL partitions feed item features, Ray Train trains."""

from __future__ import annotations

import json
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

from recsys_ray.cluster.train import partition_client, rank_setup, run_ranks, seed_from
from recsys_ray.config import Config, TwoTowerConfig
from recsys_ray.core.clock import is_leave_one_out
from recsys_ray.core.errors import DataError
from recsys_ray.core.precision import choose_precision
from recsys_ray.core.progress import Progress
from recsys_ray.core.snapshots import Snapshot, snapshots_of
from recsys_ray.data.tables import Events, Tables
from recsys_ray.graph.activity import ACTIVITY, COLUMNS
from recsys_ray.scoring.choices import Choices, choices_file, write_choices
from recsys_ray.scoring.choose import Moment
from recsys_ray.scoring.memory import Memory, memory_file
from recsys_ray.scoring.ridge import fit_memories
from recsys_ray.scoring.scorer import ScoreSpec
from recsys_ray.storage.artifacts import MANIFEST, SCRATCH, Artifact, load_arrays, write_json
from recsys_ray.storage.checkpoint import load_checkpoint, read_state, save_checkpoint
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
from recsys_ray.two_tower.towers import TowerSpec, TwoTower
from recsys_ray.two_tower.training import TowerTask, TowerTrainer, refit, start, train_epochs

VARIANTS = {"hgnn": True, "text_only": False}  # folder -> with HGNN embeddings
_CHECKPOINT = "checkpoint.safetensors"
_BEST = "best.safetensors"
_REPORT_EVERY = 10  # steps
_MAX_QUERIES = 10_000  # validation queries an epoch, over all ranks


def train_two_tower(
    config: Config, ingest: Artifact, featurize: Artifact, graph: Artifact, hgnn: Artifact, out: Path,
    progress: Progress, cpus: int, hosts: int,
) -> dict[str, Any]:  # fmt: skip
    """Train the two-tower, and the one without HGNN beside it, into ``out`` (docs/architecture.md).

    A run that was killed goes on at its last epoch.

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
    per_worker = max(1, cpus // workers)
    variants = [name for name, with_hgnn in VARIANTS.items() if with_hgnn or config.two_tower.ablation]
    write_specs(out, variants, spec)
    asked = [s for s in snapshots if config.two_tower.memory and s.name in ("valid", "test", "serve")]
    asked = [s for s in asked if not memory_file(out, s.name).exists()]  # what is there is kept
    counted = snapshots if config.two_tower.trends or config.two_tower.unseen else []
    if asked or counted:
        tables = Tables(ingest.path)
        users = write_choices(config, tables, counted, asked, out, cpus)
        fit_memories(tables.ntype, graph.path, users, out, progress)
    parameters = {
        "config": config.two_tower.model_dump(),
        "seed": seed_from(config.seed, "two_tower"),
        "threads": per_worker,
        "precision": choose_precision(config.two_tower.precision),
        "graph": str(graph.path.resolve()),
        "hgnn": str(hgnn.path.resolve()),
        "ingest": str(ingest.path.resolve()),
        "activity": str((graph.path / ACTIVITY).resolve()),
        "vocabularies": {k: list(ingest.counts[k]) for k in ("languages", "categories")},
        "out": str(out.resolve()),
        "variants": variants,
        "snapshots": [(s.name, s.index) for s in snapshots],
        "periods": _periods(config, ingest.counts, snapshots),
        "trends": config.two_tower.trends and not is_leave_one_out(ingest.counts),
    }
    with progress.task("two-tower", unit="steps", may_stop_early=True) as task:
        run_ranks(_train_rank, parameters, workers, per_worker, out / SCRATCH, task, datasets)
    last = {v: json.loads((out / v / "metrics.json").read_text(encoding="utf-8"))[-1:] for v in variants}
    return {"workers": workers, "precision": parameters["precision"], **counts, "last": last}


def _periods(config: Config, counts: Mapping[str, Any], snapshots: Sequence[Snapshot]) -> Periods | None:
    """None where examples do not tell how much goes to unseen items: features are of a time when the target was had
    already, or the loss knows no shares."""
    if not config.two_tower.unseen or config.two_tower.loss != "softmax" or config.graph.features_as_of != "example":
        return None
    valid, test = counts["valid_from"], counts["test_from"]
    since = {s.index: valid - s.time for s in snapshots if s.name.startswith("cut")}
    if is_leave_one_out(counts):  # folds of users, each of all the time
        since = {max(since): 0}
    return Periods(counts["end"] - test, test - valid, since)


def write_specs(out: Path, variants: Sequence[str], spec: TowerSpec) -> None:
    """Each variant's spec, for the ranks. One that an earlier attempt finished keeps its own: it holds
    validation's choices."""
    for variant in variants:
        (out / variant).mkdir(parents=True, exist_ok=True)
        if not is_whole(out / variant):
            (spec if VARIANTS[variant] else replace(spec, hgnn_dim=0)).save(out / variant / "spec.json")


def is_whole(variant: Path) -> bool:
    """Whether a variant's training has ended: its metrics are written last."""
    return (variant / "metrics.json").exists()


def _spec(config: Config, ingest: Artifact, featurize: Artifact, hgnn: Artifact) -> TowerSpec:
    facts = ingest.counts
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
        id_dim=config.two_tower.id_dim,
        id_rows=min(sum(facts["items_per_type"]), config.two_tower.id_items),
        num_items=sum(facts["items_per_type"]),
        id_dropout=config.two_tower.id_dropout,
        last_item=config.two_tower.last_item,
        item_types=list(facts["item_types"]),
        countries=list(facts["countries"]),
        dropout=config.two_tower.dropout,
        history=config.two_tower.history,
        window_days=config.graph.window_days,
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
    # The same rows go to the same rank after a restart.
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
    """This rank's part of a data set, in memory, in an order that does not depend on how it arrived."""
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
    offsets = np.concatenate([[0], np.cumsum(lists.list.len().to_numpy())]).astype(np.int64)
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
            history: list[dict[str, Any]] = json.loads((output / variant / "metrics.json").read_text("utf-8"))
            return history
        with suppress(OSError, SafetensorError):  # none yet, or replaced or removed at this moment
            return list(read_state(output / SCRATCH / variant / _CHECKPOINT)["history"])
    return []


def _train_rank(parameters: dict[str, Any]) -> None:
    """What each rank runs: one variant after the other, over the same servers and the same examples."""
    names = {index: name for name, index in parameters["snapshots"]}
    features = {f"hgnn_{name}": Path(parameters["hgnn"]) / "embeddings" / name for name in names.values()}
    with rank_setup(parameters) as (rank, world):
        examples = _collect("train", ("uid", "timestamp", "target"))
        queries = _collect("valid", ("uid", "target"))
        config = TwoTowerConfig.model_validate(parameters["config"])
        later = _collect("refit", ("uid", "timestamp", "target")) if config.refit else {}
        queries = _sample(queries, _MAX_QUERIES // world, seed_from(parameters["seed"], "queries", rank))
        tables = Tables(Path(parameters["ingest"]))
        catalogue = load_catalogue(tables, parameters["activity"], **parameters["vocabularies"])
        memory = Memory.load(memory_file(Path(parameters["out"]), "valid")) if config.memory else None
        counted = choices_file(Path(parameters["out"]))
        choices = load_arrays(counted) if config.trends or config.unseen else {}
        moment = Moment(catalogue.ntype.numpy(), memory, choices.get("valid"), parameters["trends"])
        with partition_client(Path(parameters["graph"]), rank, world, features) as client:
            for variant in parameters["variants"]:
                if is_whole(Path(parameters["out"]) / variant):  # from an earlier attempt
                    continue
                spec = TowerSpec.load(Path(parameters["out"]) / variant / "spec.json")
                score = ScoreSpec(temperature=config.temperature)
                task = TowerTask(spec, client, catalogue, examples, queries, later, names, moment, score)
                torch.manual_seed(seed_from(parameters["seed"], variant))
                _train(parameters, config, variant, task, choices, rank, world, client)


def _sample(examples: Examples, count: int, seed: int) -> Examples:
    if not examples:
        return {"target": np.zeros(0, np.int32), "uid": np.zeros(0, np.int64)}
    return take(examples, np.sort(np.random.default_rng(seed).permutation(len(examples["uid"]))[:count]))


def _refit_steps(task: TowerTask, batch_size: int) -> int:
    """Of this rank: what is shown as left need not know the other ranks'."""
    parts = [part["snapshot"] for part in (task.examples, task.later) if part]
    return batches_in(np.concatenate(parts), batch_size)


def _train(
    parameters: dict[str, Any], config: TwoTowerConfig, variant: str, task: TowerTask,
    choices: Mapping[str, Choices], rank: int, world: int, client: Any,
) -> None:  # fmt: skip
    import ray.train.torch

    periods = parameters["periods"]
    shares = {s: unseen_shares(task, s, periods, choices) for s in ("valid", *ASKED)} if periods else {}
    task.moment = replace(task.moment, shares=shares.pop("valid", ()))
    task = with_recency(task, parameters["seed"])
    model = TwoTower(task.spec)
    model.train_in(parameters["precision"])
    start(model, task, parameters["seed"])
    network: nn.Module = model
    if world > 1:  # the only buffer never changes
        network = ray.train.torch.prepare_model(model, parallel_strategy_kwargs={"broadcast_buffers": False})
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    out = Path(parameters["out"]) / variant
    scratch = Path(parameters["out"]) / SCRATCH / variant
    trainer = TowerTrainer(model, network, task, config, parameters["seed"], rank)
    state: dict[str, Any] = {}
    total = config.epochs * trainer.steps + (_refit_steps(task, config.batch_size) if config.refit else 0)
    if (scratch / _CHECKPOINT).exists():
        state = load_checkpoint(scratch / _CHECKPOINT, trainer.weights, optimizer)

    def on_step(epoch: int, step: int, loss: float) -> None:
        if rank == 0 and step % _REPORT_EVERY == 0:
            best = "" if not state.get("best") else f", best valid NDCG@100 {state['best']:.4f}"
            done = epoch * trainer.steps + step
            parameters["board"].put.remote(done, total, f"{variant}, epoch {epoch} loss {loss:.4f}{best}")

    def on_epoch(state: dict[str, Any], better: bool) -> None:
        if rank == 0:
            if better:
                save_checkpoint(scratch / _BEST, trainer.averaged, optimizer, state)
            save_checkpoint(scratch / _CHECKPOINT, trainer.weights, optimizer, state)

    state = train_epochs(trainer, optimizer, state, on_step, on_epoch)
    client.barrier()  # rank 0 has written the best weights
    load_checkpoint(scratch / _BEST, model, optimizer)
    if config.refit:
        model = refit(trainer, optimizer, len(state["history"]), on_step)
    if rank == 0:
        write_towers(out, model.eval(), task, ScoreSpec(**state["score"]), choices, shares)
        write_json(out / "metrics.json", state["history"])  # last: says that the variant is whole
    client.barrier()  # no rank looks for the next variant's files before this one's are there
