"""Checks that a snapshot depends only on events before its moment, by computing a sample of items again.

Edges, users and activity are counted again from tables without any later events (in leave-one-out, without the fold's
users) and must be bit-identical. Embeddings are computed again from the snapshot's edge file and the HGNN's weights,
and the test's item vectors from the test snapshot's embeddings and activity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from recsys_ray.checks.finished_run import FinishedRun, Words
from recsys_ray.config import GraphConfig, HgnnConfig
from recsys_ray.core.errors import LeakError
from recsys_ray.core.progress import Progress
from recsys_ray.data.tables import Events
from recsys_ray.graph import pairs
from recsys_ray.graph.activity import (
    ACTIVITY,
    COLUMN_NAMES,
    Counts,
    add_counts,
    count_events,
    describe,
)
from recsys_ray.graph.edges import EDGES, PAIRS, Edges, as_edges, kinds_of, most_pairs, read_edges, with_texts
from recsys_ray.graph.pairs import Counted, PairCounter, Window
from recsys_ray.graph.snapshots import Snapshot
from recsys_ray.graph.texts import NearestTexts, TextPairs, load_nearest_texts, text_pairs
from recsys_ray.graph.users import count_users, load_users
from recsys_ray.hgnn.blocks import ItemTypes
from recsys_ray.hgnn.encoder import make_hgnn
from recsys_ray.hgnn.outputs import load_embeddings
from recsys_ray.hgnn.sampler import WeightedEdges, build_blocks
from recsys_ray.hgnn.signature import SignedSource, item_signatures
from recsys_ray.scoring.choices import PERIODS, choices_file, count_choices
from recsys_ray.scoring.memory import Memory, memory_file
from recsys_ray.scoring.ridge import memory_of, solve
from recsys_ray.scoring.scorer import LEARNED, VECTOR
from recsys_ray.storage.artifacts import load_arrays
from recsys_ray.two_tower.batches import ArrayFeatures
from recsys_ray.two_tower.stage import load_catalogue
from recsys_ray.two_tower.towers import load_towers
from recsys_ray.two_tower.training import item_vectors, learned_vectors

_ITEMS_AT_MOST = 500  # whose edges are counted again: a user with one of them brings all of the user's items
_EMBEDDED_AT_MOST = 100  # whose neighbours' neighbours are embedded again
_TOLERANCE = 1e-3  # of unit vectors: sums in another order
_ALL = -1


def check_snapshots(run: FinishedRun, sample: int, words: Words, progress: Progress) -> Iterator[str]:
    """Edges, activity, embeddings and the test's item vectors; yields a line for each."""
    ntype = run.tables.ntype
    random = np.random.default_rng(run.config.seed)
    some = np.sort(random.permutation(len(ntype))[: min(sample, _ITEMS_AT_MOST)])
    codes, seed = run.tables.codes(run.graph.manifest["config"]["edges"]), run.graph.manifest["config"]["seed"]
    published = run.tables.published_in_time
    activity = load_arrays(run.graph.path / ACTIVITY)
    allowed = pairs.allowed_relations(run.graph_config.relations, run.ingest.counts["item_types"])
    most = run.graph_config.max_neighbors
    kept = {EDGES: most, PAIRS: most_pairs(len(ntype), int(ntype.max()) + 1, most)}
    near, users, history = load_nearest_texts(run.graph.path), load_users(run.graph.path), run.graph_config.max_history
    near = NearestTexts(*(rows[some] for rows in near))
    edges = 0
    with progress.task("snapshots", len(run.snapshots), "snapshots") as task:
        for snapshot in run.snapshots:
            check_users(run.tables.shards, snapshot, users[snapshot.name], codes, history, words)
            stored = {kind: run.graph.path / kind / f"{snapshot.name}.parquet" for kind in kinds_of(snapshot.name)}
            texts = text_pairs(near, users[snapshot.name], some)
            edges += check_edges(
                run.tables.shards, snapshot, stored, kept, some, ntype, codes, run.graph_config, allowed, texts, seed,
                words,
            )  # fmt: skip
            check_activity(run.tables.shards, snapshot, activity[snapshot.name], published, ntype, run.positives, words)
            task.advance(detail=snapshot.name)
    on = f"on {len(run.snapshots)} snapshots"
    yield f"{edges:,} edges and pairs into {len(some):,} items {on}: follow from the events before each"
    yield f"the users of {len(ntype):,} items {on}: follow from the events before each"
    yield f"the activity of {len(ntype):,} items {on}: follow from the events before each"
    if run.hgnn is not None:
        few = np.sort(random.permutation(len(ntype))[: min(sample, _EMBEDDED_AT_MOST)])
        for snapshot in run.snapshots:
            check_embeddings(run, snapshot, few, ntype, words)
        yield f"the embeddings of {len(few):,} items {on}: follow from the snapshot's edges"
    if run.hgnn is not None and run.two_tower is not None:
        variants = check_item_vectors(run, words)
        yield f"the test's vectors of {len(ntype):,} items ({', '.join(variants)}): follow from the test snapshot"
    if run.two_tower is not None and memory_file(run.two_tower.path, "test").exists():
        for snapshot in run.snapshots:
            if snapshot.name in ("valid", "test"):
                check_memory(run, snapshot, ntype, words)
        yield "co-interaction memory of validation and test: follows from the pairs of their snapshots"
    if run.two_tower is not None and choices_file(run.two_tower.path).exists():
        for snapshot in run.snapshots:
            check_choices(run, snapshot, len(ntype), words)
        yield f"counts of choices, overall and in the last weeks {on}: follow from the events before each"


