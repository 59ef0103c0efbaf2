"""Training examples from a user's events, each with what was known at its moment and nothing later.

An example is a user's first positive event on an item. Its features are the user's earlier events within the window,
without the target itself, as in serving, where seen items are not recommended again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from recsys_ray.core.clock import DAY
from recsys_ray.core.offsets import offsets_of, spread
from recsys_ray.data.tables import Events, Tables, first_touches, has_code, traits_of
from recsys_ray.graph.snapshots import Snapshot, training_snapshot
from recsys_ray.two_tower.rows import OFFSETS

_NONE = -1  # no snapshot
_ROWS = 1 << 16  # whose histories are made at once


@dataclass(frozen=True)
class HistoryRules:
    """How much of a user's past makes features."""

    length: int
    window_days: int | None
    as_of: str = "example"  # or "window": the paper's own way, everything in the window but the target

    @property
    def window(self) -> int:
        return (1 << 40) if self.window_days is None else self.window_days * DAY


def histories(
    events: Events, users: Int[np.ndarray, "m"], moments: Int[np.ndarray, "m"], rules: HistoryRules
) -> tuple[Int[np.ndarray, "m"], Int[np.ndarray, "m"]]:
    """Where the latest ``length`` events of each user with ``moment - window <= timestamp < moment`` begin, and how
    many there are."""
    starts, ends = _ranges(events, users, moments, rules.window)
    starts = np.maximum(starts, ends - rules.length)
    return starts, np.maximum(ends - starts, 0)


def _ranges(events: Events, users: np.ndarray, moments: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """First position inside the window and first at or after the moment, by one search over (uid, timestamp)."""
    if not len(events.uid):
        return np.zeros(len(users), np.int64), np.zeros(len(users), np.int64)
    low = int(events.timestamp.min())
    span = int(max(events.timestamp.max() - low, moments.max(initial=low) - low)) + 2
    keys = events.uid.astype(np.int64) * span + (events.timestamp - low)
    at = users.astype(np.int64) * span
    ends = np.searchsorted(keys, at + np.clip(moments - low, 0, span - 1))
    starts = np.searchsorted(keys, at + np.clip(moments - window - low, 0, span - 1))
    return starts, ends


def build_examples(
    events: Events, positives: Sequence[int], snapshots: Sequence[Snapshot], rules: HistoryRules
) -> dict[str, np.ndarray]:
    """Examples of all snapshots that have an interval of them, each with the one snapshot that it may see.

    Returns:
        uid int64 [m], target int32 [m], timestamp int64 [m], snapshot int16 [m], and the histories as
        recsys_ray/two_tower/rows.py has them: history int32 [n], history_event int8 [n], offsets int64 [m + 1].
    """
    chosen = first_touches(events, has_code(events.event, positives))
    snapshot = np.full(len(chosen), _NONE, np.int16)
    for each in snapshots:
        if each.examples is not None:
            inside = (events.timestamp[chosen] >= each.examples[0]) & (events.timestamp[chosen] < each.examples[1])
            if each.without is not None:
                inside &= each.without.has(events.uid[chosen])
            snapshot[inside] = each.index
    chosen, snapshot = chosen[snapshot != _NONE], snapshot[snapshot != _NONE]
    moments = events.timestamp[chosen]
    if rules.as_of == "window":
        last = {s.index: s.examples[1] for s in snapshots if s.examples is not None and s.name.startswith("cut")}
        moments = np.array([last.get(int(s), t) for s, t in zip(snapshot, moments, strict=True)], np.int64)
    return {
        "uid": events.uid[chosen].astype(np.int64),
        "target": events.gid[chosen].astype(np.int32),
        "timestamp": events.timestamp[chosen].astype(np.int64),
        "snapshot": snapshot,
        **_past(events, chosen, moments, rules),
    }


def training_examples(
    events: Events, positives: Sequence[int], snapshots: Sequence[Snapshot], valid_from: int, rules: HistoryRules
) -> dict[str, np.ndarray]:
    """:func:`build_examples` for the training cuts out of the events before ``valid_from``."""
    cuts = [s for s in snapshots if s.name.startswith("cut")]
    return build_examples(events.before(valid_from), positives, cuts, rules)


def validation_examples(
    events: Events, positives: Sequence[int], snapshots: Sequence[Snapshot], test_from: int, rules: HistoryRules
) -> dict[str, np.ndarray]:
    """Examples of the validation period, out of the events before ``test_from``: for the refit.

    They use the snapshot on which the HGNN was trained, the last cut's, although a newer one exists: so their targets
    lie at least as far ahead as those of the last cut, like the test's. With the newest graph, new items would hardly
    ever be targets, because little time was left to choose them."""
    newest, valid = training_snapshot(snapshots), next(s for s in snapshots if s.name == "valid")
    assert valid.examples is not None
    return build_examples(events.before(test_from), positives, [replace(newest, examples=valid.examples)], rules)


def build_queries(
    events: Events, positives: Sequence[int], start: int, end: int, rules: HistoryRules
) -> dict[str, np.ndarray]:
    """Validation queries: for each user with new positives in ``start <= t < end``, one row per such item, with the
    history before ``start`` and nothing after it. Same columns as :func:`build_examples` without snapshot, and
    ``seen``: whether the user had seen the item before (such rows are left out)."""
    chosen = first_touches(events, has_code(events.event, positives))
    chosen = chosen[(events.timestamp[chosen] >= start) & (events.timestamp[chosen] < end)]
    chosen = chosen[~_touched_before(events, chosen, start)]
    moments = np.full(len(chosen), start, np.int64)
    return {
        "uid": events.uid[chosen].astype(np.int64),
        "target": events.gid[chosen].astype(np.int32),
        **_past(events, chosen, moments, rules),
    }


def _touched_before(events: Events, chosen: np.ndarray, start: int) -> np.ndarray:
    """Whether the user had any event on the item before ``start``."""
    items = int(events.gid.max(initial=0)) + 1
    pairs = events.uid.astype(np.int64) * items + events.gid
    return np.isin(pairs[chosen], pairs[events.timestamp < start])


def _past(
    events: Events, chosen: Int[np.ndarray, "m"], moments: Int[np.ndarray, "m"], rules: HistoryRules
) -> dict[str, np.ndarray]:
    """History of the events ``chosen`` before ``moments``, without the items of these events themselves."""
    begin, length = histories(events, events.uid[chosen], moments, rules)
    gids, codes, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.int8)], [np.zeros(0, np.int64)]
    for start in range(0, len(chosen), _ROWS):
        part = slice(start, start + _ROWS)
        position, row = spread(begin[part], length[part]), np.repeat(np.arange(len(chosen[part])), length[part])
        kept = events.gid[position] != events.gid[chosen[part]][row]
        gids.append(events.gid[position[kept]].astype(np.int32))
        codes.append(events.event[position[kept]].astype(np.int8))
        lengths.append(np.bincount(row[kept], minlength=len(chosen[part])))
    return {
        "history": np.concatenate(gids),
        "history_event": np.concatenate(codes),
        OFFSETS: offsets_of(np.concatenate(lengths)),
    }


def user_columns(ingest: Tables, uids: Int[np.ndarray, "m"], tastes: dict[str, int]) -> dict[str, np.ndarray]:
    """Age (NaN: absent), country (string, "" absent) and taste vectors (NaN rows: absent) of these users."""
    users, row = np.unique(uids, return_inverse=True)
    return {name: column[row] for name, column in traits_of(ingest.users(users), tastes).items()}
