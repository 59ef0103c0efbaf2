"""Locations in a file system or an object store: a path, ``file://``, or
``s3://bucket/prefix?endpoint_override=host:port&scheme=http&region=...``; credentials come from the environment.

Processes and hosts exchange URIs. Whatever must be a local file comes through :func:`local_output`: the folder itself
if it is local, otherwise a copy in the node's cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow import fs

from recsys_ray.core.errors import ArtifactError, UserError
from recsys_ray.storage.artifacts import MANIFEST, open_artifact

CACHE_FOLDER = "RECSYS_RAY_CACHE"  # of the environment
_THREADS = 8  # files that are copied at once


@dataclass(frozen=True)
class Place:
    """A file or folder by its URI; a local path is one as well."""

    uri: str

    @property
    def is_local(self) -> bool:
        return isinstance(self._found[0], fs.LocalFileSystem)

    @property
    def local(self) -> Path:
        assert self.is_local
        return Path(self._found[1])

    @cached_property
    def _found(self) -> tuple[fs.FileSystem, str]:
        return _resolve(self.uri)

    @property
    def name(self) -> str:
        return self._found[1].rstrip("/").rpartition("/")[2]

    def __truediv__(self, name: str | Path) -> Place:
        """A location below this one, or next to it with ``..``; in a URI the name is quoted and the query kept."""
        if "://" not in self.uri:
            return Place(os.path.normpath(Path(self.uri) / name))
        base, mark, query = self.uri.partition("?")
        parts = [part for part in Path(name).parts if part != "."]
        while parts and parts[0] == "..":
            base, parts = base.rpartition("/")[0], parts[1:]
        return Place("/".join([base.rstrip("/"), *(quote(part, safe="=") for part in parts)]) + mark + query)

    def __str__(self) -> str:
        return self.uri

    def kind(self) -> str:
        """``file``, ``folder`` or ``none``."""
        with self._errors():
            found = self._found[0].get_file_info(self._found[1]).type
        return {fs.FileType.File: "file", fs.FileType.Directory: "folder"}.get(found, "none")

    def exists(self) -> bool:
        return self.kind() != "none"

    def open(self) -> pa.NativeFile:
        """A file to read from anywhere in it."""
        with self._errors():
            return self._found[0].open_input_file(self._found[1])

    def dataset(self) -> ds.Dataset:
        """The Parquet files here as one table."""
        with self._errors():
            return ds.dataset(self._found[1], filesystem=self._found[0], format="parquet")

    def read(self) -> bytes:
        """Raises FileNotFoundError where there is no such file."""
        with self._errors(), self._found[0].open_input_stream(self._found[1]) as file:
            data: bytes = file.read()
        return data

    def write(self, data: bytes) -> None:
        """Put a file in one step: a reader sees the old one or the new one."""
        with self._errors():
            if self.is_local:
                self.local.parent.mkdir(parents=True, exist_ok=True)
                aside = self.local.with_name(f".{self.local.name}.{os.getpid()}.tmp")
                aside.write_bytes(data)
                aside.replace(self.local)
            else:
                with self._found[0].open_output_stream(self._found[1]) as file:
                    file.write(data)

    def files(self) -> dict[str, tuple[int, int]]:
        """Every file below the folder, folder by folder: path relative to it -> (bytes, modified in ns)."""
        filesystem, root = self._found
        with self._errors():
            found = filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
        files = {info.path[len(root) :].strip("/"): info for info in found if info.type == fs.FileType.File}
        return {name: (files[name].size, files[name].mtime_ns) for name in sorted(files, key=lambda n: n.split("/"))}

    def folders(self) -> list[str]:
        """Names of the folders in the folder."""
        filesystem, root = self._found
        with self._errors():
            found = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def delete(self) -> None:
        """Remove a file or a folder with its contents: the manifest first, so that the rest no longer counts as an
        output."""
        kind = self.kind()
        with self._errors():
            if kind == "file":
                self._found[0].delete_file(self._found[1])
            elif kind == "folder":
                if (self / MANIFEST).exists():
                    (self / MANIFEST).delete()
                self._found[0].delete_dir(self._found[1])

    def upload(self, folder: Path) -> None:
        """Copy the files of a local folder here, the manifest last: an upload that is killed leaves no output."""
        names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
        with self._errors():
            _each(lambda name: self.put(folder / name, name), [name for name in names if name != MANIFEST])
            if MANIFEST in names:
                (self / MANIFEST).write((folder / MANIFEST).read_bytes())

    def download(self, folder: Path, names: Sequence[str] | None = None) -> None:
        """Copy files from here into a local folder, the manifest last. ``names``: default, all of them."""
        names = list(self.files()) if names is None else list(names)
        with self._errors():
            _each(lambda name: self._copy_out(name, folder / name), [name for name in names if name != MANIFEST])
            if MANIFEST in names:
                self._copy_out(MANIFEST, folder / MANIFEST)

    def put(self, file: Path, name: str) -> None:
        """Copy a local file to ``name`` below the folder."""
        filesystem, target = (self / name)._found
        with self._errors():
            if self.is_local:
                Path(target).parent.mkdir(parents=True, exist_ok=True)
            fs.copy_files(str(file), target, fs.LocalFileSystem(), filesystem, use_threads=False)

    def _copy_out(self, name: str, file: Path) -> None:
        filesystem, source = (self / name)._found
        file.parent.mkdir(parents=True, exist_ok=True)
        fs.copy_files(source, str(file), filesystem, fs.LocalFileSystem(), use_threads=False)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """A store that does not answer, or refuses, is a sentence."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            if self.is_local:
                raise
            detail = " ".join(str(error).split())[:300]
            raise UserError(f"{self.uri} cannot be used ({detail}); check the address and your credentials") from error


