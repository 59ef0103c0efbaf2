"""Finds the files of a table: paths, patterns, folders, and columns encoded in folder names."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from recsys_ray.core.errors import DataError
from recsys_ray.data.file_kinds import HEAD, not_our_csv, not_that_kind
from recsys_ray.data.schema import column_names
from recsys_ray.storage.store import Place, source_fingerprint

PARQUET, CSV = (".parquet", ".pq"), (".csv", ".csv.gz")
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


def find_paths(table: str, path: str | Sequence[str]) -> list[Place]:
    """The files and folders that ``data.<table>`` names: a path or a list of them, with ``~``, variables of the
    environment and patterns (``*``, ``?``, ``[..]``, ``**``); or a URI like ``s3://bucket/folder?region=...``.

    Raises:
        DataError: one of them names nothing.
    """
    found: dict[Place, None] = {}
    for text in [path] if isinstance(path, str) else path:
        if re.match(r"[A-Za-z][\w+.-]+://", text):
            if not Place(text).exists():
                raise DataError(f"data.{table}: there is no file or folder at {text}")
            found[Place(text)] = None
            continue
        name = str(Path(os.path.expandvars(text)).expanduser())
        matches = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))  # noqa: PTH207, any root
        if not matches:
            nothing = f"nothing matches {text}" if glob.has_magic(name) else f"there is no file or folder at {text}"
            raise DataError(
                f"data.{table}: {nothing}; set it to a Parquet or CSV file, a folder of them or a list of these"
            )
        found.update(dict.fromkeys(map(Place, matches)))
    return list(found)


def table_fingerprint(table: str, path: str | Sequence[str]) -> str:
    """A hash of what ``data.<table>`` names. Of several files or folders, and of a folder whose name is a partition,
    their order and partitions count. Errors as :func:`find_paths`."""
    parts = [(partition_of(str(root / "file")), source_fingerprint(root)) for root in find_paths(table, path)]
    if len(parts) == 1 and not parts[0][0]:
        return parts[0][1]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def list_files(table: str, path: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """The files of a table, and those that are neither Parquet nor CSV.

    Raises:
        DataError: there is no such path, or no such file.
    """
    roots = find_paths(table, path)
    visible: dict[str, None] = {}
    for root in roots:
        if root.kind() == "file":
            visible[str(root)] = None
            continue
        for name in root.files():
            # Spark, Ray and others write files such as _SUCCESS and .part.crc next to the data.
            if not any(part.startswith((".", "_")) for part in name.split("/")):
                visible[str(root / name)] = None
    files = [name for name in visible if ends_in(name, PARQUET + CSV)]
    if not files:
        raise _nothing(table, path, roots, list(visible))
    return files, [name for name in visible if name not in set(files)]


def ends_in(file: str, endings: tuple[str, ...]) -> bool:
    """Has the file, a path or a URI, a name with one of these endings?"""
    return Place(file).name.lower().endswith(endings)


def _nothing(table: str, path: str | Sequence[str], roots: Sequence[Place], others: Sequence[str]) -> DataError:
    kinds = ", ".join((*PARQUET, *CSV))
    if len(others) == 1:  # it may be the table, in another form
        with Place(others[0]).open() as stream:
            head = stream.read(HEAD)
        known = not_that_kind(others[0], head)
        if known:
            return known
        said = not_our_csv(others[0], head, (), *column_names(table))
        return DataError(said or f"{others[0]} is skipped because its name does not end in {kinds}; rename it")
    there = f"; it contains {', '.join(Place(name).name for name in others[:5])}" if others else ""
    where = path if isinstance(path, str) else ", ".join(map(str, roots))
    return DataError(f"{where} contains no file for the {table} table that ends in {kinds}{there}; set data.{table}")


def partition_of(file: str) -> dict[str, str | None]:
    """Columns that folders name, as Hive and Spark write them: ``event=stream/part-0.parquet``."""
    path = urllib.parse.unquote(file.partition("?")[0]) if "://" in file else file
    pairs = (part.partition("=") for part in Path(path).parent.parts if "=" in part)
    return {key: None if value == _HIVE_NULL else urllib.parse.unquote(value) for key, _, value in pairs}
