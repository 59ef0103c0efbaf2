"""A tiny world whose stage outputs are written by hand, for the tests of bundle, recommender and serving."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recsys_ray.bundle.build import build_bundle
from recsys_ray.config import Config, TextConfig
from recsys_ray.core.progress import Progress
from recsys_ray.scoring.choices import choices_file
from recsys_ray.scoring.memory import RIDGES, Memory, memory_file
from recsys_ray.scoring.scorer import LEARNED, TRENDS, UNSEEN, VECTOR, ScoreSpec
from recsys_ray.storage.artifacts import Artifact, publish, save_arrays

DAY = 86_400
END = 1_700_000_000
EVENTS = ["follow", "preview", "stream"]
TASTE = 4
POPULAR_DAYS = 30  # fewer than the histories reach back
LONELY, FORGOTTEN = "user without events", "user of long ago"
FEATURIZE: dict[str, Any] = {  # the facts of its manifest
    "config": {"text": TextConfig().model_dump(exclude={"workers"})},
    "counts": {"precision": "fp32", "encoder": "none"},
}
STRANGE_IDS = ["audio/Hörbuch: 日本語?", "audio#2 & more/similar"]  # what a URL must carry


@dataclass(frozen=True)
class World:
    """Paths of the stages and what was written into them."""

    root: Path
    config: Config
    item_ids: list[str]
    ntype: np.ndarray
    available: np.ndarray
    vectors: np.ndarray
    user_ids: list[str]
    events: np.ndarray  # [n, 4]: uid, gid, event, timestamp
    terms: dict[str, np.ndarray] = field(default_factory=dict)  # item terms, each float32 [items]

    @property
    def bias(self) -> np.ndarray:
        """The sum of the item terms."""
        return sum(self.terms.values(), np.zeros(len(self.item_ids), np.float32))

    def seen(self, user_id: str) -> set[str]:
        uid = self.user_ids.index(user_id)
        return {self.item_ids[gid] for gid in self.events[self.events[:, 0] == uid, 1]}

    def bundle(self, name: str = "bundles") -> Artifact:
        run = self.root
        stages = (run / "ingest", run / "featurize", run / "hgnn", run / "two_tower")
        return build_bundle(self.config, *stages, run / name, Progress(quiet=True))


def make_world(
    root: Path, per_type: Sequence[int] = (30, 40, 50), users: int = 60, dim: int = 8, text: int = 16, seed: int = 0,
    memory: float = 0.0, shares: Sequence[float | None] = (), terms: Sequence[str] = (),
    history: int = 0, latent: int = 0,
) -> World:  # fmt: skip
    random = np.random.default_rng(seed)
    types = ["audiobook", "music", "podcast"][: len(per_type)]
    item_ids: list[str] = []
    for name, count in zip(types, per_type, strict=True):
        strange = STRANGE_IDS if name == "audiobook" else []
        item_ids += sorted(strange + [f"{name}-{i:05d}" for i in range(count - len(strange))])
    ntype = np.repeat(np.arange(len(types)), per_type)
    available = random.random(len(item_ids)) > 0.1
    for item_id in STRANGE_IDS:
        available[item_ids.index(item_id)] = True
    group = random.integers(0, max(len(item_ids) // 50, 1), len(item_ids))
    vectors = _like_trained(random, group, dim, latent) if latent else _unit(random, len(item_ids), dim)
    user_ids = [f"üser/{i:04d}" for i in random.permutation(users)]
    user_ids[3], user_ids[7] = LONELY, FORGOTTEN
    events = _many_events(random, users, group, history) if history else _events(random, users, len(item_ids))
    made = _terms(ntype, terms)
    world = World(root, _config(root), item_ids, ntype, available, vectors, user_ids, events, made)
    write_ingest(world, types, per_type, random)
    vectors_of_text = _unit(random, len(item_ids), text).astype("float16")
    publish_arrays(root / "featurize", {"text.safetensors": {"vector": vectors_of_text}}, **FEATURIZE)
    order = random.permutation(len(item_ids))
    embedding = vectors if latent else _unit(random, len(item_ids), dim)
    half = len(order) // 2
    parts = {
        f"embeddings/serve/part-{number:05d}.safetensors": {
            "gid": gids,
            "embedding": embedding[gids],
            "hidden": np.zeros((len(gids), 4), np.float16),
            "strength": np.zeros(len(gids), np.float32),
            "users": np.zeros(len(gids), np.int32),
        }
        for number, gids in enumerate((order[:half], order[half:]))
    }
    parts["model.safetensors"] = {"nothing": np.zeros(1, np.float32)}  # serving does not open it
    publish_arrays(root / "hgnn", parts, config={"hgnn": {}})
    _write_towers(root / "two_tower", world, types, text, embedding, memory, shares, near=bool(latent))
    return world


def _config(root: Path) -> Config:
    return Config.model_validate(
        {"run_dir": str(root), "index": {"exact_up_to": 100_000, "popular_days": POPULAR_DAYS}}
    )


def _unit(random: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    values = random.standard_normal((rows, dim), dtype=np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def _like_trained(random: np.random.Generator, group: np.ndarray, dim: int, latent: int) -> np.ndarray:
    """Unit vectors that lie near ``latent`` directions, and in groups: what towers make is like this, and unlike points
    that are spread evenly over a sphere, among which no index of neighbours finds its way."""
    rows = len(group)
    centres = random.standard_normal((int(group.max()) + 1, latent), dtype=np.float32)
    points = centres[group] + 0.5 * random.standard_normal((rows, latent), np.float32)
    values = points @ random.standard_normal((latent, dim), dtype=np.float32)
    values += 0.1 * random.standard_normal((rows, dim), dtype=np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


_TASTES = 3  # groups of items that a user of a large world likes
HAD = 9  # so many users had most items; nobody had every ninth


def had(items: int) -> np.ndarray:
    return np.where(np.arange(items) % 9 == 0, 0, HAD).astype(np.int32)


def _terms(ntype: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Trends of items that somebody had; what those are given that nobody had, one number a type."""
    somebody = had(len(ntype)) > 0
    trend = 0.3 * np.random.default_rng(6).standard_normal(len(ntype), dtype=np.float32) * somebody
    unseen = np.array([0.4, -0.5, 0.2], np.float32)[ntype] * ~somebody
    return {name: term for name, term in ((TRENDS, trend), (UNSEEN, unseen)) if name in names}


