"""What a bundle holds, over a world whose stage outputs are written by hand; what is not published, what is damaged."""

from __future__ import annotations

import json
import shutil
from itertools import chain
from pathlib import Path

import bundle_world
import numpy as np
import pytest
from bundle_world import DAY, END, EVENTS, POPULAR_DAYS, World, make_world

from recsys_ray.core.errors import ArtifactError
from recsys_ray.data.tables import Tables, whole_users
from recsys_ray.scoring.scorer import TRENDS, UNSEEN
from recsys_ray.serving.histories import Histories, HistoryWriter
from recsys_ray.serving.recommender import Recommender
from recsys_ray.storage.artifacts import open_artifact
from recsys_ray.storage.outputs import find_bundle

TYPES = ["audiobook", "music", "podcast"]


@pytest.fixture(
    scope="module", params=[(0.0, ()), (0.1, (TRENDS, UNSEEN))], ids=["towers alone", "memory and item terms"]
)
def world(request, tmp_path_factory) -> World:
    memory, terms = request.param
    made = make_world(tmp_path_factory.mktemp("world"), memory=memory, terms=terms)
    made.bundle()
    return made


@pytest.fixture(scope="module")
def recommender(world) -> Recommender:
    return Recommender.load(world.root / "bundles")


def test_bundle_is_whole_and_current(world):
    bundles = world.root / "bundles"
    bundle = open_artifact(find_bundle(bundles), verify=True)
    assert json.loads((bundles / "current.json").read_text()) == {"output": bundle.counts["version"]}
    for named in (world.root, bundles / "current", bundles / "current.json", bundles / bundle.counts["version"]):
        assert find_bundle(named) == bundle.path  # what may be given to --bundle
    assert {name: made["recall"] for name, made in bundle.counts["indexes"].items()} == dict.fromkeys(TYPES, 1.0)
    assert not [path for path in bundle.path.rglob("*") if path.suffix in (".pkl", ".pt", ".npy")]


def test_same_inputs_make_the_same_version_and_are_kept(world):
    before = (find_bundle(world.root) / "manifest.json").stat().st_mtime_ns
    assert world.bundle().path.name == find_bundle(world.root).name
    assert (find_bundle(world.root) / "manifest.json").stat().st_mtime_ns == before


def test_histories_are_those_of_the_events(world, recommender):
    for uid, user_id in enumerate(world.user_ids):
        events = world.events[world.events[:, 0] == uid]
        seen = recommender.histories.seen(recommender.users.find(user_id))
        assert seen.tolist() == sorted(set(events[:, 1].tolist()))
        recent = recommender.histories.recent(uid)
        expected = events[events[:, 3] >= END - 90 * DAY][-50:]
        assert np.array_equal(np.stack([recent.gids, recent.events, recent.timestamps], 1), expected[:, 1:])


@pytest.mark.parametrize("rows", [1, 7, 10_000])
def test_no_batch_cuts_a_user_in_two(world, rows, tmp_path):
    writer = HistoryWriter(tmp_path, len(world.user_ids), len(world.item_ids), END - 90 * DAY, 50)
    uids = []
    shards = Tables(world.root / "ingest").shards
    for batch in chain.from_iterable(whole_users(shard, rows) for shard in shards):
        uids += np.unique(batch.uid).tolist()
        writer.add(batch)
    assert uids == sorted(set(world.events[:, 0].tolist()))
    writer.close(tmp_path / "histories.safetensors")
    made, kept = (
        Histories(tmp_path / "histories.safetensors"),
        Histories(find_bundle(world.root) / "histories.safetensors"),
    )
    for uid in range(len(world.user_ids)):
        assert np.array_equal(made.seen(uid), kept.seen(uid))
        assert np.array_equal(made.recent(uid).gids, kept.recent(uid).gids)


def test_users_and_items_are_found(world, recommender):
    for uid, user_id in enumerate(world.user_ids):
        assert recommender.users.find(user_id) == uid
        traits = recommender.users.traits(uid, recommender.histories.recent(uid))
        assert ("age" in traits.known_traits) == (uid % 4 != 0 and uid != 3)
        assert ("taste" in traits.known_traits) == (uid % 3 != 0)
    for gid, item_id in enumerate(world.item_ids):
        assert recommender.items.find(item_id) == gid and recommender.items.id(gid) == item_id
    for nobody in ("", "zzz", "\x00", "\ud800", "日本"):
        assert recommender.users.find(nobody) is None and recommender.items.find(nobody) is None


def test_popularity_counts_users_of_its_own_days(world, recommender):
    events = world.events[
        (world.events[:, 3] >= END - POPULAR_DAYS * DAY) & (world.events[:, 2] == EVENTS.index("stream"))
    ]
    pairs = np.unique(events[:, :2], axis=0)
    expected = np.bincount(pairs[:, 1], minlength=len(world.item_ids))
    assert np.array_equal(recommender.popularity.counted.world, expected)


def test_poor_recall_is_not_published(tmp_path, monkeypatch):
    world = make_world(tmp_path, per_type=(30, 40, 3_000))
    world = World(**{**vars(world), "config": world.config.model_validate({"index": {"exact_up_to": 20}})})
    with monkeypatch.context() as patch:
        patch.setattr("recsys_ray.serving.index._CANDIDATES", (1,))
        with pytest.raises(ArtifactError, match=r"index of '.*' has a recall of 0\.\d+ .*min_recall=0.9"):
            world.bundle()
    assert not (tmp_path / "bundles" / "current.json").exists()
    counts = world.bundle().counts
    assert all(min(made["candidates"]) >= 50 and made["recall"] >= 0.99 for made in counts["indexes"].values())
    assert len(Recommender.load(tmp_path).recommend(world.user_ids[5], k=500)) == 500


@pytest.mark.parametrize("change", ["metric", "norm", "embedding", "rows"])
def test_inputs_that_do_not_fit_are_refused(tmp_path, change, monkeypatch):
    world = make_world(tmp_path)
    monkeypatch.setattr("recsys_ray.bundle.build.open_artifact", _unchecked)
    towers, save = tmp_path / "two_tower" / "hgnn", bundle_world.save_arrays
    if change == "metric":
        spec = towers / "spec.json"
        spec.write_text(spec.read_text().replace("inner_product", "l2"))
    elif change == "norm":
        save(towers / "items" / "serve.safetensors", {"vector": world.vectors * 2})
    elif change == "rows":
        save(towers / "items" / "serve.safetensors", {"vector": world.vectors[1:]})
    else:
        (tmp_path / "hgnn" / "embeddings" / "serve" / "part-00001.safetensors").unlink()
    sentences = {"metric": "metric 'l2'", "norm": "length 2", "embedding": "each of the 120", "rows": "119 rows"}
    with pytest.raises(ArtifactError, match=sentences[change]):
        world.bundle()
    assert not (tmp_path / "bundles" / "current.json").exists()


def _unchecked(path: Path, verify: bool = False):
    from recsys_ray.storage.artifacts import Artifact

    return Artifact(path, json.loads((path / "manifest.json").read_text()))


def test_any_damaged_or_missing_file_is_one_sentence(world, tmp_path):
    healthy = find_bundle(world.root)
    for name in open_artifact(healthy).manifest["files"]:
        for damage in (_flip, _cut, Path.unlink):
            copy = tmp_path / "copy"
            shutil.copytree(healthy, copy)
            damage(copy / name)
            with pytest.raises(ArtifactError):
                Recommender.load(copy)
            shutil.rmtree(copy)
    with pytest.raises(ArtifactError, match="is not a bundle"):
        Recommender.load(tmp_path)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
