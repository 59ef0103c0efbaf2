"""Row checks: every row of a batch either passes, in its one representation, or goes to quarantine with a reason."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.core.errors import DataError
from recsys_ray.data.reading import Batch
from recsys_ray.data.schema import TABLES, Column, Converted, convert, nearest, plain

QUARANTINE = pa.schema(
    [
        ("file", pa.string()),
        ("row", pa.int64()),
        ("table", pa.string()),
        ("reason", pa.string()),
        ("record", pa.string()),
    ]
)
MILLISECONDS_FROM = 10**11  # as seconds, the year 5138
MAX_AGE = 130


class Findings:
    """The first thing wrong with each row: a short kind, to count by, and a sentence that names the field."""

    def __init__(self, rows: int) -> None:
        self.fine = np.ones(rows, dtype=bool)
        self.found: dict[int, tuple[str, str]] = {}

    def add(self, wrong: np.ndarray, kind: str, sentence: str | Callable[[int], str]) -> None:
        """``wrong``: bool [rows]; ``sentence`` is the same for all, or made from the row's position."""
        for i in np.flatnonzero(wrong & self.fine).tolist():
            self.found[i] = (kind, sentence if isinstance(sentence, str) else sentence(i))
        self.fine &= ~wrong


@dataclass
class Checked:
    """``good``: the rows that passed, with ``row`` (int64) and the table's columns. ``quarantine``: the others, as
    QUARANTINE. ``kinds``: kind -> [count, an example sentence]. ``ignored``: rows left out by configuration."""

    good: pa.Table
    quarantine: pa.Table
    kinds: dict[str, list[Any]]
    ignored: int = 0
    untitled: int = 0
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Catalogue:
    """What interactions are checked against: item_id (string), ntype (int16) by gid, and the types' names.

    ``others``: ids of items that were left out on purpose; their interactions are, too."""

    item_ids: pa.Array
    ntypes: np.ndarray
    type_names: Sequence[str]
    others: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))


@dataclass(frozen=True)
class EventRules:
    """``names``: the events that count, in the order of their codes. ``now``: unix seconds."""

    names: Sequence[str]
    ignored: Sequence[str]
    now: int


def check_items(batch: Batch, file: str) -> Checked:
    """Items: ids, types and dates must be there and readable; a missing title becomes an empty one."""
    columns, findings = _convert_all("items", batch)
    values = {name: column.values for name, column in columns.items()}
    titles, descriptions = (_unescape(values[name]) for name in ("title", "description"))
    untitled = _null(titles) & findings.fine
    values |= {
        "title": titles.fill_null(""),
        "description": descriptions,
        "available": values["available"].fill_null(True),
    }
    checked = _divide("items", batch, file, values, findings)
    checked.untitled = int(untitled.sum())
    return checked


def check_users(batch: Batch, file: str, taste: Sequence[str]) -> Checked:
    """Users: an id, an age of 0 to 130 if any, finite taste vectors. The vectors' lengths are for the caller to
    compare across all files: ``lengths`` has column -> length -> rows."""
    columns, findings = _convert_all("users", batch, [Column(name, "vector") for name in taste])
    ages = _numbers(columns["age"].values, 0.0)
    raw = _raw(batch, "age")
    findings.add(
        (ages < 0) | (ages > MAX_AGE), "age out of range", lambda i: f"age is {raw(i)}, outside 0 to {MAX_AGE}"
    )
    values = {name: column.values for name, column in columns.items()}
    values["age"] = values["age"].cast(pa.float32())
    checked = _divide("users", batch, file, values, findings)
    for name in taste:
        lengths = pc.value_counts(pc.list_value_length(checked.good[name]).drop_null())
        checked.lengths[name] = {str(entry["values"]): entry["counts"] for entry in lengths.to_pylist()}
    return checked


def check_interactions(batch: Batch, file: str, catalogue: Catalogue, rules: EventRules) -> Checked:
    """Interactions: the good ones come back as user_id (string), gid (int32), event (int8), timestamp (int64), row."""
    events = convert(_column(batch, "event"), "text", len(batch.table)).values
    ignored = pc.is_in(events, pa.array(rules.ignored, pa.string())).to_numpy(zero_copy_only=False)
    if len(catalogue.others):
        items = convert(_column(batch, "item_id"), "id", len(batch.table)).values
        ignored = ignored | pc.is_in(items, catalogue.others).to_numpy(zero_copy_only=False)
    skipped = int(ignored.sum())
    if skipped:
        keep = pa.array(~ignored)
        batch = Batch(batch.table.filter(keep), batch.rows[~ignored], batch.malformed)
    columns, findings = _convert_all("interactions", batch)
    codes = _check_event(columns["event"].values, rules, findings)
    _check_moment(batch, columns["timestamp"].values, rules.now, findings)
    gids = _check_item(columns, catalogue, findings)
    values = {
        "user_id": columns["user_id"].values,
        "gid": pa.array(gids, pa.int32()),
        "event": pa.array(codes, pa.int8()),
        "timestamp": columns["timestamp"].values,
    }
    checked = _divide("interactions", batch, file, values, findings)
    checked.ignored = skipped
    return checked