def events_before(shard: Path, snapshot: Snapshot) -> Events:
    """A shard without the events that the snapshot must not use."""
    events = Events.read(shard).before(snapshot.time)
    return events if snapshot.without is None else events.select(~snapshot.without.has(events.uid))


def check_users(
    shards: Sequence[Path],
    snapshot: Snapshot,
    stored: np.ndarray,
    codes: Sequence[int],
    max_history: int,
    words: Words,
) -> None:
    """``stored``: int32 [items], how many had each item; ``codes``: of the events that make edges."""
    made = np.zeros_like(stored)
    for shard in shards:
        made += count_users(events_before(shard, snapshot), snapshot, codes, max_history, len(stored)).astype(np.int32)
    wrong = np.flatnonzero(made != stored)
    if len(wrong):
        raise LeakError(
            f"snapshot {snapshot.name}, before {words.time(snapshot.time)}: {stored[wrong[0]]} users had "
            f"{words.item(wrong[0])}, but {made[wrong[0]]} by the events that the snapshot may use"
        )


def check_edges(
    shards: Sequence[Path],
    snapshot: Snapshot,
    stored: Mapping[str, Path],
    most: Mapping[str, int],
    some: np.ndarray,
    ntype: np.ndarray,
    codes: Sequence[int],
    config: GraphConfig,
    allowed: np.ndarray,
    texts: TextPairs,
    seed: int,
    words: Words,
) -> int:
    """The edges of the files ``stored`` into the items ``some``; returns how many there are.

    Args:
        stored: kind (edges, pairs) -> file.
        most: kind -> how many edges of an item and type of src it keeps.
        some: int64 [n], ascending gids.
        ntype: int16 [items].
        codes: events that make edges.
        allowed: bool [types, types], the pairs of item types that make edges.
        texts: what the texts of ``some`` tell at the snapshot.
    """
    items, parts = len(ntype), [Counted.none()]
    for shard in shards:
        events = events_before(shard, snapshot)
        wanted = np.isin(events.uid, np.unique(events.uid[np.isin(events.gid, some)]))
        pairing = events.select(wanted).of(codes)
        counter = PairCounter(items, Window(snapshot.start, snapshot.time), config.max_history, config.pair_half_life)
        for counted in (*counter.add(pairing.uid, pairing.gid, pairing.timestamp), counter.flush()):
            parts.append(counted.take(np.isin(counted.dst, some)))
    made = pairs.merge(parts, items)
    made = made.take(allowed[ntype[made.src], ntype[made.dst]])
    count = 0
    for kind, file in stored.items():
        edges = as_edges(pairs.keep_best(made, ntype, config.min_support, most[kind], seed))
        if kind == EDGES:
            edges = with_texts(edges, texts, config.text_users, ntype, allowed)
        count += _check_file(file, edges, snapshot, some, words)
    return count


