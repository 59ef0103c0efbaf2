"""Bundles with damaged or forged files: refused in words that name the file, whatever the manifest says, and never the
end of the process. Arrow reads such files without a doubt and outside its memory."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from bundle_world import make_world
from safetensors.numpy import load_file, save_file

from recsys_ray.bundle.release import check_release
from recsys_ray.core.errors import ArtifactError
from recsys_ray.core.offsets import check_offsets
from recsys_ray.scoring.scorer import TRENDS, Pairs
from recsys_ray.serving.index import TypeIndex
from recsys_ray.serving.recommender import Recommender
from recsys_ray.storage.artifacts import sha256

EDGES = [b"\x00" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"\x01\x00\x00\x00"]
_MEMORY = 12 << 30  # bytes of addresses: libraries take half of it
Case = tuple[str, int]  # a file of the bundle, and a seed


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("world"))


def made(root: Path) -> Path:
    """A bundle with a file of every kind: memory, item terms, and codes of the larger types."""
    world = make_world(root, (12, 40, 30), 20, memory=0.1, terms=(TRENDS,))
    config = world.config.model_validate({**world.config.model_dump(), "index": {"exact_up_to": 20}})
    path = replace(world, config=config).bundle().path
    assert sorted(file.name for file in (path / "index").iterdir()) == ["t1.safetensors", "t2.safetensors"]
    return path


def trust(bundle: Path, file: Path) -> None:
    """Write a file's size and checksum into the manifest, as whoever forged it would."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][str(file.relative_to(bundle))] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def changed(data: bytes, draw: random.Random) -> bytes:
    """Some bytes of it flipped, cut, replaced, repeated or made the edge of a number's range."""
    made = bytearray(data)
    kind = draw.choice(["flip", "flip", "edge", "edge", "cut", "repeat", "other", "zero"])
    # what says how the rest is to be read lies at the beginning or the end
    reach = draw.choice([64, 300, len(made)])
    place = (
        min(draw.randrange(reach), len(made) - 1)
        if draw.random() < 0.7
        else max(len(made) - 1 - draw.randrange(reach), 0)
    )
    if kind == "flip":
        for _ in range(draw.randint(1, 4)):
            made[min(place + draw.randrange(16), len(made) - 1)] ^= 1 << draw.randrange(8)
    elif kind == "edge":
        place -= place % 4
        made[place : place + 4] = draw.choice(EDGES)
    elif kind == "cut":
        del made[place:]
    elif kind == "repeat":
        made[place:place] = made[place : place + draw.randint(1, 200)]
    elif kind == "other":
        made[place : place + 8] = draw.randbytes(8)
    else:
        made[place : place + draw.randint(1, 100)] = b""
    return bytes(made) if made != data else changed(data, draw)


def outcome(bundle: Path, case: Case, trusted: bool) -> str:
    """What becomes of the bundle with one file changed: served, or refused, or what was raised instead."""
    name, seed = case
    file, manifest = bundle / name, bundle / "manifest.json"
    before, stated = file.read_bytes(), manifest.read_bytes()
    file.write_bytes(changed(before, random.Random(seed)))
    if trusted and name != "manifest.json":
        trust(bundle, file)
    try:
        check_release(Recommender.load(bundle), None, None)
        return "served"
    except ArtifactError as error:
        if "MemoryError" in str(error):
            return "it fills the memory"
        return "refused" if str(bundle) in str(error) or names_version(error) else f"no file is named: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        file.write_bytes(before)
        manifest.write_bytes(stated)


def names_version(error: ArtifactError) -> bool:
    """Of a bundle whose files are whole, but whose answers are not, the version is named."""
    return "gives no answer" in str(error)


def apart(judge: Callable[[Case], str], cases: list[Case]) -> Iterator[tuple[Case, str]]:
    """The outcomes, found in a process of their own: where it dies, the last one says so, and another goes on."""
    rest = list(cases)
    while rest:
        read, write = os.pipe()
        if not (child := os.fork()):
            os.close(read)
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
            with os.fdopen(write, "w", buffering=1) as out:
                for case in rest:
                    print(json.dumps(judge(case)), file=out)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as told:
            found = [json.loads(line) for line in told if line.endswith("\n")]
        _, status = os.waitpid(child, 0)
        yield from zip(rest, found, strict=False)
        if len(found) < len(rest):
            yield rest[len(found)], f"the process died ({status})"
        rest = rest[len(found) + 1 :]


