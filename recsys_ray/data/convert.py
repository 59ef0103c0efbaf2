"""Converts cells from every accepted representation to one; cells that do not fit are marked, not dropped.

Ids follow one rule in all tables: 1000, 1000.0, Decimal(1000), "1000" and "1000.0" are the same id. The words that
programs write for null (NULL, nan, ...) are null.
"""

from __future__ import annotations

import ast
import html
import json
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.core.clock import DAY
from recsys_ray.data import times
from recsys_ray.data.schema import Kind, is_text, plain

# As MySQL and Hive, pandas, Spark, Python, Excel, JavaScript and SQL clients write it. R's NA is nothing where a word
# is not expected, but also Namibia, North America and a title.
_NOTHING = (
    "NULL", "Null", "null", "(null)", "<null>", "\\N", "None", "none", "nan", "NaN", "NAN", "NaT", "<NA>", "#N/A",
    "N/A", "n/a", "undefined",
)  # fmt: skip
NOTHING = {"text": _NOTHING, "other": (*_NOTHING, "NA")}


class Converted(NamedTuple):
    """``values``: one representation, null where a cell is missing or does not fit; ``bad``: bool [rows], a cell is
    there but does not fit; ``taken``: cells that were read as something else than the plainest form, by what it is."""

    values: pa.Array
    bad: np.ndarray
    taken: Mapping[str, int] = MappingProxyType({})


def convert(column: pa.Array | pa.ChunkedArray | None, kind: Kind, rows: int) -> Converted:
    """Bring a column to its one representation; a column that is not there is all null.

    id, name and text: string, trimmed, empty is null. seconds: int64 unix seconds. number: float64. flag: bool. labels:
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


# -- text ------------------------------------------------------------------------------------------------------------


def _text(array: pa.Array) -> Converted:
    """Whole numbers are written without a fraction, as ids are; other numbers as they are."""
    return Converted(_unescape(_words(_written(array)[0], "text")), _none_bad(array))


def _id(array: pa.Array) -> Converted:
    """Text or whole numbers, also where they are floats, decimals or end in .0 (pandas makes floats of whole numbers
    beside nulls)."""
    written, fraction = _written(array)
    cells = _words(written, "other")
    if pc.any(pc.match_substring(cells, ".0")).as_py():
        cells = pc.replace_substring_regex(cells, r"^(-?\d+)\.0+$", r"\1")
    return Converted(pc.if_else(pa.array(fraction), None, cells), fraction)


def _name(array: pa.Array) -> Converted:
    cells, bad, _ = _id(array)
    return Converted(_unescape(cells), bad)


def _written(array: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Cells as text; and which are numbers that are not whole, or floats too large to be exact: bool [n]."""
    kind = array.type
    if pa.types.is_floating(kind):
        array = array.cast(pa.float64())
        numbers = _numpy(array, np.nan)
        whole = (np.abs(numbers) < 2**53) & (numbers == np.floor(numbers))
        integers = pa.array(np.where(whole, numbers, 0).astype(np.int64), mask=~whole)
        fraction = ~whole & ~np.isnan(numbers)
    elif pa.types.is_decimal(kind):
        fraction = ~_numpy(pc.equal(pc.round(array), array), True)
        no_places = pa.decimal256(76, 0) if pa.types.is_decimal256(kind) else pa.decimal128(38, 0)
        integers = pc.if_else(pa.array(fraction), None, array).cast(no_places)
    else:
        return array.cast(pa.string()), _none_bad(array)
    return pc.if_else(pa.array(fraction), array.cast(pa.string()), integers.cast(pa.string())), fraction


def _words(cells: pa.Array, kind: str) -> pa.Array:
    """Trimmed; what is empty or a word for nothing is null."""
    trimmed = pc.utf8_trim_whitespace(cells)
    nothing = pc.is_in(trimmed, value_set=pa.array(["", *NOTHING[kind]], pa.string()))
    return pc.if_else(nothing, None, trimmed)


def _unescape(texts: pa.Array) -> pa.Array:
    """HTML entities to characters: catalogues scraped from pages are full of ``&amp;``."""
    if not pc.any(pc.match_substring(texts, "&")).as_py():
        return texts
    plain_texts = (text if text is None else html.unescape(text).strip() for text in texts.to_pylist())
    return pa.array([text or None for text in plain_texts], pa.string())


# -- numbers ---------------------------------------------------------------------------------------------------------


