"""Adds new items to a bundle without training: text -> HGNN over the items' own edges -> item tower -> a new bundle.

The other items do not change. What users did with the new items (the *trickle*) creates edges by the rules of the graph
stage; users in the bundle bring their histories. The old bundle stays as it is.

Items may have types that are new to the bundle, if the HGNN knows later types (``HgnnConfig``); in the towers they have
no type embedding (recsys_ray/two_tower/towers.py). New types are numbered after the existing ones.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import torch

from recsys_ray.bundle.arrivals import (
    Arrivals,
    Known,
    Reader,
    Trickle,
    arriving_edges,
    no_trickle,
    number_arrivals,
    number_trickle,
    with_arrivals,
)
from recsys_ray.bundle.build import CANARY, TERMS_FILE, check_recall, sample_profiles, sample_queries, version_name
from recsys_ray.bundle.embedder import Models, given_to_unseen
from recsys_ray.config import Config, TextConfig
from recsys_ray.core.clock import NEVER, days_before, is_leave_one_out
from recsys_ray.core.progress import Progress
from recsys_ray.data.files import table_fingerprint
from recsys_ray.data.schema import nearest
from recsys_ray.data.validate import Catalogue, EventRules
from recsys_ray.graph.activity import count_events, describe
from recsys_ray.graph.edges import Edges, as_edges, with_texts
from recsys_ray.graph.pairs import ONE, Counted, Window, allowed_relations
from recsys_ray.graph.texts import TextPairs, nearest_texts, text_pairs
from recsys_ray.scoring.choose import Moment, Users, unseen_term
from recsys_ray.scoring.memory import MEMORY_FILE, Memory
from recsys_ray.scoring.scorer import UNSEEN, VECTOR, ScoreSpec, with_item_terms
from recsys_ray.serving.catalogue import Items, read_table, sorted_ids, write_table
from recsys_ray.serving.filters import Facts, write_facts
from recsys_ray.serving.histories import Histories, HistoryWriter, mapped_arrays, user_inputs
from recsys_ray.serving.index import TypeIndex, index_file
from recsys_ray.serving.popularity import Popularity, PopularityCounter
from recsys_ray.serving.tower import TowerRunner
from recsys_ray.storage.artifacts import (
    MANIFEST,
    SCRATCH,
    Artifact,
    fingerprint,
    open_artifact,
    publish,
    save_arrays,
)
from recsys_ray.storage.outputs import find_finished, locate_bundle, point_at, work_folder
from recsys_ray.storage.store import Place, local_output
from recsys_ray.storage.working_copy import copy_of
from recsys_ray.text.featurize import encode_alike, text_of

Array = npt.NDArray[Any]
_VERSION = 5  # raise it when what an extension makes changes
_COPIED = (CANARY, "user_tower", "hgnn_model", "vocabularies.json", "user_ids.arrow", "users.safetensors")


def extend_bundle(
    bundle: str | Path,
    items: str | Path,
    interactions: str | Path | None,
    progress: Progress,
    out: str | Path | None = None,
    replace: bool = False,
    make_current: bool = True,
    cpus: int = 1,
) -> Artifact:
    """Embed new items and publish a bundle that has them.

    The same bundle and tables give the same version; an existing one is kept. An interrupted call continues at the last
    block of texts.

    Args:
        bundle: the one to extend; see :func:`locate_bundle`.
        items, interactions: tables as ingest takes them, URIs too. Interactions may be with any item.
        out: folder of bundles, or its URI; default: the one that ``bundle`` is in.
        replace: embed again items that the bundle has; they keep stored edges that the histories show.
        make_current: make the new bundle the current one of ``out``.
        cpus: threads of the text encoder.

    Returns:
        The local path of the bundle.

    Raises:
        DataError: a table cannot be used, or an item cannot be embedded.
        ArtifactError: there is no whole bundle.
    """
    found = locate_bundle(bundle)
    source = open_artifact(local_output(found), verify=True)
    target = found / ".." if out is None else Place(str(out))
    root = target.local if target.is_local else copy_of(target)
    inputs = {"bundle": source.fingerprint, "items": table_fingerprint("items", str(items))}
    if interactions is not None:
        inputs["interactions"] = table_fingerprint("interactions", str(interactions))
    expected = fingerprint("embed-items", {"replace": replace}, inputs, _VERSION)
    version = version_name(source.counts["end"], expected)
    made = find_finished(root, version, expected)
    if made:
        progress.say(f"    bundle {made.path.name}: up to date")
    else:
        work = work_folder(root, version)
        counts = {
            **source.counts,
            **_Extension(source, work, progress, cpus).run(items, interactions, replace),
        }
        counts["version"] = work.name
        facts = {"config": source.manifest["config"], "inputs": inputs, "counts": counts}
        made = publish(work, "bundle", expected, _VERSION, **facts)
    if not target.is_local and not (target / made.path.name / MANIFEST).exists():
        (target / made.path.name).upload(made.path)
    if make_current:
        point_at(target, made.path.name)
    return made


@dataclass
class _Extension:
    """The state of one extension. Arrays of length ``n`` are for the arriving items, in their order."""

    source: Artifact
    work: Path
    progress: Progress
    cpus: int

    def run(self, items: str | Path, interactions: str | Path | None, replace: bool) -> dict[str, Any]:
        """Write all files; returns what differs in the manifest's counts."""
        counts = self.source.counts
        reader = Reader(self.work / "quarantine", self.config.data, self.progress)
        known = Known.read(self.source.path, counts["item_types"])
        new = number_arrivals(reader.items(str(items)), known, replace, self.models.hgnn.knows_later_types)
        for name in new.types[len(known.types) :]:
            self.progress.say(f'    item_type "{name}" is new to the bundle{nearest(name, known.types)}')
        trickle = no_trickle(counts["users"])
        if interactions is not None:
            rows = reader.interactions(str(interactions), self._catalogue(known, new), self._rules())
            trickle = number_trickle(rows, self.source.path, new, counts)
        end = max(int(counts["end"]), (trickle.last or 0) + 1)
        start = days_before(end, counts["window_days"])
        histories = Histories(self.source.path / "histories.safetensors")
        codes = self._codes(self.config.events.edges)
        counted, directions, had = arriving_edges(
            known, new, trickle, histories, codes, self.config, Window(start, end)
        )
        users = self._users(known, new, had)
        text = self._encode(new)
        self._grow("text.safetensors", new, vector=text)
        texts = self._texts(new, text, users)
        allowed = allowed_relations(self.config.graph.relations, new.types)
        edges = with_texts(as_edges(counted), texts, self.config.graph.text_users, with_arrivals(known, new), allowed)
        towers = self._write_features(known, new, text, edges, users, self._write_activity(known, new, trickle, end))
        self._write_memory(known, new, directions, users, texts)
        self._write_items(new)
        self._write_people(new, trickle, start, end)
        self._write_vectors(known, new, trickle, towers)
        indexes = self._write_indexes(new)
        linked = len(np.unique(counted.dst))
        self.progress.say(
            f"  embedded {len(new.gid):,} items ({int(new.replaced.sum()):,} of them replaced): {linked:,} with "
            f"{len(counted):,} edges, {len(new.gid) - linked:,} from text alone"
        )
        sizes = np.bincount(np.concatenate([known.ntype, new.ntype[~new.replaced]]), minlength=len(new.types))
        return {
            "items": len(known) + new.added,
            "item_types": new.types,
            "items_per_type": dict(zip(new.types, sizes.tolist(), strict=True)),
            "embedded": counts.get("embedded", 0) + new.added,  # items that no training has seen
            "end": end,
            "indexes": indexes,
        }

    @cached_property
    def config(self) -> Config:
        return Config.model_validate(self.source.manifest["config"])

    @cached_property
    def models(self) -> Models:
        return Models(self.source.path)

    @cached_property
    def score(self) -> ScoreSpec:
        return ScoreSpec.load(self.source.path / "user_tower")

    def _trained(self, kind: int) -> bool:
        """Whether the towers had training examples of a type; if so, its items keep their terms."""
        shares = self.score.unseen_share
        known = kind < len(self.source.counts["item_types"])
        return known and (not shares or (kind < len(shares) and shares[kind] is not None))

    def _rules(self) -> EventRules:
        now = self.config.data.now
        moment = int(time.time()) if now is None else int(now.timestamp())
        return EventRules(self.source.counts["events"], self.config.events.ignore, moment)

    def _catalogue(self, known: Known, new: Arrivals) -> Catalogue:
        fresh = pa.array(~new.replaced)
        ids = pa.concat_arrays([known.ids.cast(pa.string()), new.table["item_id"].filter(fresh).combine_chunks()])
        ntype = np.concatenate([known.ntype, new.ntype[~new.replaced].astype(np.int16)])
        return Catalogue(ids, ntype, new.types)

    def _codes(self, names: list[str]) -> list[int]:
        events = list(self.source.counts["events"])
        return [events.index(name) for name in names if name in events]

    def _mapped(self, name: str) -> dict[str, Array]:
        return {key: value.numpy() for key, value in mapped_arrays(self.source.path / name).items()}

    # -- vectors -------------------------------------------------------------------------------------------------------

    def _users(self, known: Known, new: Arrivals, had: Array) -> Array:
        """How many had each item, int64 [items]. Of the arriving items ``had`` is whole; of others it counts those who
        had one of these, too."""
        users = np.concatenate([known.users, np.zeros(new.added, np.int32)]).astype(np.int64)
        users[new.gid] = 0
        return np.maximum(users, had)

    def _texts(self, new: Arrivals, text: Array, users: Array) -> TextPairs:
        """The users that the arriving items' texts stand for: of the bundle's items, so that it does not matter what
        else arrives."""
        of_all = mapped_arrays(self.work / "text.safetensors")["vector"].numpy()
        near = nearest_texts(of_all, np.flatnonzero(users[: len(users) - new.added]), text, new.gid, self.cpus)
        return text_pairs(near, users, new.gid)

    def _write_features(
        self, known: Known, new: Arrivals, text: Array, edges: Edges, users: Array, activity: Array
    ) -> Array:
        """Write HGNN embedding and state of each item; returns what the item tower makes of the arriving ones, float32
        [n, d]. ``activity``: float16 [items, columns], of all."""
        surroundings, strength = known.surround(new.table["item_id"].to_pylist(), new.ntype, text, new.gid, edges)
        hidden, embedding = self.models.embed(len(new.types), surroundings)
        items = pl.DataFrame(new.table.select(["language", "categories"])).with_columns(ntype=pl.Series(new.ntype))
        vectors, learned = self.models.item_vectors(items, text, embedding, activity[new.gid], new.gid)
        if learned is not None:
            self._grow("ids.safetensors", new, vector=learned)
        had = users[new.gid].astype(np.int32)
        self._grow("hidden.safetensors", new, hidden=hidden.half().numpy(), strength=strength, users=had)
        self._grow("hgnn.safetensors", new, embedding=embedding.numpy())
        return vectors

    def _write_vectors(self, known: Known, new: Arrivals, trickle: Trickle, towers: Array) -> None:
        """[v_j, b_j] of all items, and the terms of b_j.

        It is unknown how often the towers expect an arriving item to be chosen, so it has no trend or keeps its old
        one. An unseen item gets the same term as the other unseen items of its type. In a type without training
        examples, the terms of all items are computed again from the counts (recsys_ray/scoring/unseen.py)."""
        stored, wide = self._mapped(TERMS_FILE), self._mapped("vectors.safetensors")["vector"]
        ntype = with_arrivals(known, new)
        terms = {name: np.concatenate([stored[name], np.zeros(new.added, stored[name].dtype)]) for name in stored}
        vectors = np.concatenate([wide[:, :-1], np.zeros((new.added, wide.shape[1] - 1), np.float32)])
        vectors[new.gid] = towers
        chosen = trickle.events.of(self._codes(self.config.events.positives))
        chosen = chosen.select(np.isin(chosen.gid, new.gid))
        pairs = np.unique(chosen.uid * len(ntype) + chosen.gid)
        had = terms["had"] = terms["had"] + np.bincount(pairs % len(ntype), minlength=len(ntype)).astype(np.int32)
        for kind in np.unique(new.ntype):
            mine = new.gid[new.ntype == kind]
            if not self.score.unseen_share:
                continue
            if self._trained(int(kind)):
                terms[UNSEEN][mine] = np.where(had[mine] == 0, given_to_unseen(stored, known.ntype, int(kind)), 0)
            else:
                whole = np.flatnonzero(ntype == kind)
                terms[UNSEEN][whole] = self._terms_of_untrained(vectors[whole], had[whole])
        save_arrays(self.work / TERMS_FILE, terms)
        save_arrays(self.work / "vectors.safetensors", {"vector": with_item_terms({VECTOR: vectors, **terms})})

    def _terms_of_untrained(self, vectors: Array, had: Array) -> Array:
        """What the items of a type without training examples, all of them, are given, float32 [n]; by a sample of the
        bundle's users."""
        profiles = sample_profiles(self.work, self.config.seed)
        if not profiles:
            return np.zeros(len(had), np.float32)
        ntype, none = read_table(self.work / "items.arrow")["ntype"].to_numpy(), np.zeros(0, np.int64)
        tower = TowerRunner.open(self.work, torch.from_numpy(ntype.astype(np.int64)))
        users = Users(torch.from_numpy(tower(user_inputs(profiles, tower.tastes))), none, none)
        moment = Moment(np.zeros(len(had), np.int64), None, had[None], False, (None,))
        return unseen_term(users, torch.from_numpy(vectors), moment, self.score.temperature)

    def _write_memory(self, known: Known, new: Arrivals, directions: Counted, users: Array, texts: TextPairs) -> None:
        if (self.source.path / MEMORY_FILE).exists():
            memory, ntype = Memory.load(self.source.path / MEMORY_FILE), with_arrivals(known, new)
            columns = directions.src, directions.dst, directions.weight / ONE
            grown = memory.extended(*columns, users, new.gid, ntype, self.score.ridge, texts, self.score.text_users)
            grown.save(self.work / MEMORY_FILE)

    def _encode(self, new: Arrivals) -> Array:
        """float16 [n, text_dim]."""
        made = self.source.counts["text"]
        config = TextConfig.model_validate(made["config"])
        texts = pa.array((text_of(row, config.fields) for row in new.table.to_pylist()), pa.large_string())
        cache = self.work / SCRATCH / "text"
        return encode_alike(texts, config, made["precision"], made["encoder"], cache, self.progress, self.cpus)

    def _write_activity(self, known: Known, new: Arrivals, trickle: Trickle, end: int) -> Array:
        """Add what the trickle says of the arriving items; the table of all items, float16 [items, columns].

        A publication after the bundle's end moves the moment on: the item is out, and that is known. A model of
        leave-one-out knows no calendar: all that happened has just happened, no date is known.
        """
        stored = self._mapped("activity.safetensors")
        published = new.table["published_at"].cast(pa.int64()).fill_null(NEVER).to_numpy()
        out = published[published <= self._rules().now]
        moment = max(end, int(out.max(initial=0)))
        size = len(stored["first"]) + new.added
        events = trickle.events.select(np.isin(trickle.events.gid, new.gid))
        positive = self._codes(self.config.events.positives)
        timeless = is_leave_one_out(self.source.counts)
        when = np.full(len(events), moment - 1) if timeless else events.timestamp
        counts, first = count_events(events.gid, events.event, when, moment, positive, size)
        counts[:, : len(stored["first"])] += stored["counts"]
        first[: len(stored["first"])] = np.minimum(first[: len(stored["first"])], stored["first"])
        dates = np.full(size, NEVER)
        dates[: len(stored["published"])] = stored["published"]
        dates[new.gid] = published
        save_arrays(self.work / "activity.safetensors", {"counts": counts, "first": first, "published": dates})
        known_dates = np.full(size, NEVER) if timeless else dates
        return describe(counts, first, known_dates, with_arrivals(known, new), moment).astype(np.float16)

    def _grow(self, file: str, new: Arrivals, **arrays: Array) -> None:
        """The bundle's arrays with the rows of the arriving items put in their places."""
        grown = {}
        for name, rows in arrays.items():
            old = self._mapped(file)[name]
            grown[name] = np.concatenate([old, np.zeros((new.added, *old.shape[1:]), old.dtype)])
            grown[name][new.gid] = rows
        save_arrays(self.work / file, grown)

    # -- the rest of the bundle ----------------------------------------------------------------------------------------

    def _write_items(self, new: Arrivals) -> None:
        old = read_table(self.source.path / "items.arrow")
        rows = {
            "item_id": new.table["item_id"].cast(pa.large_string()),
            "title": new.table["title"].cast(pa.large_string()),
            "ntype": pa.array(new.ntype, pa.int16()),
            "available": pa.array(new.table["available"].to_numpy().astype(np.uint8)),
        }
        order = np.arange(len(old) + len(new.gid))  # of the old rows, then the new ones
        order[new.gid] = len(old) + np.arange(len(new.gid))
        table = pa.concat_tables([old, pa.table(rows)]).take(pa.array(order[: len(old) + new.added]))
        write_table(self.work / "items.arrow", table)
        write_table(self.work / "item_ids.arrow", sorted_ids(table["item_id"], "gid"))
        facts = pa.table(dict(zip(("language", "categories"), Facts(self.source.path).columns(), strict=True)))
        facts = pa.concat_tables([facts, new.table.select(facts.column_names).cast(facts.schema)])
        language, categories = facts.take(pa.array(order[: len(old) + new.added])).combine_chunks().columns
        published = mapped_arrays(self.work / "activity.safetensors")["published"].numpy()
        write_facts(self.work, language.combine_chunks(), categories.combine_chunks(), published)
        for name in _COPIED:
            path = self.source.path / name
            if path.is_dir():
                shutil.copytree(path, self.work / name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, self.work / name)

    def _write_people(self, new: Arrivals, trickle: Trickle, start: int, end: int) -> None:
        """Histories with the new events of the bundle's users, and the popularity of the new items; the other items'
        popularity does not change."""
        counts, source = self.source.counts, self.source.path
        size = len(mapped_arrays(self.work / "activity.safetensors")["first"])
        if len(trickle.known):
            writer = HistoryWriter(self.work / SCRATCH, trickle.users, size, start, counts["history"])
            histories = Histories(source / "histories.safetensors")
            histories.extend(trickle.known, writer, self.work / "histories.safetensors")
        else:
            shutil.copyfile(source / "histories.safetensors", self.work / "histories.safetensors")
        events = trickle.events.of(self._codes(self.config.events.positives))
        since = days_before(end, counts.get("popular_days"))  # bundles of earlier versions have none: all counts
        events = events.select((events.timestamp >= since) & np.isin(events.gid, new.gid[~new.replaced]))
        country = np.full(max(trickle.users, int(events.uid.max(initial=-1)) + 1), -1, np.int64)
        country[: trickle.users] = mapped_arrays(source / "users.safetensors")["country"].numpy()
        counter = PopularityCounter(size, country)
        counter.add(events)
        published = mapped_arrays(self.work / "activity.safetensors")["published"].numpy()
        arrays = Popularity.load(source / "popularity.safetensors").with_new_items(counter, published)
        save_arrays(self.work / "popularity.safetensors", arrays)

    def _write_indexes(self, new: Arrivals) -> dict[str, dict[str, Any]]:
        """Add the arrivals to their types' indexes, or build these again; their settings by type."""
        counts, config = self.source.counts, self.config
        items = Items(self.work, new.types)
        vectors = mapped_arrays(self.work / "vectors.safetensors")["vector"].numpy()
        queries = sample_queries(self.work, config.seed, items, vectors)
        settings = dict(counts["indexes"])
        for number, name in enumerate(new.types):
            file = index_file(number)
            if not (new.ntype == number).any():
                if (self.source.path / file).exists():
                    (self.work / file).parent.mkdir(exist_ok=True)
                    shutil.copyfile(self.source.path / file, self.work / file)
                continue
            gids = items.offered(number)
            index = None
            if self._trained(number) and not new.replaced[new.ntype == number].any():
                index = self._grown(file, number, gids, vectors, queries)
            index = index or TypeIndex.build(name, vectors, gids, config.index, queries)
            check_recall(index, config.index.min_recall)
            settings[name] = index.settings
            index.save(self.work / file)
        return settings

    def _grown(
        self, file: str, number: int, gids: npt.NDArray[np.int32], vectors: Array, queries: Array
    ) -> TypeIndex | None:
        """The stored index with the gids that it lacks, which are the last ones; None where another kind is due."""
        old = Items(self.source.path, list(self.source.counts["item_types"]))
        have, name = len(old.offered(number)), old.types[number]
        settings = self.source.counts["indexes"][name]
        stored = TypeIndex.load(self.source.path / file, name, gids[:have], vectors, settings)
        if stored.exact and len(gids) > self.config.index.exact_up_to:
            return None
        return stored.grown(gids).tuned(queries, self.config.index.recall)
