"""Trials: their number, their order, going on after a kill; and that nothing looks past the moment it is given."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from colour_world import CATALOGUE, ITEMS, PER_TYPE, USERS, fit, write_features

from recsys_ray.baselines import BASELINES, fitting
from recsys_ray.baselines.fitting import Job, Watcher, prepare_validation, read_known, try_point
from recsys_ray.baselines.interface import Choice, Params, Real, default_point
from recsys_ray.baselines.tuning import Tuned, search
from recsys_ray.config import load_config
from recsys_ray.evaluation.queries import prepare
from recsys_ray.evaluation.ranking import batch_of
from recsys_ray.storage.artifacts import write_json

SPACE = {"x": Real(1.0, 0.01, 100.0, log=True), "kind": Choice("a", ("a", "b"))}
VALID, TEST, END = 1000, 2000, 3000


def bowl(params: Params) -> dict:
    """Best, 1, at x = 20 and kind b."""
    away = abs(np.log(params["x"] / 20)) + (params["kind"] == "a")
    return {"params": params, "hr_at_10": float(np.exp(-away)), "seconds": 1.0, "capped": False}


class TestSearch:
    def test_default_point_first_then_better_ones(self, tmp_path):
        trials = search(SPACE, 40, 0, tmp_path, bowl)
        assert len(trials) == 40 and trials[0]["params"] == {"x": 1.0, "kind": "a"}
        assert Tuned({}, trials).best["hr_at_10"] > 0.8 > 3 * trials[0]["hr_at_10"]
        learned = [trial["hr_at_10"] for trial in trials[20:]]
        assert np.mean(learned) > 1.5 * np.mean([trial["hr_at_10"] for trial in trials[:6]])

    def test_what_is_popular_now_is_among_the_first_points(self, tmp_path):
        space = BASELINES["item_knn"].space(load_config())
        flat = {"hr_at_10": 0.5, "seconds": 1.0, "capped": False}
        first, second = search(space, 2, 0, tmp_path, lambda params: {"params": params, **flat})
        assert first["params"] == default_point(space)
        assert second["params"] == {**first["params"], "popular_days": 30, "popular_power": 0.7}

    def test_killed_and_started_again(self, tmp_path):
        whole = search(SPACE, 12, 3, tmp_path / "whole", _made(tmp_path / "whole"))
        folder, calls = tmp_path / "killed", []

        def dies(params: Params) -> dict:
            if len(calls) == 7:
                raise KeyboardInterrupt
            calls.append(params)
            return bowl(params)

        with pytest.raises(KeyboardInterrupt):
            search(SPACE, 12, 3, folder, _made(folder, dies))
        again: list[Params] = []
        resumed = search(SPACE, 12, 3, folder, lambda params: again.append(params) or bowl(params))
        assert resumed == whole and [trial["params"] for trial in whole[7:]] == again
        longer = search(SPACE, 15, 3, folder, lambda params: again.append(params) or bowl(params))
        assert longer[:12] == whole and len(again) == 5 + 3  # a larger budget goes on from a smaller one

    def test_a_damaged_trial_is_run_again(self, tmp_path):
        trials = search(SPACE, 4, 0, tmp_path, bowl)
        (tmp_path / "trial-002.json").write_text("{")
        again: list[Params] = []
        assert search(SPACE, 4, 0, tmp_path, lambda params: again.append(params) or bowl(params)) == trials
        assert again == [trials[2]["params"]]

    def test_no_point_is_fitted_twice(self, tmp_path):
        fitted: list[Params] = []

        def attempt(params: Params) -> dict:
            fitted.append(params)
            return {**bowl({**params, "x": 1.0}), "params": params}

        trials = search({"kind": SPACE["kind"]}, 9, 0, tmp_path, attempt)
        assert len(trials) == 9 and len(fitted) == 2

    def test_a_trial_without_result_is_passed_over(self, tmp_path):
        def ended(params: Params) -> dict:
            if params["kind"] == "b":
                return {"params": params, "hr_at_10": None, "seconds": 9.0, "capped": True}
            return bowl(params)

        tuned = Tuned({}, search(SPACE, 10, 0, tmp_path, ended))
        assert tuned.best["params"]["kind"] == "a" and tuned.capped > 0
        assert f"10 trials, {tuned.capped} of them stopped" in tuned.note


def _made(folder: Path, attempt=bowl):
    folder.mkdir(parents=True)
    return attempt


class TestWatcher:
    def test_goes_on_over_a_plateau_and_stops_after_epochs_without_a_better_score(self):
        rise = [0.016, 0.009, 0.012, 0.012, 0.013, 0.020]  # a transformer's: at first it ranks what is popular
        scores = iter([*rise, 0.02, 0.01, 0.02, 0.02, 0.01, 0.9])
        watcher = Watcher(lambda model: next(scores), float("inf"))
        stopped = [watcher(epoch, lambda: None) for epoch in range(1, 12)]
        assert stopped == [False] * 10 + [True]
        assert watcher.best_epoch == len(rise) and not watcher.out_of_time

    def test_stops_when_out_of_time(self):
        watcher = Watcher(lambda model: 0.5, time.monotonic() - 1)
        assert watcher(1, lambda: None) and watcher.out_of_time and watcher.best_epoch == 1


def log(seed: int = 0, after: int = END) -> pl.DataFrame:
    """Users like items of their colour before, in and after the validation period; the events from ``after`` on are
    drawn by another seed, of any colour."""
    rows = []
    for user in range(USERS):
        random = np.random.default_rng(user)
        for first in (0, PER_TYPE):
            own = first + user % 2 + 2 * random.permutation(PER_TYPE // 2)[:20]
            moments = np.sort(np.concatenate([random.integers(0, VALID, 10), random.integers(VALID, END, 10)]))
            rows += [(user, int(g), 0, int(t)) for g, t in zip(own, moments, strict=True)]
    changed = np.random.default_rng(seed)
    rows = [(u, int(changed.integers(ITEMS)) if t >= after else g, e, t) for u, g, e, t in rows]
    rows.sort(key=lambda row: (row[0], row[3], row[1]))
    return pl.DataFrame(rows, {"uid": pl.Int64, "gid": pl.Int32, "event": pl.Int8, "timestamp": pl.Int64}, orient="row")


def job(folder: Path, events: pl.DataFrame, *overrides: str) -> Job:
    """What the stages before leave, as far as fitting reads it."""
    ingest = folder / "ingest"
    (ingest / "interactions").mkdir(parents=True)
    ntype = np.arange(ITEMS, dtype=np.int16) // PER_TYPE
    pl.DataFrame({"ntype": ntype, "available": np.ones(ITEMS, bool)}).write_parquet(ingest / "items.parquet")
    pl.DataFrame({"user_id": [str(u) for u in range(USERS)]}).write_parquet(ingest / "users.parquet")
    for k, part in enumerate((pl.col("uid") < USERS // 2, pl.col("uid") >= USERS // 2)):
        events.filter(part).write_parquet(ingest / "interactions" / f"shard-{k:05d}.parquet")
    counts = {"item_types": CATALOGUE.types, "events": ["stream"], "valid_from": VALID, "test_from": TEST, "end": END}
    write_json(ingest / "manifest.json", {"counts": counts})
    write_features(folder)
    config = load_config(None, list(overrides))
    return Job(config, prepare(config, ingest, folder / "out"), folder / "featurize", folder / "hgnn")


@pytest.mark.parametrize("name", list(BASELINES))
def test_a_fit_sees_nothing_from_its_moment_on(name, tmp_path):
    """Two logs that differ only from the moment on: the same model, to the last bit; one event earlier: another."""
    if name == "ials":
        pytest.importorskip("implicit")
    changed = {"epochs": 1} if BASELINES[name].max_epochs else {}
    batch = batch_of(np.arange(USERS), read_known(job(tmp_path / "batch", log()), VALID, "valid").events)

    def scores(seed: int, after: int) -> np.ndarray:
        data = read_known(job(tmp_path / f"{seed}-{after}", log(seed, after)), TEST, "test")
        return fit(name, data, **changed).scorer(batch)(0, ITEMS).numpy()

    assert np.array_equal(scores(1, TEST), scores(2, TEST))
    if name not in ("llm_knn", "hgnn"):  # they hold vectors that others made; the history is not in the model
        assert not np.array_equal(scores(1, TEST - 200), scores(2, TEST - 200))


def test_choosing_sees_nothing_of_the_test_period(tmp_path):
    params = default_point(BASELINES["item_knn"].space(load_config()))
    found = []
    for seed, after in ((1, TEST), (2, TEST), (2, VALID)):
        made = job(tmp_path / f"{seed}-{after}", log(seed, after))
        assert prepare_validation(made) > 0
        found.append(try_point(made, "item_knn", params, 1)["hr_at_10"])
    assert found[0] == found[1] > found[2] + 0.2  # of shuffled answers fewer are found


def test_a_trial_of_a_model_with_epochs_says_how_many(tmp_path):
    made = job(tmp_path, log())
    prepare_validation(made)
    params = default_point(BASELINES["sasrec"].space(made.config))
    trial = try_point(made, "sasrec", params, 1)
    assert trial["hr_at_10"] == max(trial["curve"]) == trial["curve"][trial["epochs"] - 1] and not trial["capped"]
    hurried = job(tmp_path / "hurried", log(), "evaluate.trial_seconds=0.001")
    prepare_validation(hurried)
    trial = try_point(hurried, "sasrec", params, 1)
    assert trial["capped"] and trial["epochs"] == len(trial["curve"]) == 1


def test_validation_asks_a_seeded_sample_of_warm_users(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "_TUNING_USERS", 10)
    cold = log().filter((pl.col("uid") != 3) | (pl.col("timestamp") >= VALID))
    made = job(tmp_path, cold)
    assert prepare_validation(made) > 0
    arrays = fitting.load_arrays(made.validation)
    assert len(np.unique(arrays["uid"])) == 10 and 3 not in arrays["uid"]
    assert arrays["history_timestamp"].max() < VALID
    assert set(arrays["history_uid"]) == set(arrays["uid"])


def test_fits_are_bounded_by_a_sample_of_users(tmp_path):
    made = job(tmp_path, log(), "evaluate.fit_users=7")
    one, two = (read_known(made, moment, "test") for moment in (VALID, TEST))
    assert len(one.users) == 7 and np.array_equal(one.users.uid, two.users.uid)
    assert json.loads(json.dumps(made.config.model_dump(mode="json")))["evaluate"]["fit_users"] == 7
