"""Stage outputs appear whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from recsys_ray.core.errors import ArtifactError, UserError
from recsys_ray.storage.artifacts import (
    FORMAT,
    SCRATCH,
    changes,
    fingerprint,
    load_arrays,
    open_artifact,
    publish,
    save_arrays,
)
from recsys_ray.storage.lock import run_lock
from recsys_ray.storage.outputs import (
    current_folder,
    current_output,
    find_finished,
    remove_unnamed,
    set_current,
    work_folder,
)


def make(tmp_path, value=1.0, print_="f" * 64):
    work = work_folder(tmp_path / "stage", print_[:16])
    save_arrays(work / "table.safetensors", {"x": np.full(3, value)})
    (work / SCRATCH).mkdir(exist_ok=True)
    (work / SCRATCH / "resume").write_text("state")
    return publish(work, "stage", print_, counts={"rows": 3})


def test_an_output_is_whole_and_without_scratch(tmp_path):
    artifact = make(tmp_path)
    assert artifact.counts["rows"] == 3 and artifact.manifest["made_by"].keys() == {"version", "commit", "command"}
    assert not (artifact.path / SCRATCH).exists()
    assert open_artifact(artifact.path, verify=True).fingerprint == "f" * 64


def test_a_pointer_names_the_current_output_and_what_none_names_is_removed(tmp_path):
    first, second = make(tmp_path), make(tmp_path, 2.0, "e" * 64)
    stage, variant = tmp_path / "stage", tmp_path / "variants" / "v"
    with pytest.raises(ArtifactError, match="no finished output"):
        current_output(tmp_path, "stage")
    set_current(stage, first.path)
    set_current(variant / "stage", first.path)
    set_current(stage, second.path)
    assert json.loads((stage / "current.json").read_text()) == {"output": "e" * 16}
    assert current_output(tmp_path, "stage").fingerprint == "e" * 64
    assert current_folder(variant / "stage") == first.path
    unfinished = work_folder(stage, "d" * 16)
    remove_unnamed(tmp_path, "stage", [tmp_path, variant])
    assert first.path.exists() and second.path.exists() and not unfinished.exists()
    remove_unnamed(tmp_path, "stage", [tmp_path])
    assert not first.path.exists() and second.path.exists()


def test_what_was_interrupted_is_found_again_and_what_is_finished_is_not_written_into(tmp_path):
    work = work_folder(tmp_path / "stage", "f" * 16)
    (work / "half").write_text("x")
    assert (work_folder(tmp_path / "stage", "f" * 16) / "half").exists()
    assert find_finished(tmp_path / "stage", "f" * 16, "f" * 64) is None
    made = make(tmp_path)
    assert made.path == work and find_finished(tmp_path / "stage", "f" * 16, "f" * 64) == made
    again = make(tmp_path, 2.0)
    assert again.path.name == "f" * 16 + "-2"
    assert load_arrays(made.path / "table.safetensors")["x"][0] == 1.0
    (made.path / "table.safetensors").unlink()
    assert find_finished(tmp_path / "stage", "f" * 16, "f" * 64) == again


def test_outputs_of_an_earlier_layout_are_refused_in_a_sentence(tmp_path):
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "manifest.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"made by an earlier version of recsys-ray.*set another run_dir"):
        current_output(tmp_path, "stage")


def test_two_runs_in_one_folder_are_refused_and_a_dead_one_is_not_in_the_way(tmp_path):
    code = f"import time\nfrom recsys_ray.storage.lock import run_lock\nwith run_lock({str(tmp_path)!r}):\n"
    other = subprocess.Popen([sys.executable, "-c", code + " print(1, flush=True); time.sleep(99)"], stdout=-1)
    assert other.stdout is not None and other.stdout.readline()
    with pytest.raises(UserError, match=f"another run is working in .*process {other.pid} on "), run_lock(tmp_path):
        pass
    other.kill()
    other.wait()
    with run_lock(tmp_path), run_lock(tmp_path):
        pass


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
    with pytest.raises(ArtifactError, match=r"table\.safetensors is missing or was modified"):
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
