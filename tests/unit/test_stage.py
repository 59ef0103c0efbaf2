"""The runner of stages, with stages that write one number and need no Ray."""

import dataclasses
import json
import shutil
from importlib.metadata import version

import pytest

from recsys_ray.config import Config
from recsys_ray.core.errors import ArtifactError
from recsys_ray.core.progress import Progress
from recsys_ray.stages.runner import VARIANTS, Context, Runner, Stage
from recsys_ray.storage.artifacts import write_json
from recsys_ray.storage.outputs import current_folder, current_output


class Local(Runner):
    def _ray(self):
        return 1, 1


def stage(name: str, inputs: tuple[str, ...], runs: list[str]) -> Stage:
    def run(context: Context) -> dict:
        runs.append(name)
        write_json(context.out / "number.json", len(runs))
        return {}

    return Stage(name, name, "count", inputs, lambda config: {"seed": config.seed}, run, version=1)


@pytest.fixture
def world(tmp_path):
    """Three stages in a row, the third of which needs both others, and what ran."""
    runs: list[str] = []
    stages = {n: stage(n, i, runs) for n, i in (("a", ()), ("b", ("a",)), ("c", ("a", "b")))}

    def runner(seed: int = 0) -> Runner:
        data = {"items": "items", "interactions": "interactions"}
        return Local(Config(run_dir=str(tmp_path), seed=seed, data=data), stages, Progress())

    return runner, runs


def test_what_is_up_to_date_is_skipped_and_what_depends_on_a_change_is_not(world):
    runner, runs = world
    runner().chain(["a", "b", "c"])
    runner().chain(["a", "b", "c"])
    assert runs == ["a", "b", "c"]
    runner(seed=1).chain(["a", "b", "c"])
    assert runs == ["a", "b", "c"] * 2


def test_what_is_made_again_says_why(world, capsys):
    runner, runs = world

    def said() -> list[str]:
        return [line.split(": ", 1)[1] for line in capsys.readouterr().err.splitlines() if "made again" in line]

    runner().chain(["a", "b"])
    assert said() == []
    runner(seed=1).run("a")
    assert said() == ["configuration changed (seed: 0 -> 1)"]
    runner(seed=1).run("b")
    assert said() == ["configuration changed (seed: 0 -> 1); inputs changed (a)"]
    changed = runner(seed=1)
    changed.stages = {**changed.stages, "b": dataclasses.replace(changed.stages["b"], version=2)}
    made = changed.run("b")
    assert said() == ["the stage changed (version 1 -> 2)"]
    assert made.manifest["version"] == 2 and made.manifest["made_by"]["version"] == version("recsys-ray")
    (made.path / "number.json").unlink()
    made = changed.run("b")
    assert "number.json is missing" in said()[0]
    manifest = json.loads((made.path / "manifest.json").read_text())
    write_json(made.path / "manifest.json", manifest | {"format": 3})
    changed.run("b")
    assert said() == ["its format changed (3 -> 4)"] and runs == ["a", "b", "a", "b", "b", "b", "b"]


def test_an_input_of_another_format_is_refused_in_a_sentence(world):
    runner, _ = world
    made = runner().run("a")
    write_json(made.path / "manifest.json", {"format": 3})
    with pytest.raises(ArtifactError, match=r"b needs the output of a: .*another version of recsys-ray.*run its stage"):
        runner().run("b")


def test_a_stage_refuses_inputs_of_different_makes(world):
    """b was made from the first a; c would join dense ids of two ingests."""
    runner, runs = world
    runner().chain(["a", "b"])
    runner(seed=1).run("a")
    with pytest.raises(ArtifactError, match="made from a different a output than the current one; run b"):
        runner(seed=1).run("c")
    assert runs == ["a", "b", "a"]


def test_a_stage_without_its_input_says_what_to_run(world):
    runner, _ = world
    with pytest.raises(ArtifactError, match="b needs the output of a"):
        runner().run("b")


@pytest.fixture
def family(tmp_path):
    """A run and its variants: a and b depend on ``data_seed``, c on ``seed`` as well; and what ran."""
    runs: list[str] = []
    stages = {n: stage(n, i, runs) for n, i in (("a", ()), ("b", ("a",)), ("c", ("b",)))}
    for name in ("a", "b"):
        stages[name] = dataclasses.replace(stages[name], settings=lambda config: {"seed": config.data_seed})
    data = {"items": "items", "interactions": "interactions"}

    def runner(name: str = "", seed: int = 0, data_seed: int = 0) -> Runner:
        folder = tmp_path / "run" / VARIANTS / name if name else tmp_path / "run"
        config = Config(run_dir=str(folder), seed=seed, data_seed=data_seed, data=data)
        return Local(config, stages, Progress(), home=tmp_path / "run")

    return runner, runs, tmp_path / "run"


