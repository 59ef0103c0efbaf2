"""Moments and days as all stages use them. Moments are int unix seconds; days are counted from 1970, in UTC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

DAY = 86_400
NEVER = np.iinfo(np.int64).max  # a moment that is not known, or that has not come


def days_before(moment: int, days: int | None, first: int = 0) -> int:
    """The start of a window of ``days`` days that ends at ``moment``; ``first`` if ``days`` is None."""
    return first if days is None else moment - days * DAY


def is_leave_one_out(counts: Mapping[str, Any]) -> bool:
    """Whether the times of an ingest manifest and of its interactions are logical ones (recsys_ray/data/split.py)."""
    return counts.get("protocol", "time") == "leave_one_out"


def calendar_end(counts: Mapping[str, Any]) -> int:
    """Unix seconds, 1 s after the last event of an ingest manifest, under either protocol."""
    return int(counts.get("last_event", counts["end"] - 1)) + 1


def popular_days(counts: Mapping[str, Any], days: int | None) -> int | None:
    """``index.popular_days``, unless the split is leave-one-out, which knows no days: then all counts (None)."""
    return None if is_leave_one_out(counts) else days
