"""The bundle: all that serving needs in one folder, published whole.

Layout of ``bundles/<version>/``:

- ``items.arrow`` (item_id, title, ntype, available; row = gid), ``item_ids.arrow`` (id ascending, gid). Gids are those
  of the ingest stage; items that came later (extend.py) have the next ones, whatever their type. So a type's gids
  ascend but need not be a range.
- ``facts.safetensors``, ``facts.json``: languages, categories and dates of publication (serving/filters.py)
- ``vectors.safetensors``: ``vector`` float32 [items, d + 1], what the item tower made of every item and the sum of its
  item terms, [v_j, b_j] of recsys_ray/scoring/scorer.py
- ``text.safetensors``, ``ids.safetensors`` (the items' learned vectors; not where the towers have none): the user
  tower's item tables
- ``hgnn.safetensors``: HGNN embeddings, of which reasons are found (and which towers with paper A's inputs read)
- ``memory.safetensors``: the co-interaction memory (recsys_ray/scoring/memory.py); not where it has no weight
- ``index/t{i}.safetensors``: codes of the available items of type number i, in order of gid, where there are many
- ``user_tower/``: ``model.safetensors``, ``spec.json``, ``score.json`` (what validation chose of the terms)
- ``user_ids.arrow`` (id ascending, uid), ``users.safetensors`` (age, country, taste.<name>; row = uid)
- ``histories.safetensors`` (see histories.py), ``popularity.safetensors`` (see popularity.py)
- what only embedding new items reads: ``hgnn_model/`` (``model.safetensors``, ``config.json``), ``hidden.safetensors``
  (``hidden`` float16 [items, h], what items send in the second layer; ``strength`` float32 [items], the sums of their
  edges' weights), ``vocabularies.json`` (languages, categories of the item tower), ``activity.safetensors`` (``counts``
  int64 [5, items], ``first``, ``published`` int64 [items]; see recsys_ray/graph/activity.py), ``terms.safetensors``
  (the item terms, ``trends`` and ``unseen``, float32 [items]; and ``had``, int32 [items]: users who ever chose each
  item)
- ``canary.json``: users that are asked before the bundle is served (release.py)
- ``manifest.json``: checksums, counts, configuration, recall of every index against exact search

``bundles/current.json`` names the live version and is replaced in one step.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from recsys_ray.config import Config
from recsys_ray.core.clock import calendar_end, days_before, is_leave_one_out, popular_days
from recsys_ray.core.errors import ArtifactError
from recsys_ray.core.progress import Progress
from recsys_ray.data.tables import Tables, traits_of, whole_users
from recsys_ray.graph.activity import Counts, add_counts, count_events
from recsys_ray.scoring.choices import choices_file
from recsys_ray.scoring.memory import MEMORY_FILE, Memory, memory_file
from recsys_ray.scoring.scorer import ITEM_TERMS, LEARNED, SCORE, ScoreSpec, as_queries, with_item_terms
from recsys_ray.serving.catalogue import Items, Users, sorted_ids, write_table
from recsys_ray.serving.filters import write_facts
from recsys_ray.serving.histories import (
    Histories,
    HistoryWriter,
    Profile,
    RawArrays,
    mapped_arrays,
    user_inputs,
)
from recsys_ray.serving.index import METRIC, TypeIndex, check_metric, check_unit_norm, index_file
from recsys_ray.serving.popularity import PopularityCounter, popularity_arrays
from recsys_ray.serving.tower import TowerRunner
from recsys_ray.storage.artifacts import (
    SCRATCH,
    Artifact,
    fingerprint,
    load_arrays,
    open_artifact,
    publish,
    read_json,
    save_arrays,
    write_json,
)
from recsys_ray.storage.outputs import find_finished, set_current, work_folder
from recsys_ray.two_tower.batches import country_index
from recsys_ray.two_tower.towers import TowerSpec

VERSION = 10  # of a bundle's contents: raise it when they change
VARIANT = "hgnn"  # of the two-tower stage's models, the one that is served
CANARY = "canary.json"
TERMS_FILE = "terms.safetensors"
_SAMPLE = 1_000  # queries that recall is measured with
_CANARIES = 64  # users whose answers are checked before the bundle is served
_EVENTS = 500_000  # that are added to histories at once


@dataclass(frozen=True)
class _Sources:
    """The outputs of the earlier stages."""

    ingest: Artifact
    featurize: Artifact
    hgnn: Artifact
    two_tower: Artifact
    spec: TowerSpec

    @classmethod
    def open(cls, ingest: Path, featurize: Path, hgnn: Path, two_tower: Path) -> _Sources:
        spec = TowerSpec.load(two_tower / VARIANT / "spec.json")
        return cls(open_artifact(ingest), open_artifact(featurize), open_artifact(hgnn), open_artifact(two_tower), spec)

    @property
    def prints(self) -> dict[str, str]:
        stages = {"ingest": self.ingest, "featurize": self.featurize, "hgnn": self.hgnn, "two_tower": self.two_tower}
        return {name: artifact.fingerprint for name, artifact in stages.items()}

    @property
    def tables(self) -> Tables:
        return Tables(self.ingest.path)

    @property
    def start(self) -> int:
        """First moment of the window before the data's end, unix seconds."""
        return days_before(calendar_end(self.ingest.counts), self.spec.window_days)


