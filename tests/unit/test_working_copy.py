"""A run in an object store (moto's server): what is there at any moment, who may work, what another machine finds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3 import moto_bucket

from recsys_ray.core.errors import UserError
from recsys_ray.storage import working_copy as module
from recsys_ray.storage.artifacts import CHECKPOINTS, SCRATCH, open_artifact, publish
from recsys_ray.storage.outputs import current_output, remove_unnamed, set_current, work_folder
from recsys_ray.storage.store import Place
from recsys_ray.storage.working_copy import check_shared, copy_of, working_copy


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with moto_bucket() as query:
        yield query


@pytest.fixture
def run_dir(bucket, tmp_path, monkeypatch) -> Place:
    use_machine(monkeypatch, tmp_path / "here")
    return Place(f"s3://test/{tmp_path.name}{bucket}") / "my run"


def use_machine(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Be another machine: with a cache and a name of its own."""
    monkeypatch.setenv("RECSYS_RAY_CACHE", str(cache))
    monkeypatch.setattr(module.socket, "gethostname", lambda: cache.name)


def make(folder: str, text: str) -> None:
    """An output of the stage ``toy``, the current one."""
    work = work_folder(Path(folder) / "toy", f"print-{text}")
    (work / SCRATCH).mkdir(exist_ok=True)
    (work / "part").mkdir(exist_ok=True)
    (work / "part" / "a.txt").write_text(text)
    set_current(work.parent, publish(work, "toy", text).path)
    remove_unnamed(Path(folder), "toy", [Path(folder)])


def names(place: Place) -> set[str]:
    return set(place.files())


def test_a_local_run_is_worked_on_where_it_is(tmp_path):
    for given in (str(tmp_path), f"file://{tmp_path}"):
        with working_copy(given) as folder:
            assert folder == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_machine_finds_what_was_made(run_dir, tmp_path, monkeypatch):
    with working_copy(run_dir.uri) as folder:
        make(folder, "one")
        (Path(folder) / "report.html").write_text("page")
        (Path(folder) / "cache").mkdir()
        (Path(folder) / "cache" / "trials").write_text("of this machine")
    assert names(run_dir) == {
        "report.html", "toy/current.json", "toy/print-one/manifest.json", "toy/print-one/part/a.txt",
    }  # fmt: skip
    use_machine(monkeypatch, tmp_path / "there")
    said: list[str] = []
    with working_copy(run_dir.uri, said.append) as folder:
        assert "there" in folder and Path(folder).name == "my run"
        found = current_output(folder, "toy")
        assert open_artifact(found.path, verify=True) and (found.path / "part" / "a.txt").read_text() == "one"
        assert (Path(folder) / "report.html").read_text() == "page"
        make(folder, "two")
    assert "4 files downloaded" in said[0]
    assert names(run_dir) == {
        "report.html", "toy/current.json", "toy/print-two/manifest.json", "toy/print-two/part/a.txt",
    }  # fmt: skip
    use_machine(monkeypatch, tmp_path / "here")
    with working_copy(run_dir.uri) as folder:  # the first one again: the store's word counts
        assert (current_output(folder, "toy").path / "part" / "a.txt").read_text() == "two"


def test_what_is_known_is_not_fetched_or_copied_again(run_dir, monkeypatch):
    with working_copy(run_dir.uri) as folder:
        make(folder, "one")
    copied: list[str] = []
    for way in ("put", "_copy_out"):
        monkeypatch.setattr(Place, way, lambda self, *given: copied.append(str(given)))
    with working_copy(run_dir.uri):
        pass
    assert copied == ["('toy/current.json', " + repr(Path(folder) / "toy/current.json") + ")"]


