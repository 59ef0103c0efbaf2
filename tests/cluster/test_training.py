"""HGNN and two-tower trained by two workers over two partitions on two hosts, and by one worker on one host."""

from __future__ import annotations

from pathlib import Path

import pytest
from hosts import two_hosts

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_two_hosts_train_to_the_loss_of_one(tmp_path: Path) -> None:
    with two_hosts(cpus=2) as hosts:
        report = hosts.run(Path(__file__).with_name("drive_training.py"), tmp_path, timeout=540)
    both, one = report["2"], report["1"]
    assert both["workers"] == [2, 2]
    assert one["workers"] == [1, 1]

    # Each rank embedded the items of its own host's partition, and together they embedded them all, on every snapshot.
    assert [len(gids) for gids in one["owned"]] == [one["items"]]
    assert sorted(len(gids) for gids in both["owned"]) == sorted(both["nodes_per_partition"])
    assert min(len(gids) for gids in both["owned"]) > both["items"] // 4
    assert sorted(gid for gids in both["owned"] for gid in gids) == list(range(both["items"]))
    for run in (both, one):
        assert all(run["unit"])
        assert run["item_vectors"] == [[run["items"], 32]] * 2

    for model, share in (("hgnn", 0.985), ("two_tower", 0.97)):  # an HGNN starts near where it ends
        first, last = (one["histories"][model][k]["loss"] for k in (0, -1))
        assert last < share * first, f"{model} learned nothing on one host"
        assert both["histories"][model][-1]["loss"] == pytest.approx(last, rel=0.1), model
    valid = [run["histories"]["hgnn"][-1]["valid_loss"] for run in (both, one)]
    assert valid[0] == pytest.approx(valid[1], rel=0.1)