def _many_events(random: np.random.Generator, users: int, group: np.ndarray, each: int) -> np.ndarray:
    """As many events of every user, for worlds that are large: users have a taste for a few groups of items."""
    uid = np.repeat(np.arange(users), each)
    by_group, size = np.argsort(group, kind="stable"), np.bincount(group)
    filled = np.flatnonzero(size)
    tastes = filled[random.integers(0, len(filled), (users, _TASTES))]
    chosen = tastes[uid, random.integers(0, _TASTES, len(uid))]
    gid = by_group[(np.cumsum(size) - size)[chosen] + (size[chosen] * random.random(len(uid))).astype(int)]
    moment = END - 1 - random.integers(0, 80, len(uid)) * DAY
    table = np.column_stack([uid, gid, random.integers(0, 3, len(uid)), moment])
    return table[np.lexsort((table[:, 2], table[:, 1], table[:, 3], table[:, 0]))]


def _events(random: np.random.Generator, users: int, items: int) -> np.ndarray:
    """Some users have many events, one has none, one only events from before the window."""
    rows = []
    for uid in range(users):
        count = 0 if uid == 3 else 120 if uid == 5 else int(random.integers(1, 20))
        gids = (items * random.random(count) ** 2).astype(int)
        age = random.integers(200, 300, count) if uid == 7 else random.integers(0, 150, count)
        moments = END - 1 - age * DAY
        rows += [(uid, g, e, t) for g, e, t in zip(gids, random.integers(0, 3, count), moments, strict=True)]
    table = np.array(rows, np.int64)
    return table[np.lexsort((table[:, 2], table[:, 1], table[:, 3], table[:, 0]))]


def published(item_id: str) -> int | None:
    """Of a third of the items, within half a year before the end."""
    number = zlib.crc32(item_id.encode())
    return None if number % 3 else END - number // 3 % 180 * DAY


def title_of(item_id: str) -> str:
    return f"Title of {item_id}"


