"""A server in a process of its own, asked through a socket."""

from __future__ import annotations

import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str], log: Path, **pipes: Any) -> Iterator[subprocess.Popen]:
    """A process of ours, ended as a user would, or by force. ``log`` has what it says on standard error."""
    with log.open("w") as out:
        process = subprocess.Popen(command, stderr=out, start_new_session=True, **pipes)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def wait_for(url: str, log: Path, process: subprocess.Popen, seconds: float = 180) -> None:
    """Until the server answers."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/healthz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"nothing answers at {url}:\n{log.read_text()[-4000:]}")


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def own_folders() -> set[Path]:
    """The temporary folders of servers that run."""
    return set(Path(tempfile.gettempdir()).glob("recsys-ray-*"))
