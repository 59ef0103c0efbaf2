"""The store in a file, for servers on one machine.

Write-ahead logging, one writer at a time, every commit on disk before it is acknowledged. SQLite before 3.51.3 can
damage such a file if several processes write, so the build that comes with apsw is used instead of Python's.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw

from serve.store.interface import GivenAnswer, LiveEvent, LiveItem, StoreError
from serve.store.rows import EXACT, Rows, parsed, text

_SAFE = (3, 51, 3)
_WAIT_MS = 5_000  # for other writers
_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    place INTEGER PRIMARY KEY AUTOINCREMENT, event_id TEXT UNIQUE NOT NULL, user_id TEXT NOT NULL,
    item_id TEXT NOT NULL, event TEXT NOT NULL, timestamp INTEGER NOT NULL, request_id TEXT);
CREATE INDEX IF NOT EXISTS events_of_user ON events (user_id, timestamp);
CREATE INDEX IF NOT EXISTS events_of_request ON events (request_id) WHERE request_id IS NOT NULL;
CREATE TABLE IF NOT EXISTS items (item_id TEXT PRIMARY KEY, change INTEGER NOT NULL, record TEXT, vectors BLOB);
CREATE INDEX IF NOT EXISTS items_by_change ON items (change);
CREATE TABLE IF NOT EXISTS answers (
    request_id TEXT PRIMARY KEY, variant TEXT NOT NULL, version TEXT NOT NULL, timestamp INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS answers_by_time ON answers (timestamp);
"""
_COLUMNS = "event_id, user_id, item_id, event, timestamp, request_id"
# In a damaged file a column may hold anything: texts come after all numbers.
_LAST_CHANGE = f"SELECT CAST(coalesce(max(change), 0) AS INTEGER) FROM items WHERE change < {EXACT}"