def bundle_fingerprint(config: Config, prints: Mapping[str, str]) -> str:
    """``prints``: fingerprints of the ingest, featurize, hgnn and two_tower folders."""
    own = {"index": config.index.model_dump(), "positives": config.events.positives, "seed": config.seed}
    own |= {"history": config.two_tower.history, "window_days": config.graph.window_days}
    return fingerprint("index", own, prints, VERSION)


def build_bundle(
    config: Config,
    ingest_dir: Path,
    featurize_dir: Path,
    hgnn_dir: Path,
    two_tower_dir: Path,
    out_root: Path,
    progress: Progress,
) -> Artifact:
    """Build ``out_root``/<version> and make it the current one.

    A bundle of the same inputs and configuration that is already there is kept; the version is a date (of the data's
    last event) and the start of the fingerprint, so that the same inputs always make the same version.

    Raises:
        ArtifactError: an input is missing or does not fit the others; recall is below ``index.min_recall``.
    """
    sources = _Sources.open(ingest_dir, featurize_dir, hgnn_dir, two_tower_dir)
    check_metric(sources.spec.metric, two_tower_dir / VARIANT)
    expected = bundle_fingerprint(config, sources.prints)
    version = version_name(calendar_end(sources.ingest.counts), expected)
    bundle = find_finished(out_root, version, expected)
    if bundle is None:
        work = work_folder(out_root, version)
        progress.say(f"    bundle {work.name}")
        _write_items(work, sources)
        _write_seeds(work, sources)
        _write_users(work, sources)
        _write_events(work, config, sources, progress)
        _write_canary(work, config.seed, sources)
        indexes = _write_indexes(work, config, sources, progress)
        facts = {"config": config.model_dump(mode="json"), "inputs": sources.prints}
        counts = _counts(config, sources, work.name) | {"indexes": indexes}
        bundle = publish(work, "bundle", expected, VERSION, counts=counts, **facts)
    set_current(out_root, bundle.path)
    return bundle


def version_name(end: int, expected: str) -> str:
    """Of the data's ``end`` (unix seconds) and the fingerprint: the same inputs always make the same version."""
    return f"{datetime.fromtimestamp(end - 1, tz=UTC):%Y%m%d}-{expected[:12]}"


def _counts(config: Config, sources: _Sources, version: str) -> dict[str, Any]:
    """What a replica must know before it reads a table."""
    counts, spec = sources.ingest.counts, sources.spec
    events = list(counts["events"])
    default = next((event for event in config.events.positives if event in events), events[0] if events else "")
    return {
        "version": version,
        "base": version,  # of a bundle that was extended: the one that the run made
        "metric": METRIC,
        "items": sum(counts["items_per_type"]),
        "item_types": counts["item_types"],
        "items_per_type": dict(zip(counts["item_types"], counts["items_per_type"], strict=True)),
        "users": counts["users"],
        "events": events,
        "default_event": default,
        "countries": counts["countries"],
        "taste": counts["taste"],
        "end": calendar_end(counts),
        "protocol": counts.get("protocol", "time"),
        "history": spec.history,
        "window_days": spec.window_days,
        "popular_days": popular_days(sources.ingest.counts, config.index.popular_days),
        "validation_ndcg_at_100": _validation(sources),
        "cold_start": spec.cold_start,
        "text": {"config": sources.featurize.manifest["config"]["text"]}
        | {name: sources.featurize.counts[name] for name in ("precision", "encoder")},
    }


def _validation(sources: _Sources) -> float | None:
    """The best epoch's NDCG@100 of the validation period; None where nothing was validated."""
    epochs = read_json(sources.two_tower.path / VARIANT / "metrics.json")
    return max((epoch["valid_ndcg_at_100"] for epoch in epochs if "valid_ndcg_at_100" in epoch), default=None)