def _check_event(events: pa.Array, rules: EventRules, findings: Findings) -> np.ndarray:
    """Codes of the events, int32 [rows], -1 where unknown."""
    codes = _numbers(pc.index_in(events, value_set=pa.array(rules.names, pa.string())), -1)
    hints: dict[str, str] = {}

    def unknown(i: int) -> str:
        name = events[i].as_py()
        if name not in hints:
            known = [*rules.names, *rules.ignored]
            hints[name] = f'event "{name}" is in none of the lists of the events section{nearest(name, known)}'
        return hints[name]

    findings.add(codes < 0, "unknown event", unknown)
    return codes


def _check_moment(batch: Batch, seconds: pa.Array, now: int, findings: Findings) -> None:
    moments, raw = _numbers(seconds, 0), _raw(batch, "timestamp")
    findings.add(
        moments > MILLISECONDS_FROM,
        "timestamp in milliseconds",
        lambda i: f"timestamp is {raw(i)}, which looks like milliseconds; whole numbers are read as unix seconds",
    )
    findings.add(
        moments > now,
        "timestamp in the future",
        lambda i: f"timestamp is {raw(i)}, later than {utc(now)} (data.now)",
    )
    findings.add(moments < 0, "timestamp before 1970", lambda i: f"timestamp is {raw(i)}, before 1970")


def _check_item(columns: Mapping[str, Converted], catalogue: Catalogue, findings: Findings) -> np.ndarray:
    """gids, int32 [rows], -1 where unknown."""
    items, types = columns["item_id"].values, columns["item_type"].values
    gids = _numbers(pc.index_in(items, value_set=catalogue.item_ids), -1)
    findings.add(gids < 0, "unknown item", lambda i: f'item_id "{items[i]}" is not among the items that were kept')
    names = pa.array(catalogue.type_names, pa.string())
    claimed = _numbers(pc.index_in(types, value_set=names), -1)
    actual = catalogue.ntypes[gids]  # where the item is unknown, the row is already in quarantine
    findings.add(
        ~_null(types) & (claimed != actual),
        "item_type contradicts the catalogue",
        lambda i: f'item_type is "{types[i]}", but the catalogue has "{catalogue.type_names[actual[i]]}"',
    )
    return gids


def utc(seconds: int) -> str:
    """A moment as a reader writes it; the time of day only where it is not midnight."""
    text = datetime.fromtimestamp(seconds, UTC).isoformat(sep=" ").removesuffix("+00:00")
    return text.removesuffix(" 00:00:00")


# -- common to all tables --------------------------------------------------------------------------------------------


def _convert_all(table: str, batch: Batch, more: Sequence[Column] = ()) -> tuple[dict[str, Converted], Findings]:
    """Every column in its one representation; what is missing or does not fit is found."""
    findings = Findings(len(batch.table))
    columns = {}
    for column in (*TABLES[table], *more):
        converted = convert(_column(batch, column.name), column.kind, len(batch.table))
        columns[column.name] = converted
        _find_unreadable(batch, column, converted, findings)
    return columns, findings


def _find_unreadable(batch: Batch, column: Column, converted: Converted, findings: Findings) -> None:
    name, raw = column.name, _raw(batch, column.name)
    what = {
        "id": "not an id",
        "seconds": "not a time (unix seconds or an ISO date)",
        "number": "not a number",
        "flag": "neither true nor false",
        "vector": "not a list of finite numbers",
    }.get(column.kind, "not readable")
    findings.add(converted.bad, f"unreadable {name}", lambda i: f"{name} is {raw(i)}, {what}")
    if column.required and name != "title":
        findings.add(_null(converted.values), f"missing {name}", f"{name} is missing")
    if name == "published_at":
        late = _numbers(converted.values, 0) > MILLISECONDS_FROM
        findings.add(
            late,
            "published_at in milliseconds",
            lambda i: f"{name} is {raw(i)}, which looks like milliseconds; whole numbers are read as unix seconds",
        )


def _divide(table: str, batch: Batch, file: str, values: Mapping[str, pa.Array], findings: Findings) -> Checked:
    keep = pa.array(findings.fine)
    good = pa.table({"row": pa.array(batch.rows, pa.int64()), **values}).filter(keep)
    positions = sorted(findings.found)
    rejected = batch.table.take(pa.array(positions, pa.int64()))
    rows = [int(batch.rows[i]) for i in positions]
    reasons = [findings.found[i] for i in positions]
    records = as_records(rejected)
    for row, text, wrong in batch.malformed:
        rows.append(row)
        reasons.append(("malformed record", wrong))
        records.append(json.dumps({"text": text}, ensure_ascii=False))
    return Checked(good, quarantine_table(file, rows, table, [r for _, r in reasons], records), count_kinds(reasons))


