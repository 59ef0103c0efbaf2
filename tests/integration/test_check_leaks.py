"""What lies at or after a moment may be anything: no feature of an example or a snapshot before it changes by a bit.

The tables themselves are changed; ingest, graph and examples are made again. And the check of a run finds no leak.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from pipelines.leaks import check
from recsys_ray.config import Config
from recsys_ray.core.errors import LeakError
from recsys_ray.core.progress import Progress
from recsys_ray.data.tables import Events, Tables
from recsys_ray.graph.activity import ACTIVITY
from recsys_ray.graph.edges import kinds_of
from recsys_ray.graph.snapshots import Snapshot, snapshots_of
from recsys_ray.stages.chain import STAGES
from recsys_ray.stages.runner import Runner
from recsys_ray.storage.artifacts import load_arrays, publish, save_arrays
from recsys_ray.storage.outputs import current_output, set_current, work_folder
from recsys_ray.two_tower.examples import HistoryRules, build_queries, training_examples
from recsys_ray.two_tower.rows import join, take

pytestmark = pytest.mark.usefixtures("ray_local")
DAY, NOW = 86_400, 1_700_006_400  # NOW is a midnight
VALID, TEST = NOW - 20 * DAY, NOW - 10 * DAY
USERS, PER_TYPE, EVENTS = 80, 30, 1600
RULES = HistoryRules(8, None)


def table() -> pl.DataFrame:
    """Events of a hundred days, a fifth of them weak, in order of time."""
    random = np.random.default_rng(7)
    columns = {
        "user_id": [f"u{n}" for n in random.integers(0, USERS, EVENTS)],
        "item_id": [f"{'ab'[n % 2]}{n // 2}" for n in random.integers(0, 2 * PER_TYPE, EVENTS)],
        "event": ["stream" if draw > 0.2 else "follow" for draw in random.random(EVENTS)],
        "timestamp": np.sort(random.integers(NOW - 100 * DAY, NOW, EVENTS)),
    }
    return pl.DataFrame(columns).unique(["user_id", "item_id", "event", "timestamp"], keep="first", maintain_order=True)


def run(root: Path, events: pl.DataFrame, protocol: str, **graph: Any) -> Config:
    """Ingest and graph of a world with these events; text vectors are drawn."""
    root.mkdir(parents=True)
    events.write_parquet(root / "interactions.parquet")
    ids = [f"{kind}{n}" for kind in "ab" for n in range(PER_TYPE)]
    items = {"item_id": ids, "item_type": [name[0] for name in ids], "title": ids}
    pl.DataFrame(items).write_parquet(root / "items.parquet")
    pl.DataFrame({"user_id": [f"u{n}" for n in range(USERS)]}).write_parquet(root / "users.parquet")
    tables = {name: str(root / f"{name}.parquet") for name in ("items", "interactions", "users")}
    by_time = {"valid_from": "2023-10-26", "test_from": "2023-11-05"}
    config = Config.model_validate(
        {
            "run_dir": str(root / "run"),
            "data": {**tables, "shards": 2, "now": "2023-11-16"},
            "events": {"weak": ["follow"]},
            "split": by_time if protocol == "time" else {"protocol": protocol},
            "graph": {"window_days": None, "cuts": 3, "max_neighbors": 4, **graph},
        }
    )
    with Runner(config, STAGES, Progress(quiet=True)) as runner:
        ingest = runner.run("ingest")
        work = work_folder(root / "run" / "featurize", "made")
        vectors = np.random.default_rng(0).normal(size=(len(ids), 8)).astype(np.float16)
        save_arrays(work / "text.safetensors", {"vector": vectors})
        publish(work, "featurize", "0" * 16, inputs={"ingest": ingest.fingerprint}, counts={"text_dim": 8})
        set_current(work.parent, work)
        runner.run("graph")
    return config


def features(config: Config) -> tuple[list[Snapshot], dict[str, bytes], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Snapshots; edges, pairs and activity of each; training examples; validation queries."""
    ingest, graph = (current_output(config.run_dir, stage) for stage in ("ingest", "graph"))
    counts, snapshots = ingest.counts, snapshots_of(graph.counts)
    activity = load_arrays(graph.path / ACTIVITY)
    seen = {
        s.name: b"".join((graph.path / kind / f"{s.name}.parquet").read_bytes() for kind in kinds_of(s.name))
        + activity[s.name].tobytes()
        for s in snapshots
    }
    shards = [Events.read(p) for p in Tables(ingest.path).shards]
    valid, test = counts["valid_from"], counts["test_from"]
    parts = [training_examples(events, [0], snapshots, valid, RULES) for events in shards]
    asked = [build_queries(events, [0], valid, test, RULES) for events in shards]
    return snapshots, seen, join(parts), join(asked)


def rows_of(columns: dict[str, np.ndarray], chosen: np.ndarray) -> list[Any]:
    """Rows as comparable values: every feature of each, to the bit."""
    rows = [take(columns, np.array([row])) for row in np.flatnonzero(chosen)]
    return sorted(tuple(row[name].tobytes() for name in sorted(row)) for row in rows)


def shuffle_items(events: pl.DataFrame, late: np.ndarray) -> pl.DataFrame:
    """Other items for the late events; users, times and numbers of events stay."""
    items, kinds = events["item_id"].to_numpy().copy(), events["event"].to_numpy().copy()
    order = np.random.default_rng(1).permutation(np.flatnonzero(late))
    items[late] = items[order]
    positive = late & (kinds == "stream")
    assert positive.any()
    return events.with_columns(item_id=pl.Series(items))


