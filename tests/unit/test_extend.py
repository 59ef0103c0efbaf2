"""New items in a bundle: the same vectors as if the stages had known the items, and a bundle that is whole."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bundle_world
import httpx
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from bundle_world import DAY, END, POPULAR_DAYS, publish_arrays
from late_world import QUIET, TYPES, Late, extend, make_late, rows_of, true_edges
from toy_graph import ToyGraph

from recsys_ray.bundle.build import build_bundle
from recsys_ray.bundle.extend import extend_bundle
from recsys_ray.core.errors import ArtifactError, ConfigError, DataError
from recsys_ray.graph.texts import nearest_texts, text_pairs
from recsys_ray.hgnn.blocks import ItemTypes
from recsys_ray.hgnn.inductive import EdgeList
from recsys_ray.scoring.memory import MEMORY_FILE, Memory
from recsys_ray.scoring.scorer import ScoreSpec
from recsys_ray.serving.histories import mapped_arrays
from recsys_ray.serving.recommender import Recommender
from recsys_ray.storage.artifacts import load_arrays, open_artifact
from recsys_ray.storage.outputs import find_bundle
from serve.app import create_app
from serve.live import LiveAnswers


@pytest.fixture(scope="module")
def late(tmp_path_factory) -> Late:
    return make_late(tmp_path_factory.mktemp("late"))


@pytest.fixture(scope="module")
def extended(late, tmp_path_factory) -> Path:
    return extend(late, tmp_path_factory.mktemp("extended"), late.items(late.lonely, late.linked), late.trickle)


# -- vectors


def test_an_item_with_the_same_edges_has_the_embedding_that_the_stages_gave_it(late, extended, tmp_path):
    found = rows_of(extended, late.linked)
    assert np.abs(found["embedding"][0] - late.embedding[late.linked]).max() < 2e-3  # states are stored as float16
    assert np.abs(found["vector"][0] - late.vector[late.linked]).max() < 5e-3
    without = rows_of(extend(late, tmp_path, late.items(late.linked)), late.linked)
    for name, of_stages in (("embedding", late.embedding), ("vector", late.vector)):
        assert np.abs(without[name][0] - of_stages[late.linked]).max() > 0.05  # the edges did make it


def test_an_item_without_edges_has_the_vector_that_the_stages_gave_it(late, extended):
    found = rows_of(extended, late.lonely)
    assert np.abs(found["embedding"][0] - late.embedding[late.lonely]).max() < 1e-4
    assert np.abs(found["vector"][0] - late.vector[late.lonely]).max() < 1e-3


def test_items_of_the_bundle_keep_their_rows(late, extended):
    for file in ("vectors", "text", "hgnn", "hidden"):
        old, new = (mapped_arrays(folder / f"{file}.safetensors") for folder in (late.bundle, extended))
        for name, rows in old.items():
            assert torch.equal(new[name][: len(rows)], rows)
            assert len(new[name]) == len(rows) + 2


def test_new_items_that_share_a_user_send_to_each_other(late, tmp_path):
    """A user whom nobody knows, and two new items: the one edge there is, beside what texts tell."""
    trickle = pa.table(
        {
            "user_id": ["someone new"] * 2,
            "item_id": [late.lonely, late.linked],
            "event": ["stream"] * 2,
            "timestamp": [END + DAY] * 2,
        }
    )
    apart = rows_of(extend(late, tmp_path / "a", late.items(late.lonely, late.linked)), late.lonely, late.linked)
    joined = rows_of(
        extend(late, tmp_path / "b", late.items(late.lonely, late.linked), trickle), late.lonely, late.linked
    )
    assert (np.abs(apart["embedding"] - joined["embedding"]).max(1) > 0.01).all()
    assert Recommender.load(tmp_path / "b" / "bundles").users.find("someone new") is None


@pytest.mark.parametrize("count", [4, 30])
def test_replacing_items_by_themselves_changes_nothing(late, tmp_path, count):
    """Their edges come from the histories and from texts; some of the catalogue, then all of it but the lonely item,
    to which the linked one's text told nothing."""
    world = late.whole
    gids = np.sort(np.random.default_rng(0).permutation(len(world.item_ids))[:count])
    gids = gids[gids != world.item_ids.index(late.lonely)]
    names = [world.item_ids[gid] for gid in gids]
    pq.write_table(late.items(*names, item_type=[TYPES[world.ntype[gid]] for gid in gids]), tmp_path / "new.parquet")
    base = find_bundle(world.root)
    made = extend_bundle(base, tmp_path / "new.parquet", None, QUIET, out=tmp_path / "bundles", replace=True)
    before, after = rows_of(base, *names), rows_of(made.path, *names)
    assert np.abs(before["embedding"] - after["embedding"]).max() < 2e-3
    assert np.abs(before["vector"] - after["vector"]).max() < 5e-3
    assert len(Recommender.load(made.path).items) == len(world.item_ids)
    assert made.counts["embedded"] == 0


