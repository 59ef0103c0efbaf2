"""Two partitions on two hosts: what a client sees does not depend on where things lie."""

from __future__ import annotations

from pathlib import Path

import pytest
from hosts import two_hosts

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_sampling_across_two_hosts(tmp_path: Path) -> None:
    with two_hosts(cpus=2) as hosts:
        report = hosts.run(Path(__file__).with_name("drive_partitions.py"), tmp_path, timeout=300)
    first, second = report["seen"]
    assert {first["part"], second["part"]} == {0, 1}
    assert sorted(first["local"] + second["local"]) == list(range(68))
    assert min(len(first["local"]), len(second["local"])) > 10
    assert report["edges"], "the partitions' edges are not the graph's"
    for seen in report["seen"]:
        assert all(seen["neighbours"])
        assert seen["text"]
        assert seen["remote_text"]
