"""Stage outputs appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from recsys_ray.core.errors import ArtifactError
from recsys_ray.storage.artifacts import (
    FORMAT,
    SCRATCH,
    changes,
    find_current,
    fingerprint,
    load_arrays,
    open_artifact,
    publish,
    save_arrays,
    source_fingerprint,
    work_folder,
)


def make(tmp_path, value=1.0, print_="f" * 64):
    target = tmp_path / "stage"
    work = work_folder(target, print_)
    save_arrays(work / "table.safetensors", {"x": np.full(3, value)})
    (work / SCRATCH).mkdir(exist_ok=True)
    (work / SCRATCH / "resume").write_text("state")
    return publish(work, target, "stage", print_, counts={"rows": 3})


def test_published_folder_is_whole_and_without_scratch(tmp_path):
    artifact = make(tmp_path)
    assert artifact.counts["rows"] == 3 and artifact.manifest["made_by"].keys() == {"version", "commit", "command"}
    assert not (artifact.path / SCRATCH).exists()
    assert not list(tmp_path.glob(".stage.*"))
    assert open_artifact(artifact.path, verify=True).fingerprint == "f" * 64


def test_publishing_again_replaces(tmp_path):
    make(tmp_path, 1.0)
    artifact = make(tmp_path, 2.0, "e" * 64)
    assert load_arrays(artifact.path / "table.safetensors")["x"][0] == 2.0
    assert find_current(artifact.path, "f" * 64) is None
    assert find_current(artifact.path, "e" * 64) is not None


def test_work_of_the_same_fingerprint_is_kept_and_of_others_removed(tmp_path):
    first = work_folder(tmp_path / "stage", "a" * 64)
    (first / "half").write_text("x")
    assert (work_folder(tmp_path / "stage", "a" * 64) / "half").exists()
    work_folder(tmp_path / "stage", "b" * 64)
    assert not first.exists()


def test_damage_is_noticed(tmp_path):
    artifact = make(tmp_path)
    file = artifact.path / "table.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    open_artifact(artifact.path)  # sizes are as they were
    with pytest.raises(ArtifactError, match="checksum"):
        open_artifact(artifact.path, verify=True)
    file.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=r"table\.safetensors is missing or not"):
        open_artifact(artifact.path)
    with pytest.raises(ArtifactError, match="damaged"):
        load_arrays(file)


def test_unfinished_and_foreign_folders(tmp_path):
    with pytest.raises(ArtifactError, match="no finished output"):
        open_artifact(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        open_artifact(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 0}))
    with pytest.raises(ArtifactError, match="format 0"):
        open_artifact(tmp_path)


def test_fingerprints_depend_on_configuration_and_inputs():
    base = fingerprint("graph", {"a": 1}, {"ingest": "x"})
    assert base == fingerprint("graph", {"a": 1}, {"ingest": "x"})
    others = fingerprint("graph", {"a": 2}, {"ingest": "x"}), fingerprint("graph", {"a": 1}, {})
    assert len({base, *others, fingerprint("graph", {"a": 1}, {"ingest": "x"}, version=2)}) == 4


def test_changes_are_named_by_field_and_input():
    manifest = {"format": FORMAT, "version": 1, "config": {"x": {"a": 1, "b": [1, 2]}}, "inputs": {"ingest": "i"}}
    assert changes(manifest, 1, {"x": {"a": 1, "b": (1, 2)}}, {"ingest": "i"}) == []
    assert changes(manifest, 1, {"x": {"a": 2, "b": [1, 2], "c": "new"}}, {"ingest": "i"}) == [
        'configuration changed (x.a: 1 -> 2, x.c: null -> "new")'
    ]
    assert changes(manifest, 3, manifest["config"], {"ingest": "j", "graph": "g"}) == [
        "the stage changed (version 1 -> 3)",
        "inputs changed (graph, ingest)",
    ]
    many = {"x": dict.fromkeys("abcdef", 0)}
    assert changes(manifest, 1, many, {"ingest": "i"})[0].endswith(" and 2 more)")


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
