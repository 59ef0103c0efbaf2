"""User histories for serving: everything a user has seen, and the latest events, which are the user's features.

Both are built in one pass over the ingest shards (sorted by user and time), a batch of whole users at a time, and read
through memory maps: a replica touches only the rows of users who ask.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from recsys_ray.core.errors import ArtifactError
from recsys_ray.core.offsets import check_offsets, spread
from recsys_ray.data.tables import Events
from recsys_ray.storage.artifacts import understood
from recsys_ray.two_tower.features import UserInputs

Array = npt.NDArray[Any]
_USERS = 100_000  # whose histories are extended at once
_DTYPES = {"int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "float32": "F32"}


class RawArrays:
    """Arrays that grow by appending to files, then become one safetensors file: nothing is held in memory."""

    def __init__(self, scratch: Path, columns: dict[str, tuple[type, int | None]]) -> None:
        """``columns``: name -> (dtype, width of a row, or None for one-dimensional)."""
        scratch.mkdir(parents=True, exist_ok=True)
        self._columns, self._rows = columns, dict.fromkeys(columns, 0)
        self._paths = {name: scratch / f"{name}.raw" for name in columns}
        self._stack = ExitStack()
        self._files: dict[str, IO[bytes]] = {n: self._stack.enter_context(p.open("wb")) for n, p in self._paths.items()}

    def append(self, **arrays: Array) -> None:
        for name, array in arrays.items():
            self._files[name].write(np.ascontiguousarray(array, self._columns[name][0]).tobytes())
            self._rows[name] += len(array)

    def close(self, path: Path) -> None:
        """Write ``path``: 8 bytes of header length, the header, the arrays. The raw files are removed."""
        self._stack.close()
        header: dict[str, Any] = {}
        end = 0
        # safetensors wants no gaps and keeps every array aligned when wide numbers come first
        names = sorted(self._columns, key=lambda name: -np.dtype(self._columns[name][0]).itemsize)
        for name in names:
            dtype, width = self._columns[name]
            start, end = end, end + self._paths[name].stat().st_size
            shape = [self._rows[name]] if width is None else [self._rows[name], width]
            header[name] = {"dtype": _DTYPES[np.dtype(dtype).name], "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                with self._paths[name].open("rb") as raw:
                    shutil.copyfileobj(raw, out)
                self._paths[name].unlink()


def mapped_arrays(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, read from disk as they are touched.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; build the bundle again") from None
    except Exception as error:
        raise ArtifactError(f"{path} is damaged ({error}); build the bundle again") from error


def latest(events: Events, count: int) -> Events:
    """The last ``count`` events of every user."""
    from_end = np.searchsorted(events.uid, events.uid, side="right") - np.arange(len(events))
    return events.select(from_end <= count)


class HistoryWriter:
    """Collects histories, a batch of whole users after the other."""

    def __init__(self, scratch: Path, users: int, items: int, start: int, length: int) -> None:
        """Recent events: those from ``start`` (unix seconds) on, the last ``length`` of each user."""
        self._items, self._start, self._length = items, start, length
        self._seen = np.zeros(users + 1, np.int64)
        self._recent = np.zeros(users + 1, np.int64)
        columns: dict[str, tuple[type, int | None]] = {
            "seen_offsets": (np.int64, None),
            "recent_offsets": (np.int64, None),
            "recent_timestamps": (np.int64, None),
            "seen_gids": (np.int32, None),
            "recent_gids": (np.int32, None),
            "recent_events": (np.int8, None),
        }
        self._raw = RawArrays(scratch, columns)

    def add(self, events: Events) -> None:
        self.add_apart(events.uid, events.gid, events)

    def add_apart(self, uid: npt.NDArray[np.int64], gid: npt.NDArray[np.int64], events: Events) -> None:
        """As :meth:`add`, where more pairs of user and item are known to be seen than the events say."""
        uid, gid = np.divmod(np.unique(uid * self._items + gid), self._items)
        self._raw.append(seen_gids=gid)
        np.add.at(self._seen, uid + 1, 1)
        recent = latest(events.select(events.timestamp >= self._start), self._length)
        self._raw.append(recent_gids=recent.gid, recent_events=recent.event, recent_timestamps=recent.timestamp)
        np.add.at(self._recent, recent.uid + 1, 1)

    def close(self, path: Path) -> None:
        self._raw.append(seen_offsets=np.cumsum(self._seen), recent_offsets=np.cumsum(self._recent))
        self._raw.close(path)


@dataclass(frozen=True)
class Profile:
    """What is known about one user when answering."""

    gids: npt.NDArray[np.int64]  # [n] oldest first
    events: npt.NDArray[np.int64]  # [n] index into the bundle's event names
    timestamps: npt.NDArray[np.int64]  # [n] unix seconds
    age: float = float("nan")
    country: int = -1
    tastes: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)  # only those that are known

    @property
    def known_traits(self) -> list[str]:
        traits = ["age"] if np.isfinite(self.age) else []
        traits += ["country"] if self.country >= 0 else []
        return traits + (["taste"] if self.tastes else [])


def user_inputs(profiles: Sequence[Profile], taste_sizes: dict[str, int]) -> UserInputs:
    """One batch for the user tower; absent values become NaN or -1."""
    empty = np.empty(0, np.int64)
    lengths = [len(profile.gids) for profile in profiles]
    tastes = {}
    for name, size in taste_sizes.items():
        absent = np.full(size, np.nan, np.float32)
        tastes[name] = torch.from_numpy(np.stack([profile.tastes.get(name, absent) for profile in profiles]))
    return UserInputs(
        gids=torch.from_numpy(np.concatenate([empty, *(profile.gids for profile in profiles)])),
        events=torch.from_numpy(np.concatenate([empty, *(profile.events for profile in profiles)])),
        offsets=torch.from_numpy(np.cumsum([0, *lengths])),
        age=torch.tensor([profile.age for profile in profiles], dtype=torch.float32),
        country=torch.tensor([profile.country for profile in profiles], dtype=torch.int64),
        tastes=tastes,
    )


class Histories:
    """Reader of what :class:`HistoryWriter` wrote."""

    def __init__(self, path: Path) -> None:
        arrays = {name: tensor.numpy() for name, tensor in mapped_arrays(path).items()}
        try:
            self._seen = (arrays["seen_offsets"], arrays["seen_gids"])
            self._recent_offsets = arrays["recent_offsets"]
            self._recent = (arrays["recent_gids"], arrays["recent_events"], arrays["recent_timestamps"])
        except KeyError as error:
            raise ArtifactError(f"{path} lacks the array {error}; build the bundle again") from None
        with understood(path):
            check_offsets(self._seen[0], len(self._seen[1]))
            check_offsets(self._recent_offsets, len(self._recent[0]))

    def seen(self, uid: int) -> npt.NDArray[np.int64]:
        """Every item that the user ever had an event with, sorted."""
        offsets, gids = self._seen
        return gids[offsets[uid] : offsets[uid + 1]].astype(np.int64)

    def recent(self, uid: int) -> Profile:
        """The latest events inside the window, oldest first; no traits."""
        rows = slice(self._recent_offsets[uid], self._recent_offsets[uid + 1])
        gids, events, timestamps = (column[rows].astype(np.int64) for column in self._recent)
        return Profile(gids, events, timestamps)

    def events(self, uids: npt.NDArray[np.int64]) -> Events:
        """The recent events of these users (ascending)."""
        row, index = _ranges(self._recent_offsets, uids)
        return Events(uids[row], *(column[index].astype(np.int64) for column in self._recent))

    def who_touched(self, gids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Users with a recent event on any of these items, ascending."""
        places = np.flatnonzero(np.isin(self._recent[0], gids))
        return np.unique(np.searchsorted(self._recent_offsets, places, side="right") - 1)

    def extend(self, new: Events, writer: HistoryWriter, path: Path) -> None:
        """Write these histories and the events ``new`` (of known users) to ``path``, some users at a time."""
        new = new.select(np.lexsort((new.event, new.gid, new.timestamp, new.uid)))
        users = len(self._recent_offsets) - 1
        for begin in range(0, users, _USERS):
            uids = np.arange(begin, min(begin + _USERS, users))
            mine = new.select(slice(*np.searchsorted(new.uid, [begin, begin + _USERS])))
            row, index = _ranges(self._seen[0], uids)
            seen = np.concatenate([uids[row], mine.uid]), np.concatenate([self._seen[1][index], mine.gid])
            old = self.events(uids)
            both = Events.join([old, mine])
            order = np.lexsort((both.timestamp, both.uid))  # stable: of equal times the old ones first
            writer.add_apart(*seen, both.select(order))
        writer.close(path)

    def active(self) -> npt.NDArray[np.int64]:
        """uids that have recent events."""
        return np.flatnonzero(np.diff(self._recent_offsets))


def _ranges(offsets: Array, rows: npt.NDArray[np.int64]) -> tuple[Array, Array]:
    """Of the ranges ``offsets[r]:offsets[r + 1]``: the place of each entry's row among ``rows``, and the entry."""
    lengths = offsets[rows + 1] - offsets[rows]
    return np.repeat(np.arange(len(rows)), lengths), spread(offsets[rows], lengths)
