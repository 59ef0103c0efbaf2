"""Who chose what, and when: the counts that item terms are made of.

A choice is a user's first positive event on an item. For each snapshot they are counted in all, and in the last weeks
before it. **Nobody had an item** means one thing in this project: no user chose it before the moment
(:func:`nobody_had`).

Imports neither dgl nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from recsys_ray.cluster.pool import in_parallel
from recsys_ray.config import Config
from recsys_ray.core.clock import DAY
from recsys_ray.core.snapshots import Snapshot
from recsys_ray.storage.artifacts import Artifact, save_arrays
from recsys_ray.two_tower.examples import UserEvents, first_touches

PERIODS = ((30, 7), (7, 0))  # from and to so many days before a moment, the oldest first
Choices = Int[np.ndarray, "ever_and_periods items"]  # row 0: users who ever chose each item; then of each of PERIODS


def choices_file(two_tower: Path) -> Path:
    """Where the two-tower stage keeps the counts: snapshot -> int32 :data:`Choices`."""
    return two_tower / "choices.safetensors"


def nobody_had(choices: Choices) -> Bool[np.ndarray, "items"]:
    """The items that no user chose before the moment: had no positive event of anybody."""
    return choices[0] == 0


def write_choices(config: Config, ingest: Artifact, snapshots: Sequence[Snapshot], out: Path, cpus: int) -> None:
    """Count the choices as of each of these snapshots. One task a shard of interactions."""
    items = sum(ingest.counts["items_per_type"])
    names = list(ingest.counts["events"])
    positives = [names.index(name) for name in config.events.positives if name in names]
    shards = sorted((ingest.path / "interactions").resolve().glob("shard-*.parquet"))
    counts = np.zeros((len(snapshots), 1 + len(PERIODS), items), np.int32)
    for counted in in_parallel([(count_shard, shard, snapshots, positives, items) for shard in shards], cpus):
        counts += counted
    save_arrays(choices_file(out), {snapshot.name: counts[k] for k, snapshot in enumerate(snapshots)})


def count_shard(
    shard: Path, snapshots: Sequence[Snapshot], positives: Sequence[int], items: int
) -> Int[np.ndarray, "snapshots ever_and_periods items"]:
    """The choices of a shard's users; see :func:`count_choices`."""
    return count_choices(UserEvents.read(shard), snapshots, positives, items)


def count_choices(
    events: UserEvents, snapshots: Sequence[Snapshot], positives: Sequence[int], items: int
) -> Int[np.ndarray, "snapshots ever_and_periods items"]:
    """How many users chose each item before each snapshot, and in each of ``PERIODS`` before it.

    Args:
        positives: codes of the positive events.
    """
    chosen = first_touches(events, np.isin(events.event, np.asarray(positives, events.event.dtype)))
    uid, gid, time = events.uid[chosen], events.gid[chosen], events.timestamp[chosen]
    counts = np.zeros((len(snapshots), 1 + len(PERIODS), items), np.int32)
    for k, snapshot in enumerate(snapshots):
        known = time < snapshot.time
        if snapshot.without is not None:
            known &= ~snapshot.without.has(uid)
        counts[k, 0] = np.bincount(gid[known], minlength=items)
        for period, (since, until) in enumerate(PERIODS, 1):
            inside = known & (time >= snapshot.time - since * DAY) & (time < snapshot.time - until * DAY)
            counts[k, period] = np.bincount(gid[inside], minlength=items)
    return counts