def number(run, stage: str) -> int:
    return json.loads((current_output(run, stage).path / "number.json").read_text())


def outputs(run, stage: str) -> list[str]:
    return sorted(folder.name for folder in (run / stage).glob("*/"))


def test_variants_share_what_they_have_in_common(family):
    runner, runs, home = family
    runner().chain(["a", "b", "c"])
    runner("other", seed=1).chain(["a", "b", "c"])
    assert runs == ["a", "b", "c", "c"]
    other = home / VARIANTS / "other"
    assert [current_folder(other / name) == current_folder(home / name) for name in "abc"] == [True, True, False]
    assert [len(outputs(other, name)) for name in "abc"] == [0, 0, 1]
    runner("third", seed=1, data_seed=5).chain(["a", "b", "c"])
    runner("fourth", seed=2, data_seed=5).chain(["a", "b"])  # from a variant, not from the run
    assert runs == ["a", "b", "c", "c", "a", "b", "c"]
    shutil.move(home, home.with_name("moved"))  # the whole run may be moved
    assert current_output(home.with_name("moved") / VARIANTS / "fourth", "b").fingerprint


def test_a_variant_never_changes_what_it_shares(family):
    runner, runs, home = family
    runner().chain(["a", "b"])
    runner("other").chain(["a", "b"])
    made = {name: number(home, name) for name in "ab"}
    runner("other", data_seed=1).chain(["a", "b"])  # now it needs its own
    runner("other", data_seed=1).run("b", force=True)
    assert runs == ["a", "b", "a", "b", "b"]
    assert {name: number(home, name) for name in "ab"} == made
    other = home / VARIANTS / "other"
    assert [len(outputs(other, name)) for name in "ab"] == [1, 1]
    runner("other").chain(["a", "b"])  # and back: its own give way to those of the run
    assert [outputs(other, name) for name in "ab"] == [[], []] and len(runs) == 5


def test_what_a_variant_points_at_stays_when_the_run_moves_on(family):
    runner, runs, home = family
    runner().chain(["a"])
    runner("other").chain(["a"])
    runner(data_seed=1).chain(["a"])
    assert len(outputs(home, "a")) == 2 and number(home / VARIANTS / "other", "a") == 1
    runner("other", data_seed=1).chain(["a"])
    runner(data_seed=1).chain(["a"])
    assert len(outputs(home, "a")) == 1 and runs == ["a", "a"]


def test_a_pointer_to_what_is_gone_is_made_again(family):
    runner, runs, home = family
    runner().chain(["a"])
    runner("other").chain(["a"])
    shutil.rmtree(home / "a")
    runner("other").chain(["a"])
    assert runs == ["a", "a"] and len(outputs(home / VARIANTS / "other", "a")) == 1


def test_a_forced_stage_leaves_one_output(world, tmp_path):
    runner, runs = world
    first = runner().run("a")
    second = runner().run("a", force=True)
    assert runs == ["a", "a"] and outputs(tmp_path, "a") == [second.path.name] and first.path != second.path
    runner().run("a")
    assert runs == ["a", "a"]


def test_a_run_that_was_killed_before_it_pointed_at_its_output_makes_nothing_anew(world, tmp_path):
    runner, runs = world
    runner().run("a")
    (tmp_path / "a" / "current.json").unlink()
    runner().chain(["a", "b"])
    assert runs == ["a", "b"]


def test_a_page_is_put_into_the_folder_of_the_run(world, tmp_path):
    runner, _ = world
    once = runner()
    once.stages = {"a": dataclasses.replace(once.stages["a"], page="number.json")}
    once.run("a")
    assert json.loads((tmp_path / "number.json").read_text()) == 1
    (tmp_path / "number.json").unlink()
    once.run("a")
    assert json.loads((tmp_path / "number.json").read_text()) == 1


def test_a_folder_of_an_earlier_layout_is_refused(world, tmp_path):
    runner, _ = world
    (tmp_path / "a").mkdir()
    write_json(tmp_path / "a" / "manifest.json", {"format": 3})
    with pytest.raises(ArtifactError, match="earlier version of recsys-ray"):
        runner().run("a")
