"""Training examples or queries as columns: one value per row, and a history of any length.

``history`` (gids, oldest first) and ``history_event`` are flat; row k has ``offsets[k]:offsets[k + 1]`` of both. Most
users have few events and a few have very many, so a padded matrix would be nearly empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from recsys_ray.core.offsets import offsets_of, spread

Examples = Mapping[str, np.ndarray]

OFFSETS = "offsets"
FLAT = ("history", "history_event")


def take(examples: Examples, rows: Int[np.ndarray, "m"]) -> dict[str, np.ndarray]:
    """These rows, in this order."""
    lengths = np.diff(examples[OFFSETS])[rows]
    flat = spread(examples[OFFSETS][rows], lengths)
    taken = {name: column[flat if name in FLAT else rows] for name, column in examples.items() if name != OFFSETS}
    return {**taken, OFFSETS: offsets_of(lengths)}


def join(parts: Sequence[Examples]) -> dict[str, np.ndarray]:
    """The rows of all parts, which have the same columns."""
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != OFFSETS}
    return {**joined, OFFSETS: offsets_of(np.concatenate([np.diff(part[OFFSETS]) for part in parts]))}


def histories_of(
    examples: Examples, rows: Int[np.ndarray, "m"]
) -> tuple[Int[np.ndarray, "total"], Int[np.ndarray, "total"], Int[np.ndarray, "m_plus_1"]]:
    """History and its events of these rows, and where each row's begins and ends."""
    lengths = np.diff(examples[OFFSETS])[rows]
    flat = spread(examples[OFFSETS][rows], lengths)
    return examples["history"][flat], examples["history_event"][flat], offsets_of(lengths)


def to_table(examples: Examples) -> pa.Table:
    """As Arrow has it: histories are lists, matrices lists of one size."""
    columns = {}
    for name, column in examples.items():
        if name in FLAT:
            columns[name] = pa.LargeListArray.from_arrays(pa.array(examples[OFFSETS]), pa.array(column))
        elif column.ndim == 2:
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(column.ravel()), column.shape[1])
        elif name != OFFSETS:
            columns[name] = pa.array(column)
    return pa.table(columns)


def from_table(table: pa.Table) -> dict[str, np.ndarray]:
    """The inverse of :func:`to_table`."""
    columns = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if name in FLAT:
            columns[name] = column.flatten().to_numpy()
            columns[OFFSETS] = offsets_of(pc.list_value_length(column).to_numpy())
        elif pa.types.is_fixed_size_list(column.type):
            columns[name] = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)
        else:
            columns[name] = column.to_numpy(zero_copy_only=False)
    return columns
