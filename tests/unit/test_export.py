"""Exported embeddings: every item once, with the vectors that the stages and the bundle hold."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bundle_world import World, make_world

from recsys_ray.bundle import export
from recsys_ray.bundle.export import export_bundle, export_run
from recsys_ray.core.errors import ArtifactError, UserError
from recsys_ray.core.progress import Progress
from recsys_ray.scoring.scorer import TRENDS
from recsys_ray.storage.artifacts import load_arrays
from recsys_ray.storage.outputs import set_current

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"), terms=(TRENDS,))
    made.bundle()
    for stage in ("ingest", "featurize", "hgnn", "two_tower"):  # a run that points at them
        set_current(made.root / "run" / stage, made.root / stage)
    return made


@pytest.fixture
def in_pieces(monkeypatch):
    monkeypatch.setattr(export, "_ROWS", 32)


def matrix(table: pa.Table, name: str) -> np.ndarray:
    return np.array(table[name].to_pylist(), np.float32)


def test_a_run_is_exported_in_pieces(world, tmp_path, in_pieces):
    out = tmp_path / "new folder" / "items.parquet"
    assert export_run(world.root / "run", out, "serve", ["text", "hgnn", "tower"], QUIET) == len(world.item_ids)
    file = pq.ParquetFile(out)
    assert file.num_row_groups == -(-len(world.item_ids) // 32)
    table = file.read()
    assert table.schema.field("hgnn").type == pa.list_(pa.float32())
    assert table["item_id"].to_pylist() == world.item_ids
    assert table["item_type"].to_pylist()[0] == "audiobook" and table["item_type"].to_pylist()[-1] == "podcast"
    assert table["title"][3].as_py() == f"Title of {world.item_ids[3]}"
    assert np.array_equal(matrix(table, "tower"), world.vectors)
    text = load_arrays(world.root / "featurize" / "text.safetensors")["vector"]
    assert np.array_equal(matrix(table, "text"), text.astype(np.float32))
    for path in (world.root / "hgnn" / "embeddings" / "serve").iterdir():
        part = load_arrays(path)
        assert np.array_equal(matrix(table, "hgnn")[part["gid"]], part["embedding"])
    assert [path.name for path in out.parent.iterdir()] == ["items.parquet"]


def test_a_bundle_is_exported_like_its_run(world, tmp_path, in_pieces):
    export_run(world.root / "run", tmp_path / "run.parquet", "serve", ["hgnn", "tower"], QUIET)
    export_bundle(world.root / "bundles" / "current", tmp_path / "bundle.parquet", ["hgnn", "tower"], QUIET)
    assert pq.read_table(tmp_path / "bundle.parquet").equals(pq.read_table(tmp_path / "run.parquet"))


def test_only_the_wanted_vectors_are_written(world, tmp_path):
    export_run(world.root / "run", tmp_path / "a.parquet", "serve", ["text"], QUIET)
    assert pq.read_schema(tmp_path / "a.parquet").names == ["item_id", "item_type", "title", "text"]


@pytest.mark.parametrize(
    ("snapshot", "vectors", "sentence"),
    [
        ("serve", ["text", "txt"], "--vectors takes a comma-separated choice of text, hgnn, tower.*'txt'"),
        ("yesterday", ["hgnn"], "no snapshot 'yesterday'; choose from serve"),
        ("cut0", ["tower"], "for test and serve only, not for 'cut0'"),
    ],
)
def test_what_is_not_there_is_one_sentence(world, tmp_path, snapshot, vectors, sentence):
    with pytest.raises(UserError, match=sentence):
        export_run(world.root / "run", tmp_path / "a.parquet", snapshot, vectors, QUIET)
    assert not list(tmp_path.iterdir())


def test_a_stage_that_has_not_run_is_one_sentence(tmp_path):
    with pytest.raises(ArtifactError, match="contains no finished output"):
        export_run(tmp_path, tmp_path / "a.parquet", "serve", ["text"], QUIET)
