"""The featurize stage on a real local Ray: each distinct text once, and never again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_ray.config import Config, TextConfig
from recsys_ray.core.errors import ConfigError
from recsys_ray.core.progress import Progress
from recsys_ray.storage.artifacts import load_arrays
from recsys_ray.text.encoder import Encoder, find_model
from recsys_ray.text.featurize import BLOCK, featurize

pytestmark = pytest.mark.usefixtures("ray_local")
CONFIG = Config(text=TextConfig(precision="fp32", max_tokens=32))


def write_items(folder: Path, titles: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "item_type": ["radio play"] * len(titles),
            "title": titles,
            "description": pa.nulls(len(titles), pa.string()),
            "categories": pa.array([[]] * len(titles), pa.list_(pa.string())),
        }
    )
    pq.write_table(table, folder / "items.parquet")
    return folder


def run(items: Path, out: Path, cache: Path, config: Config = CONFIG) -> tuple[dict[str, Any], np.ndarray]:
    counts = featurize(config, items, out, cache, Progress(quiet=True), cpus=2)
    return counts, load_arrays(out / "text.safetensors")["vector"]


def alone(text: str) -> np.ndarray:
    return Encoder(find_model("packaged"), 32, 1, "fp32").encode([text])[0]


def test_each_distinct_text_is_encoded_once(tmp_path: Path) -> None:
    titles = ["Ночь", "Dune", "", "Dune", " Dune "]
    items, cache = write_items(tmp_path / "items", titles), tmp_path / "cache"
    counts, vectors = run(items, tmp_path / "a", cache)
    assert len(counts.pop("encoder")) == 32
    assert counts == {"text_dim": 384, "texts_distinct": 3, "encoded": 3, "reused": 0, "precision": "fp32"}
    assert vectors.dtype == np.float16 and vectors.shape == (5, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors.astype(np.float32), axis=1), 1, atol=1e-3)
    assert (vectors[1] == vectors[3]).all() and (vectors[1] == vectors[4]).all()
    np.testing.assert_allclose(vectors[2], alone("radio play"), atol=2e-4)  # no text: the name of its type
    np.testing.assert_allclose(vectors[0], alone("Ночь"), atol=2e-4)

    changed = write_items(tmp_path / "items", ["Ночь", "Dune II", "", "Dune", "Dune"])
    counts, later = run(changed, tmp_path / "b", cache)
    assert (counts["encoded"], counts["reused"]) == (1, 3)
    assert (later[[0, 2, 3, 4]] == vectors[[0, 2, 3, 4]]).all()
    np.testing.assert_allclose(later[1], alone("Dune II"), atol=2e-4)
    counts, _ = run(changed, tmp_path / "c", cache)
    assert (counts["encoded"], counts["reused"]) == (0, 4)


def test_a_killed_run_loses_only_the_blocks_in_flight(tmp_path: Path) -> None:
    titles = [f"Title {n} " + "word " * (n % 7) for n in range(BLOCK + 60)]
    items = write_items(tmp_path / "items", titles)
    _, undisturbed = run(items, tmp_path / "a", tmp_path / "cache")
    files = sorted((tmp_path / "cache").rglob("*.parquet"))
    assert sorted(pq.read_metadata(f).num_rows for f in files) == [60, BLOCK]

    short = min(files, key=lambda f: pq.read_metadata(f).num_rows)
    short.unlink()  # as if it had been in flight; beside it, what a killed process leaves of a file
    (short.parent / ".half.tmp").write_bytes(b"PAR1")
    (short.parent / "other.parquet").write_bytes(b"PAR1 no more")  # and what a failing disk leaves
    counts, resumed = run(items, tmp_path / "b", tmp_path / "cache")
    assert (counts["encoded"], counts["reused"]) == (60, BLOCK)
    assert resumed.tobytes() == undisturbed.tobytes()


def test_a_model_that_cannot_be_loaded_is_a_sentence(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items", ["Dune"])
    with pytest.raises(ConfigError, match=r"text\.max_tokens is 5000"):
        run(items, tmp_path / "a", tmp_path / "cache", Config(text=TextConfig(max_tokens=5000)))
