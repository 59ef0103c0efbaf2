"""Peak memory of this process and all its children, Ray's among them, while a block runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import psutil

_INTERVAL_S = 1.0
_GROWN = 1.01  # times what it was before the exact look is worth its price


class PeakMemory:
    """``with PeakMemory() as memory: ...; memory.peak_mb``. Shared pages are counted once (proportional set size) if
    the system reports it; otherwise resident sizes are added up.

    Reading the exact size makes the kernel walk through every page of thirty processes and stalls the training one:
    once a second, it took a fifth of a core. So it is read only when the resident sizes, which are free to read, have
    grown."""

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._resident = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        root = psutil.Process(os.getpid())
        while True:
            self._look([root, *root.children(recursive=True)])
            if self._done.wait(_INTERVAL_S):
                return

    def _look(self, processes: list[psutil.Process]) -> None:
        resident = sum(_of_each(processes, lambda process: process.memory_info().rss))
        if resident > self._resident * _GROWN:
            self._resident = resident
            self.peak_mb = max(self.peak_mb, sum(_of_each(processes, _proportional)) / 2**20)


def _proportional(process: psutil.Process) -> int:
    memory = process.memory_full_info() if os.name == "posix" else process.memory_info()
    return getattr(memory, "pss", 0) or memory.rss


def _of_each(processes: list[psutil.Process], size: Callable[[psutil.Process], int]) -> Iterator[int]:
    for process in processes:
        try:
            yield size(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it ended meanwhile
            continue