def test_replacing_an_item_by_another_text_moves_it(late, tmp_path):
    name = "music-00001"
    made = extend(late, tmp_path, late.items(name, title=["The history of steam engines"]), replace=True)
    assert np.abs(rows_of(late.bundle, name)["vector"] - rows_of(made, name)["vector"]).max() > 0.02
    recommender = Recommender.load(made)
    assert recommender.items.title(recommender.items.find(name)) == "The history of steam engines"
    neighbour = recommender.similar(name, k=1)[0]  # the index has the new vector
    vectors = {i: rows_of(made, i)["vector"][0, :-1] for i in (name, neighbour.item_id)}
    assert neighbour.score == pytest.approx(float(vectors[name] @ vectors[neighbour.item_id]), abs=1e-5)


# -- the bundle


def test_the_new_bundle_is_whole_and_the_old_one_is_left(late, extended):
    old, new = open_artifact(late.bundle, verify=True), open_artifact(extended, verify=True)
    assert find_bundle(extended.parent) == extended.resolve()
    assert new.counts["version"] == extended.name != late.bundle.name
    assert new.counts["base"] == old.counts["base"] == late.bundle.name
    assert new.counts["items"] == old.counts["items"] + 2 == sum(new.counts["items_per_type"].values())
    assert new.counts["embedded"] == 2
    assert new.manifest["inputs"]["bundle"] == old.fingerprint
    assert not [path for path in extended.parent.iterdir() if path.name.startswith(".")]


def test_the_same_tables_make_the_same_version(late, tmp_path):
    first = extend(late, tmp_path, late.items(late.lonely))
    before = (first / "manifest.json").stat().st_mtime_ns
    again = extend_bundle(late.bundle, tmp_path / "new.parquet", None, QUIET, out=tmp_path / "bundles")
    assert again.path == first
    assert (first / "manifest.json").stat().st_mtime_ns == before


def test_current_may_be_left_alone(late, tmp_path):
    shutil.copytree(late.bundle.parent, tmp_path / "mine")
    pq.write_table(late.items(late.lonely), tmp_path / "new.parquet")
    here = tmp_path / "mine" / "current"  # no file: the current one of the folder
    made = extend_bundle(here, tmp_path / "new.parquet", None, QUIET, make_current=False)
    assert made.path.parent == tmp_path / "mine"
    assert find_bundle(here).name == late.bundle.name
    extend_bundle(here, tmp_path / "new.parquet", None, QUIET)
    assert find_bundle(here).name == made.path.name


def test_an_extended_bundle_can_be_extended(late, tmp_path):
    first = extend(late, tmp_path, late.items(late.lonely))
    pq.write_table(late.items(late.linked), tmp_path / "more.parquet")
    pq.write_table(late.trickle, tmp_path / "trickle.parquet")
    second = extend_bundle(first, tmp_path / "more.parquet", tmp_path / "trickle.parquet", QUIET)
    found = rows_of(second.path, late.linked)
    assert np.abs(found["vector"][0] - late.vector[late.linked]).max() < 5e-3
    assert second.counts["embedded"] == 2


def test_a_new_item_is_recommended_and_may_be_in_a_history(late, extended):
    recommender = Recommender.load(extended)
    everything = recommender.recommend(history=[{"item_id": late.linked}], k=100)
    ids = [item.item_id for item in everything]
    assert late.lonely in ids and late.linked not in ids
    assert any(late.linked in item.reason for item in everything)
    assert {item.item_id for item in recommender.similar(late.lonely, k=100)} >= {late.linked}

    async def ask() -> httpx.Response:
        live = SimpleNamespace(recommender=recommender, refused=None, examples=False, answers=LiveAnswers(None))
        app = create_app(live)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post(
                "/v1/recommendations", json={"history": [{"item_id": late.lonely}], "item_types": ["podcast"], "k": 100}
            )

    answer = asyncio.run(ask())
    assert answer.status_code == 200
    assert late.linked in [item["item_id"] for item in answer.json()["items"]]


