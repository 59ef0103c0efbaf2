"""Peak memory of a stage: its own process's and its children's, whatever is given back in between.

Each in a process of its own: the tests' has children of other tests, which may end while it is measured.
"""

from __future__ import annotations

import subprocess
import sys

HOLD = "import time; held = bytearray(300 << 20); held[::4096] = b'x' * len(held[::4096]); time.sleep(4)"


def growth(work: str) -> float:
    """MB by which the peak while ``work`` runs is above the one before."""
    script = "\n".join(
        [
            "import subprocess, sys, time",
            "from recsys_ray.stages.peak_memory import PeakMemory",
            "with PeakMemory() as before: pass",
            "with PeakMemory() as memory:",
            f"    {work}",
            "print(memory.peak_mb - before.peak_mb)",
        ]
    )
    return float(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)


def test_a_child_that_holds_memory_for_a_while_counts():
    assert 250 < growth(f"subprocess.run([sys.executable, '-c', {HOLD!r}], check=True)") < 1000


def test_the_peak_stays_when_the_memory_is_given_back():
    assert 250 < growth("held = b'x' * (300 << 20); time.sleep(2.5); del held; time.sleep(1.5)") < 1000


def test_nothing_is_nothing():
    assert growth("time.sleep(1.5)") < 100
