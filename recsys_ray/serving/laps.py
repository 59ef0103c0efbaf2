"""Measures where the time of an answer goes."""

from __future__ import annotations

from collections import defaultdict
from time import perf_counter


class Laps:
    """A stop-watch: each :meth:`lap` gives the time since the one before to a stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = perf_counter()

    def lap(self, stage: str) -> None:
        now = perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now