def test_the_memory_holds_the_edges_of_new_items_in_both_directions(late, extended):
    old, new = Memory.load(late.bundle / MEMORY_FILE), Memory.load(extended / MEMORY_FILE)
    gid = Recommender.load(extended).items.find(late.linked)
    near = new.gid[new.begin[gid] : new.begin[gid + 1]]
    assert len(near) > 3
    ids, edges = late.whole.item_ids, true_edges(late.whole, len(late.whole.item_ids))
    into = edges.dst == ids.index(late.linked)
    weight = {ids[src]: w for src, w in zip(edges.src[into].tolist(), edges.weight[into].tolist(), strict=True)}
    spec, text = ScoreSpec.load(extended / "user_tower"), load_arrays(extended / "text.safetensors")["vector"]
    mine, known = np.array([gid]), np.flatnonzero(new.users[: len(old.users)])
    texts = text_pairs(nearest_texts(text, known, text[mine], mine, threads=1), new.users, mine)
    told = dict(zip(texts.src.tolist(), (spec.text_users * texts.users).tolist(), strict=True))
    assert set(near.tolist()) & set(told)
    for item in near.tolist():
        row = new.gid[new.begin[item] : new.begin[item + 1]].tolist()
        sent = new.coefficient[new.begin[item] + row.index(gid), 0]  # from the other item to the new one
        expected = weight[late.world.item_ids[item]] + told.get(item, 0)
        assert sent == pytest.approx(expected / (new.users[item] + spec.ridge), rel=1e-5)
        before = old.gid[old.begin[item] : old.begin[item + 1]].tolist() if item < len(old.users) else []
        assert gid in row and set(before) <= set(row)
    untouched = next(u for u in late.world.user_ids if u not in late.trickle["user_id"].to_pylist())
    for user in ("nobody", untouched):  # who has something beside it is shown it sooner
        asked = {"user_id": user, "history": [{"item_id": late.world.item_ids[near[0]]}], "k": 500}
        score = {found.item_id: found.score for found in Recommender.load(extended).recommend(**asked)}
        alone = Recommender.load(extended)
        alone.score = replace(alone.score, memory=None)
        assert score[late.linked] > {f.item_id: f.score for f in alone.recommend(**asked)}[late.linked]


def test_known_users_have_seen_what_the_trickle_says(late, extended):
    recommender = Recommender.load(extended)
    user = late.trickle["user_id"][0].as_py()
    assert late.linked in {event.item_id for event in recommender.history(user, 1000)}
    assert late.linked not in {item.item_id for item in recommender.recommend(user_id=user, k=100)}
    untouched = next(u for u in late.world.user_ids if u not in late.trickle["user_id"].to_pylist())
    old = Recommender.load(late.bundle)
    assert recommender.history(untouched, 1000) == old.history(untouched, 1000)


def test_popularity_counts_the_users_of_new_items(late, extended):
    recommender = Recommender.load(extended)
    rows = late.trickle.to_pylist()
    streams = {r["user_id"] for r in rows if r["event"] == "stream" and r["timestamp"] >= END - POPULAR_DAYS * DAY}
    assert recommender.popularity.counted.world[recommender.items.find(late.linked)] == len(streams) > 0
    assert recommender.popularity.counted.world[recommender.items.find(late.lonely)] == 0
    old = Recommender.load(late.bundle).popularity.counted
    assert np.array_equal(recommender.popularity.counted.world[: len(old.world)], old.world)
    for country in range(2):
        before, after = (np.zeros(len(recommender.items), np.int64) for _ in range(2))
        for counts, arrays in ((before, old), (after, recommender.popularity.counted)):
            rows_ = slice(arrays.offsets[country], arrays.offsets[country + 1])
            counts[arrays.gids[rows_]] = arrays.counts[rows_]
        assert np.array_equal(before[: len(old.world)], after[: len(old.world)])
    assert sorted(recommender.popularity.counted.rank.tolist()) == list(range(len(recommender.items)))


def test_an_unavailable_item_is_never_recommended(late, tmp_path):
    made = Recommender.load(extend(late, tmp_path, late.items(late.lonely, available=[False])))
    assert late.lonely not in {item.item_id for item in made.recommend(history=[{"item_id": "music-00001"}], k=500)}
    assert made.items.find(late.lonely) is not None