def drop_most(events: pl.DataFrame, late: np.ndarray) -> pl.DataFrame:
    """Three in four of the late events are gone."""
    return events.filter(pl.Series(~late | (np.cumsum(late) % 4 == 0)))


@pytest.fixture(scope="module")
def whole(ray_local, tmp_path_factory):
    config = run(tmp_path_factory.mktemp("leaks") / "whole", table(), "time")
    return config, features(config)


@pytest.mark.parametrize(
    ("change", "moment"),
    [
        (shuffle_items, "valid"),
        (drop_most, "test"),
        pytest.param(shuffle_items, "cut2", marks=pytest.mark.slow),
        pytest.param(drop_most, "valid", marks=pytest.mark.slow),
    ],
)
def test_the_future_changes_no_feature(whole, tmp_path, change, moment):
    _, (snapshots, seen, examples, queries) = whole
    since = next(s.time for s in snapshots if s.name == moment)
    events = table()
    late = events["timestamp"].to_numpy() >= since
    changed_events = change(events, late)
    assert len(changed_events) < len(events) or not changed_events.equals(events)
    others, other_seen, other_examples, other_queries = features(run(tmp_path / "changed", changed_events, "time"))
    assert others[:-1] == snapshots[:-1]  # the last is of the end of the data
    compared = [s.name for s in snapshots if s.time <= since]
    assert compared[-1] == moment
    for name in compared:
        assert other_seen[name] == seen[name], name
    for name in ("test", "serve")[moment == "test" :]:
        assert other_seen[name] != seen[name], name  # or the change was none
    mine, theirs = examples["timestamp"] < since, other_examples["timestamp"] < since
    assert mine.sum() > 200
    assert rows_of(other_examples, theirs) == rows_of(examples, mine)
    if moment == "test":
        assert len(queries["uid"]) > 20
        assert rows_of(other_queries, other_queries["uid"] >= 0) == rows_of(queries, queries["uid"] >= 0)


def test_a_fold_changes_no_feature_of_its_own_examples_but_the_history(ray_local, tmp_path):
    """Leave-one-out: other items for all events of the users of fold 0."""
    events = table()
    config = run(tmp_path / "whole", events, "leave_one_out")
    snapshots, seen, examples, _ = features(config)
    users = pl.read_parquet(current_output(config.run_dir, "ingest").path / "users.parquet")["user_id"].to_list()
    fold = {users[uid] for uid in np.flatnonzero(snapshots[0].without.has(np.arange(len(users))))}
    assert 5 < len(fold) < USERS - 5
    late = events["user_id"].is_in(list(fold)).to_numpy()
    others, other_seen, other_examples, _ = features(
        run(tmp_path / "changed", shuffle_items(events, late), "leave_one_out")
    )
    assert others == snapshots
    assert other_seen["cut0"] == seen["cut0"]
    for name in ("cut1", "cut2", "valid", "test", "serve"):
        assert other_seen[name] != seen[name], name
    mine, theirs = examples["snapshot"] != 0, other_examples["snapshot"] != 0
    assert mine.sum() > 200
    assert rows_of(other_examples, theirs) == rows_of(examples, mine)


def test_leave_one_out_does_not_see_what_is_left_out(ray_local, tmp_path):
    """Each user's last event is another one: training and validation are as they were."""
    streams = table().filter(pl.col("event") == "stream")
    events = streams.unique(["user_id", "item_id"], keep="first", maintain_order=True)
    last = (events["user_id"].is_last_distinct()).to_numpy()
    other = events.with_columns(item_id=pl.when(pl.Series(last)).then(pl.lit("a0")).otherwise(pl.col("item_id")))
    known = events.filter(pl.Series(~last) & (pl.col("item_id") == "a0"))["user_id"].to_list()
    kept = ~events["user_id"].is_in(known)  # for them, a0 would be no new item
    found = [
        features(run(tmp_path / name, each.filter(kept), "leave_one_out"))
        for name, each in (("whole", events), ("changed", other))
    ]
    (_, seen, examples, queries), (_, other_seen, other_examples, other_queries) = found
    for name in ("cut0", "cut1", "cut2", "valid", "test"):
        assert other_seen[name] == seen[name], name
    assert other_seen["serve"] != seen["serve"]
    assert rows_of(other_examples, other_examples["uid"] >= 0) == rows_of(examples, examples["uid"] >= 0)
    assert rows_of(other_queries, other_queries["uid"] >= 0) == rows_of(queries, queries["uid"] >= 0)
    assert len(queries["uid"]) > 20


def test_the_check_of_a_run_says_what_it_looked_at(whole, capsys):
    config, (snapshots, _, examples, queries) = whole
    check(config, Progress(quiet=True), 10_000)
    said = capsys.readouterr().out
    assert f"{len(examples['uid']):,} of {len(examples['uid']):,} training examples" in said
    assert f"{len(queries['uid']):,} of {len(queries['uid']):,} validation queries" in said
    assert f"edges and pairs into {2 * PER_TYPE} items on {len(snapshots)} snapshots" in said
    assert "not checked: hgnn has not run" in said
    assert said.rstrip().endswith("no feature looks past its time")


def test_the_check_fails_on_the_papers_own_way(ray_local, tmp_path):
    config = run(tmp_path / "paper", table(), "time", features_as_of="window")
    with pytest.raises(LeakError, match="the training example of user"):
        check(config, Progress(quiet=True), 50)
