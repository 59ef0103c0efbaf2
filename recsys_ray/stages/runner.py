"""Defines a stage and runs it: skipped if up to date, resumed if it was interrupted, published as a whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys_ray.cluster.session import ray_session
from recsys_ray.config import Config
from recsys_ray.core.errors import ArtifactError
from recsys_ray.core.progress import Progress
from recsys_ray.data.files import table_fingerprint
from recsys_ray.stages.peak_memory import PeakMemory
from recsys_ray.storage.artifacts import (
    Artifact,
    changes,
    fingerprint,
    open_artifact,
    publish,
    read_manifest,
)
from recsys_ray.storage.lock import run_lock
from recsys_ray.storage.outputs import (
    check_layout,
    current_folder,
    current_output,
    find_finished,
    put_file,
    remove_unnamed,
    set_current,
    work_folder,
)
from recsys_ray.storage.working_copy import check_shared


@dataclass(frozen=True)
class Context:
    """What a stage's function is given. ``out`` is its work folder."""

    config: Config
    inputs: Mapping[str, Artifact]
    out: Path
    progress: Progress
    cpus: int
    hosts: int
    cache: Path  # what later runs reuse; may be removed
    spent: Callable[[], tuple[float, float]]  # seconds and peak memory in MB of this stage so far

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def folders(self) -> list[Path]:
        """Those of the inputs, in the order in which the stage names them."""
        return [artifact.path for artifact in self.inputs.values()]


@dataclass(frozen=True)
class Stage:
    """A function of configuration and inputs to one folder below ``run_dir``."""

    name: str  # the verb
    folder: str
    summary: str
    inputs: tuple[str, ...]  # names of other stages
    settings: Callable[[Config], dict[str, Any]]  # the part of the configuration that decides the output
    run: Callable[[Context], dict[str, Any]]  # returns the counts for the manifest
    version: int  # raise it when what the stage makes changes: what it made before is then made again
    sources: Callable[[Config], Mapping[str, str | Sequence[str] | None]] = lambda config: {}  # tables from outside
    is_whole: Callable[[Config, Artifact], bool] = lambda config, artifact: True  # is what it made elsewhere there?
    shared: bool = True  # the folder is all that it makes: another run may point at it
    page: str = ""  # a file of the output that is put into the run's folder as well


VARIANTS = "variants"  # below the folder of a run: the same run with some settings changed, a folder each


def family(home: Path) -> list[Path]:
    """The folders of a run and of its variants."""
    return [home, *sorted((home / VARIANTS).glob("*"))]


