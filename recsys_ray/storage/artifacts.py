"""A stage's output: a folder with a manifest, which is written last and makes the output valid.

The manifest holds inputs and their fingerprints, configuration, counts, checksums and software versions.
recsys_ray/storage/outputs.py knows where outputs are and which is current.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file

from recsys_ray.core.errors import ArtifactError

MANIFEST = "manifest.json"
FORMAT = 4  # raise it when what every manifest or pointer holds changes; for one stage's output raise its version
SCRATCH = "_scratch"  # inside a work folder: resume state that is not part of the output
LAST, BEST = CHECKPOINTS = ("last.safetensors", "best.safetensors")  # of one training, somewhere in its scratch
_SOFTWARE = ("ray", "torch", "dgl", "transformers", "pyarrow", "faiss-cpu", "numpy")


@dataclass(frozen=True)
class Artifact:
    """A published folder and its manifest."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def counts(self) -> Mapping[str, Any]:
        return self.manifest["counts"]


def fingerprint(stage: str, config: Any, inputs: Mapping[str, str], version: int = 1) -> str:
    """Hash of all that decides a stage's output; ``version`` is that of the stage's code."""
    text = json.dumps([FORMAT, stage, version, config, dict(sorted(inputs.items()))], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(path: str | Path) -> dict[str, Any] | None:
    """The manifest in a folder, of whatever format, or None where there is none that can be read."""
    manifest = json_or_none(Path(path) / MANIFEST)
    return manifest if isinstance(manifest, dict) else None


def open_artifact(path: str | Path, verify: bool = False) -> Artifact:
    """Open a published folder; ``verify`` also compares every file's checksum.

    Raises:
        ArtifactError: no manifest, another format, a file missing or of another size (or checksum).
    """
    folder = Path(path)
    try:
        manifest = read_json(folder / MANIFEST)
    except FileNotFoundError:
        raise ArtifactError(f"{folder} contains no finished output (no {MANIFEST})") from None
    except (ValueError, RecursionError):
        raise ArtifactError(f"{folder / MANIFEST} is damaged; remove the folder and run the stage again") from None
    if not isinstance(manifest, dict):
        raise ArtifactError(f"{folder / MANIFEST} is damaged; remove the folder and run the stage again")
    if manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{folder} was made by another version of recsys-ray (format {manifest.get('format')}; this one reads "
            f"{FORMAT}); run its stage again"
        )
    with understood(folder / MANIFEST):
        for name, expected in manifest["files"].items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != expected["bytes"]:
                raise ArtifactError(f"{file} is missing or was modified; remove the folder and run the stage again")
            if verify and sha256(file) != expected["sha256"]:
                raise ArtifactError(
                    f"{file} has a different checksum than when it was written; remove the folder and run the stage "
                    "again"
                )
    return Artifact(folder, manifest)


def changes(manifest: Mapping[str, Any], version: int, config: Any, inputs: Mapping[str, str]) -> list[str]:
    """Why an output with this manifest is not what a stage of this version, with this configuration and these inputs,
    would make; empty where it is."""
    if manifest.get("format") != FORMAT:
        return [f"its format changed ({manifest.get('format')} -> {FORMAT})"]
    found = []
    if manifest["version"] != version:
        found.append(f"the stage changed (version {manifest['version']} -> {version})")
    now = json.loads(json.dumps(config, default=_plain))
    if fields := list(_differing(manifest["config"], now)):
        found.append(f"configuration changed ({_some(fields)})")
    names = sorted(manifest["inputs"].keys() | inputs.keys())
    if differing := [name for name in names if manifest["inputs"].get(name) != inputs.get(name)]:
        found.append(f"inputs changed ({_some(differing)})")
    return found


def _differing(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Dotted names of the fields that differ between two trees of JSON, with their values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from _differing(before.get(key), now.get(key), f"{name}.{key}".removeprefix("."))
    elif before != now:
        texts = [json.dumps(value, ensure_ascii=False) for value in (before, now)]
        yield name if max(map(len, texts)) > 40 else f"{name}: {texts[0]} -> {texts[1]}"


def _some(names: list[str], most: int = 4) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def publish(work: Path, stage: str, expected: str, version: int = 1, **facts: Any) -> Artifact:
    """Turn ``work`` into an output: remove the scratch folder and write the manifest, which makes it valid.

    ``facts`` (config, inputs, counts, schema, seconds, ...) go into the manifest as they are.
    """
    shutil.rmtree(work / SCRATCH, ignore_errors=True)
    files = {
        str(p.relative_to(work)): {"bytes": p.stat().st_size, "sha256": sha256(p)}
        for p in sorted(work.rglob("*"))
        if p.is_file()
    }
    manifest = {"format": FORMAT, "stage": stage, "version": version, "fingerprint": expected}
    manifest |= {"config": {}, "inputs": {}, "counts": {}, **facts, "made_by": made_by(), "software": software()}
    manifest["files"] = files
    write_json(work / MANIFEST, manifest)
    return open_artifact(work)


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A path to write to. It gets the name of ``target`` when the block ends: a reader sees the old file or the new
    one, never half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.tmp")
    yield aside
    aside.replace(target)


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Whatever a library makes of a file that another one wrote, or nobody should have: in words, with its name.

    Raises:
        ArtifactError: the block raised anything else.
    """
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"{path} is damaged ({type(error).__name__}: {error}); build it again") from error


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def json_or_none(path: Path) -> Any:
    """JSON, or None where there is none that can be read."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole."""
    with written_whole(path) as aside:
        aside.write_text(json.dumps(value, indent=1, default=_plain, ensure_ascii=False) + "\n", encoding="utf-8")


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table as Parquet, whole."""
    with written_whole(path) as aside:
        pq.write_table(table, aside, compression="zstd")


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays as safetensors, whole."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with written_whole(path) as aside:
        save_file(contiguous, aside, metadata=dict(metadata) if metadata else None)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; run the stage that writes it again") from None
    except Exception as error:
        raise ArtifactError(f"{path} is damaged ({error}); run the stage that writes it again") from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def software() -> dict[str, str]:
    """Versions of what an output depends on."""
    versions = {"python": platform.python_version()}
    for name in _SOFTWARE:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a serving replica has neither dgl nor transformers
            continue
    return versions


@cache
def made_by() -> dict[str, str | None]:
    """The package's version, the commit where this is a checkout ("-dirty" where its files were changed), and the
    command line of this process."""
    root = Path(__file__).resolve().parents[2]
    told = None
    if (root / ".git").exists():
        words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with suppress(OSError, subprocess.SubprocessError):
            told = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout.strip() or None
    try:
        version: str | None = importlib.metadata.version("recsys-ray")
    except importlib.metadata.PackageNotFoundError:
        version = None
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"version": version, "commit": told, "command": command}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return str(value)
