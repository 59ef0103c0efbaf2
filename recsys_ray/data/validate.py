"""Row checks: every row of a batch either passes, in a canonical representation, or is quarantined with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.config import DataConfig
from recsys_ray.core.errors import DataError
from recsys_ray.data.convert import Converted, convert
from recsys_ray.data.reading import Batch
from recsys_ray.data.schema import TABLES, Column, nearest, plain

_TEXT = pa.string()
QUARANTINE = pa.schema({"file": _TEXT, "row": pa.int64(), "table": _TEXT, "reason": _TEXT, "record": _TEXT})
MAX_AGE = 130
MALFORMED = "malformed record"


class Findings:
    """The first thing wrong with each row: a short kind, to count by, and a sentence that names the field. And optional
    values that are wrong: the row stays without them."""

    def __init__(self, rows: int) -> None:
        self.fine = np.ones(rows, dtype=bool)
        self.found: dict[int, tuple[str, str]] = {}
        self.dropped: list[tuple[np.ndarray, str, Callable[[int], str]]] = []
        self.taken: dict[str, int] = {}

    def add(self, wrong: np.ndarray, kind: str, sentence: str | Callable[[int], str]) -> None:
        """``wrong``: bool [rows]; ``sentence`` is the same for all, or made from the row's position."""
        for i in np.flatnonzero(wrong & self.fine).tolist():
            self.found[i] = (kind, sentence if isinstance(sentence, str) else sentence(i))
        self.fine &= ~wrong

    def drop(self, wrong: np.ndarray, kind: str, sentence: Callable[[int], str]) -> None:
        """As :meth:`add`, for values left empty in rows that are kept."""
        if wrong.any():
            self.dropped.append((wrong, kind, sentence))


@dataclass
class Tally:
    """What became of some rows of a table, as JSON can hold it."""

    read: int = 0
    kept: int = 0
    ignored: int = 0  # left out by configuration
    repeated: int = 0  # one of them counts
    untitled: int = 0
    kinds: dict[str, list[Any]] = field(default_factory=dict)  # of quarantined rows: kind -> [count, first sentence]
    dropped: dict[str, list[Any]] = field(default_factory=dict)  # the same for values left empty in kept rows
    taken: dict[str, int] = field(default_factory=dict)  # values not read in the plainest way, by how
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)  # of taste vectors: column -> length -> rows

    def __add__(self, more: Tally) -> Tally:
        mine, other = vars(self), vars(more)
        return Tally(**{name: _added(mine[name], other[name]) for name in mine})

    @property
    def quarantined(self) -> int:
        return sum(count for count, _ in self.kinds.values())


def _added(mine: Any, more: Any) -> Any:
    """The sum of two counts; of what two dictionaries have under the same key; of two entries [count, example]."""
    if isinstance(mine, dict):
        return mine | {key: _added(mine[key], value) if key in mine else value for key, value in more.items()}
    return [mine[0] + more[0], mine[1]] if isinstance(mine, list) else mine + more


class Checked(NamedTuple):
    """``good``: the rows that passed, with ``row`` (int64) and the table's columns. ``quarantine``: the others, as
    QUARANTINE."""

    good: pa.Table
    quarantine: pa.Table
    tally: Tally


@dataclass(frozen=True)
class Catalogue:
    """What interactions are checked against: item_id (string), ntype (int16) by gid, and the types' names.

    ``others``: ids of items skipped on purpose; their interactions are skipped as well."""

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
    """Items: ids and types must be there and readable; a missing title becomes an empty one. An item that may be
    available or not, as its value cannot be read, is taken for withdrawn."""
    columns, findings = _convert_all("items", batch)
    values = {name: column.values for name, column in columns.items()}
    untitled = _null(values["title"]) & findings.fine
    available = pc.if_else(pa.array(columns["available"].bad), False, values["available"])
    values |= {"title": values["title"].fill_null(""), "available": available.fill_null(True)}
    return _divide("items", batch, file, values, findings, untitled=int(untitled.sum()))


