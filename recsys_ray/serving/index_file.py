"""What a FAISS file says of itself, checked before FAISS reads it.

FAISS trusts its files: sizes, links and offsets of a damaged or forged one lead it out of its memory. A bundle may come
from elsewhere, and its checksums with it. Only the two kinds of index that ``TypeIndex`` writes are accepted, byte for
byte as FAISS lays them out; any links that pass keep within the graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys_ray.core.errors import ArtifactError

_HEADER = np.dtype([("d", "<i4"), ("n", "<i8"), ("unused", "<i8", 2), ("trained", "u1"), ("metric", "<i4")])
_WALK = np.dtype([("entry", "<i4"), ("top", "<i4"), ("construction", "<i4"), ("search", "<i4"), ("unused", "<i4")])
_INNER_PRODUCT = 0
_OTHER_METRIC = "it does not rank by 'inner_product', the towers' metric"
_MOST_EF = 1 << 20
_ROWS = 1 << 16  # nodes whose links are looked at together


def check_index_file(path: Path) -> None:
    """Raises ArtifactError where FAISS could not read the file, or could be led astray by it."""
    try:
        size = path.stat().st_size
        _Reader(np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)).check()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}); build the bundle again") from None
    except ValueError as error:
        raise ArtifactError(f"{path} cannot be read as an index: {error}; build the bundle again") from None


class _Reader:
    """Goes through the file from front to back. All methods raise ValueError."""

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self._data, self._place = data, 0

    def check(self) -> None:
        kind = self._take(4).tobytes()
        if kind == b"IHNf":
            header = self._header()
            self._graph(int(header["n"]))
            if self._take(4).tobytes() != b"IxFI" or self._header().tobytes() != header.tobytes():
                raise ValueError("its graph and its vectors do not belong together")
        elif kind == b"IxFI":
            header = self._header()
        elif kind == b"IxF2":
            raise ValueError(_OTHER_METRIC)
        else:
            raise ValueError("it is neither a flat index of inner products nor an HNSW graph of them")
        vectors = self._list("<f4")
        if len(vectors) != int(header["n"]) * int(header["d"]):
            raise ValueError("it has more or fewer vectors than it says")
        if self._place != len(self._data):
            raise ValueError("something follows after its end")

    def _header(self) -> Any:
        header = self._take(_HEADER.itemsize).view(_HEADER)[0]
        if header["metric"] != _INNER_PRODUCT:
            raise ValueError(_OTHER_METRIC)
        if header["n"] < 0 or header["d"] <= 0 or header["trained"] != 1:
            raise ValueError("its header is damaged")
        return header

    def _graph(self, n: int) -> None:
        chances, begin, levels, offsets, links = (self._list(kind) for kind in ("<f8", "<i4", "<i4", "<u8", "<i4"))
        walk = self._take(_WALK.itemsize).view(_WALK)[0]
        most = len(begin) - 1  # levels that a node can have
        if most < 1 or len(chances) != most or begin[0] != 0 or (np.diff(begin) < 0).any():
            raise ValueError("its levels are damaged")
        if len(levels) != n or len(offsets) != n + 1 or (n and (levels.min() < 1 or levels.max() > most)):
            raise ValueError("its levels are damaged")
        steps = begin[levels]
        if offsets[0] != 0 or offsets[-1] != len(links) or (np.diff(offsets.astype(np.int64)) != steps).any():
            raise ValueError("its offsets are damaged")
        if len(links) and (links.min() < -1 or links.max() >= n):
            raise ValueError("it links to items that are not there")
        top, entry = int(walk["top"]), int(walk["entry"])
        if (n and not (0 <= entry < n and levels[entry] == top + 1)) or (not n and (entry, top) != (-1, -1)):
            raise ValueError("it begins at an item that is not there")
        if not (0 < walk["construction"] <= _MOST_EF and 0 < walk["search"] <= _MOST_EF):
            raise ValueError("its settings are damaged")
        self._upper_links(begin, levels, offsets.astype(np.int64), links)

    @staticmethod
    def _upper_links(begin: Any, levels: Any, offsets: Any, links: Any) -> None:
        """On each level a link leads to a node of this level: that node's links there are looked up unasked."""
        above = np.flatnonzero(levels > 1)
        for start in range(0, len(above), _ROWS):
            nodes = above[start : start + _ROWS]
            for level in range(1, int(levels[nodes].max())):
                mine = offsets[nodes[levels[nodes] > level]]
                places = mine[:, None] + np.arange(begin[level], begin[level + 1])
                linked = links[places]
                if (levels[linked[linked >= 0]] <= level).any():
                    raise ValueError("it links to items that are not on that level")

    def _list(self, kind: str) -> Any:
        count, width = int(self._take(8).view("<u8")[0]), np.dtype(kind).itemsize
        return np.frombuffer(self._take(count * width), kind)

    def _take(self, count: int) -> npt.NDArray[np.uint8]:
        if count > len(self._data) - self._place:
            raise ValueError("it ends too early")
        self._place += count
        return self._data[self._place - count : self._place]