def _check_file(file: Path, made: Edges, snapshot: Snapshot, some: np.ndarray, words: Words) -> int:
    stored = read_edges(file)
    there = _by_edge(Edges(*(column[np.isin(stored.dst, some)] for column in stored)))
    wanted_edges = _by_edge(made)
    for to, of in sorted(there.keys() | wanted_edges.keys()):
        found, expected = (edges.get((to, of), (0, 0.0)) for edges in (there, wanted_edges))
        if found != expected:
            raise LeakError(
                f"snapshot {snapshot.name}, before {words.time(snapshot.time)}: the edge from {words.item(of)} to "
                f"{words.item(to)} has {found[0]} users and weight {found[1]:.4g}, but {expected[0]} and "
                f"{expected[1]:.4g} by the events that the snapshot may use"
            )
    return len(there)


def _by_edge(edges: Edges) -> dict[tuple[int, int], tuple[int, float]]:
    """(dst, src) -> users and weight."""
    src, dst, support, weight = (column.tolist() for column in edges)
    return dict(zip(zip(dst, src, strict=True), zip(support, weight, strict=True), strict=True))


def check_activity(
    shards: Sequence[Path],
    snapshot: Snapshot,
    stored: np.ndarray,
    published: np.ndarray,
    ntype: np.ndarray,
    positives: Sequence[int],
    words: Words,
) -> None:
    """``stored``: float16 [items, COLUMNS], the snapshot's table."""

    def counts() -> Iterator[Counts]:
        for shard in shards:
            known = events_before(shard, snapshot)
            yield count_events(known.gid, known.event, known.timestamp, snapshot.time, positives, len(published))

    made = describe(*add_counts(counts()), published, ntype, snapshot.time).astype(np.float16)
    if not np.array_equal(made, stored):
        gid, column = np.argwhere(made != stored)[0]
        raise LeakError(
            f"snapshot {snapshot.name}, before {words.time(snapshot.time)}: the activity of {words.item(gid)} "
            f"({COLUMN_NAMES[column]}) is {stored[gid, column]:.4f}, but {made[gid, column]:.4f} by the events that "
            "the snapshot may use"
        )


class EdgeFile:
    """One snapshot's edge file as the HGNN's graph: all neighbours of a node, none drawn."""

    def __init__(self, path: Path, ntype: np.ndarray, text: np.ndarray) -> None:
        src, dst, _, weight = read_edges(path)
        self._src = torch.from_numpy(src.astype(np.int64))  # the file is sorted by dst
        counted = pairs.message_weights(src, dst, weight, pairs.strengths(dst, weight, len(ntype)))
        self._weight = torch.from_numpy(counted)
        self._begin = torch.from_numpy(np.searchsorted(dst, np.arange(len(ntype) + 1)))
        self._ntype, self._text = torch.from_numpy(ntype.astype(np.int64)), text

    def features(self, name: str, gids: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._text[gids.numpy()]).float()

    def sample(
        self, gids: torch.Tensor, snapshot: int, fanout: int, generator: torch.Generator | None = None
    ) -> Mapping[tuple[int, int], WeightedEdges]:
        count = self._begin[gids + 1] - self._begin[gids]
        place = torch.repeat_interleave(torch.arange(len(gids)), count)
        within = torch.arange(len(place)) - torch.repeat_interleave(torch.cumsum(count, 0) - count, count)
        edge = self._begin[gids][place] + within
        source, weight = self._src[edge], self._weight[edge]
        kinds = torch.stack([self._ntype[source], self._ntype[gids][place]], 1)
        found = {}
        for relation in torch.unique(kinds, dim=0):
            mine = (kinds == relation).all(1)
            found[int(relation[0]), int(relation[1])] = place[mine], source[mine], weight[mine]
        return found


@torch.no_grad()
def check_embeddings(run: FinishedRun, snapshot: Snapshot, some: np.ndarray, ntype: np.ndarray, words: Words) -> None:
    """The stored embeddings of the items ``some`` on a snapshot are those of its edge file."""
    assert run.hgnn is not None
    text = load_arrays(run.featurize.path / "text.safetensors")["vector"]
    config = HgnnConfig.model_validate(run.hgnn.manifest["config"]["hgnn"])
    starts = np.concatenate([[0], np.cumsum(run.ingest.counts["items_per_type"])]).astype(np.int64)
    model = make_hgnn(text.shape[1], config, ItemTypes(torch.from_numpy(starts))).eval()
    model.load_state_dict({k: torch.from_numpy(v) for k, v in load_arrays(run.hgnn.path / "model.safetensors").items()})
    packed = torch.from_numpy(item_signatures(run.tables.item_ids.to_pylist(), config.signature_dim).copy())
    file = EdgeFile(run.graph.path / "edges" / f"{snapshot.name}.parquet", ntype, text)
    source = SignedSource(file, packed, config.signature_dim)
    blocks = build_blocks(source, torch.from_numpy(some.astype(np.int64)), snapshot.index, [_ALL, _ALL])
    made = model.second(model.first(source, blocks[0]), blocks[1]).numpy()
    stored = load_embeddings(run.hgnn.path, snapshot.name, len(ntype)).numpy()[some]
    _compare(f"the embedding on snapshot {snapshot.name}", made, stored, some, "the snapshot's edges", words)


