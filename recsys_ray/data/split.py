"""One global split by time: training < valid_from <= validation < test_from <= test."""

from __future__ import annotations

from collections.abc import Sequence

from recsys_ray.config import SplitConfig
from recsys_ray.data.validate import utc
from recsys_ray.errors import DataError

DAY = 86_400


def plan_split(
    config: SplitConfig,
    days: Sequence[tuple[int, int]],
    positive: tuple[int, int],
    last: int,
    positives: Sequence[str],
) -> tuple[int, int]:
    """``valid_from`` and ``test_from`` in unix seconds. Derived ones are midnights, UTC.

    Args:
        days: (unix day, positive events), ascending, without empty days.
        positive: the first and the last moment of a positive event.
        last: the last moment of any event.
        positives: the names of the positive events, for the message.

    Raises:
        DataError: training, validation or test would be empty; the message gives the data's range.
    """
    after = (last // DAY + 1) * DAY
    test = int(config.test_from.timestamp()) if config.test_from else after - config.test_days * DAY
    valid = int(config.valid_from.timestamp()) if config.valid_from else test - config.valid_days * DAY
    span = (
        f"validation is from {utc(valid)}, test from {utc(test)}, and the positive events ({', '.join(positives)}) run "
        f"from {utc(positive[0])} to {utc(positive[1])} (UTC)"
    )
    change = (
        "set split.valid_from and split.test_from inside that range"
        if config.test_from or config.valid_from
        else "set split.test_days and split.valid_days smaller, or split.valid_from and split.test_from to dates"
    )
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
