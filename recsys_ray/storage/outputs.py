"""Where the outputs of a run lie, and which of them is current.

    <run_dir>/<stage>/<fingerprint>/    an output, finished once its manifest is there; nothing changes it afterwards
    <run_dir>/<stage>/current.json      names the current one, relative to the folder of the pointer

A stage writes into the output's own folder, named by the fingerprint: a killed stage finds its work again, and one with
other inputs or another configuration starts afresh. A pointer is replaced in one step. Runs share an output by pointers
to the same folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from recsys_ray.core.errors import ArtifactError
from recsys_ray.storage.artifacts import MANIFEST, Artifact, open_artifact, write_json
from recsys_ray.storage.store import Place

POINTER = "current.json"


def current_output(run_dir: str | Path, stage: str) -> Artifact:
    """The current output of a stage; ``stage`` is the name of its folder.

    Raises:
        ArtifactError: there is none, it is damaged, or an earlier version made it.
    """
    folder = current_folder(Path(run_dir) / stage)
    if folder is None:
        check_layout(run_dir, stage)
        raise ArtifactError(f"{Path(run_dir) / stage} holds no finished output (no {POINTER} in it)")
    return open_artifact(folder)


def current_folder(parent: Path) -> Path | None:
    """The folder that the pointer in ``parent`` names; None without a pointer. Nobody looks whether it is there."""
    place = current_place(Place(str(parent)))
    return place.local if place else None


def current_place(parent: Place) -> Place | None:
    """As :func:`current_folder`, wherever it lies."""
    try:
        return parent / json.loads((parent / POINTER).read())["output"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError):
        raise ArtifactError(f"{parent / POINTER} is damaged; remove it and run the stage again") from None


def set_current(parent: Path, output: Path) -> None:
    """Let the pointer in ``parent`` name ``output``, in one step: there is no moment without a current one."""
    parent.mkdir(parents=True, exist_ok=True)
    write_json(parent / POINTER, {"output": os.path.relpath(output.resolve(), parent.resolve())})


def put_file(file: Path, target: Path) -> None:
    """Copy a file to ``target`` in one step."""
    aside = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(file, aside)
    aside.replace(target)


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
            f"{run_dir} was made by an earlier version of recsys-ray, whose outputs this one cannot read; remove or "
            "rename the folder, or set another run_dir, and run again"
        )
