r"""Splits CSV text into records, with every record's number and every malformed record reported.

CSV readers are lenient: pyarrow, like others, takes a stray quote for the start of a cell and silently swallows records
up to the next quote. Here a record is regular, or readable with the exceptions below, or returned as malformed. Good
records leave as clean CSV, which pyarrow then parses.

Exceptions: blanks around a quoted cell; a backslash before a quote (``"the \"Anchor\" inn"``, as MySQL, Hive and Spark
write it) instead of a doubled quote; text after a closing quote on the same line (``"Heroes" (live)``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

import numpy as np

from recsys_ray.core.errors import DataError
from recsys_ray.data.file_kinds import bad_utf8, not_utf8

LONGEST = 16 << 20  # bytes of a record, and about the size of a piece
_END = rb"(?:\r\n?|\n)"
_ENDS = re.compile(_END)
_QUOTED = {
    False: re.compile(rb'[ \t]*"([^"]*+(?:""[^"]*+)*+)"[ \t]*+'),
    True: re.compile(rb'[ \t]*"([^"\\]*+(?:(?:""|\\.)[^"\\]*+)*+)"[ \t]*+', re.DOTALL),
}
_PLAIN = {False: re.compile(rb"[^,\r\n]*+"), True: re.compile(rb"[^,\r\n\\]*+(?:\\(?:.|\Z)[^,\r\n\\]*+)*+", re.DOTALL)}
_OPENS = re.compile(rb'[ \t]*"')
_LENIENT_CELL = re.compile(rb'(?:[ \t]*"[^"]*+(?:""[^"]*+)*+(?:"[^,\r\n]*+|$)|[^,\r\n]*+)')
_ESCAPED = re.compile(rb'\\(["\\,\r\n])')
# Cells that every reader takes for the same text. What holds a backslash in quotes is looked at by itself.
_REGULAR_CELL = rb'(?:"[^"\\\r\n]*+(?:""[^"\\\r\n]*+)*+"|[ \t]*+(?:[^" \t,\r\n%b][^,\r\n%b]*+)?)'


@dataclass(frozen=True)
class Piece:
    """Some records. ``text``: the good ones as clean CSV without a header; ``rows``: their numbers, int64, from 1.
    ``malformed``: the others as (row, text, what is wrong), one for each line that they span."""

    text: bytes
    rows: np.ndarray
    malformed: list[tuple[int, str, str]] = field(default_factory=list)


class _Read(NamedTuple):
    """A record as one reading has it: ``end``, where the next begins, or None if it goes on beyond the text that is
    there; ``cells`` None: not a record by this reading."""

    end: int | None
    cells: list[bytes] | None


class Records:
    """The records of a CSV file.

    Attributes:
        names: the header's cells, trimmed and without a byte order mark; none where there is no line at all.

    Args:
        block: bytes that are read at once.

    Raises:
        DataError: the header is not UTF-8.
    """

    def __init__(self, stream: BinaryIO, file: str, block: int = LONGEST) -> None:
        self._stream, self._file, self._block = stream, file, block
        self._next = 1  # number of the next record
        self._escapes = False  # a record was seen that only backslashes explain
        self._rest = b""
        self.names = self._header()
        self._width = len(self.names)
        self._regular = {escapes: _regular_records(self._width, escapes) for escapes in (False, True)}

    def _header(self) -> list[str]:
        more = True
        while more and len(self._rest) <= LONGEST:
            block = self._stream.read(self._block)
            more = bool(block)
            self._rest = (self._rest + block).removeprefix(b"\xef\xbb\xbf")
            text = self._rest.lstrip(b"\r\n")
            end, cells = _read(text, 0, False, whole=not more)
            if end is None or not text:
                continue
            if cells is None:  # quotes that do not fit
                line = _ENDS.search(text)
                end, cells = (line.end(), text[: line.start()].split(b",")) if line else (len(text), text.split(b","))
            self._rest = text[end:]
            try:
                return [cell.decode("utf-8").strip() for cell in cells]
            except UnicodeDecodeError as error:
                bad = b",".join(cells)
                raise DataError(not_utf8(self._file, bad, bad_utf8(bad, True) or 0, "its first line")) from error
        return []

    def __iter__(self) -> Iterator[Piece]:
        """
        Raises:
            DataError: text that is not UTF-8, or a record that is longer than LONGEST.
        """
        more = True
        while more:
            block = self._stream.read(self._block)
            more = bool(block)
            self._rest, piece = self._take(self._rest + block, whole=not more)
            yield piece
            if len(self._rest) > LONGEST:
                raise DataError(
                    f"row {self._next} of {self._file} is longer than {LONGEST >> 20} MB; a cell probably begins with "
                    "a quote that is never closed: double or remove it"
                )

    def _take(self, text: bytes, whole: bool) -> tuple[bytes, Piece]:
        """The records that are there in full; and the rest."""
        good: list[bytes] = []
        rows: list[np.ndarray] = []
        malformed: list[tuple[int, str, str]] = []
        at = 0
        while at < len(text):
            run = self._regular[self._escapes].match(text, at)
            if run and run.end() > at:
                good.append(self._checked(run.group()))
                rows.append(self._number(_lines(good[-1])))
                at = run.end()
                continue
            blank = _ENDS.match(text, at)
            if blank:
                at = blank.end()
                continue
            end, cells, wrong = self._judge(text, at, whole)
            if end is None:
                break
            if cells is not None:
                good.append(self._checked(_clean(cells)))
                rows.append(self._number(1))
            else:
                malformed += self._told(text[at:end], wrong)
            at = end
        return text[at:], Piece(b"".join(good), np.concatenate([np.zeros(0, np.int64), *rows]), malformed)

    def _number(self, count: int) -> np.ndarray:
        self._next += count
        return np.arange(self._next - count, self._next, dtype=np.int64)

    def _judge(self, text: bytes, at: int, whole: bool) -> tuple[int | None, list[bytes] | None, str]:
        """Where the record at ``at`` ends (None: more text is needed), its cells if it is good, else what is wrong."""
        plain = _read(text, at, False, whole)
        reads = {False: plain}
        if b"\\" in text[at : plain.end]:
            escaped = _read(text, at, True, whole)
            reads = {True: escaped, False: plain} if self._escapes else {False: plain, True: escaped}
        good = {
            escapes: read
            for escapes, read in reads.items()
            if read.cells and len(read.cells) == self._width and not self._swallows(text[at : read.end])
        }
        open_end = not whole and any(read.end is None for read in reads.values())
        if good:  # of two readings the shorter one, which cannot have swallowed a record
            escapes = min(good, key=lambda e: good[e].end or 0)
            if open_end and good[escapes].end == len(text):  # the other one may turn out to be as short
                return None, None, ""
            self._escapes |= escapes
            return good[escapes].end, good[escapes].cells, ""
        line = _ENDS.search(text, at)
        if open_end or (not whole and line is None):
            return None, None, ""
        cells = _literal(text[at : line.start() if line else len(text)])
        if cells and len(cells) == self._width:
            return line.end() if line else len(text), cells, ""
        if plain.cells and len(plain.cells) != self._width:
            return plain.end, None, f"it has {len(plain.cells)} cells where the header has {self._width}"
        end = _lenient_end(text, at, whole)
        return end, None, 'its quotes are unbalanced; write a quote within a cell as two ("")'

    def _swallows(self, record: bytes) -> bool:
        """Whether a record of several lines is several records that a stray quote has joined: each of its lines has
        the header's number of cells, and they begin alike."""
        lines = [line for line in _ENDS.split(record) if line]
        if len(lines) < 2 or self._width < 2:
            return False
        ids = [line.split(b",", 1)[0].strip(b' "') for line in lines]
        return all(line.count(b",") == self._width - 1 for line in lines) and all(_alike(ids[0], i) for i in ids[1:])

    def _told(self, record: bytes, wrong: str) -> list[tuple[int, str, str]]:
        """A malformed record, line by line, because in the worst case each line is a lost record."""
        lines = [line for line in _ENDS.split(record) if line]
        first = self._next
        spans = f" and spans {len(lines):,} lines" if len(lines) > 1 else ""
        wrong = f"the record in row {first} of {self._file} is malformed{spans}: {wrong}"
        self._next += len(lines)
        return [(first + i, line.decode("utf-8", "replace"), wrong) for i, line in enumerate(lines)]

    def _checked(self, records: bytes) -> bytes:
        """``records``, if they are UTF-8."""
        try:
            records.decode("utf-8")
        except UnicodeDecodeError as error:
            row = self._next + _lines(records[: error.start])
            raise DataError(not_utf8(self._file, records, error.start, f"row {row}")) from error
        return records


