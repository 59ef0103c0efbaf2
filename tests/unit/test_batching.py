"""Requests that wait together are computed together, and each gets its own answer."""

from __future__ import annotations

import asyncio

import pytest

from serve.batching import Batches


def test_what_waits_is_computed_at_once_and_what_comes_meanwhile_is_next():
    seen: list[list[int]] = []

    def compute(numbers: list[int]) -> list[int]:
        seen.append(numbers)
        if len(seen) == 1:  # they come while the first batch is computed
            late.extend(asyncio.ensure_future(batches.ask(number)) for number in (20, 21))
        return [number * number for number in numbers]

    late: list[asyncio.Future[int]] = []
    batches = Batches(compute, most=8)

    async def main() -> list[int]:
        asked = await asyncio.gather(*(batches.ask(number) for number in range(10)))
        return [*asked, *[await one for one in late]]

    assert asyncio.run(main()) == [number * number for number in [*range(10), 20, 21]]
    assert seen[0] == [*range(8)]
    assert sorted(number for batch in seen[1:] for number in batch) == [8, 9, 20, 21]


def test_dear_questions_are_not_computed_together():
    sizes: list[int] = []

    def compute(numbers: list[int]) -> list[int]:
        sizes.append(len(numbers))
        return numbers

    async def main() -> list[int]:
        batches = Batches(compute, most=8, cost=lambda number: number)
        return await asyncio.gather(*(batches.ask(number) for number in (9, 4, 4, 1, 20, 20, 2)))

    assert asyncio.run(main()) == [9, 4, 4, 1, 20, 20, 2]
    assert sizes == [1, 2, 1, 1, 1, 1]


def test_the_loop_looks_around_between_two_batches():
    order: list[str] = []

    def compute(numbers: list[int]) -> list[int]:
        order.append("batch")
        return numbers

    async def look() -> None:
        for _ in range(12):
            order.append("look")
            await asyncio.sleep(0)

    async def main() -> None:
        batches = Batches(compute, most=1)
        await asyncio.gather(look(), *(batches.ask(number) for number in range(3)))

    asyncio.run(main())
    assert "batch batch" not in " ".join(order)


def test_a_full_batch_waits_for_nobody():
    """With a new question in each turn of the loop, for ever, answers still come."""
    sizes: list[int] = []

    def compute(numbers: list[int]) -> list[int]:
        sizes.append(len(numbers))
        return numbers

    async def main() -> None:
        batches = Batches(compute, most=8)
        asked = []
        for number in range(100):
            asked.append(asyncio.create_task(batches.ask(number)))
            await asyncio.sleep(0)
        assert sizes, "nothing was computed while questions came"
        await asyncio.gather(*asked)

    asyncio.run(main())
    assert max(sizes) == 8


def test_each_gets_its_own_error():
    def compute(numbers: list[int]) -> list[int | Exception]:
        if 13 in numbers:
            raise RuntimeError("all of them")
        return [ValueError(number) if number % 2 else number for number in numbers]

    async def main() -> None:
        batches = Batches(compute, most=8)
        assert await batches.ask(2) == 2
        with pytest.raises(ValueError, match="3"):
            await batches.ask(3)
        with pytest.raises(RuntimeError, match="all of them"):
            await batches.ask(13)
        assert await batches.ask(4) == 4, "it goes on"

    asyncio.run(main())


def test_who_has_gone_is_not_waited_for():
    computed: list[int] = []

    def compute(numbers: list[int]) -> list[int]:
        computed.extend(numbers)
        return numbers

    async def main() -> None:
        batches = Batches(compute, most=1)
        first, gone = (asyncio.create_task(batches.ask(number)) for number in (1, 2))
        await asyncio.sleep(0)
        gone.cancel()
        assert await first == 1 and await batches.ask(3) == 3

    asyncio.run(main())
    assert computed == [1, 3]
