"""The store does the same in a folder and in a bucket of S3 (moto's server)."""

from __future__ import annotations

import gzip
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from bundle_world import make_world
from s3 import moto_bucket

from recsys_ray.core.errors import ArtifactError, DataError, UserError
from recsys_ray.data.files import partition_of
from recsys_ray.data.reading import find_source, read_batches
from recsys_ray.serving.recommender import Recommender
from recsys_ray.storage.artifacts import open_artifact, publish
from recsys_ray.storage.outputs import find_bundle, locate_bundle
from recsys_ray.storage.store import Place, local_output, source_fingerprint


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with moto_bucket() as query:
        yield query


@pytest.fixture(params=["path", "file", "s3"])
def place(request, tmp_path, bucket, monkeypatch) -> Place:
    monkeypatch.setenv("RECSYS_RAY_CACHE", str(tmp_path / "cache"))
    if request.param == "s3":
        return Place(f"s3://test/{tmp_path.name}{bucket}")
    (tmp_path / "store").mkdir()
    return Place(str(tmp_path / "store") if request.param == "path" else f"file://{tmp_path}/store")


def folder_of(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_files_are_put_and_read(place):
    file = place / "a" / "b.json"
    with pytest.raises(FileNotFoundError):
        file.read()
    assert not file.exists()
    for data in (b"one", b"another"):
        file.write(data)
        assert file.read() == data
    assert file.kind() == "file" and (place / "a").kind() == "folder" and (place / "c").kind() == "none"
    with file.open() as opened:
        opened.seek(3)
        assert opened.read(2) == b"th"
    assert (file / ".." / "b.json").read() == (place / "a" / "x" / "../b.json").read() == b"another"


@pytest.mark.parametrize("name", ["a b.json", "50%.csv", "day=2024%2001", "ü[1]?.parquet", "#x"])
def test_names_are_as_they_are_in_the_store(place, name):
    """Spark writes ``%20`` into the names of partitions; people write anything."""
    (place / "folder" / name).write(b"data")
    assert list((place / "folder").files()) == [name]
    assert (place / "folder" / name).read() == b"data" and (place / "folder" / name).name == name


def test_columns_in_the_names_of_folders_are_the_same_wherever_they_lie(place):
    file = place / "event=add%20to cart" / "part.parquet"
    assert partition_of(file.uri) == {"event": "add to cart"}


def test_folders_are_listed_and_removed(place, tmp_path):
    assert place.files() == {} and place.folders() == []
    place.upload(folder_of(tmp_path / "mine", a="1", b__c="22", b__d__e="333"))
    assert {name: size for name, (size, _) in place.files().items()} == {"a": 1, "b/c": 2, "b/d/e": 3}
    assert place.folders() == ["b"] and (place / "b").folders() == ["d"]
    (place / "b").delete()
    (place / "nothing").delete()
    assert list(place.files()) == ["a"]
    (place / "a").delete()
    assert place.files() == {}


def test_a_folder_goes_there_and_back(place, tmp_path):
    place.upload(folder_of(tmp_path / "mine", a="1", b__c="22"))
    place.download(tmp_path / "back")
    assert (tmp_path / "back" / "a").read_text() == "1" and (tmp_path / "back" / "b" / "c").read_text() == "22"
    place.download(tmp_path / "one", ["b/c"])
    assert [path.name for path in (tmp_path / "one").rglob("*")] == ["b", "c"]


def output(root: Path, text: str = "x") -> Path:
    folder_of(root, a=text, b__c="22")
    return publish(root, "stage", "f" * 64, counts={"rows": 3}).path


def test_an_output_is_used_where_it_is_or_through_the_cache(place, tmp_path):
    with pytest.raises(ArtifactError, match="no finished output"):
        open_artifact(local_output(place / "made"))
    (place / "made").upload(output(tmp_path / "mine"))
    folder = local_output(place / "made")
    assert open_artifact(folder, verify=True).counts["rows"] == 3
    assert (folder == tmp_path / "store" / "made") == place.is_local  # no copy of what is here
    assert local_output(place / "made") == folder
    (place / "other").upload(output(tmp_path / "theirs", "y"))
    assert (local_output(place / "other") / "a").read_text() == "y"


def test_a_killed_upload_leaves_nothing_that_is_taken_for_whole(place, tmp_path, monkeypatch):
    made = output(tmp_path / "mine")
    copy = Place.put

    def dies(self: Place, file: Path, name: str) -> None:
        if name == "b/c":
            raise KeyboardInterrupt
        copy(self, file, name)

    monkeypatch.setattr(Place, "put", dies)
    with pytest.raises(KeyboardInterrupt):
        (place / "made").upload(made)
    with pytest.raises(ArtifactError, match="no finished output"):
        open_artifact(local_output(place / "made"))
    monkeypatch.setattr(Place, "put", copy)
    (place / "made").upload(made)
    assert open_artifact(local_output(place / "made"), verify=True)


def test_a_copy_that_was_cut_off_is_made_again(place, tmp_path):
    (place / "made").upload(output(tmp_path / "mine"))
    folder = local_output(place / "made")
    if not place.is_local:
        (folder / "a").unlink()
        assert (local_output(place / "made") / "a").read_text() == "x"


def test_several_processes_get_one_copy(place, tmp_path):
    (place / "made").upload(output(tmp_path / "mine"))
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        folders = pool.map(local_output, [place / "made"] * 6)
    assert len(set(folders)) == 1 and open_artifact(folders[0], verify=True)


def test_a_damaged_manifest_is_one_sentence(place):
    (place / "made" / "manifest.json").write(b"{")
    with pytest.raises(ArtifactError, match="is damaged"):
        open_artifact(local_output(place / "made"))


def test_a_store_that_cannot_be_used_is_one_sentence(bucket):
    with pytest.raises(UserError, match=r"s3://nowhere/x.* cannot be used .*check the address and your credentials"):
        Place(f"s3://nowhere/x{bucket}").write(b"1")
    with pytest.raises(UserError, match="is not a valid location"):
        Place("ftp2://x/y").read()


def test_a_table_is_known_by_its_names_and_contents_wherever_it_lies(tmp_path):
    table, copy = tmp_path / "one" / "items", tmp_path / "another" / "items"
    (table / "day=1").mkdir(parents=True)
    (table / "day=1" / "part.csv").write_text("abc\n")
    shutil.copytree(table, copy)
    os.utime(copy / "day=1" / "part.csv", (0, 0))
    assert source_fingerprint(copy) == source_fingerprint(table)
    assert source_fingerprint(copy / "day=1" / "part.csv") == source_fingerprint(table / "day=1" / "part.csv")

    before = {source_fingerprint(table)}
    (table / "day=1" / "part.csv").write_text("abd\n")  # of the same length
    before.add(source_fingerprint(table))
    (table / "day=1").rename(table / "day=2")
    before.add(source_fingerprint(table))
    assert len(before) == 3


def test_a_table_has_the_same_fingerprint_wherever_it_lies(place, tmp_path):
    table = folder_of(tmp_path / "items", day_1__part="abc\n", day_2="x")
    (place / "items").upload(table)
    assert source_fingerprint(str(place / "items")) == source_fingerprint(table)
    (place / "items" / "day_2").write(b"y")
    assert source_fingerprint(str(place / "items")) != source_fingerprint(table)


def test_tables_are_read_where_they_lie(place, tmp_path):
    table = pa.table({"user_id": ["u", "v"], "item_id": ["i", "j"], "timestamp": [1_700_000_000, 1_700_000_001]})
    mine = tmp_path / "mine"
    (mine / "event=stream").mkdir(parents=True)
    pq.write_table(table, mine / "event=stream" / "part.parquet")
    (mine / "event=follow").mkdir()
    pa.csv.write_csv(table, mine / "event=follow" / "part.csv")
    with gzip.open(mine / "event=follow" / "more.csv.gz", "wb") as packed:
        pa.csv.write_csv(table, packed)
    (mine / "_SUCCESS").write_text("")
    place.upload(mine)
    found = find_source("interactions", str(place))
    assert [Place(fragment.file).name for fragment in found.fragments] == ["more.csv.gz", "part.csv", "part.parquet"]
    rows = [batch.table for fragment in found.fragments for batch in read_batches(fragment)]
    assert [table["user_id"].to_pylist() for table in rows] == [["u", "v"]] * 3
    assert [table["event"].to_pylist()[0] for table in rows] == ["follow", "follow", "stream"]
    with pytest.raises(DataError, match="there is no file or folder at"):
        find_source("interactions", str(place / "nowhere"))


def test_a_bundle_answers_from_where_it_lies(place, tmp_path):
    world = make_world(tmp_path / "world")
    made = world.bundle()
    with pytest.raises(ArtifactError, match="is not a bundle and contains none"):
        find_bundle(str(place))
    (place / "bundles").upload(made.path.parent)
    for given in (place, place / "bundles", place / "bundles" / "current", place / "bundles" / made.path.name):
        assert locate_bundle(str(given)).name == made.path.name
        assert Recommender.load(str(given), warm=False).version == made.counts["version"]
    user = world.user_ids[5]
    here, there = (Recommender.load(path).recommend(user_id=user, k=20) for path in (made.path, str(place)))
    assert here == there