@lru_cache(maxsize=256)
def _resolve(uri: str) -> tuple[fs.FileSystem, str]:
    if "://" not in uri:
        return fs.LocalFileSystem(), uri
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{uri} is not a valid location ({error}); give a path or s3://bucket/prefix") from error
    return filesystem, path


def _each(work: Any, names: Sequence[str]) -> None:
    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(work, names))


def source_fingerprint(path: str | Path | Place) -> str:
    """Hash of the names and contents below ``path``, about a second a gigabyte and thread. Location and times do not
    count: a copied or restored table, or a moved run folder, causes no new run."""
    root = Place(str(path))
    files = {root.name: root} if root.kind() == "file" else {name: root / name for name in root.files()}
    with ThreadPoolExecutor() as threads:
        described = list(zip(files, threads.map(_sha256, files.values()), strict=True))
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _sha256(place: Place) -> str:
    with place.open() as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def node_cache() -> Path:
    """The folder for copies of remote files: ``$RECSYS_RAY_CACHE`` or ``~/.cache/recsys-ray``."""
    return Path(os.environ.get(CACHE_FOLDER) or Path.home() / ".cache" / "recsys-ray")


def local_output(place: Place) -> Path:
    """The folder of an output (one with a manifest): itself if local, otherwise the node's copy.

    The copy is keyed by its manifest, which has the fingerprint and every file's checksum. Processes that want the same
    one wait for the first.

    Raises:
        ArtifactError: there is no manifest, or it is damaged.
    """
    if place.is_local:
        return place.local
    try:
        manifest = (place / MANIFEST).read()
        names = [*json.loads(manifest)["files"], MANIFEST]
    except FileNotFoundError:
        raise ArtifactError(f"{place} contains no finished output (no {MANIFEST})") from None
    except (ValueError, KeyError, TypeError):
        raise ArtifactError(f"{place / MANIFEST} is damaged; remove the folder and run the stage again") from None
    folder = node_cache() / hashlib.sha256(manifest).hexdigest()[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            place.download(folder, names)
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        open_artifact(folder)
    except ArtifactError:
        return False
    return True
