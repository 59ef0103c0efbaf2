"""Computes requests that wait at the same time together, on the event loop itself.

Answers are short and many. A thread of their own for them would share the interpreter's lock with the event loop, and
would have to wait for it after each call into NumPy, torch or FAISS: that cost more than the answers. Between two
batches the loop reads everything that has arrived; so Serve counts the requests that wait, adds replicas by this number
and refuses with 429, and a batch holds what came while the one before was computed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Batches(Generic[Question, Answer]):
    """``await ask(question)``, answered by ``compute`` together with others.

    Args:
        compute: questions -> an answer, or the exception to raise, for each. What it raises itself reaches all of them.
        most: what the questions of a batch may cost in all; one that costs more is computed alone. The loop does
            nothing else meanwhile.
        cost: of a question.
    """

    def __init__(
        self,
        compute: Callable[[list[Question]], Sequence[Answer | Exception]],
        most: int,
        cost: Callable[[Question], int] = lambda question: 1,
    ) -> None:
        self._compute, self._most, self._cost = compute, most, cost
        self._waiting: deque[tuple[Question, asyncio.Future[Answer]]] = deque()
        self._due = False

    async def ask(self, question: Question) -> Answer:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append((question, future))
        if not self._due:
            self._due = True
            loop.call_soon(self._work, loop, 0)
        return await future

    def _work(self, loop: asyncio.AbstractEventLoop, seen: int) -> None:
        """Compute a batch, once it is full or a turn of the loop brings no new question: those that arrived together
        reach :meth:`ask` over several turns. ``seen``: how many waited one turn ago."""
        if len(self._waiting) > seen and sum(self._cost(question) for question, _ in self._waiting) < self._most:
            loop.call_soon(self._work, loop, len(self._waiting))
            return
        batch = self._next()
        answers: Sequence[Answer | Exception]
        try:
            answers = self._compute([question for question, _ in batch]) if batch else []
        except Exception as error:
            answers = [error] * len(batch)
        for (_, future), answer in zip(batch, answers, strict=True):
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
        self._due = bool(self._waiting)
        if self._due:  # after the loop has looked at its connections
            loop.call_soon(self._work, loop, 0)

    def _next(self) -> list[tuple[Question, asyncio.Future[Answer]]]:
        """Those who have waited longest, without those who have gone."""
        batch: list[tuple[Question, asyncio.Future[Answer]]] = []
        left = self._most
        while self._waiting:
            question, future = self._waiting[0]
            if not future.done():
                left -= self._cost(question)
                if batch and left < 0:
                    break
                batch.append((question, future))
            self._waiting.popleft()
        return batch