def check_users(batch: Batch, file: str, taste: Sequence[str]) -> Checked:
    """Users: an id; other values stay where they are readable, an age where it is 0 to 130. The vectors' lengths are
    for the caller to compare across all files."""
    columns, findings = _convert_all("users", batch, [Column(name, "vector") for name in taste])
    ages = _numbers(columns["age"].values, 0.0)
    raw, odd = _raw(batch, "age"), (ages < 0) | (ages > MAX_AGE)
    findings.drop(odd, "age out of range", lambda i: f"age is {raw(i)}, outside 0 to {MAX_AGE}")
    values = {name: column.values for name, column in columns.items()}
    values["age"] = pc.if_else(pa.array(odd), None, values["age"]).cast(pa.float32())
    checked = _divide("users", batch, file, values, findings)
    for name in taste:
        lengths = pc.value_counts(pc.list_value_length(checked.good[name]).drop_null())
        checked.tally.lengths[name] = {str(entry["values"]): entry["counts"] for entry in lengths.to_pylist()}
    return checked


def check_interactions(batch: Batch, file: str, catalogue: Catalogue, rules: EventRules) -> Checked:
    """Interactions: the good ones come back as user_id (string), gid (int32), event (int8), timestamp (int64), row."""
    events = convert(_column(batch, "event"), "name", len(batch.table)).values
    ignored = pc.is_in(events, pa.array(rules.ignored, pa.string())).to_numpy(zero_copy_only=False)
    if len(catalogue.others):
        items = convert(_column(batch, "item_id"), "id", len(batch.table)).values
        ignored = ignored | pc.is_in(items, catalogue.others).to_numpy(zero_copy_only=False)
    if ignored.any():
        batch = Batch(batch.table.filter(pa.array(~ignored)), batch.rows[~ignored], batch.malformed)
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
    return _divide("interactions", batch, file, values, findings, ignored=int(ignored.sum()))


def _check_event(events: pa.Array, rules: EventRules, findings: Findings) -> np.ndarray:
    """Codes of the events, int32 [rows], -1 where unknown."""
    codes = _numbers(pc.index_in(events, value_set=pa.array(rules.names, pa.string())), -1)
    hints: dict[str, str] = {}

    def unknown(i: int) -> str:
        name = events[i].as_py()
        if name not in hints:
            known = [*rules.names, *rules.ignored]
            hints[name] = f'event "{name}" is in none of the lists in the events section{nearest(name, known)}'
        return hints[name]

    findings.add(codes < 0, "unknown event", unknown)
    return codes


def _check_moment(batch: Batch, seconds: pa.Array, now: int, findings: Findings) -> None:
    moments, raw = _numbers(seconds, 0), _raw(batch, "timestamp")
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
    findings.add(gids < 0, "unknown item", lambda i: f'item_id "{items[i]}" is not among the items kept')
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
    text = (datetime(1970, 1, 1) + timedelta(seconds=seconds)).isoformat(sep=" ")
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
        "id": "not an id (text or a whole number; floats are exact below 2^53)",
        "name": "neither text nor a whole number",
        "seconds": "not a time (write unix seconds or an ISO date such as 2024-01-31)",
        "number": "not a number",
        "flag": "neither true nor false",
        "vector": "not a list of finite numbers",
    }.get(column.kind, "not readable")
    find = findings.add if column.required else findings.drop
    find(converted.bad, f"unreadable {name}", lambda i: f"{name} is {raw(i)}, {what}")
    if column.required and name != "title":

        def missing(i: int) -> str:
            cell = str(batch.table[name][i].as_py() or "").strip() if name in batch.table.column_names else ""
            return f'{name} is "{cell}", which means no value' if cell else f"{name} is missing"

        findings.add(_null(converted.values), f"missing {name}", missing)
    for taken, count in converted.taken.items():
        findings.taken[f"{name} in {taken}"] = count


