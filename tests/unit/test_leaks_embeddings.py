"""The check of what a run has computed out of its snapshots: embeddings and the vectors that the test ranks by."""

from __future__ import annotations

import shutil
from dataclasses import asdict

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import save_file
from toy_graph import ToyGraph

from recsys_ray.checks.finished_run import FinishedRun, Words
from recsys_ray.checks.leaks_snapshots import check_snapshots
from recsys_ray.config import Config, HgnnConfig
from recsys_ray.core.clock import NEVER
from recsys_ray.core.errors import LeakError
from recsys_ray.core.progress import Progress
from recsys_ray.data.tables import Events, Tables
from recsys_ray.graph.activity import ACTIVITY, COLUMNS, count_shard, describe
from recsys_ray.graph.edges import EDGES, PAIRS, kinds_of, most_pairs, read_edges, reduce_range
from recsys_ray.graph.edges import count_shard as count_pairs
from recsys_ray.graph.pairs import Window, message_weights, strengths
from recsys_ray.graph.snapshots import plan_snapshots
from recsys_ray.graph.texts import TEXTS, nearest_texts
from recsys_ray.graph.users import USERS, count_users
from recsys_ray.hgnn.blocks import ItemTypes
from recsys_ray.hgnn.encoder import make_hgnn
from recsys_ray.hgnn.inference import LocalStore, embed_items
from recsys_ray.hgnn.signature import SignedSource, item_signatures
from recsys_ray.scoring.choices import choices_file, count_choices
from recsys_ray.scoring.memory import memory_file
from recsys_ray.scoring.ridge import memory_of, solve
from recsys_ray.storage.artifacts import Artifact, load_arrays, save_arrays, write_json
from recsys_ray.two_tower.batches import ArrayFeatures
from recsys_ray.two_tower.stage import load_catalogue
from recsys_ray.two_tower.towers import TowerSpec, TwoTower
from recsys_ray.two_tower.training import item_vectors

SIZES, TEXT, LAST = (25, 15), 8, 90
ITEMS = sum(SIZES)
HGNN_CONFIG = HgnnConfig(out_dim=6, signature_dim=64)
CONFIG = Config.model_validate({"graph": {"window_days": None, "cuts": 2, "max_neighbors": 6}})
DAY = 86_400


