"""The text encoder against canonical vectors of the packaged model, without Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recsys_ray.core.errors import ConfigError
from recsys_ray.core.precision import choose_precision
from recsys_ray.text import encoder as module
from recsys_ray.text.encoder import Encoder, encoder_fingerprint, find_model
from recsys_ray.text.featurize import hash_text, random_vectors, text_of

# First numbers of the vectors, computed one sentence at a time with transformers alone, mean over tokens, unit norm.
CANONICAL = {
    "The lighthouse keeper's daughter": [-0.018008, 0.025998, 0.014311, 0.046709, 0.027442, -0.000711],
    "Криминальный подкаст о море": [0.024642, 0.080197, -0.010110, 0.002314, -0.042315, 0.061237],
    "🎧 深夜のジャズ": [-0.022651, 0.109320, -0.014248, 0.008913, -0.014553, 0.061474],
}


@pytest.fixture(scope="module")
def packaged() -> Encoder:
    return Encoder(find_model("packaged"), max_tokens=128, batch_size=4, precision="fp32", threads=1)


def test_canonical_vectors(packaged: Encoder) -> None:
    vectors = packaged.encode(list(CANONICAL)).astype(np.float64)
    assert vectors.shape == (3, 384)
    np.testing.assert_allclose(vectors[:, :6], list(CANONICAL.values()), atol=2e-4)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)


def test_a_vector_depends_on_its_text_alone(packaged: Encoder) -> None:
    """Neither the order nor the padding of its batch, nor where a text is cut."""
    texts = [*CANONICAL, "a", "word " * 60, "The lighthouse keeper's daughter. " * 9]
    together = packaged.encode(texts).astype(np.float32)
    backwards = packaged.encode(texts[::-1])[::-1].astype(np.float32)
    alone = np.concatenate([packaged.encode([text]) for text in texts]).astype(np.float32)
    np.testing.assert_allclose(together, backwards, atol=2e-4)
    np.testing.assert_allclose(together, alone, atol=2e-4)
    long, longer = packaged.encode(["word " * 200, "word " * 900])
    np.testing.assert_allclose(long, longer, atol=2e-4)


def test_bf16_is_close_to_fp32(packaged: Encoder) -> None:
    half = Encoder(find_model("packaged"), max_tokens=128, batch_size=4, precision="bf16", threads=1)
    texts = list(CANONICAL)
    cosine = (half.encode(texts).astype(np.float32) * packaged.encode(texts).astype(np.float32)).sum(1)
    assert cosine.min() > 0.999


def test_models_that_cannot_be_had_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"text\.model: .* is not a transformers model"):
        find_model(str(tmp_path))
    with pytest.raises(ConfigError, match=r"text\.model: 'no-such/model' is neither"):
        find_model("no-such/model")
    with pytest.raises(ConfigError, match=r"text\.max_tokens is 4096"):
        Encoder(find_model("packaged"), max_tokens=4096, batch_size=4, precision="fp32")
    monkeypatch.setattr(module, "_PACKAGED_SHA256", "00000000")
    with pytest.raises(ConfigError, match=r"have the sha256 53aa5117\.\.\. instead of 00000000"):
        find_model("packaged")


def test_fingerprint_follows_all_that_decides_a_vector() -> None:
    source = find_model("packaged")
    prints = {encoder_fingerprint(source, tokens, kind) for tokens in (64, 128) for kind in ("fp32", "bf16")}
    assert len(prints) == 4
    assert choose_precision("bf16") == "bf16" and choose_precision("auto") in ("bf16", "fp32")


def test_text_of_an_item() -> None:
    row = {"title": "Dune", "description": None, "categories": ["sf", "desert"], "item_type": "book"}
    assert text_of(row, ["title", "description", "categories"]) == "Dune. sf, desert"
    assert text_of(row, ["description"]) == "book"
    assert text_of(row | {"title": "  "}, ["title"]) == "book"
    assert len(hash_text("Dune")) == 16 and hash_text("Dune") != hash_text("dune")


def test_random_vectors_depend_on_the_item_alone():
    vectors = random_vectors(["a", "b", "c"]).astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-2)
    np.testing.assert_array_equal(vectors[[2, 0]], random_vectors(["c", "a"]))
    assert np.abs(np.triu(vectors @ vectors.T, 1)).max() < 0.3