class SqliteStore:
    """Keeps to :class:`serve.store.interface.Store`."""

    def __init__(self, path: str | Path, make: bool = True) -> None:
        version = tuple(map(int, apsw.sqlite_lib_version().split(".")))
        assert version >= _SAFE, f"SQLite {version} is not safe with several writers"
        self._path = Path(path)
        if not make and not self._path.exists():
            raise StoreError(f"there is no store {self._path}; use the one given to serve --store")
        self._writing, self._reading = threading.Lock(), threading.Lock()
        self._made = Rows()
        with self._errors():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Two connections: a read waits neither for the disk nor for a writer of another process.
            self._db, self._reader = self._connect(), self._connect()
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute(_SCHEMA)
            self._reader.execute("PRAGMA query_only=ON")

    def add_events(self, events: Sequence[LiveEvent]) -> int:
        rows = [(e.event_id, e.user_id, e.item_id, e.event, e.timestamp, e.request_id) for e in events]
        insert = f"INSERT INTO events ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (event_id) DO NOTHING"

        def write() -> int:
            before = self._db.total_changes()
            self._db.executemany(insert, rows)
            return self._db.total_changes() - before

        return self._write(write)

    @property
    def damaged(self) -> int:
        return self._made.damaged

    def events_of(self, user_ids: Sequence[str], since: int, limit: int) -> dict[str, list[LiveEvent]]:
        query = f"""
            SELECT place, {_COLUMNS} FROM events WHERE user_id = ? AND timestamp >= ?
            ORDER BY timestamp DESC, place DESC LIMIT ?"""
        found = {}
        with self._errors(), self._reading:
            for user_id in user_ids:
                if events := self._events(self._read(query, (user_id, since, limit))):
                    found[user_id] = events[::-1]
        return found

    def events_after(self, place: str, limit: int) -> tuple[list[LiveEvent], str]:
        query = f"SELECT place, {_COLUMNS} FROM events WHERE place > ? ORDER BY place LIMIT ?"
        rows = self._rows(query, int(place or 0), limit)
        return self._events(rows), str(rows[-1][0]) if rows else place

    def _events(self, rows: Sequence[Sequence[Any]]) -> list[LiveEvent]:
        return [event for row in rows if (event := self._made.event(row[0], row[1:])) is not None]

    def put_item(self, item: LiveItem) -> int:
        record = None if item.record is None else json.dumps(item.record, ensure_ascii=False)

        def write() -> int:
            change = self._db.execute(_LAST_CHANGE).get + 1
            row = (item.item_id, change, record, item.vectors)
            self._db.execute("INSERT OR REPLACE INTO items (item_id, change, record, vectors) VALUES (?, ?, ?, ?)", row)
            return int(change)

        return self._write(write)

    def put_vectors(self, item: LiveItem, vectors: bytes) -> bool:
        def write() -> bool:
            row = (self._db.execute(_LAST_CHANGE).get + 1, vectors, item.item_id, item.change)
            self._db.execute("UPDATE items SET change = ?, vectors = ? WHERE item_id = ? AND change = ?", row)
            return self._db.changes() > 0

        return self._write(write)

    def last_change(self) -> int:
        return int(self._rows(_LAST_CHANGE)[0][0])

    def items_after(self, change: int) -> list[LiveItem]:
        query = "SELECT item_id, record, vectors, change FROM items WHERE change > ? ORDER BY change"
        made = [
            self._made.item(at, name, record if record is None else parsed(record), vectors)
            for name, record, vectors, at in self._rows(query, change)
        ]
        return [item for item in made if item is not None]

    def add_answers(self, answers: Sequence[GivenAnswer]) -> None:
        rows = [(one.request_id, one.variant, one.version, one.timestamp) for one in answers]
        insert = "INSERT OR REPLACE INTO answers (request_id, variant, version, timestamp) VALUES (?, ?, ?, ?)"
        self._write(lambda: self._db.executemany(insert, rows))

    def outcomes(self, since: int, until: int, events: Sequence[str], window: int) -> dict[str, tuple[int, int]]:
        marks = ", ".join("?" * len(events))
        query = f"""
            SELECT variant, count(*) AS given, sum(EXISTS (
                SELECT 1 FROM events WHERE events.request_id = answers.request_id AND event IN ({marks})
                AND events.timestamp BETWEEN answers.timestamp AND answers.timestamp + ?)) AS followed
            FROM answers WHERE timestamp >= ? AND timestamp < ? GROUP BY variant"""
        rows = self._rows(query, *events, window, since, until)
        return {variant: (given, followed) for variant, given, followed in rows}

    def trim(self, before: int) -> int:
        def write() -> int:
            self._db.execute("DELETE FROM answers WHERE timestamp < ?", (before,))
            self._db.execute("DELETE FROM events WHERE timestamp < ?", (before,))
            return self._db.changes()

        return self._write(write)

    def forget_user(self, user_id: str) -> int:
        def write() -> int:
            self._db.execute("DELETE FROM events WHERE user_id = ?", (user_id,))
            return self._db.changes()

        return self._write(write)

    def close(self) -> None:
        with self._errors(), self._writing, self._reading:
            self._reader.close()
            self._db.close()

    def _connect(self) -> apsw.Connection:
        made = apsw.Connection(str(self._path))
        made.set_busy_timeout(_WAIT_MS)
        made.execute("PRAGMA journal_mode=WAL")
        return made

    def _rows(self, query: str, *values: Any) -> list[Any]:
        with self._errors(), self._reading:
            return self._read(query, values)

    def _read(self, query: str, values: Sequence[Any]) -> list[Any]:
        """Texts that are none, in a damaged file, come as bytes."""
        try:
            return self._reader.execute(query, values).fetchall()
        except UnicodeDecodeError:
            names = [f'"{name}"' for name, *_ in self._reader.execute(query, values).get_description()]
            columns = (f"CASE typeof({name}) WHEN 'text' THEN CAST({name} AS BLOB) ELSE {name} END" for name in names)
            rows = self._reader.execute(f"SELECT {', '.join(columns)} FROM ({query})", values).fetchall()
            texts = {number for number, name in enumerate(names) if name != '"vectors"'}
            return [tuple(text(v) if number in texts else v for number, v in enumerate(row)) for row in rows]

    def _write(self, work: Callable[[], Any]) -> Any:
        """One transaction, which waits for those of others at its beginning, and is on the disk when this returns."""
        with self._errors(), self._writing:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                result = work()
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
            return result

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (apsw.Error, ValueError, OverflowError) as error:  # its text may hold values
            raise StoreError(f"the store {self._path} cannot be used ({type(error).__name__})") from None
        except OSError as error:
            raise StoreError(f"the store {self._path} cannot be used ({error.strerror})") from None
