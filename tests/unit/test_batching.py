"""Requests that wait together are computed together, and each gets its own answer."""

from __future__ import annotations

import asyncio
import threading

import pytest

from serve.batching import Batches


def test_what_waits_is_computed_at_once():
    sizes: list[int] = []
    go = threading.Event()

    def compute(numbers: list[int]) -> list[int]:
        go.wait(10)
        sizes.append(len(numbers))
        return [number * number for number in numbers]

    async def main() -> list[int]:
        batches = Batches(compute, most=8)
        first = asyncio.create_task(batches.ask(0))
        await asyncio.sleep(0.05)  # the thread is at work on it
        rest = [asyncio.create_task(batches.ask(number)) for number in range(1, 21)]
        await asyncio.sleep(0.05)
        go.set()
        return await asyncio.gather(first, *rest)

    assert asyncio.run(main()) == [number * number for number in range(21)]
    assert sizes == [1, 8, 8, 4]


def test_each_gets_its_own_error():
    def compute(numbers: list[int]) -> list[int | Exception]:
        if 13 in numbers:
            raise RuntimeError("all of them")
        return [ValueError(number) if number % 2 else number for number in numbers]

    async def main() -> None:
        batches = Batches(compute)
        assert await batches.ask(2) == 2
        with pytest.raises(ValueError, match="3"):
            await batches.ask(3)
        with pytest.raises(RuntimeError, match="all of them"):
            await batches.ask(13)
        assert await batches.ask(4) == 4, "the thread goes on"

    asyncio.run(main())


def test_who_has_gone_is_not_waited_for():
    computed: list[int] = []
    go = threading.Event()

    def compute(numbers: list[int]) -> list[int]:
        go.wait(10)
        computed.extend(numbers)
        return numbers

    async def main() -> None:
        batches = Batches(compute)
        first = asyncio.create_task(batches.ask(1))
        await asyncio.sleep(0.05)
        gone = asyncio.create_task(batches.ask(2))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0.01)
        go.set()
        assert await first == 1 and await batches.ask(3) == 3

    asyncio.run(main())
    assert computed == [1, 3]
