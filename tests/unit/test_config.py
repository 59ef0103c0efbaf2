"""The configuration tree: presets, overrides, and errors that name the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from recsys_ray.config import changed, load_config
from recsys_ray.core.errors import ConfigError

PRESETS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_are_valid(preset):
    load_config(preset)


def test_overrides_reach_nested_fields_with_their_types():
    config = load_config(None, ["hgnn.hidden_dim=64", "events.weak=[]", "graph.window_days=30", "seed=7"])
    assert config.hgnn.hidden_dim == 64
    assert config.events.weak == []
    assert config.graph.window_days == 30
    assert config.seed == 7


def test_text_is_taken_as_it_is(tmp_path):
    """What YAML would cut at a blank and #, or read as a date, a number or true."""
    for folder in ("a #2", "2024-06-01", "12:30", "007", "yes", "a: b", "[x]", "1e3"):
        assert load_config(None, [f"run_dir={folder}"]).run_dir == folder
    assert load_config(None, ["run_dir='a b'", 'data.users="u"']).data.users == "u"
    assert load_config(None, ["data.users=null"]).data.users is load_config(None, ["data.users="]).data.users is None
    codes = load_config(None, ["events.positives=[3]", "events.edges=[3, on]", "data.item_types=[1.0]"])
    assert (codes.events.positives, codes.events.edges, codes.data.item_types) == (["3"], ["3", "on"], ["1.0"])
    (tmp_path / "c.yaml").write_text("run_dir: 2024-06-01\nevents: {positives: [7], edges: [7], weak: [no, ~]}\n")
    with pytest.raises(ConfigError, match=r"events.weak.1.*None"):
        load_config(tmp_path / "c.yaml")
    config = load_config(tmp_path / "c.yaml", ["events.weak=[no]", "hgnn.balanced=no", "hgnn.max_steps=null"])
    assert (config.run_dir, config.events.positives, config.events.weak) == ("2024-06-01", ["7"], ["no"])
    assert load_config(None, ["data.items=a #2"]).data.items == "a #2"
    assert load_config(None, ["data.items=[a, 2024-06-01]"]).data.items == ["a", "2024-06-01"]
    assert load_config(None, ["evaluate.baselines=[ease, popularity]"]).evaluate.baselines == ("popularity", "ease")
    assert config.hgnn.balanced is False and config.hgnn.max_steps is None


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.now=2024", "write a date as 2024-01-31"),
        ("split.test_from=20240131", "write a date as 2024-01-31"),
        ("hgnn.hiden_dim=64", "did you mean 'hgnn.hidden_dim'"),
        ("hidden_dim=64", "did you mean 'hgnn.hidden_dim'"),
        ("hgn.epochs=3", "did you mean 'hgnn'"),
        ("two_tower.epochs=many", "'two_tower.epochs'"),
        ("data.max_bad_share=1.5", "'data.max_bad_share'"),
        ("hgnn.loss=hinge", "'hgnn.loss'"),
        ("hgnn.epochs", "NAME=VALUE"),
        ("events.ignore=[stream]", "events.ignore lists ['stream']"),
        ("split.protocol=leave_two_out", "'split.protocol'"),
        ("data.item_types=[]", "'data.item_types'"),
    ],
)
def test_mistakes_name_the_field(override, sentence):
    with pytest.raises(ConfigError, match=r".") as error:
        load_config(None, [override])
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("split.test_from=2024-01-01", "remove split.valid_from and split.test_from"),
        ("graph.cuts=1", "at least 2"),
        ("graph.window_days=30", "set graph.window_days=null"),
        ("data.oracle=somewhere", "data.oracle"),
    ],
)
def test_leave_one_out_refuses_what_has_no_meaning_in_it(override, sentence):
    fitting = ["split.protocol=leave_one_out"]
    assert load_config(None, fitting).split.protocol == "leave_one_out"
    with pytest.raises(ConfigError, match="leave_one_out") as error:
        load_config(None, [*fitting, override])
    assert sentence in str(error.value)


def test_missing_and_malformed_presets(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="mapping"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")


def test_defaults_are_written_as_they_are_read():
    """A variant's configuration is read from the run's: 24 here and 24.0 there would be two fingerprints."""
    config = load_config()
    assert repr(changed(config, []).model_dump()) == repr(config.model_dump())
