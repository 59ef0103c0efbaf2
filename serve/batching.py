"""Computes waiting requests together.

One thread computes, and takes everything that arrived while it was busy: under load one matrix product serves many
users, and a single request waits for nothing. Meanwhile the event loop accepts requests; Serve counts those that wait,
adds replicas by this number and refuses with 429.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Batches(Generic[Question, Answer]):
    """``await ask(question)``, answered by ``compute``, which is given up to ``most`` questions at once.

    Args:
        compute: questions -> an answer, or the exception to raise, for each. What it raises itself reaches all of them.
    """

    def __init__(self, compute: Callable[[list[Question]], Sequence[Answer | Exception]], most: int = 32) -> None:
        self._compute, self._most = compute, most
        self._waiting: queue.SimpleQueue[tuple[Question, asyncio.Future[Answer]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="answers", daemon=True).start()

    async def ask(self, question: Question) -> Answer:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.put((question, future))
        return await future

    def _work(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while len(batch) < self._most and not self._waiting.empty():
                batch.append(self._waiting.get())
            batch = [(question, future) for question, future in batch if not future.cancelled()]
            if not batch:
                continue
            answers: Sequence[Answer | Exception]
            try:
                answers = self._compute([question for question, _ in batch])
            except Exception as error:
                answers = [error] * len(batch)
            for loop in {future.get_loop() for _, future in batch}:
                mine = [
                    (future, answer)
                    for (_, future), answer in zip(batch, answers, strict=True)
                    if future.get_loop() is loop
                ]
                if not loop.is_closed():
                    loop.call_soon_threadsafe(_settle, mine)


def _settle(answers: Sequence[tuple[asyncio.Future[Answer], Answer | Exception]]) -> None:
    for future, answer in answers:
        if future.done():  # who asked has gone
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
