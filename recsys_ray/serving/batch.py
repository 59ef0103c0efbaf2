"""Recommendations for many users at once, on Ray Data, as Parquet.

    <out>/plan.json                              bundle, settings and users: what the folder is for
    <out>/users/block-00000.parquet              the users of each block, where they come from a table
    <out>/recommendations/part-00000.parquet     a block's recommendations, there whole or not at all
    <out>/quarantine/part-00000.parquet          rows of the users table that cannot be answered, with file and reason
    <out>/manifest.json                          written last, with all counts

Users are cut into blocks, the queue of a pool of actors with one recommender each. An interrupted call goes on with the
blocks that are missing.
"""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys_ray.core.errors import DataError, UserError
from recsys_ray.core.progress import Progress
from recsys_ray.data.files import table_fingerprint
from recsys_ray.data.reading import find_source, read_batches
from recsys_ray.data.validate import QUARANTINE, as_records, last_of_each, quarantine_table
from recsys_ray.serving.answers import Listed
from recsys_ray.serving.recommender import Recommender
from recsys_ray.serving.requests import Question, RequestError
from recsys_ray.storage.artifacts import FORMAT, MANIFEST, changes, made_by, software
from recsys_ray.storage.outputs import locate_bundle
from recsys_ray.storage.store import Place

PLAN, PARTS, USERS, BAD = "plan.json", "recommendations", "users", "quarantine"
_VERSION = 1
_TABLE = "asked"  # what the users table is called in data/schema.py
_BLOCK = 256, 4096  # users of a block, at least and at most
_BLOCKS = 64  # wanted, so that all actors stay busy until the end
_TOGETHER = 256  # questions that are answered together: of more, the arrays leave the processor's cache
_COUNTS = b"recsys_ray"  # in the metadata of a part
_BUNDLE = "all users of the bundle"
_OF_A_USER = ("user_id", "history", "age", "country", "tastes")  # fields of a question


