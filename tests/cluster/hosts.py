"""Two hosts on one machine, out of Linux namespaces, with a Ray node on each.

Each host has its own network, processes, /dev/shm and /tmp/ray; files are shared, as on a cluster with common storage.
A cable (a veth pair, called eth0 at both ends) joins them. Nothing has a name outside: when a host's first process
ends, the kernel removes the host with all that ran there, whatever happened to the test.

    with two_hosts(cpus=1) as hosts:
        report = hosts.run(Path("script.py"), "argument", timeout=120)
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 6379
_TOOLS = ("ip", "unshare", "nsenter", "setpriv", "mount")
# The first process of a host: it adopts and reaps what Ray leaves behind.
_INIT = """
import os, subprocess, time
for command in COMMANDS:
    subprocess.run(command, check=True)
print("up", flush=True)
while True:
    try:
        os.wait()
    except ChildProcessError:
        time.sleep(0.1)
"""
_MOUNTS = [
    ["mount", "--make-rprivate", "/"],
    ["mount", "-t", "proc", "proc", "/proc"],
    ["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", "/dev/shm"],
    ["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", "/tmp/ray"],
]
_BOTH_UP = """
import os, sys, time, ray
ray.init(os.environ["RAY_ADDRESS"], logging_level="ERROR", log_to_driver=False)
end = time.monotonic() + 60
while sum(node["Alive"] for node in ray.nodes()) < 2:
    if time.monotonic() > end:
        sys.exit("the second host did not join")
    time.sleep(0.2)
"""


class Hosts:
    """Two running hosts; Ray's head is on the first."""

    def __init__(self, inits: list[int]) -> None:
        self._inits = inits

    def command(self, host: int, *words: str) -> list[str]:
        """The command line that runs ``words`` on a host (0 or 1)."""
        return ["nsenter", "--target", str(self._inits[host]), "--net", "--mount", "--pid", "--ipc", "--", *words]

    def run(self, script: Path, *arguments: object, timeout: float = 300.0, host: int = 0) -> dict[str, Any]:
        """Run a Python script on a host and give back its report: a line of JSON, printed when its work is done.

        The environment has ``RAY_ADDRESS``, and this repository and its tests on ``PYTHONPATH``.

        Raises:
            AssertionError: it failed, or was not done in time (all its processes are then gone); with its output.
        """
        printed = self._python(host, [str(script), *map(str, arguments)], timeout)
        assert _report(printed), f"no report in {printed[-4000:]}"
        return json.loads(_report(printed))

    def _python(self, host: int, words: list[str], timeout: float) -> str:
        process = subprocess.Popen(
            self.command(host, sys.executable, *words), env=environment(), stdin=subprocess.DEVNULL, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            printed, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, errors = process.communicate()
            raise AssertionError(f"not done in {timeout:.0f} s\n{printed[-4000:]}\n{errors[-8000:]}") from None
        # Once in many runs Ray 2.60 dies in its own ray.shutdown: a gRPC thread asks an event loop that is gone whether
        # it has stopped. The script's work is done by then, and its report is what counts.
        allowed = (0, -signal.SIGSEGV) if _report(printed) else (0,)
        assert process.returncode in allowed, f"exit code {process.returncode}\n{printed[-4000:]}\n{errors[-8000:]}"
        return printed

    def start(self, host: int, script: Path, *arguments: object) -> subprocess.Popen[str]:
        """Begin what :meth:`run` does, with pipes to talk to it; errors go where the test's go."""
        return subprocess.Popen(
            self.command(host, sys.executable, str(script), *map(str, arguments)), env=environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def kill_all(self, host: int) -> None:
        """kill -9 of every process of a host but its first: the network stays, as after a crash of all that ran."""
        first = self._inits[host]
        here = Path(f"/proc/{first}/ns/pid").readlink()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (process / "ns" / "pid").readlink() == here and int(process.name) != first:
                    os.kill(int(process.name), signal.SIGKILL)

    def pull_plug(self, host: int) -> None:
        """End a host at once, with everything on it."""
        os.kill(self._inits[host], signal.SIGKILL)


def _report(printed: str) -> str:
    """The last line of JSON; Ray may print what its workers say after it."""
    return next((line for line in reversed(printed.splitlines()) if line.startswith("{")), "")


def environment() -> dict[str, str]:
    """Environment of everything that runs on the hosts."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTEST_"))}
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "cluster")]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [kept.get("PYTHONPATH")])]),
        "RAY_ADDRESS": f"{ADDRESSES[0]}:{PORT}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_USE_DATASOURCE_V2": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
        "RAY_DEDUP_LOGS": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        # As docs/operations.md says of hosts that serve; HAProxy's own files lie where each host has its own.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "/tmp/ray/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": "/tmp/ray/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "/tmp/ray",
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "/tmp/ray/server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "/tmp/ray/metrics.sock",
        "GLOO_SOCKET_IFNAME": "eth0",  # gloo would advertise 127.0.0.1 otherwise
    }


def why_not() -> str | None:
    """Why hosts cannot be had here, or None."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "namespaces need root on Linux"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"missing: {', '.join(missing)} (Debian: iproute2, util-linux)"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--ipc", "--fork", "sh", "-c",
         "mount --make-rprivate / && mount -t tmpfs tmpfs /dev/shm && ip link add name eth0 type veth peer name eth1"],
        capture_output=True, text=True,
    )  # fmt: skip
    return f"namespaces cannot be had: {tried.stderr.strip()[:200]}" if tried.returncode else None