def test_indexes_of_codes_grow(late, tmp_path):
    world = replace(late.world, config=late.world.config.model_validate({"index": {"exact_up_to": 5}}))
    stages = [world.root / name for name in ("ingest", "featurize", "hgnn", "two_tower")]
    base = build_bundle(world.config, *stages, tmp_path / "bundles", QUIET)
    assert all(index["candidates"] for index in base.counts["indexes"].values())
    pq.write_table(late.items(late.lonely, late.linked), tmp_path / "new.parquet")
    made = extend_bundle(base.path, tmp_path / "new.parquet", None, QUIET)
    assert {name: index["recall"] for name, index in made.counts["indexes"].items()} == dict.fromkeys(TYPES, 1.0)
    recommender = Recommender.load(made.path)
    found = recommender.similar(late.lonely, k=50, item_types=["podcast"])
    assert len(found) == len(recommender.items.offered(2))


# -- what is refused


def test_csv_is_read_and_bad_rows_go_to_quarantine(late, tmp_path):
    rows = [late.lonely, late.linked, late.lonely, ""] + [f"podcast-9{i:04d}" for i in range(96)]
    table = late.items(*rows, item_type=["music", "podcast", "music", "music"] + ["podcast"] * 96)
    tmp_path.joinpath("bundles").mkdir()
    pa.csv.write_csv(table, tmp_path / "new.csv")
    made = extend_bundle(late.bundle, tmp_path / "new.csv", None, QUIET, out=tmp_path / "bundles")
    assert made.counts["items"] == len(late.world.item_ids) + 98
    reasons = pq.read_table(made.path / "quarantine" / "items.parquet")["reason"].to_pylist()
    assert reasons == ["item_id is missing"]  # the later row of an item counts, the earlier one is no fault


@pytest.mark.parametrize(
    ("rows", "changes", "sentence"),
    [
        (["music-00001"], {}, 'item_id "music-00001" is already in the bundle'),
        (["music-00001", "music-00002"], {}, 'item_id "music-00001" and 1 more are already'),
        ([""], {"item_type": ["music"]}, "1 of 1 rows of the items table are bad.*item_id is missing"),
    ],
)
def test_items_that_cannot_be_embedded(late, tmp_path, rows, changes, sentence):
    with pytest.raises(DataError, match=sentence):
        extend(late, tmp_path, late.items(*rows, **changes))
    assert not (tmp_path / "bundles" / "current.json").exists()


def test_an_item_keeps_its_type(late, tmp_path):
    with pytest.raises(DataError, match="under another item_type"):
        extend(late, tmp_path, late.items("music-00001", item_type=["podcast"]), replace=True)


def test_a_trickle_over_unknown_items_is_refused(late, tmp_path):
    trickle = late.trickle.set_column(1, "item_id", pa.array(["nowhere"] * len(late.trickle)))
    with pytest.raises(DataError, match='item_id "nowhere" is not among the items'):
        extend(late, tmp_path, late.items(late.linked), trickle)


def test_another_encoder_is_refused(late, tmp_path):
    copied = tmp_path / "stages"
    shutil.copytree(late.world.root, copied)
    shutil.rmtree(copied / "featurize")
    text = mapped_arrays(late.world.root / "featurize" / "text.safetensors")["vector"].numpy()
    publish_arrays(copied / "featurize", {"text.safetensors": {"vector": text}}, **bundle_world.FEATURIZE)
    base = replace(late.world, root=copied).bundle("others")
    pq.write_table(late.items(late.lonely), tmp_path / "new.parquet")
    with pytest.raises(ConfigError, match="a different model here"):
        extend_bundle(base.path, tmp_path / "new.parquet", None, QUIET)


def test_no_bundle_is_one_sentence(tmp_path):
    pq.write_table(pa.table({"item_id": ["a"]}), tmp_path / "new.parquet")
    with pytest.raises(ArtifactError, match="is not a bundle"):
        extend_bundle(tmp_path, tmp_path / "new.parquet", None, QUIET)


def test_whole_neighbourhoods_are_those_of_the_toy_graph():
    random = torch.Generator().manual_seed(0)
    src, dst = torch.randint(0, 12, (60,), generator=random), torch.randint(0, 12, (60,), generator=random)
    src, dst = torch.unique(torch.stack([src, dst]), dim=1)
    starts, text = torch.tensor([0, 5, 12]), torch.eye(12)
    weight = torch.rand(len(src), generator=random)
    mine, theirs = EdgeList(src, dst, weight, ItemTypes(starts), text), ToyGraph(src, dst, starts, text, weight)
    gids = torch.tensor([1, 4, 5, 6, 11])
    found, expected = mine.sample(gids, 0, -1), theirs.sample(gids, 0, -1)
    assert found.keys() == expected.keys()
    for relation, columns in found.items():
        messages = sorted(zip(*(column.tolist() for column in columns), strict=True))
        assert messages == sorted(zip(*(column.tolist() for column in expected[relation]), strict=True))