def check_item_vectors(run: FinishedRun, words: Words) -> list[str]:
    """The vectors that the test ranks by are those of the test snapshot; returns the variants of the two-tower."""
    assert run.hgnn is not None and run.two_tower is not None
    text = load_arrays(run.featurize.path / "text.safetensors")["vector"]
    source = ArrayFeatures(text=text, hgnn_test=load_embeddings(run.hgnn.path, "test", len(text)))
    facts = run.ingest.counts
    catalogue = load_catalogue(run.tables, run.graph.path / ACTIVITY, facts["languages"], facts["categories"])
    variants = sorted(path.parent.name for path in run.two_tower.path.glob("*/spec.json"))
    for variant in variants:
        towers = load_towers(run.two_tower.path / variant)
        stored = load_arrays(run.two_tower.path / variant / "items" / "test.safetensors")
        found = {VECTOR: item_vectors(towers, source, catalogue, "test")}
        learned = learned_vectors(towers, source, catalogue, "test")
        for name, made in (found if learned is None else {**found, LEARNED: learned}).items():
            what = f"the test's {'learned ' * (name == LEARNED)}vector by the two-tower {variant}"
            rows = np.arange(len(made))
            _compare(what, made.numpy(), stored[name], rows, "the test snapshot's embeddings and activity", words)
    return variants


def check_memory(run: FinishedRun, snapshot: Snapshot, ntype: np.ndarray, words: Words) -> None:
    """The memory used in validation and test follows from its snapshot's pairs and users."""
    assert run.two_tower is not None
    stored = Memory.load(memory_file(run.two_tower.path, snapshot.name))
    users = load_users(run.graph.path)[snapshot.name]
    kept = read_edges(run.graph.path / PAIRS / f"{snapshot.name}.parquet")
    near = load_nearest_texts(run.graph.path)
    made = memory_of([solve(kept, users, ntype, 0, len(ntype))], near, users, ntype)
    assert stored.text is not None and made.text is not None
    for gid in range(len(ntype)):
        of = [slice(memory.begin[gid], memory.begin[gid + 1]) for memory in (stored, made)]
        same = np.array_equal(stored.gid[of[0]], made.gid[of[1]]) and stored.users[gid] == made.users[gid]
        same = same and np.allclose(stored.coefficient[of[0]], made.coefficient[of[1]], atol=_TOLERANCE)
        if not same or not np.allclose(stored.text[of[0]], made.text[of[1]], atol=_TOLERANCE):
            raise LeakError(
                f"the memory of {words.item(gid)} in snapshot {snapshot.name} does not follow from the snapshot's pairs"
            )


def check_choices(run: FinishedRun, snapshot: Snapshot, items: int, words: Words) -> None:
    """The choices behind trends and the share of unseen items happened before the snapshot."""
    assert run.two_tower is not None
    stored = load_arrays(choices_file(run.two_tower.path))[snapshot.name]
    made = np.zeros_like(stored)
    for shard in run.tables.shards:
        made += count_choices(events_before(shard, snapshot), [snapshot], run.positives, items)[0]
    wrong = np.flatnonzero((made != stored).any(0))
    if len(wrong):
        raise LeakError(
            f"snapshot {snapshot.name}, before {words.time(snapshot.time)}: {words.item(wrong[0])} was chosen "
            f"{stored[:, wrong[0]].tolist()} times in all and in the periods {PERIODS} (days before it), but "
            f"{made[:, wrong[0]].tolist()} times by the events that the snapshot may use"
        )


def _compare(what: str, made: np.ndarray, stored: np.ndarray, gids: np.ndarray, of: str, words: Words) -> None:
    apart = np.abs(made - stored).max(1)
    if apart.max(initial=0) > _TOLERANCE:
        worst = int(apart.argmax())
        raise LeakError(
            f"{what} of {words.item(gids[worst])} does not follow from {of} (difference {apart[worst]:.3f})"
        )
