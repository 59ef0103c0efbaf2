"""The first stage: turns source tables into dense, sorted, split tables, with a quarantine for every unusable row.

docs/architecture.md describes the output. Interactions and users are divided by user (``shuffle.py``); the catalogue
fits into one process.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys_ray.config import Config
from recsys_ray.core.clock import DAY, is_leave_one_out
from recsys_ray.core.errors import DataError
from recsys_ray.core.progress import Progress
from recsys_ray.data import shuffle
from recsys_ray.data.reading import Source, find_source, run_tasks
from recsys_ray.data.schema import nearest
from recsys_ray.data.shuffle import Job
from recsys_ray.data.split import END, TEST_FROM, VALID_FROM, plan_split
from recsys_ray.data.understood import describe
from recsys_ray.data.validate import EventRules, Tally, check_leave_out, judge_rows, newest_of_each, utc
from recsys_ray.storage.artifacts import SCRATCH, write_json, write_parquet, written_whole

_BIG_SHARD = 8_000_000  # rows that one reduce task sorts in about 2 GB
_FEW = 500  # user-days; with this many queries an HR@10 of .1 has a 95 % interval of .07 to .13


def ingest(config: Config, out: Path, progress: Progress) -> dict[str, Any]:
    """Run the stage into ``out``; returns the manifest's counts. Ray must be up.

    Raises:
        DataError: a table cannot be read, has too many bad rows or none left, or the time split leaves a period empty.
    """
    check_leave_out(config.data.leave_out)
    scratch = out / SCRATCH
    scratch.mkdir(parents=True, exist_ok=True)
    (out / "quarantine").mkdir(exist_ok=True)
    events = config.events
    names = list(dict.fromkeys([*events.positives, *events.edges, *events.weak]))  # in the order of their codes
    rules = EventRules(names, events.ignore, _now(config, scratch))
    sources = {name: find_source(name, path) for name, path in _paths(config).items()}
    run = _Run(config, out, progress, sources)
    counts = run.items()
    run.interactions_and_users(rules, counts)
    counts["rows"] = {name: tally["rows"] for name, tally in run.tallies.items()}
    counts["quarantined"] = {name: tally["quarantined"] for name, tally in run.tallies.items()}
    counts["extra_columns"] = {name: source.extra for name, source in sources.items() if source.extra}
    for line in describe(counts, run.census):
        progress.say(f"  {line}")
    progress.say(f"  {_describe_split(counts)}")
    return counts


def _describe_split(counts: Mapping[str, Any]) -> str:
    if is_leave_one_out(counts):
        return f"leave-one-out: {counts['held_out']:,} of {counts['users']:,} users have a validation and a test item"
    valid, test, last = counts["valid_from"], counts["test_from"], counts["last_event"]
    said = [f"training before {utc(valid)}, validation before {utc(test)}, test up to {utc(last)}"]
    for name, events in _by_period(counts["days"], valid, test).items():
        visits = counts["user_days"][name]
        said.append(f"  {name}: {events:,} positive events, {visits:,} user-days (days on which a user has one)")
        if visits < _FEW and name != "training":
            field = "test" if name == "test" else "valid"
            said.append(
                f"    fewer than {_FEW:,} user-days are too few to compare models: begin the period earlier "
                f"(split.{field}_days or split.{field}_from)"
            )
    return "\n  ".join(said)


def _by_period(days: Sequence[Sequence[int]], valid: int, test: int) -> dict[str, int]:
    """The sums of (unix day, number) rows by the period in which the day begins."""
    sums = dict.fromkeys(("training", "validation", "test"), 0)
    for day, number in days:
        sums["training" if day * DAY < valid else "validation" if day * DAY < test else "test"] += number
    return sums


def _paths(config: Config) -> dict[str, str | list[str]]:
    paths: dict[str, str | list[str]] = {"items": config.data.items, "interactions": config.data.interactions}
    return paths if config.data.users is None else {**paths, "users": config.data.users}


def _now(config: Config, scratch: Path) -> int:
    """The moment after which a row is from the future; an interrupted run keeps the one it began with."""
    if config.data.now is not None:
        return int(config.data.now.timestamp())
    file = scratch / "now"
    if not file.exists():
        write_json(file, int(time.time()))
    return int(file.read_text())


class _Run:
    """The state of one ingest: what every table's tasks have counted so far."""

    def __init__(self, config: Config, out: Path, progress: Progress, sources: Mapping[str, Source]) -> None:
        self.config, self.out, self.progress, self.sources = config, out, progress, sources
        self.scratch = out / SCRATCH
        self.tallies: dict[str, dict[str, Any]] = {}
        self.census: dict[str, Any] = {}
        for name, source in sources.items():
            for note in source.notes:
                progress.say(f"  {name}: {note}")

    def job(self, table: str, results: Sequence[Mapping[str, Any]] = ()) -> Job:
        fragments = self.sources[table].fragments
        parts = [(p, f.file_index) for r, f in zip(results, fragments, strict=False) for p in r["parts"]]
        return Job(self.out, self.scratch, self.config.data.shards, fragments, parts)

    def map(self, table: str, work: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
        source = self.sources[table]
        done = self.scratch / "done" / table
        return run_tasks(work, len(source.fragments), done, self.progress, f"read {table}", source.rows)

    def reduce(self, name: str, work: Callable[[int], dict[str, Any]], rows: int | None) -> list[dict[str, Any]]:
        done = self.scratch / "done" / name
        return run_tasks(work, self.config.data.shards, done, self.progress, name, rows)

    def items(self) -> dict[str, Any]:
        """Check the catalogue, number it, write ``items.parquet``; its part of the counts."""
        job = self.job("items")
        results = self.map("items", functools.partial(shuffle.map_items, job))
        pieces = [pq.read_table(self.scratch / "items" / f"{i:05d}.parquet") for i in range(len(results))]
        table = pa.concat_tables(
            piece.append_column("file", pa.array(np.full(len(piece), f.file_index, dtype=np.int32)))
            for piece, f in zip(pieces, job.fragments, strict=True)
        )
        newest = newest_of_each(table, job.file_names())
        shuffle.write_quarantine(job, "items-of-two-types", [newest.quarantine])
        table, others = self._wanted(newest.good)
        rows = self.settle("items", [*_tallies(results), newest.tally, others])
        table, counts = _number(table)
        write_parquet(self.out / "items.parquet", table)
        published = table["published_at"].drop_null().to_numpy()
        self.census["published"] = [int(published.min()), int(published.max())] if len(published) else None
        self.census["published_at_0"] = int(((published >= 0) & (published < DAY)).sum())
        counts["untitled"] = rows.untitled
        if rows.untitled:
            self.progress.say(f"  items: {rows.untitled:,} without a title, kept with an empty one")
        return counts

    def _wanted(self, table: pa.Table) -> tuple[pa.Table, Tally]:
        """Items of ``data.item_types``; the ids of the others are kept, so that their interactions are dropped as
        well."""
        wanted = self.config.data.item_types
        types = sorted(pc.unique(table["item_type"]).to_pylist())
        for name in wanted or ():
            if name not in types:
                raise DataError(f'data.item_types: no item is of type "{name}"{nearest(name, types)}')
        mine = pc.is_in(table["item_type"], pa.array(types if wanted is None else wanted, pa.string()))
        others = table.filter(pc.invert(mine)).select(["item_id"])
        write_parquet(self.scratch / shuffle.OTHER_ITEMS, others)
        return table.filter(mine), Tally(kept=-len(others), ignored=len(others))

    def interactions_and_users(self, rules: EventRules, counts: dict[str, Any]) -> None:
        """Divide by user, number users, write the rest of the output; adds to ``counts``."""
        work = functools.partial(shuffle.map_interactions, self.job("interactions"), rules, counts["item_types"])
        mapped = self.map("interactions", work)
        kept = self.settle("interactions", _tallies(mapped), quiet=True).kept  # before the costly part, if hopeless
        if kept > _BIG_SHARD * self.config.data.shards:
            self.progress.say(f"  {kept:,} interactions in {self.config.data.shards} shards; raise data.shards")
        taste, users_mapped, users_job = self._map_users()
        job = self.job("interactions", mapped)
        people = self.reduce("number users", functools.partial(shuffle.reduce_users, job, users_job, taste), None)
        if users_job:
            self.settle("users", _tallies([*users_mapped, *people]))
        self.census["examples"] = {}
        for name in ("listed", "active"):
            self.census[name] = sum(result[name] for result in people)
            ids = [user_id for result in people for user_id in result["examples"][name]]
            self.census["examples"][name] = ids[0] if ids else None
        sizes = [result["rows"] for result in people]
        offsets = [0, *np.cumsum(sizes).tolist()]
        self._write_users()
        positives, protocol = self.config.events.positives, self.config.split.protocol
        events = functools.partial(shuffle.reduce_events, job, offsets, list(rules.names), positives, protocol)
        reduced = self.reduce("sort interactions", events, kept)
        self.settle("interactions", _tallies([*mapped, *reduced]))
        countries = sorted({country for result in people for country in result["countries"]})
        counts |= {"events": list(rules.names), "users": offsets[-1], "taste": taste, "countries": countries}
        counts |= self._split(reduced)

    def _map_users(self) -> tuple[dict[str, int], list[dict[str, Any]], Job | None]:
        """Check the users table, if any; a taste vector's length is the most frequent one."""
        if "users" not in self.sources:
            return {}, [], None
        names = self.sources["users"].taste
        mapped = self.map("users", functools.partial(shuffle.map_users, self.job("users"), names))
        lengths = sum(_tallies(mapped), Tally()).lengths
        taste: dict[str, int] = {}
        for name in names:
            usable = {int(length): count for length, count in lengths.get(name, {}).items() if int(length) > 0}
            if usable:
                taste[name] = max(usable, key=lambda length: (usable[length], length))
            else:
                self.progress.say(f"  users: {name} has no vector in any row; ignored")
        return taste, mapped, self.job("users", mapped)

    def _write_users(self) -> None:
        """``users.parquet`` from the shards' people, one at a time."""
        files = sorted((self.scratch / "people").glob("*.parquet"))
        with (
            written_whole(self.out / "users.parquet") as aside,
            pq.ParquetWriter(aside, pq.read_schema(files[0]), compression="zstd") as writer,
        ):
            for file in files:
                writer.write_table(pq.read_table(file, use_threads=False), row_group_size=1 << 20)

    def _split(self, reduced: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Where the periods begin, by what the shards' events add up to; the census of these."""
        rows = np.array([row for result in reduced for row in result["days"]], np.int64)
        days, place = np.unique(rows[:, 0], return_inverse=True)
        events, chosen, visits, arrived = (np.bincount(place, column).astype(np.int64) for column in rows[:, 1:].T)
        first, last = _span_of_all(result["span"] for result in reduced)
        self.census |= {
            "events": int(events.sum()),
            "first": first,
            "all_days": days.tolist(),
            "of_1970": int(events[days < 365].sum()),
            "largest": max((result["largest"] for result in reduced), key=lambda found: found[0]),
        }
        positives, protocol = self.config.events.positives, self.config.split.protocol
        if not chosen.any():
            raise DataError(f"no interaction is one of events.positives ({', '.join(positives)}); check the names")
        some = chosen > 0
        facts = {"protocol": protocol, "last_event": last, "days": np.stack([days, chosen], 1)[some].tolist()}
        if protocol == "leave_one_out":
            held_out = sum(result["held_out"] for result in reduced)
            if not held_out:
                raise DataError(
                    f"leave-one-out needs users with positive events on three items ({', '.join(positives)}), and "
                    "there is none; set split.protocol=time, or check events.positives"
                )
            _check_users(arrived.sum(), positives)
            return {**facts, "valid_from": VALID_FROM, "test_from": TEST_FROM, "end": END, "held_out": held_out}
        visited = np.stack([days, visits], 1)[some].tolist()
        span = _span_of_all(result["positive_span"] for result in reduced)
        valid, test = plan_split(self.config.split, visited, span, last, positives)
        _check_users(arrived[days * DAY < valid].sum(), positives)
        by_period = _by_period(visited, valid, test)
        return {**facts, "valid_from": valid, "test_from": test, "end": last + 1, "user_days": by_period}

    def settle(self, table: str, tallies: Sequence[Tally], quiet: bool = False) -> Tally:
        """Add up a table's rows, report the quarantined ones, and stop if there are too many."""
        rows = sum(tallies, Tally())
        counts = {name: getattr(rows, name) for name in ("read", "kept", "quarantined", "ignored", "repeated")}
        by_reason = {kind: count for kind, (count, _) in sorted(rows.kinds.items())}
        self.tallies[table] = {"rows": counts, "quarantined": by_reason}
        lost = self.tallies["items"]["quarantined"]
        if table == "interactions" and "unknown item" in rows.kinds and lost:
            why = ", ".join(f"{kind} {count:,}" for kind, count in lost.items())
            count, example = rows.kinds["unknown item"]
            rows.kinds["unknown item"] = [count, f"{example} (quarantined rows of the items table: {why})"]
        said = judge_rows(table, rows, self.config.data, self.out / "quarantine")
        if not quiet:
            for line in said:
                self.progress.say(line)
        return rows


def _tallies(results: Sequence[Mapping[str, Any]]) -> list[Tally]:
    return [Tally(**result["tally"]) for result in results]


def _span_of_all(spans: Iterable[Sequence[int]]) -> tuple[int, int]:
    """The first and the last moment; a span without events is empty."""
    moments = [moment for span in spans for moment in span]
    return min(moments), max(moments)


def _check_users(training: int, positives: Sequence[str]) -> None:
    if training < 2:
        raise DataError(
            f"the positive events ({', '.join(positives)}) of the training period come from a single user; "
            "training needs several users: add their events, or check user_id"
        )


def _number(table: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
    """Sort by (item_type, item_id) and number: the row is the gid, ``index`` counts within the type."""
    table = table.sort_by([("item_type", "ascending"), ("item_id", "ascending")]).combine_chunks()
    names = sorted(pc.unique(table["item_type"]).to_pylist())
    ntypes = pc.index_in(table["item_type"], value_set=pa.array(names)).to_numpy()
    sizes = np.bincount(ntypes, minlength=len(names))
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    columns = {
        "item_id": table["item_id"],
        "item_type": table["item_type"],
        "ntype": pa.array(ntypes, pa.int16()),
        "index": pa.array(np.arange(len(table)) - starts[ntypes], pa.int32()),
    }
    rest = ("title", "description", "language", "categories", "published_at", "available")
    columns |= {name: table[name] for name in rest}
    counts = {
        "item_types": names,
        "items_per_type": sizes.tolist(),
        "languages": sorted(pc.unique(table["language"]).drop_null().to_pylist()),
        "categories": sorted(pc.unique(pc.list_flatten(table["categories"])).to_pylist()),
    }
    return pa.table(columns), counts
