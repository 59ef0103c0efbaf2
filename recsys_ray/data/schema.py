"""The tables that come in: their columns, and how each accepted representation is read.

A column may come in several types (ids as integers, times as Arrow timestamps, everything as text in CSV). ``convert``
brings each to one representation and marks, rather than drops, the cells that do not fit.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.core.errors import DataError

Kind = Literal["id", "text", "seconds", "number", "flag", "labels", "vector"]
_WHAT = {
    "id": "text or whole numbers",
    "text": "text",
    "seconds": "unix seconds, timestamps or ISO dates",
    "number": "numbers",
    "flag": "true or false",
    "labels": "lists of text",
    "vector": "lists of numbers",
}
_ISO_Z = re.compile(r"[zZ]$")


@dataclass(frozen=True)
class Column:
    name: str
    kind: Kind
    required: bool = False


TABLES: dict[str, tuple[Column, ...]] = {
    "items": (
        Column("item_id", "id", required=True),
        Column("item_type", "text", required=True),
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
        Column("event", "text", required=True),
        Column("timestamp", "seconds", required=True),
        Column("item_type", "text"),
    ),
    "users": (
        Column("user_id", "id", required=True),
        Column("age", "number"),
        Column("country", "text"),
    ),
}


class Converted(NamedTuple):
    """``values``: one representation, null where a cell is missing or does not fit; ``bad``: bool [rows], a cell is
    there but does not fit."""

    values: pa.Array
    bad: np.ndarray


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
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{file} (table {table}) has the column {twice[0]!r} twice; rename one of them")
    known = []
    for column in TABLES[table]:
        if column.name not in names:
            if column.required:
                raise DataError(_missing(table, column.name, names, file))
            continue
        found = plain_type(schema.field(column.name).type)
        if not _ACCEPTS[column.kind](found):
            raise DataError(
                f"column {column.name!r} of {file} (table {table}) has the type {found}, which cannot be read as "
                f"{_WHAT[column.kind]}; convert the column"
            )
        known.append(column.name)
    rest = [name for name in names if name not in known]
    taste = [n for n in rest if table == "users" and _is_vector(plain_type(schema.field(n).type))]
    return Columns(tuple(known), tuple(taste), tuple(name for name in rest if name not in taste))


def _missing(table: str, column: str, names: Sequence[str], file: str) -> str:
    near = {name.lower(): name for name in names}
    match = difflib.get_close_matches(column, list(near), n=1, cutoff=0.5)
    hint = f"; did you mean to call {near[match[0]]!r} {column!r}?" if match else f"; add a column {column!r}"
    return f"{file} (table {table}) has no column {column!r}, its columns are: {', '.join(names) or 'none'}{hint}"


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


def _is_text(t: pa.DataType) -> bool:
    return pa.types.is_string(t) or pa.types.is_large_string(t) or pa.types.is_string_view(t)


def _is_list(t: pa.DataType) -> bool:
    return pa.types.is_list(t) or pa.types.is_large_list(t) or pa.types.is_fixed_size_list(t)


def _is_number(t: pa.DataType) -> bool:
    return pa.types.is_integer(t) or pa.types.is_floating(t) or pa.types.is_decimal(t)


def _is_vector(t: pa.DataType) -> bool:
    return _is_list(t) and _is_number(t.value_type)


def _is_scalar(t: pa.DataType) -> bool:
    return _is_text(t) or _is_number(t) or pa.types.is_null(t)


_ACCEPTS: dict[str, Callable[[pa.DataType], bool]] = {
    "id": _is_scalar,
    "text": lambda t: _is_scalar(t) or pa.types.is_boolean(t),
    "seconds": lambda t: _is_scalar(t) or pa.types.is_timestamp(t) or pa.types.is_date(t),
    "number": _is_scalar,
    "flag": lambda t: _is_scalar(t) or pa.types.is_boolean(t),
    "labels": lambda t: (
        _is_text(t)
        or pa.types.is_null(t)
        or (_is_list(t) and (_is_text(plain_type(t.value_type)) or pa.types.is_null(t.value_type)))
    ),
    "vector": lambda t: _is_vector(t) or _is_text(t),
}


# -- conversions -----------------------------------------------------------------------------------------------------


def convert(column: pa.Array | pa.ChunkedArray | None, kind: Kind, rows: int) -> Converted:
    """Bring a column to its one representation; a column that is not there is all null.

    id and text: string, trimmed, empty is null. seconds: int64 unix seconds. number: float64. flag: bool. labels:
    list<string>, never null. vector: large_list<float32>.
    """
    array = pa.nulls(rows) if column is None else plain(column)
    if pa.types.is_null(array.type):
        array = array.cast(pa.string())
    return _CONVERT[kind](array)


def _none_bad(array: pa.Array) -> np.ndarray:
    return np.zeros(len(array), dtype=bool)


def _numpy(array: pa.Array, fill: Any) -> np.ndarray:
    return array.fill_null(fill).to_numpy(zero_copy_only=False)


def _present(array: pa.Array) -> np.ndarray:
    return array.is_valid().to_numpy(zero_copy_only=False)


def _text(array: pa.Array) -> Converted:
    bad = _none_bad(array)
    if pa.types.is_floating(array.type):  # whole numbers beside nulls: pandas makes floats of them
        numbers = _numpy(array.cast(pa.float64()), np.nan)
        whole = np.isfinite(numbers) & (numbers == np.floor(numbers)) & (np.abs(numbers) < 2**53)
        bad = ~whole & ~np.isnan(numbers)
        array = pa.array(np.where(whole, numbers, 0).astype(np.int64), mask=~whole)
    trimmed = pc.utf8_trim_whitespace(array.cast(pa.string()))
    return Converted(pc.if_else(pc.equal(trimmed, ""), None, trimmed), bad)


def _seconds(array: pa.Array) -> Converted:
    kind = array.type
    if _is_text(kind):
        return _seconds_of_text(pc.utf8_trim_whitespace(array.cast(pa.string())))
    if pa.types.is_date32(kind):
        array = array.cast(pa.int32()).cast(pa.int64())
        return Converted(pc.multiply(array, 86_400), _none_bad(array))
    if pa.types.is_integer(kind):
        return Converted(array.cast(pa.int64(), safe=False), _none_bad(array))
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        unit = 1_000 if pa.types.is_date(kind) else {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[kind.unit]
        values = _numpy(array.cast(pa.int64()), 0) // unit  # down, also before 1970
        return Converted(pa.array(values, mask=~_present(array)), _none_bad(array))
    values = _numpy(array.cast(pa.float64()), np.nan)
    fits = np.abs(values) < 2**53
    return Converted(pa.array(np.floor(np.where(fits, values, 0)).astype(np.int64), mask=~fits), np.isinf(values))


def _seconds_of_text(array: pa.Array) -> Converted:
    array = pc.if_else(pc.equal(array, ""), None, array)
    try:  # the two usual cases at once, the rest one by one
        if pc.all(pc.match_substring_regex(array, r"^-?\d{1,18}$")).as_py():
            return Converted(array.cast(pa.int64()), _none_bad(array))
        return _seconds(array.cast(pa.timestamp("us")))
    except pa.ArrowInvalid:
        parsed = [None if text is None else _parse_time(text) for text in array.to_pylist()]
    values = pa.array(parsed, pa.int64())
    return Converted(values, _present(array) & ~_present(values))


def _parse_time(text: str) -> int | None:
    try:
        if re.fullmatch(r"-?\d{1,18}(\.\d*)?", text):
            return int(text.partition(".")[0])
        moment = datetime.fromisoformat(_ISO_Z.sub("+00:00", text))
    except ValueError:
        return None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() // 1)


def _number(array: pa.Array) -> Converted:
    """NaN is how pandas writes a missing number."""
    if not _is_text(array.type):
        values = _numpy(array.cast(pa.float64()), np.nan)
        return Converted(pa.array(values, mask=np.isnan(values)), np.isinf(values))
    cells = _text(array).values
    try:
        return _number(cells.cast(pa.float64()))
    except pa.ArrowInvalid:
        values = pa.array([None if cell is None else _parse_number(cell) for cell in cells.to_pylist()], pa.float64())
    return Converted(values, _present(cells) & ~_present(values))


def _parse_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if np.isfinite(number) else None


_FLAGS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False, "1.0": True, "0.0": False}


def _flag(array: pa.Array) -> Converted:
    if pa.types.is_boolean(array.type):
        return Converted(array, _none_bad(array))
    cells = pc.utf8_lower(_text(array).values)
    values = pa.array([None if cell is None else _FLAGS.get(cell) for cell in cells.to_pylist()], pa.bool_())
    return Converted(values, _present(cells) & ~_present(values))


def _labels(array: pa.Array) -> Converted:
    cells = array.to_pylist()
    if _is_text(array.type):
        cells = [(cell or "").split("|") for cell in cells]
    trimmed = ((label.strip() for label in cell or () if label) for cell in cells)
    values = pa.array([list(dict.fromkeys(filter(None, labels))) for labels in trimmed], pa.list_(pa.string()))
    return Converted(values, _none_bad(array))


def _vector(array: pa.Array) -> Converted:
    """Length is for the caller to check; here every number must be finite."""
    if _is_text(array.type):
        parsed = [None if cell is None else _parse_vector(cell) for cell in _text(array).values.to_pylist()]
        bad = np.array([cell is False for cell in parsed], dtype=bool)
        return Converted(pa.array([cell or None for cell in parsed], pa.large_list(pa.float32())), bad)
    values = array.cast(pa.large_list(pa.float32()), safe=False)
    flat = _numpy(values.flatten(), np.nan)
    parents = pc.list_parent_indices(values).to_numpy(zero_copy_only=False)
    bad = _none_bad(values)
    bad[parents[~np.isfinite(flat)]] = True
    return Converted(values, bad)


def _parse_vector(text: str) -> list[float] | Literal[False]:
    try:
        numbers = np.asarray(json.loads(text), dtype=np.float32)
    except (ValueError, TypeError):
        return False
    return numbers.tolist() if numbers.ndim == 1 and len(numbers) and np.isfinite(numbers).all() else False


_CONVERT: dict[str, Callable[[pa.Array], Converted]] = {
    "id": _text,
    "text": _text,
    "seconds": _seconds,
    "number": _number,
    "flag": _flag,
    "labels": _labels,
    "vector": _vector,
}
