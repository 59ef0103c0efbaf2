"""Items of types that the bundle has never seen: real HGNN and towers, nothing trained for them."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bundle_world import DAY, END, POPULAR_DAYS, publish_arrays
from late_world import (
    HGNN_CONFIG,
    QUIET,
    SIZES,
    TYPES,
    Late,
    completed,
    extend,
    make_late,
    messages,
    rows_of,
    true_edges,
)
from toy_graph import ToyGraph

from recsys_ray.bundle.build import sample_profiles
from recsys_ray.bundle.export import export_bundle
from recsys_ray.bundle.extend import extend_bundle
from recsys_ray.core.errors import DataError
from recsys_ray.core.progress import Progress
from recsys_ray.hgnn.blocks import ItemTypes
from recsys_ray.hgnn.encoder import make_hgnn
from recsys_ray.hgnn.inductive import load_hgnn
from recsys_ray.hgnn.inference import LocalStore, embed_items
from recsys_ray.hgnn.signature import SignedSource, item_signatures
from recsys_ray.serving.histories import mapped_arrays, user_inputs
from recsys_ray.serving.recommender import Recommender
from recsys_ray.serving.requests import RequestError
from recsys_ray.storage.artifacts import open_artifact
from recsys_ray.storage.outputs import find_bundle
from serve.app import create_app
from serve.live import LiveAnswers

BOOKS = ["book-1", "book-2", "book-3"]


@pytest.fixture(scope="module")
def late(tmp_path_factory) -> Late:
    return make_late(tmp_path_factory.mktemp("late"))


@pytest.fixture(scope="module")
def books(late, tmp_path_factory) -> Path:
    """The bundle with three books, of which nothing is known but the text, and of the last that it is sold out."""
    title = [f"Title of {late.lonely}", "Growing roses", "Steam engines"]
    items = late.items(*BOOKS, title=title, available=[True, True, False])
    return extend(late, tmp_path_factory.mktemp("books"), items)


def call(recommender: Recommender, path: str, body: dict[str, Any] | None = None) -> Any:
    """What HTTP answers."""

    async def ask() -> httpx.Response:
        live = SimpleNamespace(recommender=recommender, refused=None, examples=False, answers=LiveAnswers(None))
        app = create_app(live)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await (client.get(path) if body is None else client.post(path, json=body))

    answer = asyncio.run(ask())
    assert answer.status_code == 200, answer.text
    return answer.json()


def stages_embedding(late: Late) -> np.ndarray:
    """The linked item's embedding, were it the one item of a fourth type: from all of the world's edges, with the
    states that the stages left of the others."""
    size, bundle = len(late.whole.item_ids), find_bundle(late.whole.root)
    linked = late.whole.item_ids.index(late.linked)
    order = np.append(np.delete(np.arange(size), linked), linked)  # it comes last
    events = late.whole.events.copy()
    events[:, 1] = np.argsort(order)[events[:, 1]]
    ntype = np.append(late.whole.ntype[order[:-1]], 3)
    arrays = [mapped_arrays(bundle / f"{name}.safetensors") for name in ("text", "hidden")]
    text, hidden = arrays[0]["vector"][order], arrays[1]["hidden"][order].float()
    world, gone = replace(late.whole, events=events, ntype=ntype), np.array([order.tolist().index(12), size - 1])
    src, dst, weight, _ = messages(completed(true_edges(world, size), world, text.numpy(), gone), size)
    assert len(np.unique(ntype[src[dst == size - 1]])) == 3  # it hears from every type
    types = ItemTypes(torch.from_numpy(np.searchsorted(ntype, np.arange(5))))
    model = load_hgnn(bundle / "hgnn_model" / "model.safetensors", HGNN_CONFIG, 384, types)
    packed = torch.from_numpy(item_signatures([late.whole.item_ids[gid] for gid in order], 64).copy())
    graph = SignedSource(ToyGraph(src, dst, types.starts, text.float(), weight), packed, 64)
    store = LocalStore(size, HGNN_CONFIG.state_dim)
    store.table[:] = hidden
    return embed_items(model, graph, 0, torch.tensor([size - 1]), store)[0].numpy()


def test_a_new_type_is_recommended_from_text_alone(late, books):
    recommender = Recommender.load(books)
    assert recommender.item_types == [*TYPES, "book"]
    heard = [{"item_id": "music-00001"}, {"item_id": late.whole.item_ids[0]}]
    offered = {"book-1", "book-2"}
    assert {item.item_id for item in recommender.recommend(history=heard, item_types=["book"])} == offered
    assert {item.item_type for item in recommender.similar("music-00001", 10, ["book"])} == {"book"}
    everything = recommender.recommend(history=heard, k=500)
    assert {item.item_type for item in everything} == {*TYPES, "book"}
    assert [item.score for item in everything] == sorted((item.score for item in everything), reverse=True)
    user = late.world.user_ids[0]
    assert {item.item_id for item in recommender.recommend(user, item_types=["book"], exclude=["book-1"])} == {"book-2"}
    with pytest.raises(RequestError, match="there is no item type 'film'; known: audiobook, music, podcast, book"):
        recommender.recommend(item_types=["film"])


def test_nobody_knows_a_new_type_and_popularity_still_offers_it(books):
    recommender = Recommender.load(books)
    found = recommender.recommend(item_types=["book"])
    assert [(item.item_id, item.score, item.reason) for item in found] == [
        (name, 0.0, "little known yet") for name in sorted(item.item_id for item in found)
    ]
    assert {item.item_id for item in found} == {"book-1", "book-2"}
    assert {item.item_type for item in recommender.recommend(k=500)} == {*TYPES, "book"}


def test_a_history_may_hold_items_of_a_new_type(late, books):
    recommender = Recommender.load(books)
    answers = {}
    for name in BOOKS:
        found = recommender.recommend(history=[{"item_id": name}], k=500)
        assert name not in {item.item_id for item in found}
        assert all(recommender.items.title(recommender.items.find(name)) in item.reason for item in found)
        answers[name] = [item.item_id for item in found if item.item_type == "music"]
    assert answers["book-1"] != answers["book-2"]  # what the item is counts, not only that there is one


def test_http_knows_a_new_type(late, books):
    recommender = Recommender.load(books)
    version = call(recommender, "/v1/version")
    assert version["items_per_type"]["book"] == 3
    assert version["recall"]["book"] == 1.0
    body = {"history": [{"item_id": "book-3"}], "item_types": ["book"]}
    answer = call(recommender, "/v1/recommendations", body)
    assert {(item["item_id"], item["item_type"]) for item in answer["items"]} == {
        ("book-1", "book"),
        ("book-2", "book"),
    }


def test_the_embedding_from_text_alone_is_that_of_a_known_type(late, books):
    """Of the one self weight that all types share; the item tower, too, makes something of an item of no kind."""
    found = rows_of(books, *BOOKS)
    assert np.abs(found["embedding"][0] - late.embedding[late.lonely]).max() < 1e-4
    assert np.abs(found["embedding"][1] - late.embedding[late.lonely]).max() > 0.05
    assert np.allclose(np.linalg.norm(found["vector"][:, :-1], axis=1), 1, atol=1e-5)
    assert np.abs(found["vector"][0] - found["vector"][1]).max() > 0.02


def test_the_new_bundle_says_which_types_it_has(late, books, tmp_path):
    old, new = open_artifact(late.bundle), open_artifact(books, verify=True)
    assert new.counts["item_types"] == [*TYPES, "book"]
    assert new.counts["items_per_type"] == {**old.counts["items_per_type"], "book": 3}
    assert new.counts["indexes"]["book"]["candidates"] is None
    assert export_bundle(books, tmp_path / "all.parquet", ["hgnn"], QUIET) == new.counts["items"]
    table = pq.read_table(tmp_path / "all.parquet").slice(old.counts["items"])
    assert table["item_type"].to_pylist() == ["book"] * 3


def test_a_new_type_that_looks_like_a_slip_is_pointed_out(late, tmp_path, capsys):
    pq.write_table(late.items("podcasts-1"), tmp_path / "new.parquet")
    extend_bundle(late.bundle, tmp_path / "new.parquet", None, Progress(), out=tmp_path / "bundles")
    said = "".join(capsys.readouterr())
    assert 'item_type "podcasts" is new to the bundle (did you mean "podcast"?)' in said


def test_a_new_type_hears_from_the_items_of_its_users(late, tmp_path):
    """The linked item under a type of its own: what its users touched sends over the weights between two types."""
    row = late.items(late.linked, item_type=["book"])
    alone = rows_of(extend(late, tmp_path / "a", row), late.linked)
    made = extend(late, tmp_path / "b", row, late.trickle)
    joined = rows_of(made, late.linked)
    expected = stages_embedding(late)
    assert np.abs(joined["embedding"][0] - expected).max() < 2e-3  # states are stored as float16
    assert np.abs(alone["embedding"][0] - expected).max() > 0.05
    assert np.abs(joined["vector"][0] - alone["vector"][0]).max() > 0.02
    recommender = Recommender.load(made)
    rows = late.trickle.to_pylist()
    streams = {r["user_id"] for r in rows if r["event"] == "stream" and r["timestamp"] >= END - POPULAR_DAYS * DAY}
    popular = recommender.recommend(item_types=["book"])[0]
    assert (popular.item_id, popular.reason) == (late.linked, "popular now")
    assert recommender.popularity.counted.world[recommender.items.find(late.linked)] == len(streams) > 0
    user = rows[0]["user_id"]
    assert "book" in {event.item_type for event in recommender.history(user, 1000)}
    assert not recommender.recommend(user, item_types=["book"])  # the one that there is they have seen


def test_what_is_popular_in_a_new_type_is_known_at_once(late, tmp_path):
    had = {"book-1": 2, "book-2": 6, "book-3": 1, "book-4": 0}
    pairs = [(user, item) for item, users in had.items() for user in late.world.user_ids[:users]]
    names, items = zip(*pairs, strict=True)
    rows = {"user_id": names, "item_id": items, "event": ["stream"] * len(pairs), "timestamp": [END - DAY] * len(pairs)}
    made = extend(late, tmp_path, late.items(*had), pa.table(rows))
    recommender = Recommender.load(made)
    gids = np.array([recommender.items.find(name) for name in had])
    profiles = sample_profiles(made, 0)
    users = recommender.tower(user_inputs(profiles, recommender.tower.tastes))
    vectors, bias = recommender.score.wide[gids, :-1], recommender.score.wide[gids, -1]
    share = torch.from_numpy((vectors[:3] @ users.mean(0) + bias[:3]) / 0.1).softmax(0)
    assert share.tolist() == pytest.approx([2 / 9, 6 / 9, 1 / 9], rel=1e-3)  # the mean user's, of those somebody had
    told = np.exp((users @ vectors.T + bias) / 0.1)
    assert (told[:, 3] / told.sum(1)).mean() == pytest.approx(1.5 / 10, rel=1e-3)  # one event is its item's only one
    old = mapped_arrays(late.bundle / "vectors.safetensors")["vector"].numpy()
    assert np.array_equal(recommender.score.wide[: len(old)], old)


def test_a_bundle_with_a_new_type_can_be_extended(late, books, tmp_path):
    """By more items of that type, which hear from the first ones, and by yet another type."""
    trickle = pa.table(
        {
            "user_id": ["someone new"] * 2,
            "item_id": ["book-2", "book-4"],
            "event": ["stream"] * 2,
            "timestamp": [END + DAY] * 2,
        }
    )
    pq.write_table(trickle, tmp_path / "trickle.parquet")
    pq.write_table(late.items("book-4", "art-1", late.linked), tmp_path / "new.parquet")
    out = tmp_path / "bundles"
    alone = extend_bundle(books, tmp_path / "new.parquet", None, QUIET, out=out)
    made = extend_bundle(books, tmp_path / "new.parquet", tmp_path / "trickle.parquet", QUIET, out=out)
    assert made.counts["item_types"] == [*TYPES, "book", "art"]
    assert list(made.counts["items_per_type"].values()) == [9, 9, 11, 4, 1]
    before, after = (rows_of(bundle.path, "book-4", "art-1")["embedding"] for bundle in (alone, made))
    moved = np.abs(before - after).max(1)
    assert moved[0] > 0.05 and moved[1] < 1e-5
    recommender = Recommender.load(made.path)
    heard = [{"item_id": "book-1"}, {"item_id": "music-00001"}]
    found = recommender.recommend(history=heard, item_types=["art", "book"])
    assert {item.item_id for item in found} == {"art-1", "book-2", "book-4"}
    pq.write_table(late.items("book-2", title=["Mending nets"]), tmp_path / "again.parquet")
    again = extend_bundle(made.path, tmp_path / "again.parquet", None, QUIET, out=out, replace=True)
    assert again.counts["items_per_type"] == made.counts["items_per_type"]
    assert np.abs(rows_of(again.path, "book-2")["vector"] - rows_of(made.path, "book-2")["vector"]).max() > 0.02
    assert {item.item_id for item in Recommender.load(again.path).similar("book-2", 10, ["book"])} == {
        "book-1",
        "book-4",
    }


def test_an_item_does_not_move_to_a_new_type(late, tmp_path):
    with pytest.raises(DataError, match="under another item_type"):
        extend(late, tmp_path, late.items("music-00001", item_type=["book"]), replace=True)


def test_weights_by_relation_have_none_for_a_new_type(late, tmp_path):
    root = tmp_path / "stages"
    for name in ("ingest", "featurize", "two_tower"):
        shutil.copytree(late.world.root / name, root / name)
    config = HGNN_CONFIG.model_copy(update={"encoder": "graphsage", "hidden_dim": HGNN_CONFIG.state_dim})
    model = make_hgnn(384, config, ItemTypes(torch.from_numpy(np.cumsum([0, *SIZES]))))
    (part,) = (late.world.root / "hgnn" / "embeddings" / "serve").iterdir()
    arrays = {name: array.numpy() for name, array in mapped_arrays(part).items()}
    files = {"embeddings/serve/part-00000.safetensors": arrays}
    files["model.safetensors"] = {name: weight.numpy() for name, weight in model.state_dict().items()}
    publish_arrays(root / "hgnn", files, config={"hgnn": config.model_dump(mode="json")})
    by_relation = replace(late, bundle=replace(late.world, root=root).bundle().path)
    sentence = r"item_type 'art', 'book' is not in .* each pair of audiobook, music, podcast .*hgnn.encoder=propagation"
    with pytest.raises(DataError, match=sentence):
        extend(by_relation, tmp_path / "new", by_relation.items("book-1", "art-1", late.lonely))
    assert not (tmp_path / "new" / "bundles" / "current.json").exists()
    made = extend(by_relation, tmp_path / "known", by_relation.items(late.lonely))  # items of known types still come
    assert Recommender.load(made).items.find(late.lonely) is not None
