"""The runner of stages, with stages that write one number and need no Ray."""

import pytest

from pipelines.stage import Context, Runner, Stage
from recsys_ray.artifacts import write_json
from recsys_ray.config import Config
from recsys_ray.errors import ArtifactError
from recsys_ray.progress import Progress


class Local(Runner):
    def _ray(self):
        return 1, 1


def stage(name: str, inputs: tuple[str, ...], runs: list[str]) -> Stage:
    def run(context: Context) -> dict:
        runs.append(name)
        write_json(context.out / "number.json", len(runs))
        return {}

    return Stage(name, name, "count", inputs, lambda config: {"seed": config.seed}, run)


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


def test_a_stage_refuses_inputs_of_different_makes(world):
    """b was made from the first a; c would join dense ids of two ingests."""
    runner, runs = world
    runner().chain(["a", "b"])
    runner(seed=1).run("a")
    with pytest.raises(ArtifactError, match="made from another a than the one there is; run b"):
        runner(seed=1).run("c")
    assert runs == ["a", "b", "a"]


def test_a_stage_without_its_input_says_what_to_run(world):
    runner, _ = world
    with pytest.raises(ArtifactError, match="b needs the output of a"):
        runner().run("b")
