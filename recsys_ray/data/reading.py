"""From Parquet or CSV, a file or a folder of them, to batches in which every row knows its file and number.

A table is cut into fragments (a Parquet row group, a CSV file), which Ray Data's tasks read one each. A fragment is
streamed batch by batch, so its size does not bound the memory of the task.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from recsys_ray.cluster.session import LOGICAL_CPUS_TO_SPARE
from recsys_ray.core.errors import DataError
from recsys_ray.core.progress import Progress
from recsys_ray.data.schema import TABLES, Columns, match_columns
from recsys_ray.storage.artifacts import write_json

_PARQUET, _CSV = (".parquet", ".pq"), (".csv", ".csv.gz")
_CSV_HEAD = 1 << 20  # bytes in which the kinds of a CSV file's columns are looked up
_CSV_BLOCK = 16 << 20  # bytes of a CSV batch; no row may be longer
# Rows of a Parquet batch. Catalogue rows carry descriptions and vectors, interactions are narrow.
BATCH_ROWS = {"items": 1 << 15, "users": 1 << 16, "interactions": 1 << 18}


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

    ``rows``: int64, counted from 1 in the file, a CSV header not counted. ``malformed``: CSV records that have too
    many or too few cells, as (row, text, what is wrong).
    """

    table: pa.Table
    rows: np.ndarray
    malformed: list[tuple[int, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """A table's fragments, in order of (file, row), and what was left aside."""

    fragments: list[Fragment]
    extra: list[str]  # columns that no stage reads
    other_files: list[str]
    taste: list[str]

    @property
    def rows(self) -> int | None:
        known = [fragment.rows for fragment in self.fragments if fragment.rows is not None]
        return sum(known) if len(known) == len(self.fragments) else None


def find_source(table: str, path: str) -> Source:
    """List a table's files and cut them into fragments.

    Raises:
        DataError: no such path, no Parquet or CSV files, a file that cannot be read, a column missing.
    """
    files, others = _list_files(table, path)
    fragments: list[Fragment] = []
    extra: dict[str, None] = {}
    taste: dict[str, None] = {}
    for file_index, file in enumerate(files):
        schema, group_rows = _describe_csv(file) if file.lower().endswith(_CSV) else _describe_parquet(file)
        columns = match_columns(table, schema, file)
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
    return Source(fragments, sorted(extra), others, sorted(taste))


def _list_files(table: str, path: str) -> tuple[list[str], list[str]]:
    root = Path(path)
    if not root.exists():
        raise DataError(
            f"there is no file or folder {path} for the {table} table; set data.{table} to a Parquet or CSV file, or "
            "to a folder of them"
        )
    found = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    # Spark, Ray and others leave files like _SUCCESS and .part.crc beside the data.
    visible = [p for p in found if not any(part.startswith((".", "_")) for part in p.relative_to(root).parts)]
    files = [str(p) for p in visible if p.name.lower().endswith(_PARQUET + _CSV)]
    if not files:
        kinds = ", ".join((*_PARQUET, *_CSV))
        raise DataError(f"{path} holds no file for the {table} table that ends in {kinds}; set data.{table}")
    return files, [str(p) for p in visible if str(p) not in set(files)]


def _describe_parquet(file: str) -> tuple[pa.Schema, list[int | None]]:
    try:
        with pq.ParquetFile(file) as parquet:
            groups = parquet.metadata.num_row_groups
            return parquet.schema_arrow, [parquet.metadata.row_group(g).num_rows for g in range(groups)]
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


def _describe_csv(file: str) -> tuple[pa.Schema, list[int | None]]:
    """Every column is text; those of no known name whose cells begin with a JSON list are vectors."""
    try:
        with pa.input_stream(file, compression="detect") as stream:
            head = stream.read(_CSV_HEAD)
        lines = csv.reader(io.StringIO(head.decode("utf-8-sig", errors="ignore"), newline=""))
        names = next(lines, None)
        rows = list(itertools.islice(lines, 1000))
    except (pa.ArrowException, OSError, csv.Error) as error:
        raise _unreadable(file, error) from error
    if not names:
        raise DataError(f"{file} is empty; a CSV file begins with a line of column names")
    ours = {column.name for columns in TABLES.values() for column in columns}
    lists = {name for row in rows for name, cell in zip(names, row, strict=False) if cell.lstrip().startswith("[")}
    vector = pa.large_list(pa.float32())
    types = [vector if name in lists and name not in ours else pa.string() for name in names]
    return pa.schema(list(zip(names, types, strict=True))), [None if any(rows) else 0]


def _unreadable(file: str, error: Exception) -> DataError:
    detail = " ".join(str(error).split())[:300]
    return DataError(f"{file} cannot be read ({detail}); replace or remove the file")


def read_batches(fragment: Fragment) -> Iterator[Batch]:
    """Stream a fragment.

    Raises:
        DataError: the file is damaged, not UTF-8, or has a CSV record that never ends.
    """
    try:
        yield from _read_csv(fragment) if fragment.group is None else _read_parquet(fragment)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(fragment.file, error) from error


def _read_parquet(fragment: Fragment) -> Iterator[Batch]:
    first = fragment.first_row + 1
    with pq.ParquetFile(fragment.file) as parquet:
        for batch in parquet.iter_batches(
            batch_size=BATCH_ROWS[fragment.table],
            row_groups=[fragment.group],
            columns=fragment.columns.read,
            use_threads=False,
        ):
            yield Batch(pa.Table.from_batches([batch]), np.arange(first, first + len(batch), dtype=np.int64))
            first += len(batch)


def _read_csv(fragment: Fragment) -> Iterator[Batch]:
    """Row numbers survive malformed records: Arrow tells the number of each one that it leaves out."""
    skipped: list[tuple[int, str, str]] = []

    def skip(row: pa.csv.InvalidRow) -> str:
        wrong = f"the record has {row.actual_columns} cells where the header has {row.expected_columns}"
        skipped.append((row.number - 1, row.text, wrong))
        return "skip"

    names = _describe_csv(fragment.file)[0].names
    reader = pa.csv.open_csv(
        fragment.file,
        read_options=pa.csv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            include_columns=fragment.columns.read,
            strings_can_be_null=True,
            null_values=[""],
        ),
    )
    following, reported = 1, 0
    for batch in reader:
        # The j-th good row is the j-th number that is not among the skipped ones.
        gone = [number for number, _, _ in skipped if number >= following]
        candidates = np.arange(following, following + len(batch) + len(gone), dtype=np.int64)
        rows = candidates[~np.isin(candidates, gone)][: len(batch)]
        yield Batch(pa.Table.from_batches([batch]), rows, skipped[reported:])
        reported = len(skipped)
        following = int(rows[-1]) + 1 if len(rows) else following
    if reported < len(skipped):
        empty = pa.schema([(name, pa.string()) for name in fragment.columns.read]).empty_table()
        yield Batch(empty, np.zeros(0, dtype=np.int64), skipped[reported:])


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

    A task's result is kept as ``done/i.json`` once its files are written, and such a task is not run again: an
    interrupted stage goes on where it stopped. A result's ``rows`` counts for the progress.

    Raises:
        DataError: what a task raised, as it was.
    """
    import ray
    from ray.data import TaskPoolStrategy

    done.mkdir(parents=True, exist_ok=True)
    results: dict[int, dict[str, Any]] = {}
    for i in range(count):
        file = done / f"{i:05d}.json"
        if file.exists():
            results[i] = json.loads(file.read_text(encoding="utf-8"))
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
    """One task. A DataError travels as a value: Ray would wrap it and retry."""
    pa.set_cpu_count(1)  # Ray granted one CPU
    i = int(batch["i"][0])
    error, result = "", {}
    try:
        result = work(i)
        write_json(Path(done) / f"{i:05d}.json", result)
    except DataError as problem:
        error = str(problem)
    return {"i": np.array([i]), "error": np.array([error]), "result": np.array([json.dumps(result)])}


def replace_aside(write: Callable[[Path], None], target: Path, scratch: Path) -> None:
    """``write`` a file into the scratch folder, then rename it to ``target``: it is there whole or not at all."""
    scratch.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = scratch / f"{target.name}.{os.getpid()}.tmp"
    write(aside)
    aside.replace(target)
