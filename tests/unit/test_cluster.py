"""How many CPUs a container grants."""

import os
import sys

import pytest

from recsys_ray.cluster.session import _container_limit, granted_cpus, without_lines


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, sys.maxsize),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, sys.maxsize),
        ({}, sys.maxsize),
    ],
)
def test_the_limit_of_a_container_is_read_from_its_control_group(tmp_path, files, wanted):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert _container_limit(tmp_path) == wanted


def test_at_least_one_cpu_is_granted():
    assert granted_cpus() >= 1


def test_a_line_of_cpp_is_held_back_and_all_others_come(capfd):
    with pytest.raises(ValueError, match="on"), without_lines(b"noise"):
        os.write(2, b"one\nsome noise here\n")
        os.write(2, b"two\n")
        raise ValueError("on")
    os.write(2, b"noise afterwards\n")
    assert capfd.readouterr().err == "one\ntwo\nnoise afterwards\n"
