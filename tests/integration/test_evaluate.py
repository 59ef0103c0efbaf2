"""The evaluate stage on a real local Ray, on a checkerboard whose right answers are known."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import ray
import torch

from recsys_ray.baselines import BASELINES, fitting
from recsys_ray.baselines import tuning as tuning_module
from recsys_ray.config import Config, load_config
from recsys_ray.core.errors import UserError
from recsys_ray.core.progress import Progress
from recsys_ray.evaluation.ranking import Scorer, UserBatch
from recsys_ray.stages import evaluate as stage
from recsys_ray.stages.runner import Context
from recsys_ray.storage.artifacts import Artifact, save_arrays, write_json

TYPES, PER_TYPE, USERS, SHARDS = ("book", "song"), 150, 48, 3
ITEMS = len(TYPES) * PER_TYPE
VALID, TEST, END = 1_000_000, 2_000_000, 3_000_000
COLUMNS = {
    "model", "item_type", "segment", "users", "queries", "hr_at_10", "hr_at_10_low", "hr_at_10_high", "ndcg_at_10",
    "ndcg_at_10_low", "ndcg_at_10_high", "mrr_at_100", "mrr_at_100_hits", "coverage_at_100", "share_of_oracle",
}  # fmt: skip


# The tower below goes to tasks, whose processes cannot import this file.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class ColourTower:
    """Knows the answer. Needs the users table to tell a user's colour."""

    item_vectors = np.eye(2, dtype=np.float32)[np.arange(ITEMS) % 2]

    def unknown(self, users: UserBatch) -> np.ndarray:
        return users.empty

    def scorer(self, users: UserBatch) -> Scorer:
        assert users.users is not None and len(users.users) == len(users)
        colour = [int(user_id.removeprefix("user-")) % 2 for user_id in users.users["user_id"].to_pylist()]
        vectors = torch.eye(2)[torch.tensor(colour)]
        return lambda first, last: vectors @ torch.from_numpy(self.item_vectors[first:last]).T