def language_of(item_id: str) -> str | None:
    return ("de", "en", None)[zlib.crc32(item_id.encode()) // 7 % 3]


def categories_of(item_id: str) -> list[str]:
    number = zlib.crc32(item_id.encode()) // 11
    return ["a", *(["b"] if number % 2 else []), *(["c"] if number % 5 == 0 else [])]


def write_ingest(world: World, types: list[str], per_type: Sequence[int], random: np.random.Generator) -> None:
    work = world.root / "ingest"
    work.mkdir(parents=True, exist_ok=True)
    size, users = len(world.item_ids), len(world.user_ids)
    items = {
        "item_id": world.item_ids,
        "item_type": [types[t] for t in world.ntype],
        "ntype": pa.array(world.ntype, pa.int16()),
        "index": pa.array(np.concatenate([np.arange(n) for n in per_type]), pa.int32()),
        "title": [title_of(item_id) for item_id in world.item_ids],
        "description": pa.nulls(size, pa.string()),
        "language": pa.array([language_of(item_id) for item_id in world.item_ids], pa.string()),
        "categories": [categories_of(item_id) for item_id in world.item_ids],
        "published_at": pa.array([published(item_id) for item_id in world.item_ids], pa.int64()),
        "available": world.available,
    }
    pq.write_table(pa.table(items), work / "items.parquet")
    people = {
        "user_id": world.user_ids,
        "shard": pa.array(np.arange(users) * 3 // users, pa.int32()),
        "age": pa.array([None if uid % 4 == 0 else 20.0 + uid % 50 for uid in range(users)], pa.float32()),
        "country": [None if uid % 5 == 4 else ["DE", "SE"][uid % 2] for uid in range(users)],
        "music": [None if uid % 3 == 0 else random.random(TASTE).tolist() for uid in range(users)],
    }
    for column in ("age", "country", "music"):  # nothing at all is known of this user
        values = people[column].to_pylist() if isinstance(people[column], pa.Array) else list(people[column])
        values[3] = None
        people[column] = pa.array(
            values, {"age": pa.float32(), "country": pa.string()}.get(column, pa.list_(pa.float32()))
        )
    pq.write_table(pa.table(people), work / "users.parquet", row_group_size=17)
    (work / "interactions").mkdir(exist_ok=True)
    for shard in range(3):
        mine = world.events[world.events[:, 0] * 3 // users == shard]
        columns = zip(
            ["uid", "gid", "event", "timestamp"], [pa.int64(), pa.int32(), pa.int8(), pa.int64()], strict=True
        )
        table = pa.table({name: pa.array(mine[:, i], kind) for i, (name, kind) in enumerate(columns)})
        pq.write_table(table, work / "interactions" / f"shard-{shard:05d}.parquet", row_group_size=50)
    counts = {
        "item_types": types,
        "items_per_type": list(per_type),
        "events": EVENTS,
        "users": users,
        "taste": {"music": TASTE},
        "languages": [],
        "countries": ["DE", "SE"],
        "categories": ["a"],
        "valid_from": END - 28 * DAY,
        "test_from": END - 14 * DAY,
        "end": END,
        "days": [],
    }
    publish(work, "ingest", "ingest", counts=counts)


def publish_arrays(target: Path, files: dict[str, dict[str, np.ndarray]], **facts: Any) -> None:
    for name, arrays in files.items():
        save_arrays(target / name, arrays)
    publish(target, target.name, target.name, **facts)


def large_memory(items: int, each: int = 90) -> Memory:
    """Of every item edges with as many others, for worlds that are large: 30 of each of three types."""
    random = np.random.default_rng(5)
    gid = np.sort(random.integers(0, items, (items, each), dtype=np.int32), axis=1)
    made = 0.01 * random.standard_exponential((items * each, len(RIDGES)), dtype=np.float32)
    return Memory(np.arange(0, items * each + 1, each), gid.ravel(), made, had(items))


def some_memory(items: int) -> Memory:
    """Of each item edges with some others, but of every ninth, which nobody had."""
    random = np.random.default_rng(5)
    src, dst = np.unique(random.integers(0, items, (2, 8 * items)), axis=1)
    kept = (src != dst) & (src % 9 > 0) & (dst % 9 > 0)
    src, dst = src[kept], dst[kept]
    made = random.random((len(src), len(RIDGES)))
    return Memory.of_edges(src, dst, made, had(items), np.zeros(items, int))


def _write_towers(
    target: Path, world: World, types: list[str], text: int, embedding: np.ndarray, memory: float,
    shares: Sequence[float | None], near: bool,
) -> None:  # fmt: skip
    from safetensors.torch import save_file

    from recsys_ray.two_tower.towers import TowerSpec, TwoTower

    size, dim = embedding.shape
    (target / "hgnn" / "items").mkdir(parents=True, exist_ok=True)
    spec = TowerSpec(
        num_types=len(types), events=EVENTS, text_dim=text, hgnn_dim=dim, activity_dim=3, num_countries=2,
        num_languages=0, num_categories=1, tastes={"music": TASTE}, layers=[16, dim], item_types=types,
        countries=["DE", "SE"], history=50, window_days=90, id_dim=dim, num_items=size,
    )  # fmt: skip
    score = ScoreSpec(
        temperature=0.3, half_life=2.0, memory=memory, ridge=RIDGES[2], trends=[0.5] * len(types),
        unseen_share=list(shares),
    )  # fmt: skip
    if memory:
        (large_memory if near else some_memory)(size).save(memory_file(target, "serve"))
    save_arrays(choices_file(target), {"serve": np.stack([had(size)] * 3)})
    torch.manual_seed(0)
    towers = TwoTower(spec)
    if near:  # a user is the mean of the history, as if trained: of random weights a user is near no item
        towers.ids.map.load_state_dict({"weight": torch.eye(dim), "bias": torch.zeros(dim)})
        towers.user.layers.start([(text, torch.eye(dim), torch.zeros(dim))])
    learned = towers.eval().ids(torch.arange(size), torch.from_numpy(embedding)).detach().numpy()
    save_file(towers.state_dict(), target / "hgnn" / "model.safetensors")
    spec.save(target / "hgnn" / "spec.json")
    (target / "hgnn" / "metrics.json").write_text(json.dumps([{"epoch": 0, "valid_ndcg_at_100": 0.2}]))
    score.save(target / "hgnn")
    save_arrays(
        target / "hgnn" / "items" / "serve.safetensors", {VECTOR: world.vectors, LEARNED: learned, **world.terms}
    )
    publish(target, target.name, target.name)
