"""Where the outputs of a run are, and which of them is current.

    <run_dir>/<stage>/<fingerprint>/    an output, finished once its manifest is there; never changed afterwards
    <run_dir>/<stage>/current.json      names the current one, relative to the folder of the pointer

A stage writes into the folder named by its fingerprint: an interrupted stage finds its work again, and one with other
inputs or another configuration starts from scratch. A pointer is replaced atomically. Runs share an output by pointers
to the same folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from recsys_ray.core.errors import ArtifactError
from recsys_ray.storage.artifacts import MANIFEST, Artifact, open_artifact, written_whole
from recsys_ray.storage.store import Place, local_output

POINTER = "current.json"


def current_output(run_dir: str | Path, stage: str) -> Artifact:
    """The current output of a stage; ``stage`` is the name of its folder.

    Raises:
        ArtifactError: there is none, it is damaged, or an earlier version made it.
    """
    folder = current_folder(Path(run_dir) / stage)
    if folder is None:
        check_layout(run_dir, stage)
        raise ArtifactError(f"{Path(run_dir) / stage} contains no finished output (no {POINTER})")
    return open_artifact(folder)


def current_folder(parent: Path) -> Path | None:
    """The folder that the pointer in ``parent`` names; None without a pointer. Its existence is not checked."""
    place = current_place(Place(str(parent)))
    return place.local if place else None


def current_place(parent: Place) -> Place | None:
    """As :func:`current_folder`, for any location."""
    try:
        return parent / json.loads((parent / POINTER).read())["output"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError):
        raise ArtifactError(f"{parent / POINTER} is damaged; remove it and run the stage again") from None


def find_bundle(path: str | Path) -> Path:
    """The local folder of the bundle that ``path`` means, which may be a URI. Of a bundle in an object store it is the
    node's copy. Arguments and errors as :func:`locate_bundle`."""
    return local_output(locate_bundle(path))


def locate_bundle(path: str | Path) -> Place:
    """The location of the bundle for a path or URI: a bundle, a folder of bundles (``bundles`` or ``bundles/current``:
    the current one), or a run's folder.

    Raises:
        ArtifactError: there is no bundle.
    """
    given = Place(str(path))
    parents = [given, given / "bundles", *([given / ".."] if Path(given.name).stem == "current" else [])]
    for place in (given, *(current_place(parent) for parent in parents)):
        if place and (place / MANIFEST).exists() and (place / "user_tower").exists():
            return Place(str(place.local.resolve())) if place.is_local else place
    raise ArtifactError(f"{given} is not a bundle and contains none; 'recsys-ray run' or 'recsys-ray index' builds one")


def set_current(parent: Path, output: Path) -> None:
    """Point ``parent`` at ``output``, atomically, so that there is always a current one."""
    point_at(Place(str(parent)), os.path.relpath(output.resolve(), parent.resolve()))


def point_at(parent: Place, output: str) -> None:
    """As :func:`set_current`, for any location; ``output`` is relative to ``parent``."""
    (parent / POINTER).write(json.dumps({"output": output}).encode())


def put_file(file: Path, target: Path) -> None:
    """Copy a file to ``target`` in one step."""
    with written_whole(target) as aside:
        shutil.copyfile(file, aside)


def find_finished(parent: Path, name: str, expected: str) -> Artifact | None:
    """A whole output with this fingerprint among ``parent``/``name``, ``name``-2, ..."""
    for folder in sorted(parent.glob(f"{name}*")):
        try:
            artifact = open_artifact(folder)
        except ArtifactError:
            continue
        if artifact.fingerprint == expected:
            return artifact
    return None


def work_folder(parent: str | Path, name: str) -> Path:
    """The folder to write an output into: ``parent``/``name``, with what an interrupted attempt left there. Finished
    outputs are never written into, so that a second one of the same name becomes ``name``-2."""
    number, folder = 1, Path(parent) / name
    while (folder / MANIFEST).exists():
        number += 1
        folder = Path(parent) / f"{name}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def remove_unnamed(run_dir: Path, stage: str, family: Iterable[Path]) -> None:
    """Remove the outputs of a stage that no pointer of the runs ``family`` names, and what killed attempts left."""
    named = {folder.resolve() for run in family if (folder := current_folder(run / stage))}
    for folder in (run_dir / stage).iterdir():
        if folder.is_dir() and folder.resolve() not in named:
            (folder / MANIFEST).unlink(missing_ok=True)  # first: half of an output must not look like one
            shutil.rmtree(folder, ignore_errors=True)


def check_layout(run_dir: str | Path, stage: str) -> None:
    """Raises ArtifactError where an earlier version left its outputs, which lay in the stages' folders themselves."""
    if (Path(run_dir) / stage / MANIFEST).exists():
        raise ArtifactError(
            f"{run_dir} was made by an earlier version of recsys-ray, whose outputs this version cannot read; remove "
            "or rename the folder, or set another run_dir, and run again"
        )