@contextmanager
def two_hosts(cpus: int = 1, object_store_mb: int = 128) -> Iterator[Hosts]:
    """Two hosts with a Ray node of ``cpus`` (logical) CPUs on each. Skips the test where that cannot be."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    Path("/tmp/ray").mkdir(exist_ok=True)  # where each host mounts its own
    with ExitStack() as stack:
        inits = [stack.enter_context(_host()) for _ in ADDRESSES]
        hosts = Hosts(inits)
        _plug_cable(hosts, inits)
        common = ["--num-cpus", str(cpus), "--object-store-memory", str(object_store_mb * 2**20), "--block"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats", *common]
        head = ["--head", "--port", str(PORT), "--include-dashboard", "false", "--node-ip-address", ADDRESSES[0]]
        stack.enter_context(_daemon(hosts.command(0, *ray, *head)))
        _until_listening(hosts)
        worker = ["--address", f"{ADDRESSES[0]}:{PORT}", "--node-ip-address", ADDRESSES[1]]
        stack.enter_context(_daemon(hosts.command(1, *ray, *worker)))
        hosts._python(0, ["-c", _BOTH_UP], 120)
        yield hosts


@contextmanager
def _host() -> Iterator[int]:
    """A host without a network; yields the process id of its first process."""
    command = [sys.executable, "-c", _INIT.replace("COMMANDS", repr(_MOUNTS))]
    outer = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--pid", "--ipc", "--fork", "--kill-child",
         *command], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert outer.stdout is not None
        assert outer.stdout.readline() == "up\n", "a host did not come up"
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        yield int(children[0])
    finally:
        outer.kill()  # --kill-child: its first process goes too, and with it every process of the host
        outer.wait()
        if outer.stdout is not None:
            outer.stdout.close()


def _plug_cable(hosts: Hosts, inits: list[int]) -> None:
    ends = [f"rr{uuid.uuid4().hex[:8]}" for _ in inits]  # names in this namespace, for a moment only
    _call(["ip", "link", "add", "name", ends[0], "type", "veth", "peer", "name", ends[1]])
    for host, (init, end, address) in enumerate(zip(inits, ends, ADDRESSES, strict=True)):
        _call(["ip", "link", "set", end, "netns", str(init), "name", "eth0"])
        for words in (
            ["ip", "address", "add", f"{address}/24", "dev", "eth0"],
            ["ip", "link", "set", "lo", "up"],
            ["ip", "link", "set", "eth0", "up"],
            ["ip", "route", "add", "default", "dev", "eth0"],  # libraries look up their address by a route outwards
        ):
            _call(hosts.command(host, *words))


def _call(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


@contextmanager
def _daemon(words: list[str]) -> Iterator[None]:
    process = subprocess.Popen(
        words, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _until_listening(hosts: Hosts) -> None:
    probe = f"import socket; socket.create_connection(({ADDRESSES[0]!r}, {PORT}), 1)"
    for _ in range(120):
        if subprocess.run(hosts.command(1, sys.executable, "-c", probe), capture_output=True).returncode == 0:
            return
        time.sleep(0.3)
    raise AssertionError("Ray's head did not come up")
