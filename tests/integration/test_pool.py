"""Many tasks on a local Ray: results, their order, how many are under way at once, and errors."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from recsys_ray.cluster.pool import in_parallel
from recsys_ray.core.errors import DataError

pytestmark = pytest.mark.usefixtures("ray_local")


def slower_first(place: int, count: int) -> int:
    time.sleep((count - place) * 0.05)
    return place


def fail(place: int) -> int:
    if place == 1:
        raise DataError("items.csv, row 7: no title")
    return place


def mark(folder: Path, place: int) -> int:
    (folder / str(place)).touch()
    return place


def test_results_come_in_the_order_of_the_calls_where_that_is_asked() -> None:
    calls = [(slower_first, place, 5) for place in range(5)]
    assert list(in_parallel(calls, ordered=True)) == [0, 1, 2, 3, 4]
    assert sorted(in_parallel(calls, 3)) == [0, 1, 2, 3, 4]
    assert list(in_parallel([])) == []


@pytest.mark.parametrize("ordered", [False, True])
def test_no_more_than_the_limit_is_begun_before_a_result_is_taken(tmp_path: Path, ordered: bool) -> None:
    results = in_parallel(((mark, tmp_path, place) for place in range(6)), 2, ordered)
    next(results)
    assert len(list(tmp_path.iterdir())) <= 2
    assert len(list(results)) == 5
    assert len(list(tmp_path.iterdir())) == 6


def test_a_users_mistake_is_raised_as_it_was() -> None:
    with pytest.raises(DataError, match=r"^items\.csv, row 7: no title$") as caught:
        list(in_parallel((fail, place) for place in range(3)))
    assert type(caught.value) is DataError