def test_while_it_works_the_store_has_checkpoints_and_finished_outputs(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_EVERY_S", 0.05)
    with pytest.raises(ZeroDivisionError), working_copy(run_dir.uri) as folder:
        make(folder, "one")
        work = work_folder(Path(folder) / "toy", "print-two")
        (work / "half.txt").write_text("half of an output")
        for name in (*CHECKPOINTS, "spill.bin"):
            path = work / SCRATCH / "model" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        wanted = {f"toy/print-two/{SCRATCH}/model/{name}" for name in CHECKPOINTS}
        finished = {"lock.json", "toy/current.json", "toy/print-one/manifest.json", "toy/print-one/part/a.txt"}
        until = time.monotonic() + 30
        while names(run_dir) != finished | wanted and time.monotonic() < until:
            time.sleep(0.05)
        assert names(run_dir) == finished | wanted
        _ = 1 / 0
    use_machine(monkeypatch, tmp_path / "there")
    with working_copy(run_dir.uri) as folder:
        work = work_folder(Path(folder) / "toy", "print-two")
        assert (work / SCRATCH / "model" / "last.safetensors").read_text() == "last.safetensors"
        make(folder, "two")
    assert names(run_dir) == {"toy/current.json", "toy/print-two/manifest.json", "toy/print-two/part/a.txt"}


def test_checkpoints_beside_a_finished_output_are_of_no_more_use(run_dir, tmp_path, monkeypatch):
    """They are there if the first machine was killed after it had finished the output and before it cleaned up."""
    with working_copy(run_dir.uri) as folder:
        make(folder, "one")
    finished = names(run_dir)
    left = run_dir / "toy" / "print-one" / SCRATCH / "model" / "last.safetensors"
    for machine in ("here", "there"):
        left.write(b"of a training that ended")
        use_machine(monkeypatch, tmp_path / machine)
        with working_copy(run_dir.uri) as folder:
            assert not list(Path(folder).rglob(SCRATCH))
        assert names(run_dir) == finished
    (Path(folder) / "toy" / "print-one" / SCRATCH).mkdir()  # not taken for an output in the making
    with working_copy(run_dir.uri):
        pass
    assert names(run_dir) == finished


def test_an_output_that_was_not_wholly_copied_is_none(run_dir, tmp_path, monkeypatch):
    put = Place.put

    def fails(self: Place, file: Path, name: str) -> None:
        if name.endswith("a.txt"):
            raise UserError("no route to host")
        put(self, file, name)

    monkeypatch.setattr(Place, "put", fails)
    with pytest.raises(UserError, match="no route"), working_copy(run_dir.uri) as folder:
        make(folder, "one")
    assert not {name for name in names(run_dir) if name.endswith(".json")}
    monkeypatch.setattr(Place, "put", put)
    with working_copy(run_dir.uri) as folder:  # what was not copied is still here, and is copied now
        pass
    assert "toy/print-one/manifest.json" in names(run_dir)


def test_two_machines_at_once_are_refused(run_dir, tmp_path, monkeypatch):
    with working_copy(run_dir.uri) as folder:
        make(folder, "one")
        use_machine(monkeypatch, tmp_path / "there")
        with pytest.raises(UserError, match=r"another run is working in s3://.*my%20run.* \(process \d+ on here\)"):
            working_copy(run_dir.uri).__enter__()
    lock = run_dir / "lock.json"
    lock.write(json.dumps({"host": "here", "process": 1, "token": "x", "renewed": time.time() - 3600}).encode())
    with working_copy(run_dir.uri):  # nobody has renewed it for an hour
        assert json.loads(lock.read())["host"] == "there"
    assert not lock.exists()


def test_hosts_must_share_the_copy(run_dir, tmp_path, monkeypatch):
    monkeypatch.delenv("RECSYS_RAY_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    check_shared(copy_of(run_dir), hosts=1)
    check_shared(tmp_path / "shared", hosts=2)
    with pytest.raises(UserError, match="a run in an object store on 2 hosts"):
        check_shared(copy_of(run_dir), hosts=2)
    monkeypatch.setenv("RECSYS_RAY_CACHE", str(tmp_path / "shared"))
    check_shared(copy_of(run_dir), hosts=2)


def test_who_lost_the_lock_writes_nothing_more(run_dir, monkeypatch):
    with pytest.raises(UserError, match="another run is working"), working_copy(run_dir.uri) as folder:
        theirs = {"host": "there", "process": 1, "token": "x", "renewed": time.time()}
        (run_dir / "lock.json").write(json.dumps(theirs).encode())
        make(folder, "one")
    assert names(run_dir) == {"lock.json"}
