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


def check_offsets(offsets: Int[np.ndarray, "n_plus_1"], entries: int) -> None:
    """Raises ValueError where offsets read from a file do not divide ``entries`` into lists. Forged ones would make
    lists so long that they fill the memory."""
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != entries or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"its offsets do not divide {entries:,} entries into lists")


def spread(begin: Int[np.ndarray, "n"], lengths: Int[np.ndarray, "n"]) -> Int[np.ndarray, "total"]:
    """``begin[k] .. begin[k] + lengths[k] - 1`` of each k, one after the other."""
    offsets = offsets_of(lengths)
    return np.repeat(begin - offsets[:-1], lengths) + np.arange(offsets[-1])