def batch_recommend(
    bundle: str, out: str, template: Question, progress: Progress, cpus: int, users: str | None = None,
    reasons: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Write recommendations for all users of a bundle, or for those of a table. Ray must be up.

    Args:
        template: a question of nobody: what is the same for all users.
        cpus: actors, at most.
        users: Parquet or CSV with user_id and optionally age, country and history.

    Returns:
        counts: users, known, cold, rows, quarantined.

    Raises:
        UserError: the folder holds something else, a setting is wrong (see :class:`Question`), or the bundle or the
            table cannot be used.
    """
    place, source = Place(out), locate_bundle(bundle)
    recommender = Recommender.load(source.uri, warm=False)
    (checked,) = recommender.lists([template])
    if isinstance(checked, RequestError):
        raise checked
    made_of, version, known = recommender.artifact.fingerprint, recommender.version, len(recommender.users)
    del recommender
    config = {name: value for name, value in asdict(template).items() if name not in _OF_A_USER} | {"reasons": reasons}
    inputs = {"bundle": made_of, USERS: table_fingerprint(_TABLE, users) if users else _BUNDLE}
    plan = _plan(place, source, version, config, inputs, users, known, progress)
    if (place / MANIFEST).exists():
        counts: dict[str, Any] = json.loads((place / MANIFEST).read())["counts"]
        progress.say(f"up to date: {counts['rows']:,} recommendations for {counts['users']:,} users in {out}")
        return counts
    job = Job(source.uri, place, template, reasons, plan["counts"]["users"], plan["counts"]["block"], users is not None)
    total = Counter(users=0, known=0, cold=0, rows=0, quarantined=plan["counts"]["quarantined"])
    done = {number: told for number in range(job.blocks) if (told := job.read_counts(number)) is not None}
    for told in done.values():
        total.update(told)
    todo = [number for number in range(job.blocks) if number not in done]
    started, before = time.monotonic(), len(done) and total["users"]
    if done:
        progress.say(f"  {total['users']:,} users are done already; {len(todo):,} of {job.blocks:,} blocks are missing")
    with progress.task("recommend", job.users, "users") as task:
        task.update(asked := total["users"] + total["quarantined"] - plan["counts"]["quarantined"])
        for told in _answered(job, todo, cpus):
            total.update(told)
            task.update(asked := asked + told["users"] + told["quarantined"])
    if not total["users"]:
        raise DataError(f"none of the rows of {users} can be answered; the reasons are in {place / BAD}")
    _publish(place, plan, total)
    seconds = time.monotonic() - started
    rate = f", {(total['users'] - before) / seconds:,.0f} users/s" if todo else ""
    bad = (
        f"; {total['quarantined']:,} rows of {users} cannot be used, see {place / BAD}" if total["quarantined"] else ""
    )
    progress.say(
        f"{total['rows']:,} recommendations for {total['users']:,} users in {seconds:,.0f} s{rate} -> {out}{bad}"
    )
    return dict(total)


# -- the folder ------------------------------------------------------------------------------------------------------


def _plan(
    place: Place, bundle: Place, version: str, config: dict[str, Any], inputs: dict[str, str], users: str | None,
    known: int, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """What the folder is for; made where there is none, with the blocks of users.

    Args:
        known: users of the bundle.

    Raises:
        UserError: the folder is for something else.
    """
    try:
        plan: dict[str, Any] = json.loads((place / PLAN).read())
        if differing := changes(plan, _VERSION, config, inputs):
            raise UserError(
                f"{place} holds recommendations that were asked for differently: {'; '.join(differing)}; choose "
                "another folder, or remove this one"
            )
        return plan
    except ValueError:
        raise UserError(f"{place / PLAN} is damaged; remove the folder and start again") from None
    except (FileNotFoundError, NotADirectoryError):
        pass
    if place.kind() == "file" or any(not name.startswith((USERS, BAD)) for name in place.files()):
        raise UserError(f"{place} is not empty and holds no recommendations; choose another folder")
    count, bad, block = known, 0, _block(known)
    if users is not None:
        table, bad = _read_users(users, place, progress)
        count, block = len(table), _block(len(table))
        for number in range(-(-count // block)):
            _write(place / USERS / f"block-{number:05d}.parquet", table.slice(number * block, block))
    counts = {"version": version, "users": count, "block": block, "quarantined": bad}
    plan = {"format": FORMAT, "stage": "batch-recommend", "version": _VERSION, "config": config, "inputs": inputs}
    plan |= {"bundle": bundle.uri, "counts": counts}
    (place / PLAN).write(json.dumps(plan, indent=1).encode())
    return plan


def _block(users: int) -> int:
    return min(max(-(-users // _BLOCKS), _BLOCK[0]), _BLOCK[1])


def _publish(place: Place, plan: dict[str, Any], total: Mapping[str, int]) -> None:
    files = place.files()
    for name in files:
        if name.split("/")[-1].startswith("."):  # what killed processes left
            (place / name).delete()
    if (place / USERS).exists():
        (place / USERS).delete()
    kept = {
        name: {"bytes": size} for name, (size, _) in files.items() if name.startswith((PARTS, BAD)) and "/." not in name
    }
    counts = plan["counts"] | dict(total)
    manifest = plan | {"counts": counts, "made_by": made_by(), "software": software(), "files": kept}
    (place / MANIFEST).write(json.dumps(manifest, indent=1).encode())


def _write(place: Place, table: pa.Table) -> None:
    data = io.BytesIO()
    pq.write_table(table, data, compression="zstd")
    place.write(data.getvalue())


# -- the users table -------------------------------------------------------------------------------------------------


def _read_users(path: str, place: Place, progress: Progress) -> tuple[pa.Table, int]:
    """file, row and record (JSON) of each user, in the table's order, and how many rows cannot be read. Of several rows
    of a user the last one counts, as in ingest."""
    source = find_source(_TABLE, path)
    for note in source.notes:
        progress.say(f"  users: {note}")
    tables, bad = [], []
    for fragment in source.fragments:
        for batch in read_batches(fragment):
            ids, file = batch.table["user_id"].cast(pa.string()).combine_chunks(), fragment.file
            there = pc.is_valid(ids)
            told = [(row, wrong, json.dumps({"text": text})) for row, text, wrong in batch.malformed]
            for row in batch.rows[~there.to_numpy(zero_copy_only=False)].tolist():
                told.append((row, "user_id is missing", "{}"))
            rows, sentences, records = zip(*told, strict=True) if told else ((), (), ())
            bad.append(quarantine_table(file, rows, USERS, sentences, records))
            columns = [
                pa.array([file] * len(ids)),
                pa.array(batch.rows),
                pa.array(as_records(batch.table), pa.string()),
            ]
            table = pa.table([*columns, ids], names=["file", "row", "record", "id"])
            tables.append(table.filter(there))
    table, wrong = pa.concat_tables(tables), pa.concat_tables(bad)
    codes = table["id"].combine_chunks().dictionary_encode().indices.to_numpy()
    last = np.unique(last_of_each(codes))
    if len(last) < len(table):
        progress.say(f"  users: {len(table) - len(last):,} rows replaced by a later row of the same user_id")
    if len(wrong):
        _write(place / BAD / "read.parquet", wrong)
    if not len(last):
        raise DataError(f"{path} has no row that can be read; the reasons are in {place / BAD}")
    return table.take(pa.array(last)).drop_columns("id"), len(wrong)


def question_of(record: Mapping[str, Any], template: Question) -> Question:
    """The question of a row of the users table.

    Raises:
        RequestError: a cell cannot be read; names the column. The recommender checks what it means.
    """
    user_id, age, history = record.get("user_id"), record.get("age"), record.get("history")
    if isinstance(user_id, float) and user_id.is_integer():
        user_id = int(user_id)
    if isinstance(age, str):
        try:
            age = float(age)
        except ValueError:
            raise RequestError("age", f"must be a number of years, not {age!r}") from None
    age = None if age is None or age != age else age
    if isinstance(text := history, str):
        try:
            history = json.loads(text) if text.strip() else None
        except ValueError:
            raise RequestError("history", f"must be a list in JSON, not {text[:60]!r}") from None
    if history is not None:
        if not isinstance(history, list):
            raise RequestError("history", "must be a list of item ids, or of item_id, event and timestamp")
        history = [_entry(entry, place) for place, entry in enumerate(history)]
    return replace(template, user_id=user_id, age=age, country=record.get("country") or None, history=history)


def _entry(entry: Any, place: int) -> dict[str, Any]:
    if isinstance(entry, dict):
        return {name: value for name, value in entry.items() if value is not None}
    if isinstance(entry, str | int) and not isinstance(entry, bool):
        return {"item_id": entry}
    raise RequestError(f"history.{place}", f"must be an item id, or item_id, event and timestamp, not {entry!r}")


# -- answering -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What an actor needs to know."""

    bundle: str
    out: Place
    template: Question
    reasons: bool
    users: int
    block: int
    given: bool  # the users come from a table

    @property
    def blocks(self) -> int:
        return -(-self.users // self.block)

    def part(self, number: int, folder: str = PARTS) -> Place:
        return self.out / folder / f"part-{number:05d}.parquet"

    def read_counts(self, number: int) -> dict[str, int] | None:
        """Of a block that is done."""
        try:
            with self.part(number).open() as file:
                counts: dict[str, int] = json.loads(pq.read_schema(file).metadata[_COUNTS])
                return counts
        except (FileNotFoundError, pa.ArrowException, KeyError, TypeError, ValueError):
            return None


class Answerer:
    """A recommender that answers block after block."""

    def __init__(self, job: Job) -> None:
        pa.set_cpu_count(1)
        self._job, self._error = job, ""
        try:
            self.recommender = Recommender.load(job.bundle, verify=False, warm=False)
        except UserError as error:  # as a value: Ray would start the actor again and again
            self._error = str(error)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        (number,) = batch["block"].tolist()
        counts: dict[str, int] = {}
        try:
            counts = {} if self._error else self.answer(number)
        except UserError as error:  # of the store that the folder lies in
            self._error = str(error)
        return {"counts": np.array([json.dumps(counts)]), "error": np.array([self._error])}

    def answer(self, number: int) -> dict[str, int]:
        """Write the recommendations of a block; returns their counts."""
        questions: list[Question | RequestError] = []
        rows: list[dict[str, Any]] = []
        if self._job.given:
            with (self._job.out / USERS / f"block-{number:05d}.parquet").open() as file:
                rows = pq.read_table(file).to_pylist()
            for row in rows:
                try:
                    questions.append(question_of(json.loads(row["record"]), self._job.template))
                except RequestError as error:
                    questions.append(error)
        else:
            ids = self.recommender.users.ids(number * self._job.block, self._job.block)
            questions += [replace(self._job.template, user_id=user_id) for user_id in ids]
        good = [question for question in questions if isinstance(question, Question)]
        tables, counts = [], Counter(users=0, known=0, cold=0, rows=0, quarantined=0)
        answered: list[Listed | RequestError] = []
        for start in range(0, len(good), _TOGETHER):
            found = self.recommender.lists(good[start : start + _TOGETHER])
            answered += found
            tables.append(self._table([one for one in found if isinstance(one, Listed)]))
        outcomes = iter(answered)
        whole = [one if isinstance(one, RequestError) else next(outcomes) for one in questions]
        bad = [place for place, one in enumerate(whole) if isinstance(one, RequestError)]
        if bad:
            columns = [[rows[place][name] for place in bad] for name in ("file", "row")]
            sentences, records = [str(whole[place]) for place in bad], [rows[place]["record"] for place in bad]
            table = pa.table([*columns, [USERS] * len(bad), sentences, records], schema=QUARANTINE)
            _write(self._job.part(number, BAD), table)
        listed = [one for one in whole if isinstance(one, Listed)]
        counts.update(
            users=len(listed), known=sum(one.known for one in listed), cold=sum(one.cold for one in listed),
            rows=sum(len(one.gids) for one in listed), quarantined=len(bad),
        )  # fmt: skip
        made = pa.concat_tables([self._table([]), *tables])
        _write(self._job.part(number), made.replace_schema_metadata({_COUNTS: json.dumps(counts)}))
        return counts

    def _table(self, listed: list[Listed]) -> pa.Table:
        """A row for each item of each user's list."""
        size = [len(one.gids) for one in listed]
        row, none = np.repeat(np.arange(len(listed)), size), np.empty(0)
        gids = np.concatenate([none, *(one.gids for one in listed)]).astype(np.int64)
        rank = np.concatenate([none, *(np.arange(1, count + 1) for count in size)])
        of_user = {
            "user_id": pa.array([str(one.asked.question.user_id) for one in listed], pa.string()),
            "known": pa.array([one.known for one in listed], pa.bool_()),
            "cold": pa.array([one.cold for one in listed], pa.bool_()),
        }
        of_user = {name: column.take(pa.array(row)) for name, column in of_user.items()}
        item_id, item_type = self.recommender.items.take(gids)
        columns = {
            "user_id": of_user.pop("user_id"),
            "rank": pa.array(rank.astype(np.int32)),
            "item_type": item_type,
            "item_id": item_id,
            "score": pa.array(np.concatenate([none, *(one.scores for one in listed)]).astype(np.float32)),
        }
        if self._job.reasons:
            told = [reason for one in listed for reason, _ in self.recommender.reasons(one)]
            columns["reason"] = pa.array(told, pa.string())
        version = pa.array([self.recommender.version] * len(gids), pa.string())
        return pa.table(columns | of_user | {"version": version})


def _answered(job: Job, blocks: list[int], cpus: int) -> Iterator[dict[str, int]]:
    """The counts of each block, as they come."""
    import ray
    from ray.data import ActorPoolStrategy

    if not blocks:
        return
    queue = ray.data.from_items([{"block": number} for number in blocks], override_num_blocks=len(blocks))
    answered = queue.map_batches(
        Answerer,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ActorPoolStrategy(size=min(cpus, len(blocks))),
        num_cpus=1,
    )
    for row in answered.iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        yield json.loads(row["counts"])
