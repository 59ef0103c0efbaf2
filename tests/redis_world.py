"""A real Redis server on a free port, whose files lie in a folder of the caller's."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
from server_process import free_port


@contextmanager
def redis_server(folder: Path, port: int | None = None) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Its URI and its process, once it answers; it keeps every write on the disk before it acknowledges it."""
    port = port or free_port()
    words = ["redis-server", "--port", str(port), "--dir", str(folder), "--save", "", "--appendonly", "yes"]
    server = subprocess.Popen([*words, "--appendfsync", "always"], stdout=subprocess.DEVNULL)
    try:
        client, until = redis.Redis(port=port), time.monotonic() + 30
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:  # not there yet, or still reading its file
                assert time.monotonic() < until, "redis-server does not answer"
                time.sleep(0.05)
        client.close()
        yield f"redis://127.0.0.1:{port}/0", server
    finally:
        server.terminate()
        server.wait(20)
