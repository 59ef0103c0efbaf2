"""Reads Parquet or CSV, a file or a folder, as batches in which every row knows its file and row number.

A table is split into fragments (a Parquet row group, a CSV file), each read by one Ray Data task. A fragment is
streamed in batches, so its size does not determine the task's memory.
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from recsys_ray.cluster.session import LOGICAL_CPUS_TO_SPARE
from recsys_ray.core.errors import DataError, UserError
from recsys_ray.core.progress import Progress
from recsys_ray.data.csv_records import LONGEST, Piece, Records
from recsys_ray.data.file_kinds import HEAD, bad_utf8, not_our_csv, not_parquet, not_that_kind
from recsys_ray.data.files import CSV, ends_in, list_files, partition_of
from recsys_ray.data.schema import TABLES, Columns, column_names, match_columns, plain, plain_type
from recsys_ray.storage.artifacts import read_json, write_json
from recsys_ray.storage.store import Place

_CSV_BLOCK = LONGEST  # bytes of a CSV batch
# Rows of a Parquet batch. Catalogue rows carry descriptions and vectors, interactions are narrow.
BATCH_ROWS = {"items": 1 << 15, "users": 1 << 16, "asked": 1 << 16, "interactions": 1 << 18}


@dataclass(frozen=True)
class Fragment:
    """A piece of a table: a row group of a Parquet file, or a whole CSV file (``group`` None)."""

    index: int
    table: str
    file: str
    file_index: int
    group: int | None
    first_row: int  # rows of the file before this fragment
    rows: int | None  # unknown for CSV until it is read
    columns: Columns


@dataclass(frozen=True)
class Batch:
    """Rows of one fragment.

    ``rows``: int64, counted from 1 in the file, a CSV header and empty lines not counted. ``malformed``: rows that
    cannot be read, as (row, text, what is wrong); a CSV record that goes over several lines counts line by line.
    """

    table: pa.Table
    rows: np.ndarray
    malformed: list[tuple[int, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """A table's fragments, in order of (file, row), and what was skipped."""

    fragments: list[Fragment]
    extra: list[str]  # columns that no stage reads
    other_files: list[str]
    taste: list[str]
    empty: list[str] = field(default_factory=list)  # files without a row

    @property
    def rows(self) -> int | None:
        known = [fragment.rows for fragment in self.fragments if fragment.rows is not None]
        return sum(known) if len(known) == len(self.fragments) else None

    @property
    def notes(self) -> list[str]:
        """What was skipped, for the user."""
        notes = [f"unused columns: {', '.join(self.extra)}"] if self.extra else []
        for files, what in ((self.other_files, "neither Parquet nor CSV by name"), (self.empty, "empty")):
            if files:
                one = "1 file is" if len(files) == 1 else f"{len(files):,} files are"
                shown = ", ".join(files[:3]) + ", ..." * (len(files) > 3)
                notes.append(f"{one} {what} and skipped: {shown}")
        return notes


def find_source(table: str, path: str | Sequence[str]) -> Source:
    """List a table's files and cut them into fragments.

    Raises:
        DataError: no such path, no Parquet or CSV files, a file that cannot be read, a column missing.
    """
    files, others = list_files(table, path)
    fragments: list[Fragment] = []
    extra: dict[str, None] = {}
    taste: dict[str, None] = {}
    empty: list[str] = []
    for file_index, file in enumerate(files):
        described = _describe_csv(file, table) if ends_in(file, CSV) else _describe_parquet(file)
        if described is None or not any(rows != 0 for rows in described[1]):
            empty.append(file)
            continue
        schema, group_rows = described
        partition = [pa.field(name, pa.string()) for name in partition_of(file) if name not in schema.names]
        columns = match_columns(table, pa.schema([*schema, *partition]), file)
        extra.update(dict.fromkeys(columns.extra))
        taste.update(dict.fromkeys(columns.taste))
        first = 0
        for group, rows in enumerate(group_rows):
            number = None if rows is None else group
            if rows != 0:
                fragments.append(Fragment(len(fragments), table, file, file_index, number, first, rows, columns))
            first += rows or 0
    if not fragments:
        raise DataError(f"the {table} table at {path} has no rows; check data.{table}")
    return Source(fragments, sorted(extra), others, sorted(taste), empty)


def _name(raw: str) -> str:
    """A column's name without invisible characters."""
    return raw.strip().removeprefix("\ufeff").strip()


def _describe_parquet(file: str) -> tuple[pa.Schema, list[int | None]] | None:
    """None: the file has no bytes at all. Names are trimmed, binary is text without the mark."""
    try:
        with Place(file).open() as stream:
            head = stream.read(HEAD)
            stream.seek(max(0, stream.size() - 4))
            tail = stream.read()
        if not head:
            return None
        other = not_parquet(file, head, tail)
        if other:
            raise other
        with Place(file).open() as opened, pq.ParquetFile(opened) as parquet:
            groups = parquet.metadata.num_row_groups
            fields = [pa.field(_name(f.name), text_type(f.type)) for f in parquet.schema_arrow]
            return pa.schema(fields), [parquet.metadata.row_group(g).num_rows for g in range(groups)]
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


