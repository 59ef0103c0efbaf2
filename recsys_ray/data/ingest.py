"""The first stage: tables as they come -> dense, sorted, split tables, and a quarantine for every row that is not fit.

Layout of the output: docs/architecture.md. Interactions and users are divided by user (``shuffle.py``); the catalogue
fits one process.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys_ray.config import Config, EventsConfig
from recsys_ray.core.clock import DAY, is_leave_one_out
from recsys_ray.core.errors import DataError
from recsys_ray.core.progress import Progress
from recsys_ray.data import shuffle
from recsys_ray.data.reading import Source, find_source, replace_aside, run_tasks
from recsys_ray.data.schema import nearest
from recsys_ray.data.shuffle import Job, Tally, merge_kinds
from recsys_ray.data.split import END, TEST_FROM, VALID_FROM, plan_split
from recsys_ray.data.understood import describe
from recsys_ray.data.validate import EventRules, check_leave_out, judge_rows, newest_of_each, utc
from recsys_ray.storage.artifacts import SCRATCH, write_json

_BIG_SHARD = 8_000_000  # rows that one reduce task sorts in about 2 GB
_FEW = 500  # days of users; of so many queries an HR@10 of .1 has a 95 % interval of .07 to .13


def ingest(config: Config, out: Path, progress: Progress) -> dict[str, Any]:
    """Run the stage into ``out``; returns the manifest's counts. Ray must be up.

    Raises:
        DataError: a table cannot be read, has too many bad rows or none left, or the time split leaves a period empty.
    """
    check_leave_out(config.data.leave_out)
    scratch = out / SCRATCH
    scratch.mkdir(parents=True, exist_ok=True)
    (out / "quarantine").mkdir(exist_ok=True)
    rules = EventRules(event_names(config.events), config.events.ignore, _now(config, scratch))
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
    for name, days in _periods(counts["days"], valid, test).items():
        visits = counts["user_days"][name]
        said.append(f"  {name}: {sum(n for _, n in days):,} positive events, {visits:,} days on which a user has one")
        if visits < _FEW and name != "training":
            field = "test" if name == "test" else "valid"
            said.append(
                f"    fewer than {_FEW:,} such days hardly tell one model from another: let it begin earlier "
                f"(split.{field}_days or split.{field}_from)"
            )
    return "\n  ".join(said)


def _periods(days: Sequence[Sequence[int]], valid: int, test: int) -> dict[str, list[Sequence[int]]]:
    """(unix day, number) rows by the period in which the day begins."""
    found: dict[str, list[Sequence[int]]] = {"training": [], "validation": [], "test": []}
    for row in days:
        moment = row[0] * DAY
        found["training" if moment < valid else "validation" if moment < test else "test"].append(row)
    return found


def event_names(config: EventsConfig) -> list[str]:
    """Every event that counts, in the order of its code."""
    return list(dict.fromkeys([*config.positives, *config.edges, *config.weak]))


def _paths(config: Config) -> dict[str, str | list[str]]:
    paths: dict[str, str | list[str]] = {"items": config.data.items, "interactions": config.data.interactions}
    return paths if config.data.users is None else {**paths, "users": config.data.users}


def _now(config: Config, scratch: Path) -> int:
    """The moment after which a row is from the future; an interrupted run keeps the one it began with."""
    if config.data.now is not None:
        return int(config.data.now.timestamp())
    file = scratch / "now"
    if not file.exists():
        replace_aside(lambda aside: write_json(aside, int(time.time())), file, scratch / "aside")
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
        table, extra = _newest_of_each(job, table)
        table, others = self._wanted(table)
        self.settle("items", [*results, extra, others])
        table, counts = _number(table)
        _write(table, self.out / "items.parquet", self.scratch)
        published = table["published_at"].drop_null().to_numpy()
        self.census["published"] = [int(published.min()), int(published.max())] if len(published) else None
        self.census["published_at_0"] = int(((published >= 0) & (published < DAY)).sum())
        counts["untitled"] = sum(result["untitled"] for result in results)
        if counts["untitled"]:
            self.progress.say(f"  items: {counts['untitled']:,} have no title; they are kept with an empty one")
        return counts

    def _wanted(self, table: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
        """Items of ``data.item_types``; the ids of the others are noted, so that their interactions go, too."""
        wanted = self.config.data.item_types
        types = sorted(pc.unique(table["item_type"]).to_pylist())
        for name in wanted or ():
            if name not in types:
                raise DataError(f'data.item_types: no item is of type "{name}"{nearest(name, types)}')
        mine = pc.is_in(table["item_type"], pa.array(types if wanted is None else wanted, pa.string()))
        others = table.filter(pc.invert(mine)).select(["item_id"])
        _write(others, self.scratch / shuffle.OTHER_ITEMS, self.scratch)
        return table.filter(mine), vars(Tally(kept=-len(others), ignored=len(others)))

    def interactions_and_users(self, rules: EventRules, counts: dict[str, Any]) -> None:
        """Divide by user, number users, write the rest of the output; adds to ``counts``."""
        work = functools.partial(shuffle.map_interactions, self.job("interactions"), rules, counts["item_types"])
        mapped = self.map("interactions", work)
        self.settle("interactions", mapped, quiet=True)  # before the costly part, if it is hopeless
        kept = sum(result["kept"] for result in mapped)
        if kept > _BIG_SHARD * self.config.data.shards:
            self.progress.say(f"  {kept:,} interactions in {self.config.data.shards} shards: raise data.shards")
        taste, users_mapped, users_job = self._map_users()
        job = self.job("interactions", mapped)
        people = self.reduce("number users", functools.partial(shuffle.reduce_users, job, users_job, taste), None)
        if users_job:
            self.settle("users", [*users_mapped, *({**p, "rows": 0} for p in people)])
        names = ("listed", "active")
        self.census |= {name: sum(result[name] for result in people) for name in names}
        self.census["examples"] = {
            name: next((r["examples"][name] for r in people if r["examples"][name]), None) for name in names
        }
        sizes = [result["rows"] for result in people]
        offsets = [0, *np.cumsum(sizes).tolist()]
        self._write_users()
        positives = self.config.events.positives
        protocol = self.config.split.protocol
        events = functools.partial(shuffle.reduce_events, job, offsets, list(rules.names), positives, protocol)
        reduced = self.reduce("sort interactions", events, kept)
        self.settle("interactions", [*mapped, *({**r, "rows": 0} for r in reduced)])
        self.census |= {
            "events": sum(result["events"] for result in reduced),
            "first": min(result["first"] for result in reduced if result["first"] is not None),
            "all_days": sorted({day for result in reduced for day in result["all_days"]}),
            "of_1970": sum(result["of_1970"] for result in reduced),
            "largest": max((result["largest"] for result in reduced), key=lambda found: found[0]),
        }
        countries = sorted({country for result in people for country in result["countries"]})
        counts |= {"events": list(rules.names), "users": offsets[-1], "taste": taste, "countries": countries}
        counts |= self._split(reduced)

    def _map_users(self) -> tuple[dict[str, int], list[dict[str, Any]], Job | None]:
        """Check the users table, if any; a taste vector's length is the most frequent one."""
        if "users" not in self.sources:
            return {}, [], None
        names = self.sources["users"].taste
        mapped = self.map("users", functools.partial(shuffle.map_users, self.job("users"), names))
        taste: dict[str, int] = {}
        for name in names:
            lengths: dict[int, int] = {}
            for result in mapped:
                for length, count in result["lengths"].get(name, {}).items():
                    lengths[int(length)] = lengths.get(int(length), 0) + count
            usable = {length: count for length, count in lengths.items() if length > 0}
            if usable:
                taste[name] = max(usable, key=lambda length: (usable[length], length))
            else:
                self.progress.say(f"  users: {name} has no vector in any row; left aside")
        return taste, mapped, self.job("users", mapped)

    def _write_users(self) -> None:
        """``users.parquet`` from the shards' people, one at a time."""
        files = sorted((self.scratch / "people").glob("*.parquet"))

        def write(aside: Path) -> None:
            with pq.ParquetWriter(aside, pq.read_schema(files[0]), compression="zstd") as writer:
                for file in files:
                    writer.write_table(pq.read_table(file, use_threads=False), row_group_size=1 << 20)

        replace_aside(write, self.out / "users.parquet", self.scratch / "aside")

    def _split(self, reduced: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        events: dict[int, int] = {}
        users: dict[int, int] = {}
        arrived: dict[int, int] = {}
        for result in reduced:
            for day, *numbers in result["days"]:
                for counted, number in zip((events, users, arrived), numbers, strict=True):
                    counted[day] = counted.get(day, 0) + number
        moments = [result["positive"] for result in reduced if result["positive"]]
        last = max(result["last"] for result in reduced if result["last"] is not None)
        positives = self.config.events.positives
        if not moments:
            raise DataError(f"no interaction is one of events.positives ({', '.join(positives)}); check the names")
        first_and_last = min(first for first, _ in moments), max(latest for _, latest in moments)
        protocol = self.config.split.protocol
        facts = {"protocol": protocol, "last_event": last, "days": [list(day) for day in sorted(events.items())]}
        if protocol == "leave_one_out":
            held_out = sum(result["held_out"] for result in reduced)
            if not held_out:
                raise DataError(
                    f"leave-one-out needs users with three items of a positive event ({', '.join(positives)}), and "
                    "there is none; set split.protocol=time, or check events.positives"
                )
            _check_users(sum(arrived.values()), positives)
            return {**facts, "valid_from": VALID_FROM, "test_from": TEST_FROM, "end": END, "held_out": held_out}
        visits = sorted(users.items())
        valid, test = plan_split(self.config.split, visits, first_and_last, last, positives)
        _check_users(sum(number for day, number in arrived.items() if day * DAY < valid), positives)
        by_period = {name: sum(n for _, n in part) for name, part in _periods(visits, valid, test).items()}
        return {**facts, "valid_from": valid, "test_from": test, "end": last + 1, "user_days": by_period}

    def settle(self, table: str, results: Sequence[Mapping[str, Any]], quiet: bool = False) -> None:
        """Add up a table's rows, say what went to quarantine, stop where too much did."""
        kinds: dict[str, list[Any]] = {}
        dropped: dict[str, list[Any]] = {}
        taken: dict[str, int] = {}
        for result in results:
            merge_kinds(kinds, result["kinds"])
            merge_kinds(dropped, result["dropped"])
            for what, count in result["taken"].items():
                taken[what] = taken.get(what, 0) + count
        rows = {name: sum(result[key] for result in results) for name, key in (("read", "rows"), ("kept", "kept"))}
        rows |= {"quarantined": _total(kinds)}
        rows |= {name: sum(result[name] for result in results) for name in ("ignored", "repeated")}
        by_reason = {kind: count for kind, (count, _) in sorted(kinds.items())}
        self.tallies[table] = {"rows": rows, "quarantined": by_reason}
        lost = self.tallies["items"]["quarantined"]
        if table == "interactions" and "unknown item" in kinds and lost:
            why = ", ".join(f"{kind} {count:,}" for kind, count in lost.items())
            kinds["unknown item"][1] += f" (rows of the items table are in quarantine: {why})"
        said = judge_rows(table, rows, kinds, dropped, taken, self.config.data, self.out / "quarantine")
        if not quiet:
            for line in said:
                self.progress.say(line)


def _check_users(training: int, positives: Sequence[str]) -> None:
    if training < 2:
        raise DataError(
            f"the positive events ({', '.join(positives)}) of the training period are all of one user; what somebody "
            "likes is learned from what others like, so bring the events of more users, or check user_id"
        )


def _total(kinds: Mapping[str, Sequence[Any]]) -> int:
    return sum(count for count, _ in kinds.values())


def _newest_of_each(job: Job, table: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
    """The last row of each item_id in order of (file, row), and what became of the others."""
    kept, bad, repeated = newest_of_each(table, job.file_names())
    tally = Tally(kept=-len(bad) - repeated, repeated=repeated)
    if len(bad):
        shuffle.write_quarantine(job, "items-of-two-types", [bad])
        tally.kinds = {"item_id of two types": [len(bad), bad["reason"][0].as_py()]}
    return kept, vars(tally)


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


def _write(table: pa.Table, target: Path, scratch: Path) -> None:
    def write(aside: Path) -> None:
        pq.write_table(table, aside, row_group_size=1 << 20, compression="zstd")

    replace_aside(write, target, scratch / "aside")
