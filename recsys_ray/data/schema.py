"""The source tables: their columns, and the types each column may have (``convert.py`` reads the cells)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from recsys_ray.core.errors import DataError

Kind = Literal["id", "name", "text", "seconds", "number", "flag", "labels", "vector", "history"]
_WHAT = {
    "id": "text or whole numbers",
    "name": "text or whole numbers",
    "text": "text",
    "seconds": "unix seconds, timestamps or ISO dates",
    "number": "numbers",
    "flag": "true or false",
    "labels": "lists of text",
    "vector": "lists of numbers",
    "history": "lists of item ids or of entries",
}


@dataclass(frozen=True)
class Column:
    name: str
    kind: Kind
    required: bool = False


TABLES: dict[str, tuple[Column, ...]] = {
    "items": (
        Column("item_id", "id", required=True),
        Column("item_type", "name", required=True),
        Column("title", "text", required=True),
        Column("description", "text"),
        Column("language", "text"),
        Column("categories", "labels"),
        Column("published_at", "seconds"),
        Column("available", "flag"),
    ),
    "interactions": (
        Column("user_id", "id", required=True),
        Column("item_id", "id", required=True),
        Column("event", "name", required=True),
        Column("timestamp", "seconds", required=True),
        Column("item_type", "name"),
    ),
    "users": (
        Column("user_id", "id", required=True),
        Column("age", "number"),
        Column("country", "text"),
    ),
    "asked": (  # of batch-recommend
        Column("user_id", "id", required=True),
        Column("age", "number"),
        Column("country", "text"),
        Column("history", "history"),
    ),
}


@dataclass(frozen=True)
class Columns:
    """What one file offers to a table."""

    known: tuple[str, ...]
    taste: tuple[str, ...]
    extra: tuple[str, ...]

    @property
    def read(self) -> list[str]:
        return [*self.known, *self.taste]


def match_columns(table: str, schema: pa.Schema, file: str) -> Columns:
    """Which of a file's columns belong to ``table``.

    Raises:
        DataError: a required column is missing, a name occurs twice, or a column has a type that cannot be read.
    """
    names = schema.names
    missing = [column.name for column in TABLES[table] if column.required and column.name not in names]
    if missing:
        raise DataError(_missing(table, missing, names, file))
    known = []
    for column in TABLES[table]:
        if column.name not in names:
            continue
        _check_once(table, column.name, names, file)
        found = plain_type(schema.field(column.name).type)
        if not _ACCEPTS[column.kind](found):
            raise DataError(
                f"column {column.name!r} of {file} (table {table}) has the type {found}, which cannot be read as "
                f"{_WHAT[column.kind]}; convert the column"
            )
        known.append(column.name)
    rest = list(
        dict.fromkeys(name for name in names if name and name not in known)
    )  # nothing reads a column without a name
    taste = [n for n in rest if table == "users" and any(_is_vector(plain_type(f.type)) for f in schema if f.name == n)]
    for name in taste:
        _check_once(table, name, names, file)
    return Columns(tuple(known), tuple(taste), tuple(name for name in rest if name not in taste))


def _check_once(table: str, column: str, names: Sequence[str], file: str) -> None:
    if names.count(column) > 1:
        raise DataError(f"{file} (table {table}) has the column {column!r} twice; rename one of them")


def column_names(table: str) -> tuple[list[str], list[str]]:
    """Names that the columns of any table may have, and those that ``table`` must have."""
    known = dict.fromkeys(column.name for columns in TABLES.values() for column in columns)
    return list(known), [column.name for column in TABLES[table] if column.required]


def _missing(table: str, columns: Sequence[str], names: Sequence[str], file: str) -> str:
    ours = {column.name for column in TABLES[table]}
    free = {re.sub(r"[\W_]", "", name).lower(): name for name in names if name not in ours}
    renamed, absent = [], []
    for column in columns:
        match = difflib.get_close_matches(column.replace("_", ""), list(free), n=1, cutoff=0.6)
        if match:
            renamed.append(f"{free.pop(match[0])!r} to {column!r}")
        else:
            absent.append(repr(column))
    advice = [f"rename {', '.join(renamed)}"] * bool(renamed) + [f"add {', '.join(absent)}"] * bool(absent)
    one = "column" if len(columns) == 1 else "columns"
    there = ", ".join(name or "(no name)" for name in names) or "none"
    return (
        f"{file} (table {table}) has no {one} {', '.join(map(repr, columns))}; its columns are: {there}; "
        f"{' and '.join(advice)}"
    )


def nearest(name: str, choices: Sequence[str]) -> str:
    """`` (did you mean "x"?)`` or nothing."""
    match = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    return f' (did you mean "{match[0]}"?)' if match else ""


# -- types -----------------------------------------------------------------------------------------------------------


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type below dictionaries and extensions (Ray writes vectors as extension types of its own)."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    return plain_type(kind.value_type) if pa.types.is_dictionary(kind) else kind


def plain(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """One array without dictionaries, extensions or string views."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # some types come back chunked
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    while isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = plain(column.dictionary_decode())
    return column


def is_text(t: pa.DataType) -> bool:
    return pa.types.is_string(t) or pa.types.is_large_string(t) or pa.types.is_string_view(t)


def _is_list(t: pa.DataType) -> bool:
    return pa.types.is_list(t) or pa.types.is_large_list(t) or pa.types.is_fixed_size_list(t)


def is_number(t: pa.DataType) -> bool:
    return pa.types.is_integer(t) or pa.types.is_floating(t) or pa.types.is_decimal(t)


def _is_vector(t: pa.DataType) -> bool:
    return _is_list(t) and is_number(t.value_type)


def _is_scalar(t: pa.DataType) -> bool:
    return is_text(t) or is_number(t) or pa.types.is_null(t)


_ACCEPTS: dict[str, Callable[[pa.DataType], bool]] = {
    "id": _is_scalar,
    "name": lambda t: _is_scalar(t) or pa.types.is_boolean(t),
    "text": lambda t: _is_scalar(t) or pa.types.is_boolean(t),
    "seconds": lambda t: _is_scalar(t) or pa.types.is_timestamp(t) or pa.types.is_date(t),
    "number": _is_scalar,
    "flag": lambda t: _is_scalar(t) or pa.types.is_boolean(t),
    "labels": lambda t: (
        is_text(t) or pa.types.is_null(t) or (_is_list(t) and _ACCEPTS["labels"](plain_type(t.value_type)))
    ),
    "vector": lambda t: _is_vector(t) or is_text(t),
    "history": lambda t: (
        _is_scalar(t) or (_is_list(t) and (_is_scalar(t.value_type) or pa.types.is_struct(t.value_type)))
    ),
}
