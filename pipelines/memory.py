"""Peak memory of this process and all its children, Ray's among them, while a block runs."""

from __future__ import annotations

import os
import threading

import psutil

_INTERVAL_S = 1.0


class PeakMemory:
    """``with PeakMemory() as memory: ...; memory.peak_mb``. Shared pages are counted once (proportional set size)
    where the system tells, else the resident sizes are added up."""

    def __init__(self) -> None:
        self.peak_mb = 0.0
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
            self.peak_mb = max(self.peak_mb, _tree_mb(root))
            if self._done.wait(_INTERVAL_S):
                return


def _tree_mb(root: psutil.Process) -> float:
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            memory = process.memory_full_info() if os.name == "posix" else process.memory_info()
            total += getattr(memory, "pss", 0) or memory.rss
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it ended meanwhile
            continue
    return total / 2**20