@pytest.fixture
def run(tmp_path) -> FinishedRun:
    """Every stage's output for random events of 90 days, by the parts of the library, without Ray and DGL servers."""
    random = np.random.default_rng(0)
    folders = {name: tmp_path / name for name in ("ingest", "featurize", "graph", "hgnn", "two_tower")}
    (folders["ingest"] / "interactions").mkdir(parents=True)
    uid = np.sort(random.integers(0, 30, 500))
    columns = {"uid": uid, "gid": random.integers(0, ITEMS, 500), "timestamp": random.integers(0, LAST * DAY, 500)}
    types = {"gid": pl.Int32, "event": pl.Int8}
    events = pl.DataFrame({**columns, "event": np.zeros(500)}).cast(types).sort("uid", "timestamp", "gid")
    shard = folders["ingest"] / "interactions" / "shard-00000.parquet"
    events.write_parquet(shard)
    ntype = np.repeat(np.arange(2), SIZES).astype(np.int16)
    ids = [f"i{gid}" for gid in range(ITEMS)]
    table = {"item_id": ids, "ntype": ntype, "language": ["en"] * ITEMS, "categories": [["x"]] * ITEMS}
    pl.DataFrame(table).with_columns(published_at=pl.lit(None, pl.Int64)).write_parquet(
        folders["ingest"] / "items.parquet"
    )
    counts = {
        "events": ["stream"], "item_types": ["a", "b"], "items_per_type": list(SIZES), "languages": ["en"],
        "categories": ["x"], "valid_from": 70 * DAY, "test_from": 80 * DAY, "end": LAST * DAY,
        "days": [[day, 5] for day in range(LAST)],
    }  # fmt: skip
    write_json(folders["ingest"] / "manifest.json", {"counts": counts})
    snapshots = plan_snapshots(CONFIG.graph, counts)
    text = random.normal(size=(ITEMS, TEXT)).astype(np.float16)
    save_arrays(folders["featurize"] / "text.safetensors", {"vector": text})
    activity, users_at = {}, {}
    near = nearest_texts(text, np.arange(ITEMS), text, np.arange(ITEMS), threads=1)
    save_arrays(folders["graph"] / TEXTS, near._asdict())
    for s in snapshots:
        windows = {s.name: Window(s.start, s.time)}
        count_pairs(shard, tmp_path / "s" / shard.stem, windows, [0], [ITEMS], 100, CONFIG.graph.pair_half_life)
        most = {EDGES: CONFIG.graph.max_neighbors, PAIRS: most_pairs(ITEMS, 2, CONFIG.graph.max_neighbors)}
        files = {kind: folders["graph"] / kind / f"{s.name}.parquet" for kind in kinds_of(s.name)}
        users = users_at[s.name] = count_users(Events.read(shard), s, [0], 100, ITEMS).astype(np.int32)
        allowed = np.ones((2, 2), bool)
        reduce_range(tmp_path / "s", s.name, 0, ntype, CONFIG.graph, 0, files, most, allowed, 0, near, users)
        (active,), (first,) = count_shard(shard, [s], [0], ITEMS)
        activity[s.name] = describe(active, first, np.full(ITEMS, NEVER), ntype, s.time).astype(np.float16)
    save_arrays(folders["graph"] / ACTIVITY, activity)
    write_embeddings(folders, snapshots, ids, torch.from_numpy(text.astype(np.float32)))
    write_towers(folders, text)
    save_arrays(folders["graph"] / USERS, users_at)
    for s in snapshots[-3:]:
        pairs = read_edges(folders["graph"] / PAIRS / f"{s.name}.parquet")
        users = users_at[s.name]
        memory = memory_of([solve(pairs, users, ntype, 0, ITEMS)], near, users, ntype)
        memory.save(memory_file(folders["two_tower"], s.name))
    chosen = count_choices(Events.read(shard), snapshots, [0], ITEMS)
    names = [s.name for s in snapshots]
    save_arrays(choices_file(folders["two_tower"]), dict(zip(names, chosen, strict=True)))
    made = {
        "ingest": {"counts": counts, "config": {"events": CONFIG.events.model_dump()}},
        "graph": {
            "counts": {"snapshots": [asdict(s) for s in snapshots]},
            "config": {"graph": CONFIG.graph.model_dump(), "edges": ["stream"], "seed": 0},
        },
        "hgnn": {"config": {"hgnn": HGNN_CONFIG.model_dump()}},
    }
    stages = {name: Artifact(folder, made.get(name, {})) for name, folder in folders.items()}
    return FinishedRun(**stages, config=CONFIG)


def write_embeddings(folders, snapshots, ids, text):
    torch.manual_seed(0)
    starts = torch.tensor([0, SIZES[0], ITEMS])
    model = make_hgnn(TEXT, HGNN_CONFIG, ItemTypes(starts))
    folders["hgnn"].mkdir()
    save_file(model.state_dict(), folders["hgnn"] / "model.safetensors")
    packed = torch.from_numpy(item_signatures(ids, HGNN_CONFIG.signature_dim).copy())
    for s in snapshots:
        src, dst, _, weight = read_edges(folders["graph"] / "edges" / f"{s.name}.parquet")
        counted = message_weights(src, dst, weight, strengths(dst, weight, ITEMS))
        graph = ToyGraph(src.astype(np.int64), dst.astype(np.int64), starts, text, counted)
        source = SignedSource(graph, packed, HGNN_CONFIG.signature_dim)
        made = embed_items(model, source, s.index, torch.arange(ITEMS), LocalStore(ITEMS, HGNN_CONFIG.state_dim))
        arrays = {"gid": np.arange(ITEMS), "embedding": made.numpy()}
        save_arrays(folders["hgnn"] / "embeddings" / s.name / "part-00000.safetensors", arrays)