def events_of(user: int, rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """Users like items of their colour. Even test: three new items a type; every sixth user is cold, every eighth
    knows books only; the last ten items of a type appear after training."""
    rows = []
    for first in (0, PER_TYPE):
        own = first + user % 2 + 2 * rng.permutation(PER_TYPE // 2)
        old, new = own[own < first + PER_TYPE - 10], own[own >= first + PER_TYPE - 10]
        if user % 6 and (first == 0 or user % 8):
            rows += [(user, int(g), 0, int(t)) for g, t in zip(old[:20], rng.integers(0, TEST, 20), strict=True)]
            rows += [(user, int(old[20]), 1, TEST - 1), (user, int(old[0]), 0, TEST + 1)]  # weak; known already
        truths = [*old[30:32], new[user % len(new)]]
        rows += [(user, int(g), 0, int(t)) for g, t in zip(truths, rng.integers(TEST, END, 3), strict=True)]
    return sorted(rows, key=lambda row: (row[0], row[3], row[1], row[2]))


@pytest.fixture(scope="module")
def log() -> list[tuple[int, int, int, int]]:
    rng = np.random.default_rng(0)
    return list(itertools.chain.from_iterable(events_of(user, rng) for user in range(USERS)))


@pytest.fixture
def run(tmp_path, log) -> Path:
    """What the stages before leave in the run folder."""
    ingest = tmp_path / "ingest"
    (ingest / "interactions").mkdir(parents=True)
    items = {
        "item_id": [f"item-{g:03d}" for g in range(ITEMS)],
        "item_type": [TYPES[g // PER_TYPE] for g in range(ITEMS)],
        "title": [f"Title {g}" for g in range(ITEMS)],
        "ntype": np.arange(ITEMS, dtype=np.int16) // PER_TYPE,
        "available": np.arange(ITEMS) % PER_TYPE != 5,
    }
    pl.DataFrame(items).write_parquet(ingest / "items.parquet")
    shard = np.arange(USERS) * SHARDS // USERS
    users = pl.DataFrame({"user_id": [f"user-{u}" for u in range(USERS)], "shard": shard})
    users.write_parquet(ingest / "users.parquet", row_group_size=10)
    schema = {"uid": pl.Int64, "gid": pl.Int32, "event": pl.Int8, "timestamp": pl.Int64}
    table = pl.DataFrame(log, schema=schema, orient="row")
    for k in range(SHARDS):
        mine = table.filter(pl.col("uid").is_in(np.flatnonzero(shard == k)))
        mine.write_parquet(ingest / "interactions" / f"shard-{k:05d}.parquet")
    counts = {"item_types": TYPES, "events": ["stream", "follow"], "valid_from": VALID, "test_from": TEST, "end": END}
    write_json(ingest / "manifest.json", {"counts": counts, "seconds": 1.0})
    vectors = np.eye(16)[np.arange(ITEMS) % 2] + np.random.default_rng(1).normal(0, 0.05, (ITEMS, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    save_arrays(tmp_path / "featurize" / "text.safetensors", {"vector": vectors.astype(np.float16)})
    shuffled = np.random.default_rng(2).permutation(ITEMS)
    for snapshot, (k, part) in itertools.product(("valid", "test"), enumerate(np.array_split(shuffled, 2))):
        arrays = {"gid": part, "embedding": vectors[part].astype(np.float32)}
        save_arrays(tmp_path / "hgnn" / "embeddings" / snapshot / f"part-{k:05d}.safetensors", arrays)
    oracle = {  # ranks for half of the users only, and has what they will touch in front
        "user_id": [f"user-{u}" for u in range(USERS // 2) for _ in TYPES],
        "item_type": [name for _ in range(USERS // 2) for name in TYPES],
        "item_ids": [
            [f"item-{g:03d}" for u, g, e, t in log if u == user and t >= TEST and g // PER_TYPE == k and e == 0]
            for user in range(USERS // 2)
            for k in range(len(TYPES))
        ],
    }
    pl.DataFrame(oracle).write_parquet(tmp_path / "oracle.parquet")
    return tmp_path


def configuration(run: Path, *overrides: str) -> Config:
    oracle = f"data.oracle={run / 'oracle.parquet'}"
    small = ("evaluate.bootstrap=200", "evaluate.trials=1", "evaluate.map_items=0")
    return load_config(None, [oracle, f"run_dir={run}", *small, *overrides])


def go(run: Path, config: Config, out: str = "evaluation", cache: str = "", **prints: str) -> dict:
    inputs = {
        name: Artifact(run / name, {"fingerprint": prints.get(name, name)}) for name in ("ingest", "featurize", "hgnn")
    }
    kept = run / (cache or f"{out}/cache")
    context = Context(config, inputs, run / out, Progress(quiet=True), 2, 1, kept, lambda: (1.0, 100.0))
    return stage.evaluate(context, {"2t_hgnn": ColourTower})


def table(run: Path, out: str = "evaluation") -> dict[tuple[str, str, str], dict]:
    rows = json.loads((run / out / "metrics.json").read_text())
    return {(row["model"], row["item_type"], row["segment"]): row for row in rows}


def by_hand(log: list[tuple[int, int, int, int]]) -> dict[str, float]:
    """HR@10 by popularity (90 days reach back to the start), one query after the other, for warm users."""
    popularity = np.zeros(ITEMS)
    for _, gid, event, time in log:
        popularity[gid] += event == 0 and time < TEST
    hits: dict[str, list[bool]] = {name: [] for name in TYPES}
    for user, (k, name) in itertools.product(range(USERS), enumerate(TYPES)):
        seen = {g for u, g, _, t in log if u == user and t < TEST}
        truth = {g for u, g, e, t in log if u == user and t >= TEST and e == 0 and g // PER_TYPE == k} - seen
        if not seen or not truth:
            continue
        allowed = [g for g in range(k * PER_TYPE, (k + 1) * PER_TYPE) if g % PER_TYPE != 5 or g in truth]
        ranked = sorted((g for g in allowed if g not in seen), key=lambda g: (-popularity[g], g))
        hits[name].append(bool(truth & set(ranked[:10])))
    return {name: float(np.mean(found)) for name, found in hits.items()}


def test_table(ray_local, run, log):
    counts = go(run, configuration(run))
    found = table(run)
    assert counts["models"] == ["popularity", "item_knn", "llm_knn", "hgnn", "2t_hgnn", "oracle"]
    assert counts["queries"] == 2 * USERS and counts["users"] == USERS
    for row in found.values():
        assert set(row) == COLUMNS
        assert row["hr_at_10_low"] <= row["hr_at_10"] <= row["hr_at_10_high"] <= 1
        assert 0 <= row["ndcg_at_10_low"] <= row["ndcg_at_10"] <= row["ndcg_at_10_high"] <= 1
        assert row["mrr_at_100"] <= row["mrr_at_100_hits"] <= 1
    expected = by_hand(log)
    for name in TYPES:
        assert found["popularity", name, "warm"]["hr_at_10"] == pytest.approx(expected[name])
    cold = sum(user % 6 == 0 for user in range(USERS))
    assert found["2t_hgnn", "all", "cold"]["users"] == cold
    assert found["2t_hgnn", "all", "warm"]["users"] == USERS - cold
    # Of cold users the tower knows nothing, so they get what is popular.
    for figure in ("hr_at_10", "mrr_at_100", "coverage_at_100"):
        assert found["2t_hgnn", "all", "cold"][figure] == found["popularity", "all", "cold"][figure]
    strangers = sum(user % 6 != 0 and user % 8 == 0 for user in range(USERS))
    assert found["llm_knn", "song", "new_to_type"]["users"] == strangers
    assert ("llm_knn", "book", "new_to_type") not in found
    # Items that appear after training: popularity cannot find them, vectors can.
    assert found["popularity", "all", "cold_items"]["hr_at_10"] == 0
    assert found["hgnn", "all", "cold_items"]["users"] == USERS - cold
    assert found["2t_hgnn", "all", "warm"]["mrr_at_100"] > found["popularity", "all", "warm"]["mrr_at_100"]
    # The oracle is always right, for those whom it knows.
    assert found["oracle", "all", "all"]["hr_at_10"] == 1 and found["oracle", "all", "all"]["users"] == USERS // 2
    assert found["oracle", "all", "warm"]["share_of_oracle"] == 1
    assert 0 < found["popularity", "all", "warm"]["share_of_oracle"] < 1
    # Two colours, all users: everything of the type is within somebody's first hundred.
    assert found["llm_knn", "all", "all"]["coverage_at_100"] == 1
    apart = json.loads((run / "evaluation" / "differences.json").read_text())
    apart = {(row["against"], row["item_type"], row["segment"]): row for row in apart}
    ours, popular = found["2t_hgnn", "all", "warm"]["hr_at_10"], found["popularity", "all", "warm"]["hr_at_10"]
    assert apart["popularity", "all", "warm"]["difference"] == pytest.approx(ours - popular)
    assert apart["popularity", "all", "warm"]["low"] > 0
    assert apart["oracle", "all", "all"]["users"] == USERS // 2  # only those whom both were asked for
    page = (run / "evaluation" / "report.html").read_text()
    assert f"{found['2t_hgnn', 'all', 'warm']['hr_at_10']:.4f}" in page


def test_example_users(ray_local, run, log):
    go(run, configuration(run))
    found = json.loads((run / "evaluation" / "examples.json").read_text())
    rows = table(run)
    warm = {model: rows[model, "all", "warm"] for model in (found["served"], found["rival"])}
    assert found["served"] == "2t_hgnn" and found["rival"] in ("popularity", "item_knn", "llm_knn")
    # The outcomes of two models add up to the figures of the table.
    lists = found["lists"]
    asked = sum(lists.values())
    assert asked == warm["2t_hgnn"]["queries"]
    assert (lists["ours"] + lists["both"]) / asked == pytest.approx(warm["2t_hgnn"]["hr_at_10"])
    assert (lists["rival"] + lists["both"]) / asked == pytest.approx(warm[found["rival"]]["hr_at_10"])
    assert len({user["user_id"] for user in found["users"]}) == len(found["users"]) == 12
    assert {"new_to_type", "cold"} <= {user["kind"] for user in found["users"]}
    for user in found["users"]:
        number, kind = int(user["user_id"].removeprefix("user-")), TYPES.index(user["item_type"])
        past = [(g, e, t) for u, g, e, t in log if u == number and t < TEST]
        assert [tuple(event[name] for name in ("gid", "event", "timestamp")) for event in user["history"]] == past[
            ::-1
        ][:12]
        assert user["events"] == len(past)
        later = {g for u, g, e, t in log if u == number and t >= TEST and e == 0 and g // PER_TYPE == kind}
        assert set(user["truths"]) == later - {g for g, _, _ in past}
        hit = {model: bool(set(items) & set(user["truths"])) for model, items in user["recommended"].items()}
        expected = {"ours": (True, False), "rival": (False, True), "both": (True, True), "neither": (False, False)}
        if user["kind"] in expected:
            assert (hit["2t_hgnn"], hit[found["rival"]]) == expected[user["kind"]]
        for model, items in user["recommended"].items():
            assert {g // PER_TYPE for g in items} <= {kind} and not set(items) & {g for g, _, _ in past}
            assert len(items) == len(set(items)) == (10 if model != "oracle" else len(items))
            assert all(found["items"][str(g)]["title"] == f"Title {g}" for g in items)


def test_shares_of_popularity_tiers(ray_local, run, log):
    go(run, configuration(run))
    found = json.loads((run / "evaluation" / "popularity.json").read_text())
    assert sum(found["items_by_tier"]["all"]) == ITEMS
    for by_segment in [found["chosen"], *found["recommended"].values()]:
        for by_type in by_segment.values():
            assert all(sum(shares) == pytest.approx(1, abs=1e-5) for shares in by_type.values())
    # No list holds more of the head than popularity's; what is new in the test period is in the last tier.
    head = {model: shares["cold"]["song"][0] for model, shares in found["recommended"].items() if model != "oracle"}
    assert head["popularity"] == max(head.values()) == 1
    unseen = sum(g % PER_TYPE >= PER_TYPE - 10 for u, g, e, t in log if t > TEST + 1 and e == 0 and u % 6 == 0)
    chosen = sum(t > TEST + 1 and e == 0 and u % 6 == 0 for u, g, e, t in log)
    assert found["chosen"]["cold"]["all"][4] >= unseen / chosen


def test_map_of_the_items(ray_local, run):
    go(run, configuration(run, "evaluate.map_items=120", "evaluate.examples=0"), "one")
    go(run, configuration(run, "evaluate.map_items=120"), "two")
    assert not (run / "one" / "examples.json").exists()
    assert (run / "one" / "map.json").read_text() == (run / "two" / "map.json").read_text()
    found = json.loads((run / "one" / "map.json").read_text())
    gids = [int(name.removeprefix("item-")) for name in found["id"]]
    assert len(gids) == 120 and list(found["spaces"]) == ["hgnn", "2t_hgnn", "text"]
    assert found["type"] == [g // PER_TYPE for g in gids] and found["title"] == [f"Title {g}" for g in gids]
    for k, near in enumerate(found["spaces"]["hgnn"]["near"]):  # two colours, far apart
        assert k not in near and {gids[n] % 2 for n in near} == {gids[k] % 2}
    go(run, configuration(run, "evaluate.map_items=0"), "none")
    assert not (run / "none" / "map.json").exists()


def test_killed_evaluation_goes_on_where_it_was(ray_local, run, monkeypatch):
    go(run, configuration(run), "undisturbed")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "summarise", killed)
    with pytest.raises(KeyboardInterrupt):
        go(run, configuration(run))
    monkeypatch.undo()
    out = run / "evaluation"
    parts = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    missing = [path for path in parts if path.stem in ("llm_knn-shard-00001", "survey-shard-00002")]
    assert len(missing) == 2
    for path in missing:
        path.unlink()
    go(run, configuration(run))
    assert (run / "evaluation" / "metrics.json").read_text() == (run / "undisturbed" / "metrics.json").read_text()
    assert {path for path, time in parts.items() if path.stat().st_mtime_ns != time} == set(missing)


def test_a_sample_of_users(ray_local, run):
    overrides = ("evaluate.max_users=10", "evaluate.batch_size=3", "evaluate.baselines=popularity,item_knn")
    assert go(run, configuration(run, *overrides), "one")["users"] == 10
    go(run, configuration(run, *overrides), "two")
    assert table(run, "one") == table(run, "two")
    go(run, configuration(run, *overrides, "data_seed=1"), "three")
    assert table(run, "one") != table(run, "three")


@pytest.mark.slow
def test_every_baseline_gets_the_same_number_of_trials(ray_local, run, monkeypatch):
    """Killed in the middle of tuning, the evaluation goes on there, and comes to the same table."""
    pytest.importorskip("implicit")
    tuned = ("evaluate.trials=2", "data.oracle=null")
    config = configuration(run, "evaluate.baselines=all", *tuned)
    counts = go(run, config)
    assert counts["models"] == [*BASELINES, "2t_hgnn"]
    tuning = json.loads((run / "evaluation" / "tuning.json").read_text())
    assert list(tuning) == list(counts["tuning"]) == list(BASELINES)
    for name, found in tuning.items():
        assert len(found["trials"]) == counts["tuning"][name]["trials"] == 2 and counts["tuning"][name]["capped"] == 0
        assert found["hr_at_10"] == max(trial["hr_at_10"] for trial in found["trials"])
        assert ("epochs" in found["params"]) == (name in ("lightgcn", "sasrec", "hgnn_w_users"))
        assert table(run)[name, "all", "warm"]["coverage_at_100"] > 0
    assert table(run)["ease", "all", "warm"]["hr_at_10"] > 1.3 * table(run)["popularity", "all", "warm"]["hr_at_10"]
    assert "2 trials" in (run / "evaluation" / "report.html").read_text()

    attempts, real = [], tuning_module.alone
    config = configuration(run, "evaluate.baselines=ease,lightgcn", *tuned)

    def alone(function, *arguments, **options):
        if function is fitting.try_point:
            attempts.append(arguments[1])
            if len(attempts) == 4:
                raise KeyboardInterrupt
        return real(function, *arguments, **options)

    monkeypatch.setattr(tuning_module, "alone", alone)
    with pytest.raises(KeyboardInterrupt):
        go(run, config, "killed")
    assert attempts == ["ease"] * 2 + ["lightgcn"] * 2
    counts = go(run, config, "killed")
    assert attempts == ["ease"] * 2 + ["lightgcn"] * 3
    assert table(run, "killed") == {key: row for key, row in table(run).items() if key[0] in counts["models"]}


def test_another_evaluation_of_the_run_ranks_no_baseline_again(ray_local, run, monkeypatch):
    cached = run / "cache" / "evaluation"
    go(run, configuration(run), "first", "cache")
    assert len(list(cached.iterdir())) == 4  # the default baselines
    ranked = []
    monkeypatch.setattr(stage, "fit_for_test", lambda *arguments: ranked.append(arguments))
    go(run, configuration(run, "two_tower.epochs=1"), "second", "cache")
    assert not ranked and table(run, "second") == table(run, "first")
    monkeypatch.undo()
    go(run, configuration(run), "third", "cache", hgnn="trained anew")
    assert len(list(cached.iterdir())) == 5  # only the one that reads its embeddings
    go(run, configuration(run, "seed=1"), "fourth", "cache", hgnn="trained anew")
    assert len(list(cached.iterdir())) == 5  # none of the defaults draws
    real, fitted = stage.alone, []

    def alone(function, *arguments, **options):
        fitted.append(function)
        return real(function, *arguments, **options)

    monkeypatch.setattr(stage, "alone", alone)
    go(run, configuration(run), "fifth", "cache", hgnn="trained anew")
    assert fitting.fit_for_test not in fitted
    layout = tuning_module.LAYOUT + 1  # what was kept holds something else
    monkeypatch.setattr(tuning_module, "LAYOUT", layout)
    go(run, configuration(run), "sixth", "cache", hgnn="trained anew")
    assert fitted.count(fitting.fit_for_test) == 4 and table(run, "sixth") == table(run, "fifth")


def test_a_trial_that_does_not_end_is_ended(ray_local, run, monkeypatch):
    monkeypatch.setattr(tuning_module, "_GRACE_S", 0.0)
    config = configuration(run, "evaluate.baselines=item_knn,llm_knn", "evaluate.trial_seconds=0.001")
    counts = go(run, config)
    assert counts["models"] == ["2t_hgnn", "oracle"]  # nothing is known of how good they are
    assert counts["tuning"]["item_knn"]["capped"] == counts["tuning"]["item_knn"]["trials"] == 1


def test_a_baseline_whose_package_is_missing_stops_before_any_work(run, monkeypatch):
    monkeypatch.setitem(BASELINES, "item_knn", replace(BASELINES["item_knn"], module="no_such_package", extra="x"))
    with pytest.raises(UserError, match="no_such_package"):
        go(run, configuration(run))
    assert not (run / "evaluation").exists()


def test_nothing_to_evaluate(ray_local, run):
    for path in (run / "ingest" / "interactions").glob("*.parquet"):
        pl.read_parquet(path).filter(pl.col("timestamp") < TEST).write_parquet(path)
    counts = go(run, configuration(run))
    assert counts["queries"] == 0
    assert json.loads((run / "evaluation" / "metrics.json").read_text()) == []
    assert "nothing to compare" in (run / "evaluation" / "report.html").read_text()


def test_further_popularity_windows_and_strangers(ray_local, run):
    """Colours are personal: with another user's history the right answer is a coin's. Popularity is not."""
    windows = ("evaluate.popularity_days=[1,30]", "index.popular_days=1")
    counts = go(run, configuration(run, *windows, "evaluate.strangers=true"))
    cold = {model: row["mrr_at_100"] for (model, *place), row in table(run).items() if place == ["all", "cold"]}
    assert cold["2t_hgnn"] == cold["popularity_1"] != cold["popularity_30"]
    found = {model: row for (model, *place), row in table(run).items() if place == ["all", "warm"]}
    assert {"popularity_1", "popularity_30", "2t_hgnn_for_a_stranger", "llm_knn_for_a_stranger"} <= set(
        counts["models"]
    )
    assert "popularity_for_a_stranger" not in counts["models"]
    ours, strangers = found["2t_hgnn"]["mrr_at_100"], found["2t_hgnn_for_a_stranger"]["mrr_at_100"]
    assert strangers < 0.8 * ours
    assert TEST < 30 * 86_400  # all that lies before the test is in the window
    assert found["popularity_30"]["hr_at_10"] == found["popularity"]["hr_at_10"]
    assert found["popularity_1"]["ndcg_at_10"] != found["popularity"]["ndcg_at_10"]
