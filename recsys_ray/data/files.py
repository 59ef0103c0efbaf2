"""Which files are a table: paths, patterns, folders, and what the folders' names say."""

from __future__ import annotations

import glob
import os
import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from recsys_ray.core.errors import DataError
from recsys_ray.data.file_kinds import HEAD, not_our_csv, not_that_kind
from recsys_ray.data.schema import column_names

PARQUET, CSV = (".parquet", ".pq"), (".csv", ".csv.gz")
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


def find_paths(table: str, path: str | Sequence[str]) -> list[Path]:
    """The files and folders that ``data.<table>`` names: a path or a list of them, with ``~``, variables of the
    environment and patterns (``*``, ``?``, ``[..]``, ``**``).

    Raises:
        DataError: one of them names nothing, or is a URI.
    """
    found: dict[Path, None] = {}
    for text in [path] if isinstance(path, str) else path:
        if re.match(r"[A-Za-z][\w+.-]+://", text):
            raise DataError(
                f"data.{table}: {text} is a URI, and tables are read from files of this machine only; copy the "
                "table, or mount its store, and set the path of the file or folder"
            )
        name = str(Path(os.path.expandvars(text)).expanduser())
        matches = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))  # noqa: PTH207, any root
        if not matches:
            nothing = f"nothing matches {text}" if glob.has_magic(name) else f"there is no file or folder at {text}"
            raise DataError(
                f"data.{table}: {nothing}; set it to a Parquet or CSV file, a folder of them or a list of these"
            )
        found.update(dict.fromkeys(map(Path, matches)))
    return list(found)


def list_files(table: str, path: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """The files of a table, and those that are neither Parquet nor CSV.

    Raises:
        DataError: there is no such path, or no such file.
    """
    roots = find_paths(table, path)
    visible: dict[str, None] = {}
    for root in roots:
        found = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
        # Spark, Ray and others leave files like _SUCCESS and .part.crc beside the data.
        hidden = (any(part.startswith((".", "_")) for part in p.relative_to(root).parts) for p in found)
        visible.update(dict.fromkeys(str(p) for p, hide in zip(found, hidden, strict=True) if not hide))
    files = [name for name in visible if name.lower().endswith(PARQUET + CSV)]
    if not files:
        raise _nothing(table, path, roots, list(visible))
    return files, [name for name in visible if name not in set(files)]


def _nothing(table: str, path: str | Sequence[str], roots: Sequence[Path], others: Sequence[str]) -> DataError:
    kinds = ", ".join((*PARQUET, *CSV))
    if len(others) == 1:  # it may be the table, in another form
        with Path(others[0]).open("rb") as stream:
            head = stream.read(HEAD)
        known = not_that_kind(others[0], head)
        if known:
            return known
        said = not_our_csv(others[0], head, (), *column_names(table))
        return DataError(said or f"{others[0]} is passed over, because its name does not end in {kinds}; rename it")
    there = f"; it holds {', '.join(Path(name).name for name in others[:5])}" if others else ""
    where = path if isinstance(path, str) else ", ".join(map(str, roots))
    return DataError(f"{where} holds no file for the {table} table that ends in {kinds}{there}; set data.{table}")


def partition_of(file: str) -> dict[str, str | None]:
    """Columns that folders name, as Hive and Spark write them: ``event=stream/part-0.parquet``."""
    pairs = (part.partition("=") for part in Path(file).parent.parts if "=" in part)
    return {key: None if value == _HIVE_NULL else urllib.parse.unquote(value) for key, _, value in pairs}