def _regular_records(width: int, escapes: bool) -> re.Pattern[bytes]:
    cell = _REGULAR_CELL % ((rb"\\",) * 2 if escapes else (b"",) * 2)
    if width == 1:  # an empty line is not a record
        cell = rb"(?!%b)%b" % (_END, cell)
    return re.compile(rb"(?:%b(?:,%b){%d}%b)*+" % (cell, cell, width - 1, _END))


def _lines(records: bytes) -> int:
    """Line ends, of any kind."""
    feeds = records.count(b"\n")
    return feeds + records.count(b"\r") - records.count(b"\r\n")


def _read(text: bytes, at: int, escapes: bool, whole: bool) -> _Read:
    """Read one record. ``escapes``: a backslash takes away the next character's meaning."""
    cells: list[bytes] = []
    while True:
        quoted = _QUOTED[escapes].match(text, at)
        if quoted:
            cell, at = quoted.group(1).replace(b'""', b'"'), quoted.end()
        elif _OPENS.match(text, at):
            return _Read(None, None) if not whole else _Read(len(text), None)
        else:
            found = _PLAIN[escapes].match(text, at)
            assert found  # it matches nothing, too
            cell, at = found.group(), found.end()
        cells.append(_ESCAPED.sub(rb"\1", cell) if escapes else cell)
        if at == len(text):
            return _Read(at, cells) if whole else _Read(None, None)
        if text[at : at + 1] == b",":
            at += 1
            continue
        end = _ENDS.match(text, at)
        return _Read(end.end() if end else at, cells if end else None)


