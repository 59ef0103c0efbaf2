"""Many tasks on a local Ray: results, their order, how many are under way at once, and errors.

The functions are inside the tests, so that Ray sends them by value: its workers cannot import this file.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from recsys_ray.cluster.pool import in_parallel
from recsys_ray.core.errors import DataError

pytestmark = pytest.mark.usefixtures("ray_local")


def test_results_come_in_the_order_of_the_calls_where_that_is_asked() -> None:
    def slowest_first(place: int) -> int:
        time.sleep((5 - place) * 0.05)
        return place

    calls = [(slowest_first, place) for place in range(5)]
    assert list(in_parallel(calls, ordered=True)) == [0, 1, 2, 3, 4]
    assert sorted(in_parallel(calls, 3)) == [0, 1, 2, 3, 4]
    assert list(in_parallel([])) == []


@pytest.mark.parametrize("ordered", [False, True])
def test_no_more_than_the_limit_is_begun_before_a_result_is_taken(tmp_path: Path, ordered: bool) -> None:
    def mark(place: int) -> None:
        (tmp_path / str(place)).touch()

    results = in_parallel(((mark, place) for place in range(6)), 2, ordered)
    next(results)
    assert len(list(tmp_path.iterdir())) <= 2
    assert len(list(results)) == 5
    assert len(list(tmp_path.iterdir())) == 6


def test_a_users_mistake_is_raised_as_it_was() -> None:
    def fail(place: int) -> None:
        if place == 1:
            raise DataError("items.csv, row 7: no title")

    with pytest.raises(DataError, match=r"^items\.csv, row 7: no title$") as caught:
        list(in_parallel((fail, place) for place in range(3)))
    assert type(caught.value) is DataError