def _divide(
    table: str,
    batch: Batch,
    file: str,
    values: Mapping[str, pa.Array],
    findings: Findings,
    ignored: int = 0,
    untitled: int = 0,
) -> Checked:
    good = pa.table({"row": pa.array(batch.rows, pa.int64()), **values}).filter(pa.array(findings.fine))
    positions = sorted(findings.found)
    rejected = batch.table.take(pa.array(positions, pa.int64()))
    rows = [int(batch.rows[i]) for i in positions]
    reasons = [findings.found[i] for i in positions]
    records = as_records(rejected)
    for row, text, wrong in batch.malformed:
        rows.append(row)
        reasons.append((MALFORMED, wrong))
        records.append(json.dumps({"text": text}, ensure_ascii=False))
    tally = Tally(len(batch.table) + len(batch.malformed) + ignored, len(good), ignored, untitled=untitled)
    tally.taken = findings.taken
    for kind, sentence in reasons:
        tally.kinds.setdefault(kind, [0, sentence])[0] += 1
    for unfit, kind, say in findings.dropped:
        if len(at := np.flatnonzero(unfit & findings.fine)):
            tally.dropped[kind] = [len(at), f"row {batch.rows[at[0]]} of {file}: {say(int(at[0]))}"]
    bad = quarantine_table(file, rows, table, [sentence for _, sentence in reasons], records)
    return Checked(good, bad, tally)


