"""Rates of long work, on a clock of the test's own."""

import pytest

from recsys_ray.core import progress
from recsys_ray.core.progress import Progress


def test_work_that_begins_anew_has_a_rate_of_its_own(monkeypatch):
    """Two models trained one after the other report to one task."""
    now, said = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    report = Progress(quiet=False)
    report.say = said.append
    with report.task("training", 1000, "steps") as task:
        for moment, done in ((0, 0), (100, 1000), (200, 0), (210, 500)):
            now[0] = moment
            task.update(done)
    assert "500 of 1,000 steps, 50 steps/s, 10 s left" in said[-1]


def test_time_left_of_work_that_may_stop_early_is_a_bound(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    report = Progress(quiet=False)
    report.say = said.append
    with report.task("training", 1000, "steps", may_stop_early=True) as task:
        for moment, done in ((0, 0), (10, 500)):
            now[0] = moment
            task.update(done)
    assert said[-1].endswith("500 of 1,000 steps, 50 steps/s, at most 10 s left")


@pytest.mark.parametrize("quiet", [True, False])
def test_lines_come_now_and_then_and_never_when_quiet(monkeypatch, quiet):
    now, said = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    report = Progress(quiet=quiet)
    report.say = said.append
    with report.task("reading", 100) as task:
        for moment in range(31):
            now[0] = moment
            task.advance()
    assert len(said) == (0 if quiet else 3)
