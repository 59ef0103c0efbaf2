"""Lists of any length in one flat array: list k is ``flat[offsets[k]:offsets[k + 1]]``."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int, Shaped


def begins(*columns: Shaped[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Which rows differ from the one before: where the lists of a sorted column begin."""
    found = np.ones(len(columns[0]), dtype=bool)
    found[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return found


def offsets_of(lengths: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n_plus_1"]:
    """Where each list begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def spread(begin: Int[np.ndarray, "n"], lengths: Int[np.ndarray, "n"]) -> Int[np.ndarray, "total"]:
    """``begin[k] .. begin[k] + lengths[k] - 1`` of each k, one after the other."""
    offsets = offsets_of(lengths)
    return np.repeat(begin - offsets[:-1], lengths) + np.arange(offsets[-1])
