"""A hash that is the same in every process, on every machine and in every release."""

from __future__ import annotations

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(keys: np.ndarray, seed: int) -> np.ndarray:
    """A well-mixed uint64 for each integer key and the seed (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = keys.astype(np.uint64) + np.uint64(seed % 2**63) * _STEP + _STEP
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