def fuzz(bundle: Path, count: int, seed: int, trusted: bool) -> dict[str, list[Case]]:
    """Outcome -> cases; ``count`` changes over the bundle's files in turn."""
    names = sorted(str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file())
    cases = [(names[number % len(names)], seed + number) for number in range(count)]
    found: dict[str, list[Case]] = {}
    with tempfile.TemporaryDirectory() as folder:
        whole = copied(bundle, Path(folder))
        for case, what in apart(partial(outcome, bundle, trusted=trusted), cases):
            found.setdefault(what, []).append(case)
            if what.startswith("the process died"):  # and left the changed file where it was
                shutil.copytree(whole, bundle, dirs_exist_ok=True)
    return found


def copied(bundle: Path, target: Path) -> Path:
    return Path(shutil.copytree(bundle, target / bundle.name))


def test_what_differs_from_its_checksum_is_refused(bundle, tmp_path):
    found = fuzz(copied(bundle, tmp_path), 60, 0, trusted=False)
    assert {name for name, _ in found.pop("served", [])} <= {"manifest.json"}, "it cannot hold its own checksum"
    assert set(found) == {"refused"}, found


def test_forged_files_are_refused_in_words_or_do_no_harm(bundle, tmp_path):
    found = fuzz(copied(bundle, tmp_path), 40, 1_000, trusted=True)
    assert set(found) == {"refused", "served"}, found
    assert len(found["refused"]) > 10


@pytest.mark.parametrize("offsets", [[0, 2**31, 5], [0, 5], [0, 3, 2, 5], [1, 2, 5], []])
def test_forged_offsets_are_found_before_they_fill_the_memory(offsets):
    check_offsets(np.array([0, 0, 2, 5]), 5)
    with pytest.raises(ValueError, match="do not divide 4 entries" if len(offsets) == 2 else "do not divide 5 entries"):
        check_offsets(np.array(offsets), 4 if len(offsets) == 2 else 5)


@pytest.mark.parametrize(
    "file, name",
    [("memory", "begin"), ("popularity", "offsets"), ("histories", "seen_offsets"), ("histories", "recent_offsets")],
)
def test_a_file_with_forged_offsets_is_refused(bundle, tmp_path, file, name):
    forged = copied(bundle, tmp_path)
    path = forged / f"{file}.safetensors"
    arrays = dict(load_file(path))
    arrays[name] = arrays[name].copy()
    arrays[name][len(arrays[name]) // 2] = 2**40
    save_file(arrays, path)
    trust(forged, path)
    with pytest.raises(ArtifactError, match=f"{path} is damaged .*offsets do not divide"):
        Recommender.load(forged)


def searched(index: TypeIndex, path: Path, data: bytes) -> str:
    """As :func:`outcome`, of an index alone."""
    path.write_bytes(data)
    try:
        read = TypeIndex.load(path, "a", index.gids, index.vectors, index.settings)
    except ArtifactError as error:
        return "refused" if str(path) in str(error) else f"no file is named: {error}"
    queries = np.eye(index.vectors.shape[1], dtype=np.float32)
    found = read.search_each(queries, 5, Pairs.nothing())
    return "served" if len(found.gid) == 5 * len(queries) else "too few were found"


@pytest.mark.parametrize("number", [1, 2])
def test_forged_codes_are_refused_in_words_or_do_no_harm(bundle, tmp_path, number):
    whole = (bundle / "index" / f"t{number}.safetensors").read_bytes()
    cases = [("", seed) for seed in range(200)]
    judge = partial(_judge, Recommender.load(bundle).indexes[number], tmp_path / "t.safetensors", whole)
    found = Counter(what for _, what in apart(judge, cases))
    assert set(found) == {"refused", "served"} and found["refused"] > 50, found


def _judge(index: TypeIndex, path: Path, whole: bytes, case: Case) -> str:
    return searched(index, path, changed(whole, random.Random(case[1])))


if __name__ == "__main__":  # PYTHONPATH=tests:. python tests/unit/test_damaged_bundle.py 3000 0
    with tempfile.TemporaryDirectory() as scratch:
        counted = fuzz(made(Path(scratch)), int(sys.argv[1]), int(sys.argv[2]), trusted=True)
    for word, cases in counted.items():
        print(len(cases), word, cases[:3])
