"""The search space and what a tuning leaves, without Ray."""

from __future__ import annotations

import json

import pytest
import yaml

from pipelines.tune import Record
from recsys_ray.config import changed, field_names, load_config
from recsys_ray.core.errors import ConfigError
from recsys_ray.core.progress import Progress
from recsys_ray.tuning.space import (
    SPACE,
    Choice,
    Range,
    Trial,
    best_of,
    identity,
    name_of,
    overrides_of,
    space_for,
    start_of,
    write_preset,
    write_trials,
)


def test_the_space_names_fields_that_exist():
    assert {dimension.name for dimension in SPACE} <= set(field_names())


@pytest.mark.parametrize("overrides", [[], ["hgnn.max_steps=77", "two_tower.temperature=2", "two_tower.layers=[64]"]])
def test_the_configuration_itself_is_a_point_of_the_space(overrides):
    config = load_config(None, overrides)
    space = space_for(config)
    start = start_of(space, config)
    for dimension in space:
        value = start[dimension.name]
        if isinstance(dimension, Range):
            assert dimension.low <= float(value) <= dimension.high
        else:
            assert json.loads(str(value)) in list(dimension.values)
    assert changed(config, overrides_of(start)) == config


def test_every_end_and_choice_of_the_space_is_valid():
    config = load_config()
    for dimension in space_for(config):
        values = [dimension.low, dimension.high] if isinstance(dimension, Range) else dimension.values
        for value in values:
            params = {dimension.name: value if isinstance(dimension, Range) else json.dumps(value)}
            assert changed(config, overrides_of(params)) is not None


def test_part_of_the_space_and_a_name_that_is_none():
    space = space_for(load_config(), ["two_tower.drop", "graph"])
    assert {d.name.split(".")[0] for d in space} == {"two_tower", "graph"} and len(space) == 5
    with pytest.raises(ConfigError, match=r"did you mean 'hgnn\.temperature'"):
        space_for(load_config(), ["hgn.temperature"])


def test_the_same_parameters_have_the_same_folder_and_another_configuration_another_search():
    assert name_of({"a": 1.0, "b": "[2]"}) == name_of({"b": "[2]", "a": 1.0}) != name_of({"a": 1.5, "b": "[2]"})
    config = load_config()
    space: list[Range | Choice] = list(space_for(config))
    assert identity(config, space) == identity(changed(config, ["evaluate.bootstrap=7", "run_dir=x"]), space)
    assert identity(config, space) != identity(changed(config, ["hgnn.epochs=9"]), space)


def trial(score: float | None, temperature: float, **more: object) -> Trial:
    fields = {"curve": (score or 0.0,), "seconds": 60.0, "stopped": False, **more}
    return Trial({"two_tower.temperature": temperature, "hgnn.fanouts": "[5, 3]"}, score, **fields)  # type: ignore[arg-type]


def test_the_preset_holds_what_differs_from_the_defaults(tmp_path):
    config = load_config(None, ["run_dir=runs/mine", "data.shards=3", "two_tower.epochs=7"])
    trials = [trial(0.1, 0.2), trial(0.3, 0.07), trial(None, 0.5, error="boom"), trial(0.2, 0.1, stopped=True)]
    best = best_of(trials)
    assert best is trials[1]
    write_preset(tmp_path / "tuned.yaml", config, best, trials, {"Data": "9 events"})
    text = (tmp_path / "tuned.yaml").read_text()
    assert "4 trials, 1 of them stopped early" in text and "0.3000" in text and "# Data: 9 events" in text
    tree = yaml.safe_load(text)
    assert tree == {
        "data": {"shards": 3},
        "hgnn": {"fanouts": [5, 3]},
        "two_tower": {"temperature": 0.07, "epochs": 7},
    }
    assert load_config(tmp_path / "tuned.yaml").two_tower.temperature == 0.07
    write_trials(tmp_path, trials)
    lines = (tmp_path / "trials.md").read_text().splitlines()
    assert len(lines) == 2 + 4 and lines[2].startswith("| 1 | 2 | 0.3000 |") and "boom" in lines[5]
    assert (tmp_path / "trials.png").exists()


def test_a_search_that_was_killed_knows_its_trials_and_what_was_under_way(tmp_path):
    config = load_config(None, [f"run_dir={tmp_path}"])
    record = Record(tmp_path, config, 3, Progress(quiet=True))
    record.begin("one", {"two_tower.dropout": 0.1})
    record.finish("one", [0.1, 0.3, 0.2])
    record.begin("two", {"two_tower.dropout": 0.2})
    again = Record(tmp_path, config, 3, Progress(quiet=True))
    assert [t.score for t in again.trials] == [0.3] and again.trials[0].curve == (0.1, 0.3, 0.2)
    assert again.trials[0].stopped  # it left no finished two-tower
    assert again.interrupted == [{"two_tower.dropout": 0.2}]
    again.begin("three", {"two_tower.dropout": 0.2})
    again.finish("three", [], error="no luck")
    last = Record(tmp_path, config, 3, Progress(quiet=True))
    assert last.interrupted == [] and last.trials[1].score is None and last.trials[1].error == "no luck"