def _seconds(array: pa.Array) -> Converted:
    kind, present = array.type, _present(array)
    if is_text(kind):
        cells = _words(array.cast(pa.string()), "other")
        return _moments(_present(cells), *times.of_texts(cells))
    if pa.types.is_date32(kind):
        days = array.cast(pa.int32()).cast(pa.int64())
        return Converted(pc.multiply(days, DAY), _none_bad(array))
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        unit = 1_000 if pa.types.is_date(kind) else {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[kind.unit]
        values = _numpy(array.cast(pa.int64()), 0) // unit  # down, also before 1970
        return Converted(pa.array(values, mask=~present), _none_bad(array))
    if pa.types.is_integer(kind):
        return _moments(present, *times.of_numbers(_numpy(array.cast(pa.int64(), safe=False), 0), present))
    numbers = _numpy(array.cast(pa.float64()), np.nan)
    fits, present = np.abs(numbers) < 2.0**63, ~np.isnan(numbers)
    seconds, bad, taken = times.of_numbers(np.floor(np.where(fits, numbers, 0)).astype(np.int64), fits)
    return _moments(present, seconds, bad | (present & ~fits), taken)


def _moments(present: np.ndarray, seconds: np.ndarray, bad: np.ndarray, taken: Mapping[str, int]) -> Converted:
    return Converted(pa.array(seconds, pa.int64(), mask=bad | ~present), bad, taken)


def _number(array: pa.Array) -> Converted:
    """NaN is how pandas writes a missing number."""
    if not is_text(array.type):
        values = _numpy(array.cast(pa.float64()), np.nan)
        return Converted(pa.array(values, mask=~np.isfinite(values)), np.isinf(values))
    cells = _words(array.cast(pa.string()), "other")
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


_TRUE, _FALSE = ("true", "t", "yes", "y", "on", "1"), ("false", "f", "no", "n", "off", "0")
_FLAGS = dict.fromkeys(_TRUE, True) | dict.fromkeys(_FALSE, False)


def _flag(array: pa.Array) -> Converted:
    if pa.types.is_boolean(array.type):
        return Converted(array, _none_bad(array))
    cells, bad, _ = _id(array)
    cells = pc.utf8_lower(cells)
    values = pa.array([None if cell is None else _FLAGS.get(cell) for cell in cells.to_pylist()], pa.bool_())
    return Converted(values, bad | (_present(cells) & ~_present(values)))


# -- lists -----------------------------------------------------------------------------------------------------------


def _labels(array: pa.Array) -> Converted:
    """Arrow lists; text divided by ``|``; or lists written as text, as pandas, JSON and Postgres have them."""
    found = [list(dict.fromkeys(_clean_labels(cell))) for cell in array.to_pylist()]
    return Converted(pa.array(found, pa.list_(pa.string())), _none_bad(array))


def _clean_labels(cell: Any) -> Iterator[str]:
    if isinstance(cell, str):
        cell = cell.strip()
        cell = _parse_list(cell) if _LIST.fullmatch(cell) else cell.split("|")
    for label in _leaves(cell):
        if (label := html.unescape(label).strip()) and label not in NOTHING["text"]:
            yield label


def _leaves(found: Any) -> Iterator[str]:
    """The texts in lists of lists. Of a record its name, or else all its texts."""
    if isinstance(found, str):
        yield found
    elif isinstance(found, Mapping):
        yield from _leaves(found["name"] if isinstance(found.get("name"), str) else list(found.values()))
    elif isinstance(found, list | tuple):
        for part in found:
            yield from _leaves(part)


_LIST = re.compile(r"""\[.*\]|\{.*\}|\(\s*(?:'.*'|".*")\s*,?\s*\)""", re.S)
_ADJACENT = re.compile(r"""['"]\s+['"]""")  # NumPy writes no commas, and Python would join the texts
_TOKEN = re.compile(
    r"""'((?:[^'\\]|\\.)*)'(?=[\s,\])}]|$)|"((?:[^"\\]|\\.)*)"(?=[\s,\])}]|$)|([^\s,\[\](){}][^,\[\](){}]*)"""
)


def _parse_list(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if text[0] != "{" and not _ADJACENT.search(text):
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
    tokens = (re.sub(r"\\(.)", r"\1", match[match.lastindex or 0]) for match in _TOKEN.finditer(text))
    return [token.strip() for token in tokens]


def _vector(array: pa.Array) -> Converted:
    """Length is for the caller to check; here every number must be finite."""
    kind = pa.large_list(pa.float32())
    if is_text(array.type):
        parsed = [None if cell is None else _parse_vector(cell) for cell in _text(array).values.to_pylist()]
        bad = np.array([cell is False for cell in parsed], dtype=bool)
        return Converted(pa.array([cell or None for cell in parsed], kind), bad)
    values = array.cast(kind, safe=False)
    flat = _numpy(values.flatten(), np.nan)
    parents = pc.list_parent_indices(values).to_numpy(zero_copy_only=False)
    bad = _none_bad(values)
    bad[parents[~np.isfinite(flat)]] = True
    return Converted(values.take(pa.array(np.arange(len(values)), mask=bad)), bad)


def _parse_vector(text: str) -> list[float] | bool:
    """Numbers in brackets or braces, divided by commas or spaces (NumPy); False where they are none."""
    match = re.fullmatch(r"[\[{(](.*)[\]})]", text, re.S)
    try:
        numbers = np.array([float(part) for part in re.split(r"\s*,\s*|\s+", match[1].strip())] if match else [])
    except ValueError:
        return False
    numbers = numbers.astype(np.float32)
    return numbers.tolist() if len(numbers) and np.isfinite(numbers).all() else False


_CONVERT: dict[str, Callable[[pa.Array], Converted]] = {
    "id": _id,
    "name": _name,
    "text": _text,
    "seconds": _seconds,
    "number": _number,
    "flag": _flag,
    "labels": _labels,
    "vector": _vector,
}
