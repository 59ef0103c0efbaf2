"""What ``import recsys_ray`` offers."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from bundle_world import make_world

import recsys_ray
from recsys_ray.core.errors import ArtifactError


def test_every_public_name_is_there_and_says_what_it_is():
    for name in recsys_ray.__all__:
        assert getattr(recsys_ray, name).__doc__, name
        assert name in dir(recsys_ray) and f"``{name}``" in recsys_ray.__doc__
    with pytest.raises(AttributeError, match="recommend"):
        _ = recsys_ray.recommend


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, recsys_ray; print(sorted({'ray', 'torch', 'polars', 'numpy', 'dgl'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_answering_loads_no_training_code(tmp_path):
    bundle = make_world(tmp_path).bundle().path
    code = (
        "import sys, recsys_ray\n"
        f"assert len(recsys_ray.Recommender.load({str(bundle)!r}).recommend(user_id='nobody', k=3)) == 3\n"
        "print(sorted({'dgl', 'transformers', 'recsys_ray.hgnn', 'recsys_ray.stages'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_a_bundle_tells_what_is_in_it(tmp_path):
    world = make_world(tmp_path)
    made = world.bundle()
    bundle = recsys_ray.Bundle.open(tmp_path / "bundles", verify=True)
    assert bundle.path == made.path.resolve() and bundle.version == made.counts["version"]
    recommender = recsys_ray.Recommender.load(bundle.path)
    assert bundle.item_types == ["audiobook", "music", "podcast"]
    assert bundle.item_ids == [recommender.items.id(gid) for gid in range(len(bundle))]
    assert bundle.vectors.shape[0] == len(bundle) and bundle.vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(bundle.vectors, axis=1), 1, atol=1e-4)
    assert bundle.version in repr(bundle)
    with pytest.raises(ArtifactError, match="is not a bundle"):
        recsys_ray.Bundle.open(tmp_path / "nothing")
