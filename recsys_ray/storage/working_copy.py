"""A run whose ``run_dir`` is in an object store works in a local copy, because DGL, FAISS and memory maps need local
files.

The copy stays in the node's cache, so that files are not downloaded again. During the run, finished outputs and the
last checkpoints are uploaded every few seconds, so an interrupted run can continue on another machine. Only one run at
a time: the holder of ``<run_dir>/lock.json`` renews it, and a process that finds a fresh lock is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recsys_ray.core.errors import UserError
from recsys_ray.storage.artifacts import CHECKPOINTS, MANIFEST, SCRATCH
from recsys_ray.storage.lock import LOCK, run_lock
from recsys_ray.storage.outputs import POINTER
from recsys_ray.storage.store import CACHE_FOLDER, Place, node_cache

CACHE = "cache"  # in the folder of a run: what later runs on this machine reuse
_LOCK = f"{LOCK}.json"
_EVERY_S = 10.0  # between two looks for what is new
_STALE_S = 60.0  # after which a lock that is not renewed is void

State = tuple[int, int]  # of a local file: bytes, modified in ns


@contextmanager
def working_copy(run_dir: str, say: Callable[[str], None] = lambda text: None) -> Iterator[str]:
    """The folder in which to work on a run: ``run_dir`` itself if local, otherwise a copy on this machine, which is
    uploaded to the store by the end of the block, even after an error.

    Raises:
        UserError: another run is working in ``run_dir``, or the store cannot be used.
    """
    place = Place(run_dir)
    if place.is_local:
        yield str(place.local)
        return
    folder = copy_of(place)
    folder.mkdir(parents=True, exist_ok=True)
    with run_lock(folder), _StoreLock(place) as lock:
        copy = _Copy(place, folder, lock)
        fetched = copy.pull()
        say(f"{place}: working copy in {folder}, {fetched:,} files downloaded")
        done = threading.Event()
        pusher = threading.Thread(target=copy.keep_pushing, args=(done,), daemon=True)
        pusher.start()
        try:
            yield str(folder)
        finally:
            done.set()
            pusher.join()
            copy.push()
            copy.remove_the_removed()


def copy_of(place: Place) -> Path:
    """The path of this machine's copy of a folder in a store."""
    return node_cache() / "runs" / hashlib.sha256(place.uri.encode()).hexdigest()[:16] / place.name


def check_shared(folder: Path, hosts: int) -> None:
    """Raises UserError where ``folder`` is this machine's copy of a run, and other hosts are to work on it."""
    if hosts > 1 and CACHE_FOLDER not in os.environ and folder.is_relative_to(node_cache()):
        raise UserError(
            f"a run in an object store on {hosts} hosts needs a shared folder, at the same path on every host, for the "
            f"working copy; set {CACHE_FOLDER} to it on every host"
        )


class _Copy:
    """Files of a run, here and in the store, and what is known to be the same."""

    def __init__(self, place: Place, folder: Path, lock: _StoreLock) -> None:
        self.place, self.folder, self.lock = place, folder, lock
        self._pushed: dict[str, State] = {}

    def pull(self) -> int:
        """Fetch what differs; returns how many files that were. Of what can change, the store's word counts."""
        there = {name: size for name, (size, _) in self.place.files().items() if name != _LOCK}
        here = {name: size for name, (size, _) in _files(self.folder).items()}
        outputs = {name.removesuffix(MANIFEST) for name in there if name.endswith("/" + MANIFEST)}
        for output in outputs:
            if not (self.folder / output / MANIFEST).exists():  # an attempt of ours at what another machine finished
                shutil.rmtree(self.folder / output, ignore_errors=True)
        fixed = tuple(outputs)
        wanted = []
        for name, size in there.items():
            if name.startswith(fixed):
                if f"/{SCRATCH}/" in name:  # checkpoints of a training that ended: nothing reads them any more
                    continue
                known = here.get(name) == size and (self.folder / name).exists()
            else:
                known = name in here and Path(name).name in CHECKPOINTS  # ours are at least as new
            if not known:
                wanted.append(name)
        manifests = [name for name in wanted if name.endswith(MANIFEST)]
        self.place.download(self.folder, [name for name in wanted if name not in set(manifests)])
        self.place.download(self.folder, manifests)
        self._pushed = {name: state for name, state in _files(self.folder).items() if name in there}
        return len(wanted)

    def push(self) -> None:
        """Copy what is new or changed: files first, then the manifests that make outputs of them, then the pointers.
        Checkpoints go in the order in which they were written: a last one never without its best."""
        self.lock.check()
        new = {name: state for name, state in _files(self.folder).items() if self._pushed.get(name) != state}
        plain = [name for name in new if _order(name) == 0]
        with ThreadPoolExecutor() as threads:
            list(threads.map(self._push, plain, (new[name] for name in plain)))
        for name in sorted(new.keys() - set(plain), key=lambda name: (_order(name), new[name][1])):
            self._push(name, new[name])

    def _push(self, name: str, state: State) -> None:
        try:
            self.place.put(self.folder / name, name)
        except FileNotFoundError:  # removed meanwhile
            return
        self._pushed[name] = state

    def keep_pushing(self, done: threading.Event) -> None:
        while not done.wait(_EVERY_S):
            try:
                self.lock.renew()
                self.push()
            except UserError:  # the store may be back at the next look; the last push is not forgiving
                continue

    def remove_the_removed(self) -> None:
        """Delete from the store what no longer exists here: outputs without a pointer, checkpoints of finished
        attempts."""
        here = _files(self.folder)
        gone = [name for name in self.place.files() if name not in here and name != _LOCK]
        for name in sorted(gone, key=lambda name: Path(name).name != MANIFEST):
            (self.place / name).delete()