def count_kinds(reasons: Sequence[tuple[str, str]]) -> dict[str, list[Any]]:
    """kind -> [count, the first sentence], for (kind, sentence) pairs."""
    kinds: dict[str, list[Any]] = {}
    for kind, sentence in reasons:
        kinds.setdefault(kind, [0, sentence])[0] += 1
    return kinds


def split_duplicates(items: pa.Table, files: Mapping[int, str]) -> tuple[pa.Table, pa.Table]:
    """The first row of each item_id in order of (file, row), and the others as QUARANTINE.

    Args:
        items: rows that passed, in that order, with ``row`` and ``file`` (a key of ``files``).
    """
    codes = items["item_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    _, first, of = np.unique(codes, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[of] != np.arange(len(items)))
    numbers, rows = items["file"].to_numpy(), items["row"].to_numpy()
    sentences = [
        f"item_id is that of row {rows[i]} of {files[int(numbers[i])]}, which was kept" for i in first[of[again]]
    ]
    records = as_records(items.drop_columns(["file", "row"]).take(pa.array(again)))
    bad = quarantine_table(
        [files[n] for n in numbers[again].tolist()], rows[again].tolist(), "items", sentences, records
    )
    return items.take(pa.array(np.sort(first))), bad


def judge_rows(
    table: str, rows: Mapping[str, int], kinds: Mapping[str, Sequence[Any]], limit: float, quarantine: Path
) -> str:
    """A line on what became of a table's rows.

    Args:
        rows: counts by ``read``, ``kept``, ``quarantined``, ``ignored``.
        kinds: kind -> [count, an example sentence].
        limit: the largest share that may be bad (``data.max_bad_share``).

    Raises:
        DataError: more is bad, or nothing is left.
    """
    frequent = sorted(kinds.items(), key=lambda entry: (-entry[1][0], entry[0]))
    share = rows["quarantined"] / max(rows["read"], 1)
    if share > limit or not rows["kept"]:
        examples = "; ".join(f"{kind}: {count:,}, as in: {text}" for kind, (count, text) in frequent)
        what = f"{rows['quarantined']:,} of {rows['read']:,} rows of the {table} table are bad"
        limit_text = f"more than data.max_bad_share ({limit:.0%})" if share > limit else "and none is left"
        by = "by events.ignore or data.item_types"
        ignored = f"; {rows['ignored']:,} were left out {by}" if rows["ignored"] else ""
        raise DataError(f"{what}, {limit_text}. {examples}{ignored}. The rows are in {quarantine}")
    said = ", ".join(f"{kind} {count:,}" for kind, (count, _) in frequent)
    left = f", {rows['ignored']:,} ignored" if rows["ignored"] else ""
    bad = f", {rows['quarantined']:,} to quarantine ({said})" if said else ""
    return f"  {table}: {rows['read']:,} rows read, {rows['kept']:,} kept{left}{bad}"


def quarantine_table(
    file: str | Sequence[str], rows: Sequence[int], table: str, reasons: Sequence[str], records: Sequence[str]
) -> pa.Table:
    """Quarantined rows as QUARANTINE, in the order of their row numbers within a file."""
    files = [file] * len(rows) if isinstance(file, str) else list(file)
    made = pa.table([files, list(rows), [table] * len(rows), list(reasons), list(records)], schema=QUARANTINE)
    return made.sort_by([("file", "ascending"), ("row", "ascending")])


def as_records(table: pa.Table) -> list[str]:
    """Rows as JSON, in the file's own representation as far as JSON has it."""
    table = pa.table({name: plain(table[name]) for name in table.column_names}) if table.num_columns else table
    return [json.dumps(row, ensure_ascii=False, default=str) for row in table.to_pylist()]


def _column(batch: Batch, name: str) -> pa.ChunkedArray | None:
    return batch.table[name] if name in batch.table.column_names else None


def _raw(batch: Batch, name: str) -> Callable[[int], str]:
    """A cell as a reason quotes it."""

    def quote(i: int) -> str:
        value = batch.table[name][i].as_py()
        text = f'"{value}"' if isinstance(value, str) else str(value)
        return text if len(text) <= 80 else f"{text[:77]}..."

    return quote


def _null(array: pa.Array) -> np.ndarray:
    return array.is_null().to_numpy(zero_copy_only=False)


def _numbers(array: pa.Array, fill: float) -> np.ndarray:
    return array.fill_null(fill).to_numpy(zero_copy_only=False)


def _unescape(texts: pa.Array) -> pa.Array:
    """HTML entities to characters: catalogues scraped from pages are full of ``&amp;``."""
    if not pc.any(pc.match_substring(texts, "&")).as_py():
        return texts
    plain_texts = (text if text is None else html.unescape(text).strip() for text in texts.to_pylist())
    return pa.array([text or None for text in plain_texts], pa.string())
