"""Reads the interaction shards for evaluation: the setting that tasks share, and the survey of every shard.

A survey holds a shard's queries and what its events say about the items. It is a file in the evaluation's scratch
folder; the driver adds the files up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import numpy as np

from recsys_ray.config import Config
from recsys_ray.core.clock import days_before, popular_days
from recsys_ray.core.offsets import offsets_of
from recsys_ray.data.tables import Catalogue, Events, Tables
from recsys_ray.evaluation.segments import ItemFacts, Queries, find_queries, popularity_tiers
from recsys_ray.storage.artifacts import SCRATCH, load_arrays, save_arrays


@dataclass(frozen=True)
class Setting:
    """What every task of an evaluation needs to know. Moments are unix seconds."""

    ingest: Tables
    scratch: Path
    catalogue: Catalogue
    positive: np.ndarray  # bool [event names]
    valid_from: int
    test_from: int
    end: int
    batch_size: int
    seed: int
    data_seed: int
    popular_days: int | None = (
        None  # popularity window for users about whom nothing is known; None: everything before the test
    )
    windows: tuple[int, ...] = ()  # days of further popularity windows
    places: Mapping[str, Path] = field(default_factory=dict)  # folders of models whose results outlast this evaluation


def prepare(config: Config, ingest: Path, out: Path) -> Setting:
    """Read what tasks need to know and make the scratch folder below ``out``.

    Raises:
        ArtifactError: the ingest stage's output is missing or damaged.
    """
    tables = Tables(ingest)
    counts = tables.counts
    scratch = out / SCRATCH
    scratch.mkdir(parents=True, exist_ok=True)
    return Setting(
        ingest=tables,
        scratch=scratch,
        catalogue=tables.catalogue,
        positive=np.isin(counts["events"], config.events.positives),
        valid_from=counts["valid_from"],
        test_from=counts["test_from"],
        end=counts["end"],
        batch_size=config.evaluate.batch_size,
        seed=config.seed,
        data_seed=config.data_seed,
        popular_days=popular_days(counts, config.index.popular_days),
        windows=tuple(config.evaluate.popularity_days),
    )


def known_before(events: Events, moment: int, uids: np.ndarray) -> Events:
    """What recommenders may know of these users: their events before ``moment``."""
    return events.select((events.timestamp < moment) & np.isin(events.uid, uids))


LAYOUT = 1  # version of a part file; raise it when its content changes, so that cached files are not misread


def part_of(setting: Setting, name: str, shard: Path) -> Path:
    """The path of a model's result (or the survey) for a shard."""
    return setting.places.get(name, setting.scratch) / f"{quote(name, safe='')}-{shard.stem}.safetensors"


def survey_shard(setting: Setting, shard: Path) -> None:
    """Queries of a shard and what its events say of the items, into the scratch folder."""
    target = part_of(setting, "survey", shard)
    if target.exists():
        return
    events = Events.read(shard)
    queries = find_queries(events, setting.catalogue, setting.positive, setting.test_from, setting.end)
    items = setting.catalogue.items
    before = events.timestamp < setting.test_from
    positive = before & setting.positive[events.event]
    ever = np.iinfo(np.int64).min
    lately = positive & (events.timestamp >= days_before(setting.test_from, setting.popular_days, ever))
    chosen = np.unique(events.uid[lately] * items + events.gid[lately]) % items  # once for each user
    arrays = {
        "positives": np.bincount(events.gid[positive], minlength=items),
        "trained": np.bincount(events.gid[events.timestamp < setting.valid_from], minlength=items),
        "popular": np.bincount(chosen, minlength=items),
    }
    for days in setting.windows:
        inside = positive & (events.timestamp >= days_before(setting.test_from, days))
        arrays[f"recent_{days}"] = np.bincount(events.gid[inside], minlength=items)
    save_arrays(target, {**arrays, **queries.as_arrays()})


@dataclass(frozen=True)
class Survey:
    """The shards' surveys, merged."""

    queries: Queries
    users: dict[Path, np.ndarray]  # of each shard, the users that are evaluated
    query_offset: dict[Path, int]
    truth_offset: dict[Path, int]
    facts: ItemFacts
    popular: np.ndarray  # int64 [items]: users who chose them in ``Setting.popular_days``, as a bundle counts them
    windows: dict[int, np.ndarray]  # days -> int64 [items]: positive events in a further popularity window


def merge_survey(setting: Setting, max_users: int | None) -> Survey:
    """Add the surveys up; keep a seeded sample of ``max_users`` users that have queries."""
    shards = setting.ingest.shards
    names = ("positives", "trained", "popular", *(f"recent_{days}" for days in setting.windows))
    totals = {name: np.zeros(setting.catalogue.items, np.int64) for name in names}
    parts: list[Queries] = []
    for shard in shards:
        arrays = load_arrays(part_of(setting, "survey", shard))
        for name, total in totals.items():
            total += arrays[name]
        parts.append(Queries.from_arrays(arrays))
    everyone = np.concatenate([np.unique(part.uid) for part in parts])
    if max_users is not None and max_users < len(everyone):
        everyone = np.random.default_rng(setting.data_seed).choice(everyone, max_users, replace=False)
    parts = [part.keep_users(everyone) for part in parts]

    def offsets(sizes: list[int]) -> dict[Path, int]:
        return dict(zip(shards, offsets_of(np.array(sizes)).tolist(), strict=False))

    return Survey(
        queries=Queries.join(parts),
        users={shard: np.unique(part.uid) for shard, part in zip(shards, parts, strict=True)},
        query_offset=offsets([len(part) for part in parts]),
        truth_offset=offsets([len(part.truth_item) for part in parts]),
        facts=ItemFacts(totals["trained"] == 0, popularity_tiers(totals["positives"], setting.catalogue)),
        popular=totals["popular"],
        windows={days: totals[f"recent_{days}"] for days in setting.windows},
    )