class Runner:
    """Runs stages of one configuration; starts Ray when the first of them has work to do.

    Outputs shared by this run and its variants are made once: if a sibling has an output with the same fingerprint,
    this run points at it. All share one cache. The run's folder is locked meanwhile; for variants, the caller holds the
    lock of their home.

    Args:
        home: the folder of the run that this one is a variant of; default: it is the run itself.
    """

    def __init__(
        self, config: Config, stages: Mapping[str, Stage], progress: Progress, home: Path | None = None
    ) -> None:
        self.config, self.stages, self.progress = config, stages, progress
        self.home = home or Path(config.run_dir)
        self._exit = ExitStack()
        self._cpus: int | None = None

    def __enter__(self) -> Runner:
        if self.home == Path(self.config.run_dir):
            self._exit.enter_context(run_lock(self.home))
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def chain(self, names: list[str], force: bool = False) -> dict[str, Artifact]:
        """Run these stages in order; returns their outputs."""
        return {name: self.run(name, f"stage {k} of {len(names)}", force) for k, name in enumerate(names, 1)}

    def run(self, name: str, place: str = "stage", force: bool = False) -> Artifact:
        """Bring one stage up to date with the configuration and with its inputs as they are.

        Raises:
            ArtifactError: an input has not been made.
            DataError: a table is not there.
        """
        stage, config = self.stages[name], self.config
        inputs = {other: self._input(name, other) for other in stage.inputs}
        hashes = {other: artifact.fingerprint for other, artifact in inputs.items()}
        check_kinship(inputs)
        hashes |= {table: table_fingerprint(table, path) for table, path in stage.sources(config).items() if path}
        settings = stage.settings(config)
        expected = fingerprint(stage.name, settings, hashes, stage.version)
        run_dir = Path(config.run_dir)
        parent = run_dir / stage.folder
        check_layout(run_dir, stage.folder)
        if not force and (found := self._find(stage, expected)):
            shared = found.path.parent != parent and current_folder(parent) != found.path
            self.progress.say(f"{place}  {name}: {f'reused from {found.path.parent}' if shared else 'up to date'}")
            return make_current(stage, found, run_dir, self.home)
        self.progress.say(f"{place}  {name}: {stage.summary}")
        if not force and (why := why_again(parent, stage, settings, hashes)):
            self.progress.say(f"    made again: {why}")
        cpus, hosts = self._ray()
        started = time.monotonic()
        work = work_folder(parent, expected[:16])
        with PeakMemory() as memory:
            here = config, inputs, work, self.progress, cpus, hosts, self.home / "cache"
            counts = stage.run(Context(*here, lambda: (time.monotonic() - started, memory.peak_mb)))
        seconds = time.monotonic() - started
        artifact = publish(
            work,
            stage.name,
            expected,
            stage.version,
            config=settings,
            inputs=hashes,
            counts=counts,
            seconds=round(seconds, 1),
            peak_memory_mb=round(memory.peak_mb),
        )
        self.progress.say(f"    done in {seconds:,.0f} s, peak memory {memory.peak_mb:,.0f} MB -> {work}")
        return make_current(stage, artifact, run_dir, self.home)

    def _find(self, stage: Stage, expected: str) -> Artifact | None:
        """A finished output with this fingerprint: the run's own, or that of a sibling."""
        run_dir = Path(self.config.run_dir)
        for run in [run_dir, *(run for run in family(self.home) if stage.shared and run != run_dir)]:
            with suppress(ArtifactError):
                made = current_output(run, stage.folder)
                if made.fingerprint == expected and stage.is_whole(self.config, made):
                    return made
        # One that was finished, and the run killed before it was pointed at.
        left = find_finished(run_dir / stage.folder, expected[:16], expected)
        return left if left and stage.is_whole(self.config, left) else None

    def _input(self, name: str, other: str) -> Artifact:
        try:
            return current_output(self.config.run_dir, self.stages[other].folder)
        except ArtifactError as error:
            raise ArtifactError(f"{name} needs the output of {other}: {error}") from error

    def _ray(self) -> tuple[int, int]:
        import ray

        if self._cpus is None:
            self._cpus = self._exit.enter_context(ray_session(self.config.ray))
        hosts = sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
        check_shared(self.home, hosts)
        return self._cpus, max(hosts, 1)


def make_current(stage: Stage, made: Artifact, run_dir: Path, home: Path) -> Artifact:
    """Let the run point at an output, show its page, and remove what no run of the family points at any more."""
    parent = run_dir / stage.folder
    moved = current_folder(parent) != made.path
    if moved:
        set_current(parent, made.path)
    if stage.page and (moved or not (run_dir / stage.page).exists()):
        put_file(made.path / stage.page, run_dir / stage.page)
    remove_unnamed(run_dir, stage.folder, family(home))
    return made


def why_again(parent: Path, stage: Stage, settings: dict[str, Any], inputs: Mapping[str, str]) -> str:
    """Why the current output below ``parent`` is out of date; empty if there is none."""
    folder = current_folder(parent)
    if folder is None:
        return ""
    if (manifest := read_manifest(folder)) and (found := changes(manifest, stage.version, settings, inputs)):
        return "; ".join(found)
    try:
        open_artifact(folder)
    except ArtifactError as error:
        return str(error)
    return "its published files are gone"


def check_kinship(inputs: Mapping[str, Artifact]) -> None:
    """Inputs that were made from one another must be of the same make: dense ids differ between two ingests."""
    for name, artifact in inputs.items():
        for other in artifact.manifest["inputs"].keys() & inputs.keys():
            if artifact.manifest["inputs"][other] != inputs[other].fingerprint:
                raise ArtifactError(
                    f"{artifact.path} was made from a different {other} output than the current one; run {name}"
                )
