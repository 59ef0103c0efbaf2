"""How many CPUs a container grants; a Ray that does not start in time."""

import os
import subprocess
import sys

import pytest
import ray

from recsys_ray.cluster.session import _container_limit, _start_local, granted_cpus, without_lines
from recsys_ray.config import RayConfig
from recsys_ray.core.errors import UserError


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


def late_start(children: list[subprocess.Popen], times: int):
    """A stand-in for ``ray.init`` that leaves a process behind and fails as Ray does, so many times."""

    def init(*_, **__) -> None:
        if len(children) < times:
            children.append(subprocess.Popen(["sleep", "60"]))
            raise Exception("The current node timed out during startup. This could happen because ...")

    return init


def test_a_ray_that_starts_too_late_is_ended_and_started_once_more(monkeypatch):
    children: list[subprocess.Popen] = []
    monkeypatch.setattr(ray, "init", late_start(children, 1))
    with subprocess.Popen(["sleep", "60"]) as other:
        _start_local(RayConfig(), 2)
        assert children[0].poll() is not None
        assert other.poll() is None  # a process that was there before
        other.kill()


def test_a_ray_that_starts_too_late_twice_is_an_error_in_words(monkeypatch):
    children: list[subprocess.Popen] = []
    monkeypatch.setattr(ray, "init", late_start(children, 2))
    with pytest.raises(UserError, match="did not start within 30 seconds, twice"):
        _start_local(RayConfig(), 2)
    assert all(child.poll() is not None for child in children)


def test_another_error_of_ray_is_raised_as_it_is(monkeypatch):
    def init(*_, **__) -> None:
        raise ValueError("no such option")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ValueError, match="no such option"):
        _start_local(RayConfig(), 2)
