"""Checks, on a sample of a finished run, that no feature of an example or query looks past its time.

The rules are those of docs/method.md, section 1: a training example sees the user's earlier events and a snapshot that
ends before it (in leave-one-out, one without its user); a query sees the events before its period. Examples and queries
come from the same functions as in training and evaluation; what they may contain is derived here independently from the
user's events. leaks_snapshots.py checks the contents of snapshots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from recsys_ray.checks.finished_run import FinishedRun, Words
from recsys_ray.checks.leaks_snapshots import check_snapshots
from recsys_ray.core.errors import LeakError
from recsys_ray.core.progress import Progress
from recsys_ray.data.tables import Events
from recsys_ray.evaluation.queries import known_before
from recsys_ray.evaluation.ranking import UserBatch, batch_of
from recsys_ray.evaluation.segments import Queries, find_queries
from recsys_ray.graph.snapshots import Snapshot, training_snapshot
from recsys_ray.two_tower.examples import (
    build_queries,
    training_examples,
    validation_examples,
)
from recsys_ray.two_tower.rows import histories_of


def check_run(run: FinishedRun, sample: int, progress: Progress) -> Iterator[str]:
    """Check ``sample`` examples, queries and items of each kind; yields a line per kind.

    Raises:
        LeakError: a feature looks past its time.
    """
    words = Words(run.ingest)
    check_plan(run.snapshots, run.ingest.counts, words)
    yield f"{len(run.snapshots)} snapshots: validation, test and HGNN training use no events after their moments"
    yield from _check_users(run, sample, words, progress)
    yield from check_snapshots(run, sample, words, progress)


def check_plan(snapshots: Sequence[Snapshot], counts: Mapping[str, Any], words: Words) -> None:
    """Validation and test use snapshots that end where their periods begin; the HGNN learns from training events."""
    valid, test = (next(s for s in snapshots if s.name == name) for name in ("valid", "test"))
    uses = [("validation", valid, "valid_from"), ("the test", test, "test_from")]
    uses.append(("HGNN training", training_snapshot(snapshots), "valid_from"))
    for what, snapshot, bound in uses:
        if snapshot.time > counts[bound]:
            raise LeakError(
                f"{what} uses snapshot {snapshot.name}, which contains events until {words.time(snapshot.time)}, after "
                f"{bound}, {words.time(counts[bound])}"
            )


def _check_users(run: FinishedRun, sample: int, words: Words, progress: Progress) -> Iterator[str]:
    """Examples, validation queries and test queries, shard by shard."""
    valid, test, end = (int(run.ingest.counts[name]) for name in ("valid_from", "test_from", "end"))
    catalogue, positive = run.tables.catalogue, np.isin(np.arange(len(run.ingest.counts["events"])), run.positives)
    random = np.random.default_rng(run.config.seed)
    share = -(-sample // len(run.tables.shards))
    looked, there = Counter[str](), Counter[str]()

    def some(kind: str, count: int) -> np.ndarray:
        rows = np.sort(random.permutation(count)[:share])
        looked[kind] += len(rows)
        there[kind] += count
        return rows

    with progress.task("examples and queries", len(run.tables.shards), "shards") as task:
        for shard in run.tables.shards:
            events = Events.read(shard)
            examples = training_examples(events, run.positives, run.snapshots, valid, run.rules)
            rows = some("training examples", len(examples["target"]))
            check_examples(events, examples, rows, run.snapshots, valid, words)
            later = validation_examples(events, run.positives, run.snapshots, test, run.rules)
            rows = some("examples of the refit", len(later["target"]))
            check_examples(events, later, rows, run.snapshots, test, words)
            queries = build_queries(events, run.positives, valid, test, run.rules)
            rows = some("validation queries", len(queries["target"]))
            check_validation(events, queries, rows, valid, words)
            asked = find_queries(events, catalogue, positive, test, end)
            uids = np.unique(asked.uid)
            uids = uids[some("users of the test", len(uids))]
            batch = batch_of(uids, known_before(events, test, uids))
            check_test(asked.keep_users(uids), batch, test, words)
            task.advance()
    holds = {
        "training examples": "history and snapshot lie before it, target not in the history",
        "examples of the refit": "the same, in the validation period",
        "validation queries": f"every history event before {words.time(valid)}, not the target",
        "users of the test": f"every history event before {words.time(test)}, no truth in it",
    }
    for kind, what in holds.items():
        yield f"{looked[kind]:,} of {there[kind]:,} {kind}: {what}"


def check_examples(
    events: Events,
    examples: Mapping[str, np.ndarray],
    rows: np.ndarray,
    snapshots: Sequence[Snapshot],
    until: int,
    words: Words,
) -> None:
    """Examples ``rows`` of the events before ``until``; for what is in them see ``build_examples``."""
    numbered = {snapshot.index: snapshot for snapshot in snapshots}
    for row in rows.tolist():
        uid, target, time = (int(examples[name][row]) for name in ("uid", "target", "timestamp"))
        snapshot = numbered[int(examples["snapshot"][row])]

        def named(uid: int = uid, target: int = target, time: int = time) -> str:
            return f"the training example of {words.user(uid)} for {words.item(target)} at {words.time(time)}"

        if time >= until:
            raise LeakError(f"{named()} is not before {words.time(until)}")
        known = snapshot.time <= (time if snapshot.without is None else until)
        if not known:
            end = words.time(snapshot.time)
            raise LeakError(f"{named()} uses embeddings and activity of snapshot {snapshot.name}, which ends at {end}")
        if snapshot.without is not None and not snapshot.without.has(np.array([uid]))[0]:
            raise LeakError(
                f"{named()} uses embeddings and activity of snapshot {snapshot.name}, which contains the user's events"
            )
        try:
            _check_history(events, examples, row, time, words)
        except LeakError as leak:
            raise LeakError(f"{named()}: {leak}") from None


def check_validation(
    events: Events, queries: Mapping[str, np.ndarray], rows: np.ndarray, valid_from: int, words: Words
) -> None:
    """Validation queries ``rows``."""
    for row in rows.tolist():
        try:
            _check_history(events, queries, row, valid_from, words)
        except LeakError as leak:
            user, item = words.user(queries["uid"][row]), words.item(queries["target"][row])
            raise LeakError(f"the validation query of {user} for {item}: {leak}") from None


def _check_history(events: Events, examples: Mapping[str, np.ndarray], row: int, moment: int, words: Words) -> None:
    """Checks that the row's history has only its user's events before ``moment``, each at most once, and not the
    target."""
    uid, target = int(examples["uid"][row]), int(examples["target"][row])
    first, last = np.searchsorted(events.uid, [uid, uid + 1])
    gid, event, time = (column[first:last] for column in (events.gid, events.event, events.timestamp))
    before = time < moment
    past = Counter(zip(gid[before].tolist(), event[before].tolist(), strict=True))
    history, codes, _ = histories_of(examples, np.array([row]))
    for item, code in zip(history.tolist(), codes.tolist(), strict=True):
        if item == target:
            raise LeakError("its history contains the target itself")
        past[item, code] -= 1
        if past[item, code] < 0:
            touched = time[(gid == item) & (event == code) & ~before]
            when = f"happened at {words.time(int(touched[0]))}" if len(touched) else "is no event of the user"
            bound = words.time(moment)
            raise LeakError(
                f"its history contains {words.event(code)} of {words.item(item)}, which {when}, not before {bound}"
            )


def check_test(queries: Queries, batch: UserBatch, test_from: int, words: Words) -> None:
    """The histories that recommenders get for the users of ``queries`` (all of them, ascending)."""
    late = np.flatnonzero(batch.timestamp >= test_from)
    if len(late):
        user, item = words.user(batch.uid[batch.rows[late[0]]]), words.item(batch.gid[late[0]])
        raise LeakError(
            f"the test queries of {user}: the history contains {item} at {words.time(int(batch.timestamp[late[0]]))}, "
            f"not before {words.time(test_from)}"
        )
    items = int(max(batch.gid.max(initial=0), queries.truth_item.max(initial=0))) + 1
    asked = queries.uid[queries.truth_query] * items + queries.truth_item
    told = np.isin(asked, batch.uid[batch.rows] * items + batch.gid)
    if told.any():
        uid, gid = divmod(int(asked[told][0]), items)
        raise LeakError(
            f"the test queries of {words.user(uid)}: the history contains their own truth, {words.item(gid)}"
        )