def _open_csv(file: str) -> BinaryIO:
    """Python's gzip notices a file that is cut off, Arrow's does not."""
    stream = Place(file).open()
    return cast(BinaryIO, gzip.GzipFile(fileobj=stream) if ends_in(file, (".gz",)) else stream)


def _describe_csv(file: str, table: str) -> tuple[pa.Schema, list[int | None]] | None:
    """Every column is text; those of no known name that have cells like ``[0.5, ...`` are vectors. None: no header."""
    try:
        with Place(file).open() as stream:
            start = stream.read(HEAD)
        if ends_in(file, (".gz",)) and start and not start.startswith(b"\x1f\x8b"):
            raise not_that_kind(file, start) or DataError(
                f"{file} is not compressed with gzip although its name ends in .gz; remove .gz from the name"
            )
        with _open_csv(file) as stream:
            head = stream.read(HEAD)
        if not head.strip():
            return None
        other = not_that_kind(file, head)
        if other:
            raise other
        records = Records(io.BytesIO(head), file)
        said = not_our_csv(file, head, records.names, *column_names(table))
        if said:
            raise DataError(said)
        pieces = list(records) if len(head) < HEAD else [next(iter(records))]
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        raise _unreadable(file, error) from error
    ours = {column.name for column in TABLES[table]}
    tables = [_parse(piece, len(records.names), range(len(records.names))).slice(0, 1000) for piece in pieces]
    fields = []
    for name, cells in zip(records.names, pa.concat_tables(tables).columns, strict=True):
        listed = name not in ours and pc.any(pc.match_substring_regex(cells, r"^\s*[\[{]\s*[-\d.]")).as_py()
        fields.append((name, pa.large_list(pa.float32()) if listed else pa.string()))
    rows = any(len(piece.rows) or piece.malformed for piece in pieces) or len(head) == HEAD
    return pa.schema(fields), [None if rows else 0]


def _unreadable(file: str, error: Exception) -> DataError:
    detail = " ".join(str(error).split())[:300]
    return DataError(f"{file} cannot be read ({detail}); replace or remove the file")


def read_batches(fragment: Fragment) -> Iterator[Batch]:
    """Stream a fragment.

    Raises:
        DataError: the file is damaged, or has CSV that is not UTF-8 or a record that never ends.
    """
    try:
        for batch in _read_csv(fragment) if fragment.group is None else _read_parquet(fragment):
            for name, value in partition_of(fragment.file).items():
                if name in fragment.columns.read and name not in batch.table.column_names:
                    cells = pa.array([value], pa.string()).take(pa.array(np.zeros(len(batch.table), np.int8)))
                    batch = Batch(batch.table.append_column(name, cells), batch.rows, batch.malformed)
            yield batch
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        raise _unreadable(fragment.file, error) from error


def _read_parquet(fragment: Fragment) -> Iterator[Batch]:
    first = fragment.first_row + 1
    with Place(fragment.file).open() as opened, pq.ParquetFile(opened) as parquet:
        names = {f.name: _name(f.name) for f in parquet.schema_arrow if _name(f.name) in fragment.columns.read}
        for batch in parquet.iter_batches(
            batch_size=BATCH_ROWS[fragment.table],
            row_groups=[fragment.group],
            columns=list(names),
            use_threads=False,
        ):
            table = pa.Table.from_batches([batch]).select(list(names)).rename_columns(list(names.values()))
            rows = np.arange(first, first + len(batch), dtype=np.int64)
            yield _without_bad_text(Batch(table, rows), fragment.file)
            first += len(batch)


