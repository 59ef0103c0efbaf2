"""Counts who chose what and when; item terms are computed from these counts.

A choice is a user's first positive event on an item. For each snapshot, choices are counted overall and in the last
weeks before it. An item is **unseen** if no user chose it before the moment (:func:`nobody_had`); this is the one
definition in the project.

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
from recsys_ray.data.tables import Events, Tables, first_touches, has_code
from recsys_ray.graph.snapshots import Snapshot
from recsys_ray.storage.artifacts import save_arrays

PERIODS = ((30, 7), (7, 0))  # periods as days before a moment, the oldest first
Choices = Int[np.ndarray, "ever_and_periods items"]  # row 0: users who ever chose each item; then of each of PERIODS


def choices_file(two_tower: Path) -> Path:
    """Where the two-tower stage keeps the counts: snapshot -> int32 :data:`Choices`."""
    return two_tower / "choices.safetensors"


def nobody_had(choices: Choices) -> Bool[np.ndarray, "items"]:
    """The items that no user chose before the moment: had no positive event of anybody."""
    return choices[0] == 0


def write_choices(config: Config, ingest: Tables, snapshots: Sequence[Snapshot], out: Path, cpus: int) -> None:
    """Count the choices as of ``snapshots``. One task a shard of interactions.

    Memory: for each item 12 bytes a snapshot, here and in each task.
    """
    items = sum(ingest.counts["items_per_type"])
    arguments = snapshots, ingest.codes(config.events.positives), items
    counts = np.zeros((len(snapshots), 1 + len(PERIODS), items), np.int32)
    for chosen in in_parallel([(_count_shard, shard, *arguments) for shard in ingest.shards], cpus):
        counts += chosen
    save_arrays(choices_file(out), {snapshot.name: counts[k] for k, snapshot in enumerate(snapshots)})


def _count_shard(
    shard: Path, snapshots: Sequence[Snapshot], positives: Sequence[int], items: int
) -> Int[np.ndarray, "snapshots ever_and_periods items"]:
    return count_choices(Events.read(shard), snapshots, positives, items)


def count_choices(
    events: Events, snapshots: Sequence[Snapshot], positives: Sequence[int], items: int
) -> Int[np.ndarray, "snapshots ever_and_periods items"]:
    """How many users chose each item before each snapshot, and in each of ``PERIODS`` before it.

    Args:
        positives: codes of the positive events.
    """
    chosen = first_touches(events, has_code(events.event, positives))
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