def _write_items(work: Path, sources: _Sources) -> None:
    names = ["item_id", "title", "ntype", "available"]
    table = sources.tables.items(*names)
    text, size = sources.featurize.path / "text.safetensors", len(table)
    vectors = sources.two_tower.path / VARIANT / "items" / "serve.safetensors"
    for path in (text, vectors):
        rows = len(mapped_arrays(path)["vector"])
        if rows != size:
            raise ArtifactError(f"{path} has {rows} rows, but the catalogue has {size} items; run the stages again")
    columns = {
        "item_id": table["item_id"].cast(pa.large_string()),
        "title": table["title"].cast(pa.large_string()),
        "ntype": table["ntype"].cast(pa.int16()),
        "available": pa.array(table["available"].fill_null(True).to_numpy().astype(np.uint8)).cast(pa.uint8()),
    }
    write_table(work / "items.arrow", pa.table(columns))
    write_table(work / "item_ids.arrow", sorted_ids(table["item_id"], "gid"))
    told = sources.tables.items("language", "categories")
    language, categories = (told[name].combine_chunks() for name in ("language", "categories"))
    write_facts(work, language, categories, sources.tables.published)
    shutil.copyfile(text, work / "text.safetensors")
    made = load_arrays(vectors)
    save_arrays(work / "vectors.safetensors", {"vector": with_item_terms(made)})
    _write_terms(work, sources, made)
    told = _hgnn_tables(sources.hgnn.path, size)
    save_arrays(work / "hgnn.safetensors", {"embedding": told.pop("embedding")})
    save_arrays(work / "hidden.safetensors", told)
    if LEARNED in made:
        save_arrays(work / "ids.safetensors", {"vector": made[LEARNED]})
    score = ScoreSpec.load(sources.two_tower.path / VARIANT)
    if score.memory:
        memory = Memory.load(memory_file(sources.two_tower.path, "serve")).at(score.ridge, [score.text_users])
        memory.save(work / MEMORY_FILE)
    (work / "user_tower").mkdir(exist_ok=True)
    for name in ("model.safetensors", "spec.json", SCORE):
        shutil.copyfile(sources.two_tower.path / VARIANT / name, work / "user_tower" / name)


def _write_terms(work: Path, sources: _Sources, made: Mapping[str, npt.NDArray[np.float32]]) -> None:
    size, counted = len(made["vector"]), choices_file(sources.two_tower.path)
    had = load_arrays(counted)["serve"][0] if counted.exists() else np.ones(size, np.int32)
    terms = {name: made.get(name, np.zeros(size, np.float32)) for name in ITEM_TERMS}
    save_arrays(work / TERMS_FILE, {**terms, "had": had})


def _hgnn_tables(folder: Path, items: int) -> dict[str, npt.NDArray[Any]]:
    """``embedding`` [items, o], the first layer's states ``hidden`` [items, h] and ``strength`` [items] of the serve
    snapshot, put together from the partitions' files."""
    serve = folder / "embeddings" / "serve"
    parts = [load_arrays(path) for path in sorted(serve.glob("part-*.safetensors"))]
    gids = np.concatenate([np.empty(0, np.int64), *(part["gid"] for part in parts)])
    if not np.array_equal(np.sort(gids), np.arange(items)):
        raise ArtifactError(
            f"{serve} does not contain each of the {items} items exactly once; run the hgnn stage again"
        )
    order = np.argsort(gids)
    names = parts[0].keys() - {"gid"}
    return {name: np.concatenate([part[name] for part in parts])[order] for name in names}


def _write_seeds(work: Path, sources: _Sources) -> None:
    """What embedding new items needs in addition to the tables (extend.py)."""
    folder, counts = work / "hgnn_model", sources.ingest.counts
    folder.mkdir(exist_ok=True)
    shutil.copyfile(sources.hgnn.path / "model.safetensors", folder / "model.safetensors")
    write_json(folder / "config.json", sources.hgnn.manifest["config"]["hgnn"])
    write_json(work / "vocabularies.json", {name: list(counts[name]) for name in ("languages", "categories")})


def _write_users(work: Path, sources: _Sources) -> None:
    counts = sources.ingest.counts
    sizes, countries = counts["taste"], counts["countries"]
    write_table(work / "user_ids.arrow", sorted_ids(sources.tables.user_ids, "uid"))
    columns: dict[str, tuple[type, int | None]] = {"age": (np.float32, None), "country": (np.int16, None)}
    columns |= {f"taste.{name}": (np.float32, size) for name, size in sizes.items()}
    raw = RawArrays(work / SCRATCH, columns)
    for batch in sources.tables.users_in_batches():
        traits = traits_of(batch, sizes)
        raw.append(age=traits["age"], country=country_index(countries, traits["country"]))
        raw.append(**{f"taste.{name}": traits[f"taste_{name}"] for name in sizes})
    raw.close(work / "users.safetensors")


