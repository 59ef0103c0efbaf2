"""The stages' memory figure."""

import subprocess
import sys
import time

import numpy as np

from pipelines.memory import PeakMemory


def test_a_child_that_holds_memory_for_a_while_counts():
    script = "import time; held = bytearray(300 << 20); held[::4096] = b'x' * len(held[::4096]); time.sleep(4)"
    with PeakMemory() as before:
        pass
    with PeakMemory() as memory:
        subprocess.run([sys.executable, "-c", script], check=True)
    assert 250 < memory.peak_mb - before.peak_mb < 1000


def test_the_peak_stays_when_the_memory_is_given_back():
    with PeakMemory() as before:
        pass
    with PeakMemory() as memory:
        held = np.ones(300 << 17)  # 300 MB
        time.sleep(2.5)
        del held
        time.sleep(1.5)
    assert 250 < memory.peak_mb - before.peak_mb < 1000
