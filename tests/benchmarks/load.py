"""Load for a server: closed loop by wrk, which asks again as soon as it has an answer, and open loop by a schedule,
which asks whether or not there are answers; only the latter sees how long users wait."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PATH = "/v1/recommendations"
_CONNECTIONS = 32  # of the open loop
_SCRIPT = """
local bodies = {}
for line in io.lines("%s") do bodies[#bodies + 1] = line end
local headers = { ["Content-Type"] = "application/json" }
local k = 0
request = function()
  k = k %% #bodies + 1
  return wrk.format("POST", "%s", headers, bodies[k])
end
"""


@dataclass(frozen=True)
class Load:
    """What came of a load. Seconds."""

    rate: float  # answers a second
    p50: float
    p99: float
    failed: int


def closed(url: str, bodies: Sequence[str], connections: int, seconds: float) -> Load:
    """As many answers as ``connections`` can get (wrk, one thread)."""
    with tempfile.TemporaryDirectory() as folder:
        lines, script = Path(folder) / "bodies", Path(folder) / "post.lua"
        lines.write_text("\n".join(bodies), encoding="utf-8")
        script.write_text(_SCRIPT % (lines, PATH), encoding="utf-8")
        words = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "--latency", "-s", str(script), url]
        told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", told)[1])  # type: ignore[index]
    p50, p99 = (_seconds(re.search(rf"\n\s+{share}%\s+(\S+)", told)[1]) for share in (50, 99))  # type: ignore[index]
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", told)
    lost = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", told)
    return Load(rate, p50, p99, (int(bad[1]) if bad else 0) + (sum(map(int, lost.groups())) if lost else 0))


def _seconds(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s|m)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}[unit]


def open_loop(url: str, bodies: Sequence[str], rate: float, seconds: float) -> Load:
    """``rate`` requests a second at the times of a Poisson process. An answer's time counts from the moment that its
    request was due, also where it waited for a connection: no answer is forgiven because the one before was late."""
    return asyncio.run(_open_loop(url, bodies, rate, seconds))


async def _open_loop(url: str, bodies: Sequence[str], rate: float, seconds: float) -> Load:
    host, port = re.fullmatch(r"http://([^:/]+):(\d+)", url).groups()  # type: ignore[union-attr]
    head = f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: "
    requests = [f"{head}{len(body.encode())}\r\n\r\n{body}".encode() for body in bodies]
    due = np.cumsum(np.random.default_rng(0).exponential(1 / rate, round(rate * seconds)))
    waiting: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue()
    times: list[float] = []
    failed = 0

    async def connection() -> None:
        nonlocal failed
        reader, writer = await asyncio.open_connection(host, int(port))
        while (one := await waiting.get()) is not None:
            try:
                writer.write(one[1])
                told = await _answer(reader)
            except (ConnectionError, asyncio.IncompleteReadError):
                told = b""
                reader, writer = await asyncio.open_connection(host, int(port))
            times.append(time.perf_counter() - one[0])
            failed += not told.startswith(b"http/1.1 200")
        writer.close()

    tasks = [asyncio.create_task(connection()) for _ in range(_CONNECTIONS)]
    await asyncio.sleep(0.2)
    began = time.perf_counter()
    for number, moment in enumerate(due):
        if (ahead := began + moment - time.perf_counter()) > 0:
            await asyncio.sleep(ahead)
        waiting.put_nowait((began + moment, requests[number % len(requests)]))
    for _ in tasks:
        waiting.put_nowait(None)
    await asyncio.gather(*tasks)
    taken = time.perf_counter() - began
    return Load(len(times) / taken, *(float(np.quantile(times, share)) for share in (0.5, 0.99)), failed)


async def _answer(reader: asyncio.StreamReader) -> bytes:
    """Reads a whole answer; returns its head."""
    told = (await reader.readuntil(b"\r\n\r\n")).lower()
    if (length := re.search(rb"content-length: (\d+)", told)) is not None:
        await reader.readexactly(int(length[1]))
    else:
        while size := int(await reader.readline(), 16):
            await reader.readexactly(size + 2)
        await reader.readexactly(2)
    return told


def questions(user_ids: Sequence[str], count: int = 5_000, **fields: object) -> list[str]:
    """Bodies that ask for random users."""
    chosen = np.random.default_rng(1).choice(len(user_ids), count)
    return [json.dumps({"user_id": user_ids[place], "k": 10, **fields}, ensure_ascii=False) for place in chosen]
