"""What an evaluation keeps of its hits: means over seeds, models compared on the same queries."""

from __future__ import annotations

import numpy as np
import pytest

from recsys_ray.core.errors import ArtifactError
from recsys_ray.evaluation.metrics import bootstrap_interval, pooled_interval
from recsys_ray.evaluation.results import Hits, against_all, difference, pool
from recsys_ray.evaluation.segments import SEGMENTS, Queries

TYPES = ("book", "song")


def hits_of(users: int, **models: np.ndarray) -> Hits:
    """A query a user, books and songs in turn; a model's hits are the same in ``all`` and ``warm``."""
    nobody = np.zeros(users, bool)
    queries = Queries(
        np.arange(users), np.arange(users).astype(np.int16) % 2, ~nobody, nobody, np.arange(users), np.arange(users) + 7
    )
    member = np.zeros((len(SEGMENTS), users), bool)
    member[:2] = True
    found = Hits.of(queries, TYPES, member)
    for name, hit in models.items():
        found.hit[name] = member & hit
    return found


def test_hits_survive_the_file(tmp_path):
    hit = np.arange(11) % 3 == 0
    before = hits_of(11, model=hit, other=~hit)
    before.asked["other"] = np.arange(11) < 4
    before.save(tmp_path / "hits.safetensors")
    after = Hits.load(tmp_path / "hits.safetensors")
    assert after.types == TYPES
    for name in ("uid", "item_type", "truths", "member"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    assert list(after.chosen("song", ["warm"], "model")) == [1, 3, 5, 7, 9]
    assert list(after.chosen("all", ["cold", "warm"], "model", "other")) == [0, 1, 2, 3]
    np.testing.assert_array_equal(after.hit_in("model", ["warm"]), hit)


def test_the_hash_of_truths_tells_sets_apart_whatever_their_order():
    nobody = np.zeros(2, bool)

    def hashes(items: list[int]) -> list[int]:
        queries = Queries(np.arange(2), np.zeros(2, np.int16), ~nobody, nobody, np.array([0, 0, 1, 1]), np.array(items))
        return Hits.of(queries, TYPES, np.zeros((len(SEGMENTS), 2), bool)).truths.tolist()

    first, second = hashes([3, 9, 9, 3])
    assert first == second
    assert len({*hashes([3, 9, 4, 8]), *hashes([2, 10, 0, 12]), *hashes([6, 6, 1, 11])}) == 6


def test_seeds_are_averaged(tmp_path):
    rng = np.random.default_rng(0)
    parts = [hits_of(400, model=rng.random(400) < share) for share in (0.2, 0.3, 0.4)]
    tables = [
        [
            {"model": "model", "item_type": "all", "segment": "warm", "queries": 400, "coverage_at_100": 0.1 * k,
             "hr_at_10": float(part.hit_in("model", ["warm"]).mean())}
        ]
        for k, part in enumerate(parts)
    ]  # fmt: skip
    (row,) = pool(tables, parts, [0, 1, 2], 500, 0)
    each = [rows[0]["hr_at_10"] for rows in tables]
    assert row["per_seed"] == each and row["seeds"] == [0, 1, 2] and row["queries"] == 400
    assert row["hr_at_10"] == pytest.approx(np.mean(each)) and row["coverage_at_100"] == pytest.approx(0.1)
    # Seeds .1 apart: the interval is far wider than that of the users alone.
    assert row["hr_at_10_high"] - row["hr_at_10_low"] > 0.3
    with pytest.raises(ArtifactError, match="different queries"):
        pool(tables, [parts[0], hits_of(399, model=np.ones(399, bool)), parts[2]], [0, 1, 2], 10, 0)


def test_one_seed_is_the_bootstrap_over_users():
    values = np.random.default_rng(1).random(300) < 0.3
    users = np.arange(300) // 2
    assert pooled_interval(values[None], users, 400, 5) == bootstrap_interval(values, users, 400, 5)


@pytest.mark.parametrize(("between_users", "between_seeds"), [(0.15, 0.0), (0.0, 0.06), (0.1, 0.04)])
def test_intervals_cover_users_and_seeds(between_users, between_seeds):
    """Worlds with a known hit rate: users differ, seeds differ; 95 % of the intervals should hold it."""
    rng = np.random.default_rng(2)
    covered, worlds, users, seeds = 0, 300, 200, 3
    for world in range(worlds):
        rate = 0.5 + between_users * rng.standard_normal(users) + between_seeds * rng.standard_normal((seeds, 1))
        low, high = pooled_interval(rng.random((seeds, users)) < rate, np.arange(users), 300, world)
        covered += low <= 0.5 <= high
    assert 0.93 <= covered / worlds <= 1.0


def test_paired_differences():
    """A model that adds hits to another one's is above it, though either's own interval is wide."""
    rng = np.random.default_rng(3)
    base = rng.random(600) < 0.3
    better = base | (rng.random(600) < 0.05)
    found = hits_of(600, **{"2t_hgnn": better, "popularity": base})
    rows = {(r["item_type"], r["segment"]): r for r in against_all([found, found], "2t_hgnn", 500, 0)}
    row = rows["all", "warm"]
    assert row["difference"] == pytest.approx(better.mean() - base.mean())
    assert 0 < row["low"] < row["difference"] < row["high"] and row["relative"] > 0
    assert row["high"] - row["low"] < 0.05
    assert ("all", "cold") not in rows and ("song", "all") in rows
    same = difference(base[None], base[None], np.arange(600), 100, 0)
    assert same["difference"] == same["low"] == same["high"] == 0
