"""The tables inside a bundle, memory-mapped: ids, items and users.

Ids are strings outside and dense integers inside. An :class:`IdTable` finds an id by binary search on disk, so that a
replica starts at once and holds no dictionary of millions of strings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.core.errors import ArtifactError
from recsys_ray.serving.histories import Profile, mapped_arrays
from recsys_ray.serving.search import ItemSearch


def write_table(path: Path, table: pa.Table) -> None:
    """Arrow IPC, one batch, not compressed: any row is read in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = table.combine_chunks()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def read_table(path: Path) -> pa.Table:
    """Memory-mapped. Raises ArtifactError where the file is missing or damaged: Arrow does not look itself whether
    offsets lead out of its memory."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate(full=True)
        return table
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); build the bundle again") from error


def _one(table: pa.Table, name: str) -> pa.Array:
    """A column as one array: a row of it is found several times faster than in chunks."""
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays([pa.array([], column.type), *column.chunks])


def sorted_ids(ids: pa.Array | pa.ChunkedArray, row_name: str) -> pa.Table:
    """``id`` ascending beside ``row_name``, the row that it had."""
    ids = ids.cast(pa.large_string())
    order = pc.sort_indices(ids)
    return pa.table({"id": ids.take(order), row_name: order.cast(pa.int64())})


class IdTable:
    """Finds the row of a string id; what :func:`sorted_ids` made."""

    def __init__(self, path: Path, row_name: str) -> None:
        table = read_table(path)
        self._ids, self._rows = _one(table, "id"), _one(table, row_name)

    def __len__(self) -> int:
        return len(self._ids)

    def find(self, wanted: str) -> int | None:
        """The row of ``wanted``, or None."""
        place = self._place(wanted)
        if place < len(self._ids) and self._ids[place].as_py() == wanted:
            return self._rows[place].as_py()
        return None

    def _place(self, wanted: str) -> int:
        """Of the first id that is not before ``wanted``, in the order of UTF-8, which is that of code points."""
        low, high = 0, len(self._ids)
        while low < high:
            middle = (low + high) // 2
            if self._ids[middle].as_py() < wanted:
                low = middle + 1
            else:
                high = middle
        return low

    def beginning(self, text: str, limit: int) -> list[str]:
        """Up to ``limit`` ids that begin with ``text``, ascending."""
        first = self._place(text)
        found = self._ids[first : first + limit].to_pylist()
        return [one for one in found if one.startswith(text)]

    def ids(self, begin: int, count: int) -> list[str]:
        """Some of the ids, ascending."""
        return self._ids.slice(begin, count).to_pylist()

    def spread(self, count: int) -> Iterator[tuple[str, int]]:
        """Up to ``count`` (id, row), evenly from first to last."""
        for place in np.unique(np.linspace(0, max(len(self) - 1, 0), min(count, len(self))).astype(int)):
            yield self._ids[int(place)].as_py(), self._rows[int(place)].as_py()


class Items:
    """Id, type and title of every item, by gid."""

    def __init__(self, folder: Path, types: list[str]) -> None:
        table = read_table(folder / "items.arrow")
        self._ids, self._titles = _one(table, "item_id"), _one(table, "title")
        self.ntype: npt.NDArray[np.int16] = table.column("ntype").to_numpy()
        self.available: npt.NDArray[np.bool_] = table.column("available").to_numpy()
        self.types = types
        self._table = IdTable(folder / "item_ids.arrow", "gid")

    def search(self, order: npt.NDArray[np.integer]) -> ItemSearch:
        """By words of titles and ids; ``order``: all gids, those first that are to be found first."""
        return ItemSearch(self._ids, self._titles, order)

    def __len__(self) -> int:
        return len(self._ids)

    def find(self, item_id: str) -> int | None:
        return self._table.find(item_id)

    def offered(self, number: int) -> npt.NDArray[np.int32]:
        """Gids of the available items of a type, ascending."""
        return np.flatnonzero((self.ntype == number) & (self.available != 0)).astype(np.int32)

    def id(self, gid: int) -> str:
        return self._ids[gid].as_py()

    def title(self, gid: int) -> str:
        return self._titles[gid].as_py()

    def name(self, gid: int) -> str:
        """In sentences: the title, or the id of an item without one."""
        return self.title(gid) or self.id(gid)

    def type(self, gid: int) -> str:
        return self.types[self.ntype[gid]]

    def take(self, gids: npt.NDArray[np.int64]) -> tuple[pa.Array, pa.Array]:
        """Ids and types of many items."""
        types = pa.array(self.types, pa.string()).take(pa.array(self.ntype[gids].astype(np.int32)))
        return self._ids.take(pa.array(gids)).cast(pa.string()), types


class Users:
    """Traits of every user, by uid."""

    def __init__(self, folder: Path) -> None:
        arrays = {name: tensor.numpy() for name, tensor in mapped_arrays(folder / "users.safetensors").items()}
        self._age, self._country = arrays["age"], arrays["country"]
        self._tastes = {n.removeprefix("taste."): a for n, a in arrays.items() if n.startswith("taste.")}
        self._table = IdTable(folder / "user_ids.arrow", "uid")

    def __len__(self) -> int:
        return len(self._table)

    def find(self, user_id: str) -> int | None:
        return self._table.find(user_id)

    def ids(self, begin: int, count: int) -> list[str]:
        """Some of the ids, ascending."""
        return self._table.ids(begin, count)

    def beginning(self, text: str, limit: int) -> list[str]:
        return self._table.beginning(text, limit)

    def spread(self, count: int) -> Iterator[tuple[str, int]]:
        return self._table.spread(count)

    def traits(self, uid: int, history: Profile) -> Profile:
        """``history`` with what is known of user ``uid``."""
        tastes = {name: array[uid] for name, array in self._tastes.items() if np.isfinite(array[uid]).all()}
        return replace(history, age=float(self._age[uid]), country=int(self._country[uid]), tastes=tastes)