def write_towers(folders, text):
    for variant, dim in (("hgnn", HGNN_CONFIG.out_dim), ("text_only", 0)):
        spec = TowerSpec(2, ["stream"], TEXT, dim, COLUMNS, 0, 1, 1, {}, [8, 4])
        model = TwoTower(spec).eval()
        folder = folders["two_tower"] / variant
        (folder / "items").mkdir(parents=True)
        spec.save(folder / "spec.json")
        save_file(model.state_dict(), folder / "model.safetensors")
        catalogue = load_catalogue(Tables(folders["ingest"]), folders["graph"] / ACTIVITY, ["en"], ["x"])
        for name in ("test", "serve"):
            stored = load_arrays(folders["hgnn"] / "embeddings" / name / "part-00000.safetensors")["embedding"]
            source = ArrayFeatures(text=text, **{f"hgnn_{name}": stored})
            vectors = item_vectors(model, source, catalogue, name).numpy()
            save_arrays(folder / "items" / f"{name}.safetensors", {"vector": vectors})


def look(run: FinishedRun) -> list[str]:
    return list(check_snapshots(run, 1000, Words(run.ingest), Progress(quiet=True)))


def test_a_run_as_it_is_made(run):
    said = look(run)
    assert [line.split(": follow")[0] for line in said[1:]] == [
        "the users of 40 items on 5 snapshots",
        "the activity of 40 items on 5 snapshots",
        "the embeddings of 40 items on 5 snapshots",
        "the test's vectors of 40 items (hgnn, text_only)",
        "co-interaction memory of validation and test",
        "counts of choices, overall and in the last weeks on 5 snapshots",
    ]
    assert "edges and pairs into 40 items on 5 snapshots" in said[0] and not said[0].startswith("0 ")


@pytest.mark.parametrize(
    ("stage", "name", "sentence"),
    [
        ("hgnn", "embeddings/{}/part-00000.safetensors", 'the embedding on snapshot test of item "i'),
        ("two_tower", "hgnn/items/{}.safetensors", "the test's vector by the two-tower hgnn of item \"i"),
        ("two_tower", "text_only/items/{}.safetensors", "the test's vector by the two-tower text_only of item \"i"),
        ("graph", "pairs/{}.parquet", "snapshot test, before 1970-03-22: the edge from item"),
        ("two_tower", "memory/{}.safetensors", 'the memory of item "i'),
        ("graph", "edges/{}.parquet", "snapshot test, before 1970-03-22: the edge from item"),
    ],
)
def test_what_belongs_to_the_data_s_end_is_found_in_the_test(run, stage, name, sentence):
    folder = getattr(run, stage).path
    shutil.copyfile(folder / name.format("serve"), folder / name.format("test"))
    with pytest.raises(LeakError) as leak:
        look(run)
    assert sentence in str(leak.value)


def test_choices_of_the_data_s_end_are_found_in_the_test(run):
    file = choices_file(run.two_tower.path)
    tables = load_arrays(file)
    save_arrays(file, {**tables, "test": tables["serve"]})
    with pytest.raises(
        LeakError, match=r"snapshot test, before 1970-03-22: item .* was chosen \[\d+, \d+, \d+\] times"
    ):
        look(run)


def test_users_of_the_data_s_end_are_found_in_the_test(run):
    tables = load_arrays(run.graph.path / USERS)
    save_arrays(run.graph.path / USERS, {**tables, "test": tables["serve"]})
    with pytest.raises(LeakError, match=r"snapshot test, before 1970-03-22: \d+ users had item"):
        look(run)


def test_activity_of_the_data_s_end_is_found_in_the_test(run):
    tables = load_arrays(run.graph.path / ACTIVITY)
    save_arrays(run.graph.path / ACTIVITY, {**tables, "test": tables["serve"]})
    with pytest.raises(LeakError, match="snapshot test, before 1970-03-22: the activity of item"):
        look(run)