def _literal(line: bytes) -> list[bytes] | None:
    """The cells of a line whose quotes mean nothing. None where one begins with the line's only quote, as it does when
    a cell goes on in the next line."""
    cells = line.split(b",")
    for i, cell in enumerate(cells):
        if _OPENS.match(cell):
            bare = cell.strip()
            if bare.count(b'"') < 2:
                return None
            cells[i] = bare[1:-1] if bare.endswith(b'"') else bare
    return cells


def _lenient_end(text: bytes, at: int, whole: bool) -> int | None:
    """Where a lenient reader would let the record end; None: beyond the text that is there."""
    while True:
        cell = _LENIENT_CELL.match(text, at)
        at = cell.end() if cell else len(text)
        if at >= len(text):
            return len(text) if whole else None
        if text[at : at + 1] != b",":
            end = _ENDS.match(text, at)
            return end.end() if end else len(text)
        at += 1


def _alike(one: bytes, other: bytes) -> bool:
    """Whether two cells may be ids of the same kind."""
    return (
        bool(one)
        and one.isdigit() == other.isdigit()
        and (len(one) == len(other) or one.isdigit())
        and b" " not in other
    )


def _clean(cells: list[bytes]) -> bytes:
    return b",".join(b'"' + cell.replace(b'"', b'""') + b'"' for cell in cells) + b"\n"
