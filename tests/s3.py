"""Servers of S3 for the tests: moto's in this process, and SeaweedFS's as a process of its own."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_EC2_METADATA_DISABLED": "true"}


@contextmanager
def moto_bucket() -> Iterator[str]:
    """The query of URIs of the bucket ``test``, on a server of this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        yield _make_bucket(f"{host}:{port}")
        server.stop()


@contextmanager
def weed_bucket(folder: Path) -> Iterator[str]:
    """As :func:`moto_bucket`, on SeaweedFS, which keeps its files in ``folder``."""
    (folder / "data").mkdir(parents=True)
    identity = {"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}
    rights = {"name": "tests", "credentials": [identity], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [rights]}))
    with pytest.MonkeyPatch.context() as patch, (folder / "weed.log").open("w") as log:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        ports = _free_ports("master", "volume", "filer", "s3")
        words = [f"-{name}.port={http}" for name, (http, _) in ports.items()]
        words += [f"-{name}.port.grpc={grpc}" for name, (_, grpc) in ports.items()]
        server = subprocess.Popen(
            [Path(sys.executable).with_name("weed"), "server", "-ip=127.0.0.1", f"-dir={folder / 'data'}",
             "-master.volumeSizeLimitMB=256", "-s3", f"-s3.config={folder / 's3.json'}", *words],
            stdout=log, stderr=log,
        )  # fmt: skip
        try:
            yield _make_bucket(f"127.0.0.1:{ports['s3'][0]}", patience_s=60)
        finally:
            server.terminate()
            server.wait(timeout=60)


def _free_ports(*names: str) -> dict[str, tuple[int, int]]:
    """Two for each name, all different."""
    with ExitStack() as stack:
        bound = [stack.enter_context(socket.socket()) for _ in range(2 * len(names))]
        for one in bound:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in bound]
    return {name: (ports[2 * k], ports[2 * k + 1]) for k, name in enumerate(names)}


def _make_bucket(address: str, patience_s: float = 0) -> str:
    client = boto3.client("s3", endpoint_url=f"http://{address}", region_name="us-east-1")
    until = time.monotonic() + patience_s
    while True:
        try:
            client.create_bucket(Bucket="test")
            return f"?scheme=http&region=us-east-1&endpoint_override={address}"
        except Exception:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)
