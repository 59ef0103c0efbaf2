"""Allows only one run at a time in a run folder."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recsys_ray.core.errors import UserError

LOCK = "lock"
_held: set[Path] = set()  # by this process


@contextmanager
def run_lock(run_dir: str | Path) -> Iterator[None]:
    """Hold the folder of a run while the block runs; a process may hold it more than once.

    The system releases a lock when its process ends, for whatever reason. The file stays and names the last holder.

    Raises:
        UserError: another process holds it.
    """
    path = Path(run_dir).resolve() / LOCK
    if path in _held:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            raise UserError(
                f"another run is working in {path.parent} ({holder}); wait until it ends, or set another run_dir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)
