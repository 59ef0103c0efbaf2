"""recsys-ray batch-recommend on a real local Ray: every user's answer, also after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bundle_world import World, make_world
from pipeline_world import call, command

from recsys_ray.serving.recommender import Recommender
from recsys_ray.serving.requests import Question

USERS = 1200  # five blocks


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"), users=USERS, memory=0.1)
    made.bundle()
    return made


@pytest.fixture(scope="module")
def recommender(world) -> Recommender:
    return Recommender.load(world.root)


def check(out: Path, recommender: Recommender, questions: list[Question]) -> None:
    """The rows are the answers of a recommender that is asked one by one."""
    rows = pq.read_table(out / "recommendations").to_pylist()
    by_user: dict[str, list[dict]] = {}
    for row in rows:
        by_user.setdefault(row["user_id"], []).append(row)
    for question in questions:
        answer, mine = recommender.answer(question), by_user.pop(str(question.user_id), [])
        assert [row["rank"] for row in mine] == list(range(1, len(answer.items) + 1))
        assert [row["score"] for row in mine] == pytest.approx([item.score for item in answer.items], abs=1e-5)
        got = [(row["item_id"], row["item_type"], row["reason"]) for row in mine]
        wanted = [(item.item_id, item.item_type, item.reason) for item in answer.items]
        apart = all(a.score - b.score > 1e-5 for a, b in zip(answer.items, answer.items[1:], strict=False))
        assert got == wanted or not apart
        assert {(row["known"], row["cold"], row["version"]) for row in mine} <= {
            (answer.known, answer.cold, answer.version)
        }
    assert not by_user


@pytest.mark.slow
def test_a_killed_call_goes_on_and_all_users_have_their_answers(world, recommender, tmp_path):
    out, bundle = tmp_path / "out", world.root / "bundles" / "current"
    words = ["batch-recommend", "--bundle", bundle, "--out", out, "-k", "7"]
    process = subprocess.Popen(command(*words), start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (parts := list((out / "recommendations").glob("part-*.parquet"))) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert parts and not (out / "manifest.json").exists(), "it was done before it was killed"
    parts = list((out / "recommendations").glob("part-*.parquet"))
    before = {part.name: part.stat().st_mtime_ns for part in parts}

    other = call("batch-recommend", "--bundle", bundle, "--out", out, "-k", "8")
    assert other.returncode == 2 and "asked for differently: configuration changed (k: 7 -> 8)" in other.stderr
    told = call(*words)
    assert told.returncode == 0, told.stderr
    if len(before) < 5:
        assert "users are done already" in told.stderr and "users/s" in told.stderr
    after = {part.name: part.stat().st_mtime_ns for part in (out / "recommendations").iterdir()}
    assert after.items() >= before.items() and len(after) == 5
    check(out, recommender, [Question(user_id, k=7) for user_id in world.user_ids])

    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["counts"]["users"] == USERS and manifest["counts"]["version"] == recommender.version
    assert manifest["counts"]["rows"] == sum(pq.read_metadata(out / name).num_rows for name in manifest["files"])
    again = call(*words)
    assert again.returncode == 0 and "up to date" in again.stderr
    foreign = call("batch-recommend", "--bundle", bundle, "--out", world.root)
    assert foreign.returncode == 2 and "is not empty and holds no recommendations" in foreign.stderr


def test_users_of_a_table(world, recommender, tmp_path):
    """A known user with news, two new ones, and rows that cannot be answered."""
    entry = pa.struct({"item_id": pa.string(), "event": pa.string(), "timestamp": pa.int64()})
    book, song = world.item_ids[4], world.item_ids[35]
    rows = [
        (world.user_ids[1], 30.0, None, [{"item_id": book, "event": None, "timestamp": None}]),
        ("new", None, "SE", [{"item_id": song, "event": "follow", "timestamp": 1_690_000_000}]),
        ("nobody", None, None, None),
        ("old", 400.0, None, None),
        ("odd", None, None, [{"item_id": song, "event": "fly", "timestamp": None}]),
        (None, 20.0, None, None),
        ("nobody", 44.0, None, None),
    ]
    columns = [pa.array(column, kind) for column, kind in zip(
        zip(*rows, strict=True), (pa.string(), pa.float64(), pa.string(), pa.list_(entry)), strict=True)]  # fmt: skip
    table, out = tmp_path / "users.parquet", tmp_path / "out"
    pq.write_table(pa.table(columns, names=["user_id", "age", "country", "history"]), table)
    words = ("batch-recommend", "--bundle", world.root, "--users", table, "--quota", "music=3", "--quota", "podcast=2")
    told = call(*words, "--diversity", "0.2", "--out", out)
    assert told.returncode == 0, told.stderr
    assert "1 rows replaced by a later row" in told.stderr and f"3 rows of {table} cannot be used" in told.stderr
    asked = Question(quotas={"music": 3, "podcast": 2}, diversity=0.2)
    first = replace(asked, user_id=world.user_ids[1], age=30.0, history=[{"item_id": book}])
    new = [{"item_id": song, "event": "follow", "timestamp": 1_690_000_000}]
    second = replace(asked, user_id="new", country="SE", history=new)
    check(out, recommender, [first, second, replace(asked, user_id="nobody", age=44.0)])
    bad = pq.read_table(out / "quarantine").to_pylist()
    assert {(row["file"], row["row"]) for row in bad} == {(str(table), 4), (str(table), 5), (str(table), 6)}
    reasons = {row["row"]: row["reason"] for row in bad}
    assert reasons[4].startswith("age: must be a number of years from 0 to 130")
    assert reasons[5].startswith("history.0.event: there is no event 'fly'") and reasons[6] == "user_id is missing"

    text = tmp_path / "users.csv"
    text.write_text(f'user_id,history,age\nnew,"[""{song}""]",31\nlost,{song},\n')
    told = call("batch-recommend", "--bundle", world.root, "--users", text, "--out", tmp_path / "csv", "--no-reasons")
    assert told.returncode == 0, told.stderr
    found = pq.read_table(tmp_path / "csv" / "recommendations")
    answer = recommender.answer(Question("new", history=[{"item_id": song}], age=31.0))
    assert found["item_id"].to_pylist() == [item.item_id for item in answer.items]
    assert "reason" not in found.column_names
    (bad,) = pq.read_table(tmp_path / "csv" / "quarantine").to_pylist()
    assert (bad["row"], bad["reason"]) == (2, f"history: must be a list in JSON, not {song!r}")


def test_a_wrong_setting_is_a_sentence_and_leaves_nothing(world, tmp_path):
    for words, sentence in {
        ("--type", "film"): "there is no item type 'film'",
        ("-k", "501"): "k: must be a whole number from 1 to 500",
        ("--quota", "music"): "write TYPE=N",
        ("--users", str(tmp_path / "none.csv")): "there is no file or folder at",
    }.items():
        told = call("batch-recommend", "--bundle", world.root, "--out", tmp_path / "out", *words)
        assert told.returncode == 2 and sentence in told.stderr
    assert not (tmp_path / "out").exists()