def newest_of_each(items: pa.Table, files: Mapping[int, str]) -> Checked:
    """The last row of each item_id in order of (file, row): a later export of the catalogue replaces an earlier one.
    Rows whose item_type is another than that of the row that stays go to quarantine: they are two items, not two
    versions of one.

    Args:
        items: rows that passed, in that order, with ``row`` and ``file`` (a key of ``files``). The tally has them as
            kept already.
    """
    codes = items["item_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    last = last_of_each(codes)
    again = np.flatnonzero(last != np.arange(len(items)))
    types = items["item_type"].combine_chunks().dictionary_encode().indices.to_numpy()
    other = again[types[again] != types[last[again]]]
    numbers, rows = items["file"].to_numpy(), items["row"].to_numpy()
    names = items["item_type"].take(pa.array(last[other])).to_pylist()
    sentences = [
        f'row {rows[i]} of {files[int(numbers[i])]} has the same item_id and item_type "{name}"; an item has one type'
        for i, name in zip(last[other].tolist(), names, strict=True)
    ]
    records = as_records(items.drop_columns(["file", "row"]).take(pa.array(other)))
    names_of_files = [files[n] for n in numbers[other].tolist()]
    bad = quarantine_table(names_of_files, rows[other].tolist(), "items", sentences, records)
    tally = Tally(kept=-len(again), repeated=len(again) - len(other))
    if sentences:
        tally.kinds["item_id of two types"] = [len(sentences), bad["reason"][0].as_py()]
    return Checked(items.take(pa.array(np.unique(last))), bad, tally)


def last_of_each(codes: np.ndarray) -> np.ndarray:
    """For each place the last place with the same code, int64 [n]."""
    _, last, of = np.unique(codes[::-1], return_index=True, return_inverse=True)
    return len(codes) - 1 - last[of[::-1]]


def judge_rows(table: str, rows: Tally, rules: DataConfig, quarantine: Path) -> list[str]:
    """Lines on what became of a table's rows.

    Args:
        rules: ``max_bad_share`` is the largest share that may be bad, not counting the kinds of ``leave_out``.

    Raises:
        DataError: more is bad, or nothing is left.
    """
    limit, most = rules.max_bad_share, rules.max_bad_share * max(rows.read, 1)
    kinds, dropped = _frequent(rows.kinds), _frequent(rows.dropped)
    frequent = [entry for entry in kinds if entry[0] not in rules.leave_out]
    unread = [entry for entry in dropped if entry[0] not in rules.leave_out and entry[1][0] > most]
    too_many = sum(count for _, (count, _) in frequent) > most
    if too_many or not rows.kept:
        why = f"more than data.max_bad_share ({limit:.0%})" if too_many else "and none is left"
        what = f"{rows.quarantined:,} of {rows.read:,} rows of the {table} table are bad, {why}"
        ignored = f"; {rows.ignored:,} were skipped by events.ignore or data.item_types" if rows.ignored else ""
        shown = frequent if too_many else kinds
        raise DataError(f"{what}. {_examples(shown)}{ignored}. {_ways_out(shown)} The rows are in {quarantine}")
    if unread:
        what = f"{unread[0][1][0]:,} of {rows.read:,} rows of the {table} table have a value that cannot be used"
        raise DataError(
            f"{what}, more than data.max_bad_share ({limit:.0%}). {_examples(unread)}. {_ways_out(unread, 'values')}"
        )
    said = ", ".join(f"{kind} {count:,}" for kind, (count, _) in kinds)
    parts = {
        f"{rows.read:,} rows read": True,
        f"{rows.kept:,} kept": True,
        f"{rows.ignored:,} ignored": rows.ignored,
        f"{rows.repeated:,} {REPEATED[table]}": rows.repeated,
        f"{rows.quarantined:,} to quarantine ({said})": rows.quarantined,
    }
    lines = [f"  {table}: {', '.join(part for part, told in parts.items() if told)}"]
    if MALFORMED in rows.kinds:  # what these rows were is not known, so the first one is shown
        lines.append(f"    {rows.kinds[MALFORMED][1]}")
    for kind, (count, example) in dropped:
        instead = "read as false" if kind == "unreadable available" else "left empty"
        lines.append(f"    {kind}: {count:,}, {instead}, as in {example}")
    return lines + [f"    {what}: {count:,}, read as such" for what, count in sorted(rows.taken.items())]


REPEATED = {
    "items": "replaced by a later row of the same item_id",
    "users": "replaced by a later row of the same user_id",
    "interactions": "repeated (same user, item, event and second), counted once",
}
_MEND = {
    "unknown item": "Add rows for these items to the items table",
    "unknown event": "Add these names to the lists in the events section (events.ignore for those to skip)",
    "timestamp in the future": "Set data.now to a later time if they are correct",
    MALFORMED: "Put cells with commas, quotes or line breaks in double quotes",
}


def _frequent(kinds: Mapping[str, Sequence[Any]]) -> list[tuple[str, Sequence[Any]]]:
    return sorted(kinds.items(), key=lambda entry: (-entry[1][0], entry[0]))


def _examples(kinds: Sequence[tuple[str, Sequence[Any]]]) -> str:
    return "; ".join(f"{kind}: {count:,}, as in: {text}" for kind, (count, text) in kinds)


def _ways_out(kinds: Sequence[tuple[str, Sequence[Any]]], what: str = "rows") -> str:
    names = [kind for kind, _ in kinds]
    mend = _MEND.get(names[0], f"Correct these {what}") if names else f"Correct these {what}"
    return f"{mend}, or continue without these {what}: --set 'data.leave_out=[{', '.join(names)}]'."


def check_leave_out(kinds: Sequence[str]) -> None:
    """Raises DataError where ``data.leave_out`` has a name that no check gives."""
    known = ["malformed record", "unknown event", "unknown item", "item_type contradicts the catalogue",
             "timestamp in the future", "timestamp before 1970", "age out of range",
             "item_id of two types"]  # fmt: skip
    for column in (column for columns in TABLES.values() for column in columns):
        known += [f"missing {column.name}"] * column.required + [f"unreadable {column.name}"]
    for kind in kinds:
        taste = kind.startswith("unreadable ") or kind.endswith(" of wrong length")
        if kind not in known and not taste:
            raise DataError(
                f'data.leave_out: "{kind}" is not a kind of bad row{nearest(kind, known)}; docs/data.md lists the kinds'
            )


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
