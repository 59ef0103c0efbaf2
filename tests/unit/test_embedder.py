"""The embedder of single items makes what an extension of the bundle makes of them."""

from __future__ import annotations

import numpy as np
import pytest
from late_world import Late, extend, make_late, rows_of

from recsys_ray.bundle.embedder import Embedder
from recsys_ray.core.errors import DataError
from recsys_ray.scoring.memory import MEMORY_FILE, Memory
from recsys_ray.serving.recommender import Recommender
from recsys_ray.storage.artifacts import open_artifact


@pytest.fixture(scope="module")
def late(tmp_path_factory) -> Late:
    return make_late(tmp_path_factory.mktemp("late"))


def test_an_item_is_embedded_as_an_extension_would(late, tmp_path):
    table = late.items(late.lonely, late.linked, categories=[["a"], ["a", "b"]])
    made = rows_of(extend(late, tmp_path, table), late.lonely, late.linked)
    found = Embedder(open_artifact(late.bundle)).embed(table.to_pylist())
    for place, item in enumerate(found):
        assert np.abs(item.wide - made["vector"][place]).max() < 5e-3
        assert np.abs(item.hgnn - made["embedding"][place]).max() < 2e-3


def test_texts_raise_an_item_as_in_an_extension(late, tmp_path):
    bundle = extend(late, tmp_path, late.items(late.lonely))
    memory, gid = Memory.load(bundle / MEMORY_FILE), Recommender.load(bundle).items.find(late.lonely)
    edges = np.flatnonzero(memory.gid == gid)
    (item,) = Embedder(open_artifact(late.bundle)).embed(late.items(late.lonely).to_pylist())
    order = np.argsort(item.raisers.gid)
    assert (np.searchsorted(memory.begin, edges, side="right") - 1).tolist() == item.raisers.gid[order].tolist() != []
    np.testing.assert_allclose(item.raisers.coefficient[order], memory.coefficient[edges, 0], rtol=1e-2)


def test_an_unknown_type_is_a_sentence(late):
    with pytest.raises(DataError, match=r"the bundle has no type 'musik'.*music"):
        Embedder(open_artifact(late.bundle)).embed([{"item_id": "x", "item_type": "musik", "title": "A song"}])
