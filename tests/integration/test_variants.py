"""Several seeds, a study and a tuning on a real local Ray, in a world of a few hundred users."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import yaml
from pipeline_world import output

from pipelines.cli import main
from recsys_ray.config import load_config
from recsys_ray.studies import audiences as groups
from recsys_ray.studies.registry import STUDIES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SMALL = {
    "data": {"now": "2026-01-02", "shards": 2},
    "graph": {"window_days": 120, "cuts": 2, "first_cut": 0.4, "max_neighbors": 10},
    "hgnn": {"out_dim": 32, "signature_dim": 32, "epochs": 1, "batch_size": 1024, "min_edges": 2000},
    "two_tower": {"layers": [32, 16], "epochs": 2, "batch_size": 128, "history": 20},
    "evaluate": {"bootstrap": 200},
    "ray": {"num_cpus": 2, "object_store_mb": 128},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory, ray_local) -> Path:
    root = tmp_path_factory.mktemp("variants")
    main_ok("demo-data", "--out", root / "data", "--events", 4000, "--seed", 3)
    tables = {table: str(root / "data" / table) for table in ("items", "interactions", "users", "oracle")}
    tree = {"run_dir": str(root / "run"), **SMALL, "data": {**tables, **SMALL["data"]}}
    (root / "small.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return root / "small.yaml"


def main_ok(*words: object) -> None:
    """The command line, in this process and on its Ray."""
    try:
        main([str(word) for word in words])
    except SystemExit as stopped:
        assert stopped.code in (0, None)


def evaluation(run: Path) -> dict[tuple[str, str, str], dict]:
    rows = json.loads((output(run, "evaluation") / "metrics.json").read_text())
    return {(row["model"], row["item_type"], row["segment"]): row for row in rows}


def test_seeds_share_data_and_graph_and_their_mean_is_the_runs_table(config, capsys):
    run = config.parent / "run"
    main_ok("run", "--config", config, "--seeds", 2)
    assert "mean of 2 seeds" in capsys.readouterr().out
    first, second = run / "variants" / "seed-0", run / "variants" / "seed-1"
    for stage in ("ingest", "featurize", "graph"):
        assert output(first, stage) == output(second, stage) == output(run, stage)
    assert output(first, "hgnn") == output(run, "hgnn") != output(second, "hgnn")
    pooled, ours, theirs = (evaluation(folder) for folder in (run, first, second))
    place = ("2t_hgnn", "all", "warm")
    assert pooled[place]["per_seed"] == [ours[place]["hr_at_10"], theirs[place]["hr_at_10"]]
    assert pooled[place]["hr_at_10"] == pytest.approx(sum(pooled[place]["per_seed"]) / 2)
    popular = pooled["popularity", "all", "warm"]  # knows no seed: the interval is that of the users
    assert [popular[end] for end in ("hr_at_10_low", "hr_at_10_high")] == [
        ours["popularity", "all", "warm"][end] for end in ("hr_at_10_low", "hr_at_10_high")
    ]
    apart = json.loads((output(run, "evaluation") / "differences.json").read_text())
    row = next(r for r in apart if (r["against"], r["item_type"], r["segment"]) == ("popularity", "all", "warm"))
    assert row["difference"] == pytest.approx(pooled[place]["hr_at_10"] - popular["hr_at_10"])
    assert (run / "bundles" / "current.json").exists() and not (second / "bundles").exists()
    main_ok("run", "--config", config, "--seeds", 2)
    said = capsys.readouterr().err
    assert said.count("up to date") == 6 + 2 * 6 + 1


def test_with_shuffled_labels_no_model_knows_anything_personal(config, tmp_path, capsys):
    main_ok("study", "permutation", "--config", config, "--out", tmp_path)
    assert "Passed" in capsys.readouterr().out
    study = json.loads((tmp_path / "permutation.json").read_text())
    assert {"2t_hgnn", "hgnn", "item_knn"} <= {c["ours"]["model"] for c in study["comparisons"]}
    page = (tmp_path / "permutation.md").read_text()
    assert "recsys-ray study permutation" in page and (tmp_path / "permutation.png").exists()
    run = config.parent / "run"
    before = pl.read_parquet(output(run, "ingest") / "interactions" / "*.parquet")
    after = pl.read_parquet(
        output(run / "variants" / "permutation-shuffled-seed-0", "ingest") / "interactions" / "*.parquet"
    )
    assert len(after) > 0.98 * len(before)  # two equal rows may have met
    stamp = {path: path.lstat().st_mtime_ns for path in (run / "variants").glob("permutation-*/*")}
    main_ok("study", "permutation", "--config", config, "--out", tmp_path)  # goes on where it was: at the end
    assert stamp == {path: path.lstat().st_mtime_ns for path in (run / "variants").glob("permutation-*/*")}


def test_a_new_type_is_embedded_with_weights_that_never_saw_it(config, tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "_KEPT", (25, None))
    kinds = ("--set", "data.item_types=[audiobook, podcast]", "--set", "evaluate.trials=1")
    main_ok("study", "foundation-type", "--config", config, *kinds, "--out", tmp_path)
    variants = config.parent / "run" / "variants"

    def of(name: str, stage: str) -> Path:
        return output(variants / f"foundation-type-{name}-seed-0", stage)

    def items(name: str) -> pl.DataFrame:
        return pl.read_parquet(of(name, "ingest") / "items.parquet")

    assert items("without-0")["item_type"].unique().to_list() == ["podcast"]
    assert not (variants / "foundation-type-without-0-seed-0" / "two_tower").exists()
    trained = (of("without-0", "hgnn") / "model.safetensors").read_bytes()
    assert trained != (of("without-1", "hgnn") / "model.safetensors").read_bytes()
    full = items("full")
    assert full["item_type"].unique().sort().to_list() == ["audiobook", "podcast"]
    for name in ("new-0-25", "new-0-all"):
        assert items(name)["item_id"].equals(full["item_id"])
        assert (of(name, "hgnn") / "model.safetensors").read_bytes() == trained
        assert of(name, "two_tower") != of("full", "two_tower")
    before = pl.read_parquet(of("new-0-25", "ingest") / "interactions" / "*.parquet").filter(
        pl.col("timestamp") < json.loads((of("full", "ingest") / "manifest.json").read_text())["counts"]["test_from"]
    )
    kinds_of = full["item_type"].to_list()
    assert sum(kinds_of[gid] == "audiobook" for gid in before["gid"]) == 25
    found = json.loads((tmp_path / "foundation-type.json").read_text())["comparisons"]
    shares = [c for c in found if c["theirs"]["variant"] == "full" and c["found"]]
    assert {c["ours"]["variant"] for c in shares} >= {"new-0-all", "new-1-all"}
    for share in shares:
        assert share["item_type"] in ("audiobook", "podcast")
        if share["found"]["hr_at_10_against"]:
            assert share["verdict"].removeprefix("reaches ").split("%")[0].isdigit()
            assert ("at least 70%" in share["verdict"]) == share["ours"]["variant"].endswith("-all")
        else:
            assert share["verdict"] == "no share: the other side has no hits"


def test_the_papers_setting_runs_through_and_is_compared_with_their_tables(config, tmp_path, monkeypatch):
    whole = STUDIES["paper"]
    few = {"full", "old-old", "printed-loss"}  # the others differ in settings that other studies run
    lean = replace(whole, variants=lambda facts: [v for v in whole.variants(facts) if v.name in few])
    monkeypatch.setitem(STUDIES, "paper", lean)
    data = load_config(config).data
    words = ["--config", Path(__file__).parents[2] / "configs" / "paper.yaml"]
    for name in ("items", "interactions", "users", "oracle"):
        words += ["--set", f"data.{name}={getattr(data, name)}"]
    short = ("hgnn.epochs=2", "two_tower.epochs=2", "evaluate.trials=1", "evaluate.bootstrap=200", "data.shards=2")
    for setting in (*short, f"run_dir={tmp_path / 'run'}", "two_tower.layers=[32, 16]"):
        words += ["--set", setting]
    main_ok("study", "paper", *words, "--out", tmp_path)
    study = json.loads((tmp_path / "paper.json").read_text())
    found = {c["label"]: c for c in study["comparisons"] if c["found"]}
    for label in (
        "Table 2, audiobooks: 2T-HGNN against HGNN alone",
        "Table 2, all types: 2T-HGNN against 2T without HGNN",
        "Table 1, all types: podcast-podcast edges only",
        "Table 1, all types: with the two-tower's loss as printed",
        "Table 3, all types: 2T-HGNN against Popularity",
        "Table 4, podcasts: 2T-HGNN against 2T without HGNN",
    ):
        assert found[label]["found"]["queries"] > 0
        assert (found[label]["same_sign"] != "") == ("printed" not in label)
    spec = json.loads((output(tmp_path / "run/variants/paper-full-seed-0", "two_tower") / "hgnn/spec.json").read_text())
    assert spec["inputs"] == "paper" and spec["id_dim"] == 0
    assert "signs are those of the paper" in (tmp_path / "paper.md").read_text()


def test_a_tuning_goes_on_and_leaves_a_preset(config, tmp_path, capsys):
    out, words = tmp_path / "tuned.yaml", ("--config", config, "--only", "two_tower.")
    main_ok("tune", *words, "--trials", 2, "--out", out)
    (folder,) = (config.parent / "run" / "tune").iterdir()
    lines = (folder / "trials.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert (
        len(lines) == 2 and float(first["params"]["two_tower.temperature"]) == load_config(config).two_tower.temperature
    )
    assert len(first["curve"]) == 2 and first["score"] == max(first["curve"])
    main_ok("tune", *words, "--trials", 3, "--out", out)
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert [json.loads(line) for line in lines] == trials[:2] and len(trials) == 3
    assert len({json.dumps(trial["params"]) for trial in trials}) == 3
    best = max(trials, key=lambda trial: trial["score"])
    tuned = load_config(out)
    assert tuned.two_tower.temperature == pytest.approx(float(best["params"]["two_tower.temperature"]))
    assert f"{best['score']:.4f}" in out.read_text() and (folder / "trials.md").exists()
    assert "trial 3 of 3" in capsys.readouterr().err
    assert not list((config.parent / "run" / "variants").glob("tune-*/two_tower"))  # what it trained is not kept