def _order(name: str) -> int:
    """In which of the steps of a push a file is copied."""
    kind = Path(name).name
    return 1 if kind in CHECKPOINTS else 2 if kind == MANIFEST else 3 if kind == POINTER else 0


def _files(folder: Path) -> dict[str, State]:
    """The files of a run that belong into the store, by their names relative to ``folder``. Of an output in the making
    these are the checkpoints alone."""
    found: dict[str, State] = {}
    for root, folders, names in os.walk(folder):
        if SCRATCH in folders and MANIFEST in names:
            folders.remove(SCRATCH)
        elif SCRATCH in folders:  # in the making
            folders[:], names = [SCRATCH], []
        elif Path(root).name == SCRATCH or f"/{SCRATCH}/" in root:
            names = [name for name in names if name in CHECKPOINTS]
        elif root == str(folder):
            folders[:] = [name for name in folders if name != CACHE]
        for name in names:
            path = Path(root, name)
            if name not in (LOCK, _LOCK) and not name.startswith("."):
                try:
                    told = path.stat()
                except FileNotFoundError:  # removed meanwhile
                    continue
                found[str(path.relative_to(folder))] = (told.st_size, told.st_mtime_ns)
    return found


class _StoreLock:
    """``lock.json`` in the folder of a run, held while the block runs."""

    def __init__(self, place: Place) -> None:
        self._file = place / _LOCK
        self._place, self._token = place, uuid.uuid4().hex
        self._holder = {"host": socket.gethostname(), "process": os.getpid(), "token": self._token}

    def __enter__(self) -> _StoreLock:
        held = self._read()
        # A process of this host does not hold it any more: its lock of the local copy would have refused us.
        if held and held["host"] != self._holder["host"] and time.time() - held["renewed"] < _STALE_S:
            raise self._refusal(held)
        self.renew(ours=False)
        self.check()  # of two that wrote at once, the last one has it
        return self

    def __exit__(self, *error: object) -> None:
        if (held := self._read()) and held["token"] == self._token:
            self._file.delete()

    def renew(self, ours: bool = True) -> None:
        if ours:
            self.check()
        self._file.write(json.dumps({**self._holder, "renewed": time.time()}).encode())

    def check(self) -> None:
        """Raises UserError if another run has taken the lock."""
        if (held := self._read()) and held["token"] != self._token:
            raise self._refusal(held)

    def _read(self) -> dict[str, Any] | None:
        try:
            held: dict[str, Any] = json.loads(self._file.read())
            return held
        except FileNotFoundError:
            return None
        except ValueError:
            raise UserError(f"{self._file} is damaged; remove it if no run is working there") from None

    def _refusal(self, held: dict[str, Any]) -> UserError:
        return UserError(
            f"another run is working in {self._place} (process {held['process']} on {held['host']}); wait until it "
            "ends (or a minute if it was killed), or set another run_dir"
        )