def text_type(kind: pa.DataType) -> pa.DataType:
    """The plain type, with text for binary, also in lists: Impala, old Hive and others leave out the mark of text."""
    kind = plain_type(kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.large_list(pa.string()) if _is_binary(plain_type(kind.value_type)) else kind
    return pa.string() if _is_binary(kind) else kind


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _without_bad_text(batch: Batch, file: str) -> Batch:
    """The batch with binary columns as text; rows whose text is not UTF-8 are malformed. Writers and readers of Parquet
    do not look."""
    columns = {name: plain(batch.table[name]) for name in batch.table.column_names}
    wrong: dict[int, str] = {}
    for name, column in columns.items():
        for row, cell in _bad_text(column):
            wrong.setdefault(row, f"{name} is not UTF-8 text: {cell[:60]!r}")
    told = []
    for row in sorted(wrong):
        cells = {name: _shown(column.slice(row, 1)) for name, column in columns.items()}
        number = int(batch.rows[row])
        told.append(
            (number, json.dumps(cells, ensure_ascii=False, default=str), f"in row {number} of {file} {wrong[row]}")
        )
    kept = np.setdiff1d(np.arange(len(batch.table)), list(wrong))
    if wrong:
        columns = {name: column.take(pa.array(kept)) for name, column in columns.items()}
    table = pa.table({name: column.cast(text_type(column.type)) for name, column in columns.items()})
    return Batch(table, batch.rows[kept], [*batch.malformed, *told])


def _bad_text(column: pa.Array) -> list[tuple[int, bytes]]:
    """(row, cell) of the text that is not UTF-8."""
    kind, binary = column.type, pa.large_binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        parents = pc.list_parent_indices(column)
        return [(parents[i].as_py(), cell) for i, cell in _bad_text(plain(column.flatten()))]
    if _is_binary(kind):
        try:
            column.cast(pa.large_string())
            return []
        except pa.ArrowInvalid:
            cells = column
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        try:
            column.validate(full=True)
            return []
        except pa.ArrowInvalid:
            cells = column.cast(binary)
    else:
        return []
    found = enumerate(cells.to_pylist())
    return [(i, cell) for i, cell in found if cell is not None and bad_utf8(cell, whole=True) is not None]


def _shown(cell: pa.Array) -> Any:
    """A cell as JSON can hold it, whatever its text is."""
    if _bad_text(cell):
        flat = cell.flatten() if pa.types.is_list(cell.type) or pa.types.is_large_list(cell.type) else cell
        return " ".join(text.decode("utf-8", "replace") for text in flat.cast(pa.large_binary()).to_pylist() if text)
    return cell.cast(text_type(cell.type))[0].as_py()


def _read_csv(fragment: Fragment) -> Iterator[Batch]:
    with _open_csv(fragment.file) as stream:
        records = Records(stream, fragment.file, _CSV_BLOCK)
        read = [name for name in fragment.columns.read if name in records.names]
        places = [records.names.index(name) for name in read]
        for piece in records:
            if len(piece.rows) or piece.malformed:
                table = _parse(piece, len(records.names), places).rename_columns(read)
                yield Batch(table, piece.rows, piece.malformed)


def _parse(piece: Piece, width: int, places: Iterable[int]) -> pa.Table:
    """The records of a piece as a table of text; an empty cell is null."""
    names = [str(i) for i in range(width)]
    read = [str(i) for i in places]
    if not len(piece.rows):
        return pa.schema([(name, pa.string()) for name in read]).empty_table()
    table = pa.csv.read_csv(
        pa.BufferReader(piece.text),
        read_options=pa.csv.ReadOptions(use_threads=False, block_size=len(piece.text) + 1, column_names=names),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            include_columns=read,
            strings_can_be_null=True,
            null_values=[""],
        ),
    )
    assert len(table) == len(piece.rows), (len(table), len(piece.rows))
    return table


# -- tasks -----------------------------------------------------------------------------------------------------------


def run_tasks(
    work: Callable[[int], dict[str, Any]],
    count: int,
    done: Path,
    progress: Progress,
    description: str,
    total_rows: int | None = None,
) -> list[dict[str, Any]]:
    """Run ``work(i)`` for i < ``count`` as Ray Data tasks; the results in order of i.

    A task's result is stored as ``done/i.json`` once its files are written, and the task does not run again: an
    interrupted stage continues where it stopped. A result's ``rows`` counts for the progress.

    Raises:
        DataError: a task raised it; it is passed on unchanged.
    """
    import ray
    from ray.data import TaskPoolStrategy

    done.mkdir(parents=True, exist_ok=True)
    results: dict[int, dict[str, Any]] = {}
    for i in range(count):
        file = done / f"{i:05d}.json"
        if file.exists():
            results[i] = read_json(file)
    todo = [i for i in range(count) if i not in results]
    with progress.task(description, total=total_rows, unit="rows") as task:
        task.update(seen := sum(result["rows"] for result in results.values()))
        if todo:
            # No more at once than there are real CPUs: the logical ones to spare are not meant for work.
            at_once = max(1, int(ray.cluster_resources().get("CPU", 1)) - LOGICAL_CPUS_TO_SPARE)
            queue = ray.data.from_items([{"i": i} for i in todo], override_num_blocks=len(todo))
            call = functools.partial(_run_one, work, str(done))
            pool = TaskPoolStrategy(size=min(at_once, len(todo)))
            for row in queue.map_batches(call, batch_size=1, compute=pool, num_cpus=1).iter_rows():
                if row["error"]:
                    raise DataError(row["error"])
                results[row["i"]] = result = json.loads(row["result"])
                seen += result["rows"]
                task.update(seen, detail=f"{len(results)} of {count} parts")
    return [results[i] for i in range(count)]


def _run_one(work: Callable[[int], dict[str, Any]], done: str, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One task. A UserError travels as a value: Ray would wrap it and retry."""
    pa.set_cpu_count(1)  # Ray granted one CPU
    i = int(batch["i"][0])
    error, result = "", {}
    try:
        result = work(i)
        write_json(Path(done) / f"{i:05d}.json", result)
    except UserError as problem:  # of the table, or of the store that it lies in
        error = str(problem)
    return {"i": np.array([i]), "error": np.array([error]), "result": np.array([json.dumps(result)])}
