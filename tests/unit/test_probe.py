"""The probes: labels of a catalogue, scores against scikit-learn's, pairs and ranks against the slow way."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import accuracy_score, f1_score

from recsys_ray.checks.classification import find_labels, predict, sample_items, score
from recsys_ray.checks.probe_plot import draw_probe
from recsys_ray.checks.similar import Period, merge_pairs, ranks, score_pairs, shared_pairs, survey_past
from recsys_ray.data.tables import Catalogue

ITEMS, TEST = 24, 1000
CATALOGUE = Catalogue(("a", "b"), np.array([0, 10, ITEMS]), np.ones(ITEMS, bool))
PERIOD = Period(valid_from=800, test_from=TEST, end=2000, codes=[0], max_history=100, seed=3)


# -- classification


def catalogue_table(**columns: list) -> pa.Table:
    size = len(next(iter(columns.values())))
    empty = {
        "item_type": pa.array(["book"] * size),
        "language": pa.nulls(size, pa.string()),
        "categories": pa.array([[]] * size, pa.list_(pa.string())),
    }
    given = {name: pa.array(values, empty[name].type) for name, values in columns.items()}
    return pa.table(empty | given)


def test_targets_are_those_that_the_catalogue_has():
    languages = ["en"] * 50 + ["de"] * 30 + ["sv"] * 5 + [None] * 15
    found, absent = find_labels(catalogue_table(language=languages))
    assert set(found) == {"language"}
    assert set(absent) == {"item_type", "category"}
    assert found["language"].names == ["de", "en"]  # five items are too few
    assert found["language"].codes.tolist() == [1] * 50 + [0] * 30 + [-1] * 20


def test_an_item_has_its_most_frequent_category_that_tells_something():
    lists = (
        [["all", "crime", "rare"]] * 30 + [["all", "crime"]] * 10 + [["love", "all"]] * 35 + [["all"]] * 20 + [[]] * 5
    )
    labels = find_labels(catalogue_table(categories=lists))[0]["category"]
    assert labels.names == ["crime", "love"]
    assert labels.codes.tolist() == [0] * 40 + [1] * 35 + [-1] * 25


def test_the_sample_is_of_items_with_a_class():
    labels = find_labels(catalogue_table(language=["en", None] * 40 + ["de"] * 40))[0]["language"]
    sample = sample_items(labels, 50, 0)
    assert len(set(sample.tolist())) == 50 and (labels.codes[sample] >= 0).all()
    assert len(sample_items(labels, 500, 0)) == 80


def test_scores_are_those_of_scikit_learn_and_lie_in_their_intervals():
    random = np.random.default_rng(0)
    classes = random.integers(0, 5, 400)
    guessed = np.where(random.random(400) < 0.6, classes, random.integers(0, 4, 400))  # class 4 is never a wild guess
    found = score(classes, guessed, 500, 0)
    assert found["accuracy"] == pytest.approx(accuracy_score(classes, guessed))
    assert found["macro_f1"] == pytest.approx(f1_score(classes, guessed, average="macro"))
    for name in ("accuracy", "macro_f1"):
        low, high = found[f"{name}_low"], found[f"{name}_high"]
        assert low < found[name] < high and 0.05 < high - low < 0.15


def test_intervals_are_those_of_resampled_items():
    random = np.random.default_rng(1)
    classes = random.integers(0, 3, 200)
    guessed = np.where(random.random(200) < 0.7, classes, 0)
    resampled = []
    for _ in range(1000):
        rows = random.integers(0, 200, 200)
        resampled.append(f1_score(classes[rows], guessed[rows], average="macro"))
    found = score(classes, guessed, 2000, 0)
    assert found["macro_f1_low"] == pytest.approx(np.quantile(resampled, 0.025), abs=0.02)
    assert found["macro_f1_high"] == pytest.approx(np.quantile(resampled, 0.975), abs=0.02)


def test_every_item_is_predicted_by_a_model_that_has_not_seen_it():
    random = np.random.default_rng(0)
    classes = random.integers(0, 3, 150)
    telling = np.eye(3)[classes] + 0.1 * random.standard_normal((150, 3))
    assert (predict(telling.astype(np.float32), classes, 5, 0) == classes).mean() > 0.95
    noise = random.standard_normal((150, 200)).astype(np.float32)  # enough columns to remember every item
    assert (predict(noise, classes, 5, 0) == classes).mean() < 0.5
    assert np.array_equal(predict(noise, classes, 5, 7), predict(noise, classes, 5, 7))


# -- similar items


@pytest.fixture
def shards(tmp_path):
    """Two shards of random events of kinds 0 (edge) and 1, before and in the test period."""
    random, paths = np.random.default_rng(0), []
    for number in range(2):
        uid = np.sort(random.integers(0, 15, 120)) + 15 * number
        columns = [uid, random.integers(0, ITEMS, 120), (random.random(120) < 0.2), random.integers(0, 1800, 120)]
        order = np.lexsort((columns[1], columns[3], uid))
        kinds = dict(zip(("uid", "gid", "event", "timestamp"), (np.int64, np.int32, np.int8, np.int64), strict=True))
        table = {name: column[order].astype(kind) for (name, kind), column in zip(kinds.items(), columns, strict=True)}
        paths.append(tmp_path / f"shard-{number:05d}.parquet")
        pq.write_table(pa.table(table), paths[-1])
    return paths


def slow_pairs(shards, low: int, high: int) -> set[tuple[int, int]]:
    found = set()
    for path in shards:
        rows = pq.read_table(path).to_pylist()
        for user in {row["uid"] for row in rows}:
            mine = {r["gid"] for r in rows if r["uid"] == user and r["event"] == 0 and low <= r["timestamp"] < high}
            found |= {(a, b) for a, b in itertools.combinations(sorted(mine), 2) if (a < 10) == (b < 10)}
    return found


def test_pairs_are_those_of_the_test_period(shards):
    parts = [shared_pairs(shard, PERIOD, CATALOGUE, 10_000) for shard in shards]
    merged = merge_pairs(parts, 10_000, PERIOD)
    expected = slow_pairs(shards, TEST, 2000)
    assert set(map(tuple, merged.T.tolist())) == expected
    assert len(merged.T) == len(expected) > 20


def test_a_sample_of_pairs_does_not_depend_on_the_shards(shards):
    whole = merge_pairs([shared_pairs(shard, PERIOD, CATALOGUE, 10_000) for shard in shards], 12, PERIOD)
    cut = merge_pairs([shared_pairs(shard, PERIOD, CATALOGUE, 12) for shard in shards[::-1]], 12, PERIOD)
    assert np.array_equal(whole, cut) and whole.shape == (2, 12)


def test_pairs_that_were_known_before_are_found(shards):
    pairs = merge_pairs([shared_pairs(shard, PERIOD, CATALOGUE, 10_000) for shard in shards], 10_000, PERIOD)
    surveys = [survey_past(shard, PERIOD, pairs, ITEMS) for shard in shards]
    before = slow_pairs(shards, 0, TEST)
    known = np.logical_or.reduce([had for had, _ in surveys])
    assert [tuple(pair) in before for pair in pairs.T.tolist()] == known.tolist()
    assert 0 < known.sum() < len(known)
    trained = np.logical_or.reduce([seen for _, seen in surveys])
    touched = {r["gid"] for shard in shards for r in pq.read_table(shard).to_pylist() if r["timestamp"] < 800}
    assert set(np.flatnonzero(trained).tolist()) == touched


def test_ranks_are_places_among_the_type_without_the_query():
    random = np.random.default_rng(0)
    vectors = random.standard_normal((ITEMS, 4)).astype(np.float16)
    query, answer = np.array([0, 3, 12, 23, 0]), np.array([5, 9, 20, 11, 1])
    found = ranks(vectors, query, answer, CATALOGUE)
    unit = vectors.astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    for q, a, rank in zip(query, answer, found, strict=True):
        others = [i for i in (range(10) if q < 10 else range(10, ITEMS)) if i != q]
        assert sorted(others, key=lambda i: -unit[q] @ unit[i]).index(a) == rank


def test_look_alikes_share_their_places():
    vectors = np.ones((ITEMS, 3), np.float32)
    assert ranks(vectors, np.array([2]), np.array([7]), CATALOGUE)[0] == 4  # in the middle of nine


def test_recall_by_type_and_segment():
    query, answer = np.array([0, 1, 12, 13]), np.array([1, 0, 13, 12])
    trained = np.ones(ITEMS, bool)
    trained[13] = False
    rows = score_pairs(np.array([3.0, 12, 9.5, 200]), query, answer, trained, CATALOGUE, 200, 0)
    by_place = {(row["item_type"], row["segment"]): row for row in rows}
    assert set(by_place) == {("all", "all"), ("all", "unseen"), ("a", "all"), ("b", "all"), ("b", "unseen")}
    assert by_place["all", "all"]["recall_at_10"] == 0.5 and by_place["all", "all"]["recall_at_100"] == 0.75
    assert by_place["b", "unseen"]["pairs"] == 2 and by_place["b", "unseen"]["recall_at_10"] == 0.5
    assert by_place["b", "all"]["chance_at_10"] == pytest.approx(10 / 13)


def test_the_picture_is_drawn_whatever_there_is(tmp_path):
    draw_probe({"classification": [], "similar": []}, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
