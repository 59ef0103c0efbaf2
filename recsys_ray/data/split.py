"""Splits events into training, validation and test: training < valid_from <= validation < test_from <= test.

The split is either by time, the same for all users, or leave-one-out. Leave-one-out gives every event a *logical time*,
so that all other stages need to know only one kind of split: validation is at 0, the test at 1, and a user's training
events are at ..., -3, -2, -1. Only times of one user are comparable.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recsys_ray.config import SplitConfig
from recsys_ray.core.clock import DAY
from recsys_ray.core.errors import DataError
from recsys_ray.core.offsets import begins
from recsys_ray.data.validate import utc

VALID_FROM, TEST_FROM, END = 0, 1, 2  # logical times
_DAYS = 14  # of validation and of the test, unless they hold too little or too much
_ENOUGH, _LEAST, _MOST = 1_000, 0.03, 0.1  # days of users in either: a number, and shares of all
_PERIODS = 3  # training, validation and test: days are too long to divide fewer of them
_HELD_OUT = 3  # a user with fewer new items has none to spare


def logical_times(uid: np.ndarray, gid: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Leave-one-out: int64 [n], ascending for each user.

    A user discovers an item with the first event of any kind on it. Only discoveries of items with a positive event
    count. The last one begins the test, the one before it validation, so each user has one target, always an item
    without earlier events. Users with fewer than three are used for training only.

    Args:
        uid, gid, positive: int64, int32 and bool [n], ascending by uid, of each user in the order in which they
            happened.
    """
    if not len(uid):
        return np.zeros(0, np.int64)
    pair = uid * (np.int64(gid.max()) + 1) + gid
    _, first, item = np.unique(pair, return_index=True, return_inverse=True)
    liked = np.bincount(item, weights=positive) > 0
    discovery = np.zeros(len(uid), np.int64)
    discovery[first[liked]] = 1
    begin = np.flatnonzero(begins(uid))
    size = np.diff(np.r_[begin, len(uid)])
    passed = np.cumsum(discovery)
    before, found = passed[begin] - discovery[begin], np.add.reduceat(discovery, begin)
    left = np.repeat(before + found, size) - passed  # discoveries that are still to come
    held_out = np.repeat(found >= _HELD_OUT, size)
    training = ~held_out | (left >= 2)
    place = np.arange(len(uid)) - np.repeat(begin + np.add.reduceat(training.astype(np.int64), begin), size)
    return np.where(training, place, np.where(left == 1, VALID_FROM, TEST_FROM))


def plan_split(
    config: SplitConfig,
    days: Sequence[Sequence[int]],
    positive: tuple[int, int],
    last: int,
    positives: Sequence[str],
) -> tuple[int, int]:
    """``valid_from`` and ``test_from`` in unix seconds. Derived ones are midnights, UTC.

    A period without configured days has 14 days; more if these hold fewer than ``_ENOUGH`` user-days with a positive
    event (or than ``_LEAST`` of all, if that is less); fewer if they hold more than ``_MOST`` of all. User-days are
    counted, not events, because each user has one list, however many films they rate in an evening.

    Args:
        days: (unix day, users with a positive event on it), ascending, without empty days.
        positive: the first and the last moment of a positive event.
        last: the last moment of any event.
        positives: the names of the positive events, for the message.

    Raises:
        DataError: training, validation or test would be empty; the message gives the data's range.
    """
    if positive[0] == positive[1]:
        raise DataError(
            f"all positive events ({', '.join(positives)}) have the same time, {utc(positive[0])} (UTC), so they "
            "cannot be split by time; give the interactions their times, or set split.protocol=leave_one_out, which "
            "uses the order of a user's rows if times are equal"
        )
    after = (last // DAY + 1) * DAY
    test, valid = (int(moment.timestamp()) if moment else None for moment in (config.test_from, config.valid_from))
    if test is None:
        test = after - DAY * (config.test_days or _days_before(after, days))
    if valid is None:
        valid = test - DAY * (config.valid_days or _days_before(test, days))
    span = (
        f"validation is from {utc(valid)}, test from {utc(test)}, and the positive events ({', '.join(positives)}) run "
        f"from {utc(positive[0])} to {utc(positive[1])} (UTC)"
    )
    if config.test_from or config.valid_from or len(days) < _PERIODS:
        change = "set split.valid_from and split.test_from to times inside that range"
    else:
        change = "set split.test_days and split.valid_days smaller, or split.valid_from and split.test_from to dates"
    change += ", or split.protocol=leave_one_out, which needs no dates"
    if valid >= test:
        raise DataError(f"the validation period is empty: {span}; {change}")
    empty = {
        "training": positive[0] >= valid,
        "validation": not any(day * DAY < test and (day + 1) * DAY > valid for day, _ in days),
        "test": positive[1] < test,
    }
    for name, is_empty in empty.items():
        if is_empty:
            raise DataError(f"the {name} period has no positive event: {span}; {change}")
    return valid, test


def _days_before(end: int, days: Sequence[Sequence[int]]) -> int:
    """The number of days before ``end`` for a validation or test period; see :func:`plan_split`."""
    day, users = (np.array(column, np.int64) for column in zip(*days, strict=True))
    ago = -((day * DAY - end) // DAY)  # 1: the last day before the end
    past = ago > 0
    held = np.cumsum(np.bincount(ago[past], weights=users[past], minlength=_DAYS + 1))[1:]  # in the last 1, 2, ... days
    if held[_DAYS - 1] > _MOST * users.sum():
        return max(1, int(np.searchsorted(held, _MOST * users.sum(), side="right")))
    enough = min(_ENOUGH, _LEAST * users.sum(), held[-1])
    return max(_DAYS, int(np.searchsorted(held, enough)) + 1)
