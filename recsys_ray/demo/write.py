"""Writes the demo data to Parquet: a Ray Data job of independent shards.

Each shard is a function of the spec and its number, so the tables are bit-identical for any number of workers, and a
retried shard writes the same file. Files are moved into place when all of them are written, ``world.json`` last.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from recsys_ray.core.errors import DataError
from recsys_ray.core.progress import Progress
from recsys_ray.demo.events import EVENTS, Events, shard_of
from recsys_ray.demo.oracle import HITS_AT, Rankings, rank
from recsys_ray.demo.texts import LANGUAGES, distinct, write_text
from recsys_ray.demo.world import (
    COUNTRIES,
    END,
    KNOWN,
    START,
    TEXT,
    TYPES,
    Users,
    WorldSpec,
    catalogue_of,
)
from recsys_ray.storage.artifacts import write_json, write_parquet

FORMAT = 1
_TABLES = ("items", "users", "interactions", "oracle")
_ITEMS_PER_FILE = 20_000
_UTC = pa.timestamp("us", tz="UTC")


def write_demo(out: Path, spec: WorldSpec, progress: Progress) -> dict[str, Any]:
    """Generate a world below ``out``: items/, users/, interactions/, oracle/ (Parquet) and world.json.

    Ray must be up. ``out`` must be on storage that every worker sees. A world that is there already is replaced.

    Returns:
        what world.json holds: the spec, counts, ``test_from`` and ``end`` (unix seconds), ``oracle_hr_at_10``
        and ``oracle_pairs`` (both for ``all`` and per item type).

    Raises:
        DataError: ``out`` is not empty and holds something other than a demo world.
    """
    out = Path(out).absolute()
    if out.exists() and not (out.is_dir() and ((out / "world.json").exists() or not any(out.iterdir()))):
        raise DataError(f"{out} contains something other than demo data; choose another folder or empty this one")
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    for table in _TABLES:
        (aside / table).mkdir(parents=True)
    world = _summary(spec, _run(aside, spec, progress))
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "world.json", {"format": FORMAT})  # if interrupted, the data are generated again
    for table in _TABLES:
        shutil.rmtree(out / table, ignore_errors=True)
        (out / table).mkdir()
        for file in (aside / table).iterdir():
            file.replace(out / table / file.name)
    write_json(out / "world.json", world)
    shutil.rmtree(aside)
    return world


def _run(folder: Path, spec: WorldSpec, progress: Progress) -> list[dict[str, Any]]:
    """Write all files; the counts of each."""
    import ray

    total = sum(spec.items.values())
    work = [{"part": part, "shard": False} for part in range(-(-total // _ITEMS_PER_FILE))]
    work += [{"part": part, "shard": True} for part in range(spec.shards)]

    def write(row: dict[str, Any]) -> dict[str, Any]:
        name, part = str(folder), int(row["part"])
        return write_shard(Path(name), spec, part) if row["shard"] else write_items(Path(name), spec, part)

    # one block, and so one task, a file: a lost worker costs one file
    rows = ray.data.from_items(work, override_num_blocks=len(work)).map(write)
    done = []
    with progress.task("demo data", total=spec.events, unit="events") as task:
        for row in rows.iter_rows():
            done.append(row)
            task.update(sum(r["events"] for r in done), detail=f"{len(done)} of {len(work)} files")
    return done


def _summary(spec: WorldSpec, parts: list[dict[str, Any]]) -> dict[str, Any]:
    pairs = {name: sum(part[f"pairs_{name}"] for part in parts) for name in TYPES}
    hits = {name: sum(part[f"hits_{name}"] for part in parts) for name in TYPES}
    pairs, hits = {"all": sum(pairs.values()), **pairs}, {"all": sum(hits.values()), **hits}
    return {
        "format": FORMAT,
        "spec": asdict(spec),
        "users": spec.users,
        "items": sum(spec.items.values()),
        "interactions": sum(part["events"] for part in parts),
        "start": START,
        "test_from": spec.test_from,
        "end": END,
        "test_from_date": datetime.fromtimestamp(spec.test_from, UTC).isoformat(),
        f"oracle_hr_at_{HITS_AT}": {
            name: round(hits[name] / pairs[name], 4) if pairs[name] else None for name in pairs
        },
        "oracle_pairs": pairs,
        "oracle_rankings": sum(part["rankings"] for part in parts),
    }


def write_items(folder: Path, spec: WorldSpec, part: int) -> dict[str, Any]:
    """Write one file of the catalogue."""
    table = items_table(spec, part)
    write_parquet(folder / "items" / f"part-{part:05d}.parquet", table)
    return _counts(0, 0, np.zeros((len(TYPES), 2), np.int64))


def write_shard(folder: Path, spec: WorldSpec, shard: int) -> dict[str, Any]:
    """Write users, interactions and oracle rankings of one shard."""
    catalogue, users, events = shard_of(spec, shard)
    rankings = rank(spec, shard, catalogue, users, events)
    ids = pa.array(catalogue.item_ids())
    name = f"part-{shard:05d}.parquet"
    write_parquet(folder / "users" / name, users_table(spec, shard, users))
    write_parquet(folder / "interactions" / name, interactions_table(users, events, ids))
    write_parquet(folder / "oracle" / name, oracle_table(users, rankings, ids))
    return _counts(len(events.time), len(rankings.user), rankings.counted)


def _counts(events: int, rankings: int, counted: np.ndarray) -> dict[str, Any]:
    row = {"events": events, "rankings": rankings}
    for kind, name in enumerate(TYPES):
        row[f"pairs_{name}"], row[f"hits_{name}"] = (int(value) for value in counted[kind])
    return row


def items_table(spec: WorldSpec, part: int) -> pa.Table:
    """Rows ``part * 20,000`` and on of the catalogue, with their texts."""
    catalogue = catalogue_of(spec)
    rows = np.arange(len(catalogue.type))[part * _ITEMS_PER_FILE : (part + 1) * _ITEMS_PER_FILE]
    rng = np.random.default_rng([spec.seed, TEXT, part])
    titles, descriptions, categories = [], [], []
    for row in rows:
        name, language = TYPES[catalogue.type[row]], LANGUAGES[catalogue.language[row]]
        topic = int(catalogue.topic[row])
        title, description, labels = write_text(name, topic, catalogue.style[row, :2].tolist(), language, rng)
        titles.append(title)
        # one in twenty has no description, as in real catalogues
        descriptions.append(description if rng.random() >= 0.05 else None)
        categories.append(labels)
    return pa.table(
        {
            "item_id": pa.array(catalogue.item_ids()[rows]),
            "item_type": pa.array([TYPES[kind] for kind in catalogue.type[rows]]),
            "title": pa.array(distinct(titles)),
            "description": pa.array(descriptions, pa.string()),
            "language": pa.array([LANGUAGES[code] for code in catalogue.language[rows]]),
            "categories": pa.array(categories, pa.list_(pa.string())),
            "published_at": _moments(catalogue.published[rows]),
            "available": pa.array(catalogue.withdrawn[rows] == END),
        }
    )


def users_table(spec: WorldSpec, shard: int, users: Users) -> pa.Table:
    """The users' known traits. One in twenty-five has no age, one in seven no music taste."""
    rng = np.random.default_rng([spec.seed, KNOWN, shard])
    age = pa.array(np.floor(users.age), pa.float32(), mask=rng.random(len(users)) < 0.04)
    unknown = rng.random(len(users)) < 0.15
    taste = [None if hide else vector for hide, vector in zip(unknown, users.taste, strict=True)]
    return pa.table(
        {
            "user_id": _user_ids(users, np.arange(len(users))),
            "age": age,
            "country": pa.array([COUNTRIES[code] for code in users.country]),
            "music_taste": pa.array(taste, pa.list_(pa.float32())),
        }
    )


