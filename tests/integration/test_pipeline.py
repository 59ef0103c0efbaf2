"""The command line from Parquet to an HTTP answer, on a real local Ray and Ray Serve; what a kill and bad input do."""

from __future__ import annotations

import doctest
import json
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import httpx
import polars as pl
import psutil
import pytest
from pipeline_world import BASELINES, SMALL, call, call_apart, command, configure, metrics_of, output
from server_process import free_port, own_folders, running, wait_for

import recsys_ray
from pipelines.cli import main
from recsys_ray.config import load_config
from recsys_ray.evaluation.results import MAIN
from recsys_ray.scoring.scorer import TERMS, TRENDS, UNSEEN, ScoreSpec, without
from recsys_ray.serving.recommender import Recommender
from recsys_ray.stages.chain import STAGES
from recsys_ray.stages.evaluate import NAMES
from recsys_ray.storage.artifacts import load_arrays, open_artifact, save_arrays
from recsys_ray.storage.outputs import find_bundle, set_current


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline")


def test_one_command_makes_everything(small_run):
    run, done = small_run.folder, small_run.done
    for stage in STAGES.values():
        assert f"{stage.name}: {stage.summary}" in done.stderr
        assert (output(run, stage.folder) / "manifest.json").exists()
    rows = metrics_of(run)
    spec = json.loads((output(run, "two_tower") / "hgnn" / "spec.json").read_text(encoding="utf-8"))
    assert spec["last_item"] is not None  # the data were asked, how fast the memory forgets too
    score = ScoreSpec.load(output(run, "two_tower") / "hgnn")
    items = load_arrays(output(run, "two_tower") / "hgnn" / "items" / "serve.safetensors")
    assert (TRENDS in items) == any(score.trends) and (UNSEEN in items) == bool(score.unseen_share)
    remembers = score.memory > 0
    models = BASELINES | set(NAMES.values()) | {without(MAIN, term) for term in TERMS}
    assert {row["model"] for row in rows} == models
    assert (find_bundle(run) / "memory.safetensors").exists() == remembers
    assert {row["item_type"] for row in rows} == {"all", "audiobook", "music", "podcast"}
    page = (run / "report.html").read_bytes()
    assert len(page) > 10_000 and page == (output(run, "evaluation") / "report.html").read_bytes()
    for promised in ("HR@10", "report.html", "recsys-ray serve", "user "):
        assert promised in done.stdout


def test_the_example_of_the_package_runs(small_run, tmp_path, monkeypatch):
    config = small_run.config
    shutil.copyfile(config, tmp_path / "my.yaml")
    monkeypatch.chdir(tmp_path)
    ran = doctest.testmod(recsys_ray)
    assert (ran.failed, ran.attempted) == (0, 5)


def test_the_second_run_skips_every_stage(small_run, monkeypatch):
    run, config = small_run.folder, small_run.config
    before = {name: (output(run, stage.folder) / "manifest.json").stat().st_mtime_ns for name, stage in STAGES.items()}
    monkeypatch.delattr("recsys_ray.stages.runner.ray_session")  # Ray is not even started
    done = call("run", "--config", config)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stderr.count("up to date") == len(STAGES)
    assert before == {name: (output(run, s.folder) / "manifest.json").stat().st_mtime_ns for name, s in STAGES.items()}


def test_the_report_is_drawn_again_from_what_there_is(small_run, tmp_path):
    run, config = small_run.folder, small_run.config
    before = (output(run, "evaluation") / "report.html").stat().st_mtime_ns
    with pytest.raises(SystemExit) as done:
        main(["report", "--config", str(config), "--out", str(tmp_path / "page.html")])
    assert not done.value.code
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for shown in ("Map of the items", "Users and their lists", "Learning curves", "evaluation</th>"):
        assert shown in page
    assert (output(run, "evaluation") / "report.html").stat().st_mtime_ns == before


@pytest.fixture(scope="module")
def server(small_run, root):
    """A server of the run's bundles: its address, process, log and temporary folders."""
    before, port, log = own_folders(), free_port(), root / "serve.log"
    with running(command("serve", "--bundle", small_run.folder, "--port", port), log) as process:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, log, process)
        yield url, process, log, own_folders() - before