def _write_events(work: Path, config: Config, sources: _Sources, progress: Progress) -> None:
    """Histories, popularity and activity, in one pass over the interactions."""
    counts, items = sources.ingest.counts, sum(sources.ingest.counts["items_per_type"])
    start, users = sources.start, int(counts["users"])
    since = days_before(calendar_end(counts), popular_days(counts, config.index.popular_days))
    writer = HistoryWriter(work / SCRATCH, users, items, start, sources.spec.history)
    tables = sources.tables
    positive = tables.codes(config.events.positives)
    country = mapped_arrays(work / "users.safetensors")["country"].numpy().astype(np.int64)
    popular, activity, end = PopularityCounter(items, country), _no_activity(items), calendar_end(counts)
    with progress.task("histories", tables.num_events, "events") as task:
        for events in chain.from_iterable(whole_users(shard, _EVENTS, calendar=True) for shard in tables.shards):
            writer.add(events)
            popular.add(events.select(events.timestamp >= since).of(positive))
            # Leave-one-out has no calendar: as in the graph stage, all that happened has just happened.
            when = np.full(len(events), end - 1) if is_leave_one_out(counts) else events.timestamp
            new = count_events(events.gid, events.event, when, end, positive, items)
            activity = add_counts(iter([activity, new]))
            task.advance(len(events))
    writer.close(work / "histories.safetensors")
    published = tables.published
    arrays = popularity_arrays(*popular.counts(), published, len(counts["countries"]))
    save_arrays(work / "popularity.safetensors", arrays)
    arrays = {"counts": activity[0], "first": activity[1], "published": published}
    save_arrays(work / "activity.safetensors", arrays)


def _write_canary(work: Path, seed: int, sources: _Sources) -> None:
    """Some users with recent events, whose answers are checked before the bundle is served (release.py)."""
    active = Histories(work / "histories.safetensors").active()
    chosen = np.random.default_rng(seed).choice(active, min(_CANARIES, len(active)), replace=False)
    write_json(work / CANARY, {"user_ids": sources.tables.user_ids.take(pa.array(np.sort(chosen))).to_pylist()})


def _no_activity(items: int) -> Counts:
    none = np.empty(0, np.int64)
    return count_events(none, none, none, 0, [], items)


def _write_indexes(work: Path, config: Config, sources: _Sources, progress: Progress) -> dict[str, dict[str, Any]]:
    """Index every type; the indexes' settings by type."""
    types = list(sources.ingest.counts["item_types"])
    vectors = np.asarray(mapped_arrays(work / "vectors.safetensors")["vector"].numpy(), np.float32)
    check_unit_norm(vectors[:, :-1], sources.two_tower.path / VARIANT / "items" / "serve.safetensors")
    items = Items(work, types)
    queries = sample_queries(work, config.seed, items, vectors)
    settings = {}
    with progress.task("index", len(types), "types") as task:
        for number, name in enumerate(types):
            index = TypeIndex.build(name, vectors, items.offered(number), config.index, queries)
            check_recall(index, config.index.min_recall)
            settings[name] = index.settings
            index.save(work / index_file(number))
            task.advance(detail=f"{name}: recall {index.recall:.3f}")
    return settings


def check_recall(index: TypeIndex, least: float) -> None:
    """Raises ArtifactError where the recall of an index is below ``least``."""
    if index.recall < least:
        raise ArtifactError(
            f"the index of {index.name!r} has a recall of {index.recall:.3f} against exact search, below "
            f"index.min_recall={least}, although a search compares {max(index.candidates):,} candidates; raise "
            "index.exact_up_to to its number of items to compare them all, or lower index.min_recall"
        )


def sample_queries(work: Path, seed: int, items: Items, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Typical queries: vectors of users with recent events, or of items if there are no such users."""
    profiles = sample_profiles(work, seed)
    if not profiles:
        random = np.random.default_rng(seed)
        return vectors[random.choice(len(vectors), min(_SAMPLE, len(vectors)), replace=False)]
    tower = TowerRunner.open(work, torch.from_numpy(items.ntype.astype(np.int64)))
    return as_queries(tower(user_inputs(profiles, tower.tastes)))


def sample_profiles(work: Path, seed: int) -> list[Profile]:
    """Profiles of some users with recent events."""
    histories, users = Histories(work / "histories.safetensors"), Users(work)
    active = histories.active()
    sample = np.sort(np.random.default_rng(seed).choice(active, min(_SAMPLE, len(active)), replace=False))
    return [users.traits(uid, histories.recent(uid)) for uid in sample]