def interactions_table(users: Users, events: Events, ids: pa.Array) -> pa.Table:
    """Events sorted by (user, time). ``ids``: the item id of each catalogue row."""
    return pa.table(
        {
            "user_id": _user_ids(users, events.user),
            "item_id": ids.take(pa.array(events.item)),
            "event": pa.array(EVENTS).take(pa.array(events.event)),
            "timestamp": _moments(events.time),
        }
    )


def oracle_table(users: Users, rankings: Rankings, ids: pa.Array) -> pa.Table:
    """Best rankings: user_id, item_type, item_ids (best first)."""
    lengths = np.array([len(line) for line in rankings.items], np.int64)
    flat = np.concatenate(rankings.items) if rankings.items else np.zeros(0, np.int64)
    offsets = pa.array(np.r_[0, np.cumsum(lengths)].astype(np.int32))
    return pa.table(
        {
            "user_id": _user_ids(users, np.array(rankings.user, np.int64)),
            "item_type": pa.array([TYPES[kind] for kind in rankings.kind], pa.string()),
            "item_ids": pa.ListArray.from_arrays(offsets, ids.take(pa.array(flat))),
        }
    )


def _user_ids(users: Users, rows: np.ndarray) -> pa.Array:
    names = pa.array([f"user-{number:09d}" for number in range(users.first, users.first + len(users))], pa.string())
    return names.take(pa.array(rows))


def _moments(seconds: np.ndarray) -> pa.Array:
    return pa.array(seconds * 1_000_000, pa.int64()).cast(_UTC)