def test_an_answer_over_http_has_nothing_that_the_user_has_seen(small_run, server):
    user, seen = seen_by_the_busiest(small_run.folder)
    answer = httpx.post(f"{server[0]}/v1/recommendations", json={"user_id": user, "k": 50}, timeout=30)
    assert answer.status_code == 200, answer.text
    ids = [item["item_id"] for item in answer.json()["items"]]
    assert len(ids) == len(set(ids)) == 50
    assert not set(ids) & seen
    assert len(seen) > 10


def test_sigterm_ends_the_server_as_ctrl_c_does(server):
    """The last test that takes the server: it ends it."""
    _, process, log, made = server
    assert made
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    said = log.read_text()
    assert said.rstrip().endswith("Stopping ...") and "SIGTERM received" not in said
    assert not made & own_folders()


def seen_by_the_busiest(run):
    """The user with the most events, and the ids of their items."""
    events = pl.read_parquet(output(run, "ingest") / "interactions" / "*.parquet")
    uid = events["uid"].value_counts(sort=True)["uid"][0]
    gids = events.filter(pl.col("uid") == uid)["gid"].unique().to_list()
    items = pl.read_parquet(output(run, "ingest") / "items.parquet")["item_id"]
    users = pl.read_parquet(output(run, "ingest") / "users.parquet")["user_id"]
    return users[uid], {items[gid] for gid in gids}


@pytest.mark.slow
def test_sigterm_ends_a_run_without_a_stack(small_run, root, small_data):
    """What a cluster sends to a job that it ends."""
    config, ended = configure(root, small_data, "ended"), root / "ended"
    for stage in ("ingest", "featurize"):
        shutil.copytree(small_run.folder / stage, ended / stage)
    log = root / "ended.log"
    with log.open("wb") as out, subprocess.Popen(command("run", "--config", config), stdout=out, stderr=out) as process:
        deadline = time.monotonic() + 100
        while not list(ended.glob("graph/*/_scratch")):  # Ray is at work
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    said = log.read_text()
    assert said.endswith("terminated\n") and "Traceback" not in said and "SIGTERM received" not in said, said
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive


@pytest.mark.slow
def test_a_killed_run_ends_as_an_undisturbed_one(small_run, root, small_data):
    run = small_run.folder
    config, killed = configure(root, small_data, "killed"), root / "killed"
    for stage in ("ingest", "featurize", "graph"):
        shutil.copytree(run / stage, killed / stage)
    process = subprocess.Popen(command("run", "--config", config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(killed.glob("hgnn/*/_scratch/hgnn/last.safetensors")):  # in the midst of training
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    names = {child.pid: child.name() for child in children}
    process.kill()
    process.wait()
    assert not (killed / "hgnn" / "current.json").exists(), "it was done before it was killed"
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not [child for child in alive if "Train" in names[child.pid]], "a worker outlived the run"
    for child in alive:  # Ray's agents, which take their time
        with suppress(psutil.NoSuchProcess):
            child.kill()
    done = call("run", "--config", config)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stderr.count("up to date") == 3
    for name in ("model.safetensors", "metrics.json"):
        assert (output(killed, "hgnn") / name).read_bytes() == (output(run, "hgnn") / name).read_bytes(), name
    assert metrics_of(killed) == metrics_of(run)
    for stage in STAGES.values():
        assert len(list((killed / stage.folder).glob("*/"))) == 1


@pytest.mark.slow
def test_given_weights_embed_without_training(small_run, root, small_data, capsys):
    run = small_run.folder
    given = output(run, "hgnn") / "model.safetensors"
    config, daily = configure(root, small_data, "daily", hgnn={"weights": str(given)}), root / "daily"
    for stage in ("ingest", "featurize", "graph"):
        shutil.copytree(run / stage, daily / stage)
    assert "no file at nowhere" in complaint(capsys, "hgnn", "--config", config, "--set", "hgnn.weights=nowhere")
    assert "does not fit" in complaint(capsys, "hgnn", "--config", config, "--set", "hgnn.out_dim=8")
    done = call("hgnn", "--config", config)
    assert done.returncode == 0, done.stderr[-6000:]
    made = output(daily, "hgnn")
    for path in (output(run, "hgnn") / "embeddings").rglob("*.safetensors"):
        assert (made / path.relative_to(output(run, "hgnn"))).read_bytes() == path.read_bytes()
    assert "up to date" in call("hgnn", "--config", config, "--set", f"hgnn.weights={made / given.name}").stderr


def test_an_unknown_field_is_one_sentence_and_exit_code_2(root, small_data):
    done = call_apart("run", "--config", configure(root, small_data, "unknown", hgnn={"hiden_dim": 3}))
    assert done.returncode == 2
    assert "hgnn.hiden_dim" in done.stderr
    assert "hgnn.hidden_dim" in done.stderr
    assert "Traceback" not in done.stderr


def complaint(capsys, *words: object) -> str:
    """What the command line says, in this process, before it exits with code 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    return errors[0]


def test_no_interactions_is_one_sentence(ray_local, root, small_data, tmp_path, capsys):
    events = pl.read_parquet(small_data / "interactions" / "*.parquet")
    events.head(0).write_parquet(tmp_path / "none.parquet")
    config = configure(root, small_data, "nothing", data={"interactions": str(tmp_path / "none.parquet")})
    assert "interactions" in complaint(capsys, "ingest", "--config", config)


def test_a_missing_column_is_one_sentence(ray_local, root, small_data, tmp_path, capsys):
    events = pl.read_parquet(small_data / "interactions" / "*.parquet")
    events.drop("timestamp").write_parquet(tmp_path / "timeless.parquet")
    config = configure(root, small_data, "timeless", data={"interactions": str(tmp_path / "timeless.parquet")})
    assert "timestamp" in complaint(capsys, "ingest", "--config", config)


def test_a_missing_table_or_stage_is_one_sentence(ray_local, root, small_data, capsys):
    config = configure(root, small_data, "missing", data={"items": str(root / "nowhere")})
    assert "nowhere" in complaint(capsys, "ingest", "--config", config)
    assert "ingest" in complaint(capsys, "hgnn", "--config", config)


@pytest.mark.slow
def test_one_item_type_alone_works(small_run, root, small_data, tmp_path):
    run = small_run.folder
    items = pl.read_parquet(small_data / "items" / "*.parquet").filter(pl.col("item_type") == "podcast")
    events = pl.read_parquet(small_data / "interactions" / "*.parquet").join(items.select("item_id"), on="item_id")
    items.write_parquet(tmp_path / "items.parquet")
    events.write_parquet(tmp_path / "interactions.parquet")
    tables = {table: str(tmp_path / f"{table}.parquet") for table in ("items", "interactions")}
    changes = {"data": {**SMALL["data"], **tables, "oracle": None}, "two_tower": {"ablation": False}}
    config = configure(root, small_data, "podcasts", **changes, hgnn={"epochs": 1})
    shutil.copytree(run / "cache", root / "podcasts" / "cache")  # the texts are the same: nothing is encoded again
    done = call("run", "--config", config)
    assert done.returncode == 0, done.stderr[-6000:]
    rows = metrics_of(root / "podcasts")
    assert {row["item_type"] for row in rows} <= {"all", "podcast"}
    assert NAMES["hgnn"] in {row["model"] for row in rows}


@pytest.mark.slow
def test_leave_one_out_from_tables_to_answers(small_run, root, small_data):
    run = small_run.folder
    changes = {"split": {"protocol": "leave_one_out"}, "two_tower": {**SMALL["two_tower"], "ablation": False}}
    changes |= {"data": {**SMALL["data"], "oracle": None, "item_types": ["music", "podcast"]}}
    config = configure(root, small_data, "left-out", **changes, graph={"window_days": None}, hgnn={"epochs": 1})
    shutil.copytree(run / "cache", root / "left-out" / "cache")
    done = call("run", "--config", config)
    assert done.returncode == 0, done.stderr[-6000:]
    out = root / "left-out"
    events = pl.read_parquet(output(out, "ingest") / "interactions" / "*.parquet")
    held_out = events.filter(pl.col("timestamp") == 1)["uid"].n_unique()
    assert f"leave-one-out: {held_out} of" in done.stderr
    rows = {(row["model"], row["item_type"], row["segment"]): row for row in metrics_of(out)}
    for model in ("popularity", "item_knn", "llm_knn", "hgnn", NAMES["hgnn"]):
        row = rows[model, "all", "all"]
        assert row["users"] == row["queries"] == held_out == rows[model, "all", "warm"]["users"]
    assert {item_type for _, item_type, _ in rows} == {"all", "music", "podcast"}
    snapshots = {
        s["name"]: s for s in json.loads((output(out, "graph") / "manifest.json").read_text())["counts"]["snapshots"]
    }
    assert list(snapshots) == ["cut0", "cut1", "valid", "test", "serve"]
    edges = {name: pl.read_parquet(output(out, "graph") / "edges" / f"{name}.parquet") for name in snapshots}
    assert 0 < len(edges["cut0"]) < len(edges["valid"]) < len(edges["test"]) < len(edges["serve"])
    bundle = json.loads((find_bundle(out) / "manifest.json").read_text())["counts"]
    assert bundle["version"].startswith("2025123")  # the calendar's, not the logical time
    assert not ScoreSpec.load(output(out, "two_tower") / "hgnn").trends  # there are no last weeks
    user, seen = seen_by_the_busiest(out)
    answer = call("recommend", "--bundle", out / "bundles" / "current", "--user", user, "--json")
    assert answer.returncode == 0, answer.stderr[-6000:]
    assert not {item["item_id"] for item in json.loads(answer.stdout)["items"]} & seen


# -- what is made of a finished run


@pytest.fixture
def base(small_run):
    """The run's own bundle; afterwards it is live again."""
    bundles = small_run.folder / "bundles"
    live = find_bundle(bundles)
    yield live
    set_current(bundles, live)


def test_new_items_are_recommended_without_training(small_run, small_data, base, tmp_path):
    run, config = small_run.folder, small_run.config
    user, _ = seen_by_the_busiest(run)
    items = pl.read_parquet(small_data / "items" / "*.parquet").filter(pl.col("item_type") == "music").head(3)
    items.with_columns(item_id=pl.format("new-{}", pl.int_range(3))).write_parquet(tmp_path / "new.parquet")
    moment = open_artifact(base).counts["end"] - 60
    trickle = {"user_id": [user], "item_id": ["new-0"], "event": ["stream"], "timestamp": [moment]}
    pl.DataFrame(trickle).write_csv(tmp_path / "trickle.csv")
    live = run / "bundles" / "current"
    done = call("embed-items", tmp_path / "new.parquet", "--bundle", live, "--interactions", tmp_path / "trickle.csv")
    assert done.returncode == 0, done.stderr[-6000:]
    assert "1 with" in done.stderr and "2 from text alone" in done.stderr
    recommender = Recommender.load(live)
    assert recommender.version != base.name
    answer = recommender.recommend(history=[{"item_id": "new-0"}], item_types=["music"], k=500)
    assert {"new-1", "new-2"} <= {item.item_id for item in answer}
    assert "new-0" not in {item.item_id for item in recommender.recommend(user_id=user, item_types=["music"], k=500)}
    done = call("run", "--config", config)  # the run is as it was: it leaves the new bundle live
    assert done.stderr.count("up to date") == len(STAGES)
    assert find_bundle(live).name == recommender.version


def test_items_that_are_embedded_again_stay_where_they_are(small_run, small_data, base, tmp_path):
    """Those whose users' histories the bundle has in full: it then knows all of their edges."""
    run, kept = small_run.folder, load_config(small_run.config).two_tower.history
    ids = pl.read_parquet(output(run, "ingest") / "items.parquet")["item_id"]
    events = pl.read_parquet(output(run, "ingest") / "interactions" / "*.parquet")
    busy = events["uid"].value_counts().filter(pl.col("count") > kept)["uid"]
    cut = set(events.filter(pl.col("uid").is_in(busy.implode()))["gid"])
    assert cut
    whole = [gid for gid in range(len(ids)) if gid not in cut]
    edges = pl.read_parquet(output(run, "graph") / "edges" / "serve.parquet")
    assert edges["dst"].is_in(whole).sum() > 5
    items = pl.read_parquet(small_data / "items" / "*.parquet").filter(pl.col("item_id").is_in(ids[whole].implode()))
    items.write_parquet(tmp_path / "again.parquet")
    out = tmp_path / "bundles"
    done = call("embed-items", tmp_path / "again.parquet", "--bundle", base, "--out", out, "--replace")
    assert done.returncode == 0, done.stderr[-6000:]
    for file, name in (("hgnn", "embedding"), ("vectors", "vector")):
        before, after = (load_arrays(b / f"{file}.safetensors")[name] for b in (base, find_bundle(out)))
        assert before.shape == after.shape
        assert (before * after).sum(1).min() > 0.995, file  # texts may be encoded at a lower precision


def test_an_item_of_the_bundle_is_refused_without_replace(small_run, small_data, base, capsys):
    assert "already in the bundle" in complaint(capsys, "embed-items", small_data / "items", "--bundle", base)
    assert find_bundle(base.parent) == base


def test_embeddings_are_exported_and_probed(small_run, tmp_path):
    run, config = small_run.folder, small_run.config
    out = tmp_path / "items.parquet"
    done = call("export-embeddings", "--config", config, "--out", out, "--snapshot", "test")
    assert done.returncode == 0, done.stderr[-6000:]
    table = pl.read_parquet(out)
    assert table.columns == ["item_id", "item_type", "title", "text", "hgnn", "tower"]
    assert table["item_id"].equals(pl.read_parquet(output(run, "ingest") / "items.parquet")["item_id"])
    done = call("probe", "--config", config)
    assert done.returncode == 0, done.stderr[-6000:]
    metrics = json.loads((output(run, "probe") / "metrics.json").read_text(encoding="utf-8"))
    found = {(row["target"], row["vectors"]): row for row in metrics["classification"]}
    assert {target for target, _ in found} | set(metrics["absent"]) == {"item_type", "language", "category"}
    assert {"item_type", "language"} <= {target for target, _ in found}
    for row in found.values():
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
    assert found["item_type", "tower"]["accuracy"] > found["item_type", "tower"]["majority"]
    assert not found["language", "text"]["in_text"]
    similar = [row for row in metrics["similar"] if (row["item_type"], row["segment"]) == ("all", "all")]
    assert [row["vectors"] for row in similar] == ["text", "hgnn", "tower"]
    assert all(row["recall_at_10"] <= row["recall_at_100"] for row in similar)
    assert (output(run, "probe") / "probe.png").stat().st_size > 10_000
    for promised in ("macro-F1", "text+hgnn", "probe.png", "Similar items"):
        assert promised in done.stdout
    again = call("probe", "--config", config)
    assert "up to date" in again.stderr and again.stdout == done.stdout


def test_no_feature_of_a_run_looks_past_its_time_and_one_that_does_is_found(small_run, root, capsys):
    run, config = small_run.folder, small_run.config
    done = call("check-leaks", "--config", config, "--sample", 300)
    assert done.returncode == 0, done.stderr[-6000:]
    for what in ("training examples", "validation queries", "users of the test", "edges and pairs", "the activity of",
                 "the embeddings of", "(hgnn, text_only)", "co-interaction memory",
                 "no feature looks past its time"):  # fmt: skip
        assert what in done.stdout
    for name, said in (("hgnn/embeddings/test/part-00000", "the embedding on snapshot test of item"),
                       ("two_tower/hgnn/items/test", "the test's vector by the two-tower hgnn of item")):  # fmt: skip
        forged = root / "forged"
        shutil.copytree(run, forged, ignore=shutil.ignore_patterns("bundles", "cache"))
        stage, _, file = name.partition("/")
        target = output(forged, stage) / f"{file}.safetensors"  # what it is after the last event, not before the test
        later = load_arrays(Path(str(target).replace("/test", "/serve")))
        save_arrays(target, {key: later[key] for key in load_arrays(target)})
        assert said in complaint(capsys, "check-leaks", "--config", config, "--set", f"run_dir={forged}")
        shutil.rmtree(forged)
