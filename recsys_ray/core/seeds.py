"""Seeds and hashes that are the same in every process, on every machine and in every release."""

from __future__ import annotations

import hashlib

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)


def seed_from(*parts: int | str) -> int:
    """A 56-bit seed that depends on the parts alone: the same after a restart."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def splitmix64(keys: np.ndarray, seed: int) -> np.ndarray:
    """A well-mixed uint64 for each integer key and the seed (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = keys.astype(np.uint64) + np.uint64(seed % 2**63) * _STEP + _STEP
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
