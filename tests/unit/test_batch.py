"""The blocks of batch-recommend, without Ray."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from bundle_world import World, make_world

from recsys_ray.serving.batch import Answerer, Job, question_of
from recsys_ray.serving.recommender import Recommender
from recsys_ray.serving.requests import Question, RequestError
from recsys_ray.storage.store import Place


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"), memory=0.1)
    made.bundle()
    return made


def test_blocks_hold_every_user_once(world, tmp_path):
    """The last block is shorter, and the counts of a part are those of its rows."""
    job = Job(str(world.root), Place(str(tmp_path)), Question(k=4), False, len(world.user_ids), 25, False)
    answerer, users = Answerer(job), []
    assert job.blocks == 3 and job.read_counts(0) is None
    for number in range(job.blocks):
        counts = answerer.answer(number)
        assert counts == job.read_counts(number)
        rows = pq.read_table(job.part(number).local)
        assert counts["users"] == counts["known"] == min(25, len(world.user_ids) - 25 * number)
        assert counts["rows"] == len(rows) == 4 * counts["users"] and counts["quarantined"] == 0
        assert rows["rank"].to_pylist() == [1, 2, 3, 4] * counts["users"]
        assert len(np.unique(rows["user_id"].to_numpy().astype(str))) == counts["users"]
        users += rows["user_id"].to_pylist()[::4]
    assert sorted(users) == sorted(world.user_ids)
    job.part(1).local.write_bytes(b"PAR1 no more")  # what a failing disk leaves is no part
    assert job.read_counts(1) is None


def test_the_numbers_of_an_answer_are_those_of_its_words(world):
    recommender = Recommender.load(world.root)
    (found,) = recommender.lists([Question(world.user_ids[1])])
    answer = recommender.answer(Question(world.user_ids[1]))
    assert not isinstance(found, RequestError)
    item_id, item_type = recommender.items.take(found.gids)
    words = zip(item_id.to_pylist(), item_type.to_pylist(), recommender.reasons(found), strict=True)
    assert [(item.item_id, item.item_type, (item.reason, item.because)) for item in answer.items] == list(words)


@pytest.mark.parametrize(
    ("record", "fields"),
    [
        ({"user_id": 7.0, "age": "31", "country": ""}, {"user_id": 7, "age": 31.0}),
        ({"user_id": "a", "age": float("nan"), "history": None}, {"user_id": "a"}),
        ({"user_id": "a", "history": " "}, {"user_id": "a"}),
        ({"user_id": "a", "history": ["x", 5]}, {"user_id": "a", "history": [{"item_id": "x"}, {"item_id": 5}]}),
        (
            {"user_id": "a", "history": json.dumps([{"item_id": "x", "event": None, "timestamp": 3}])},
            {"user_id": "a", "history": [{"item_id": "x", "timestamp": 3}]},
        ),
    ],
)
def test_a_row_of_the_users_table_is_a_question(record, fields):
    assert question_of(record, Question(k=3)) == Question(k=3, **fields)


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"user_id": "a", "age": "old"}, "age: must be a number of years, not 'old'"),
        ({"user_id": "a", "history": "x"}, "history: must be a list in JSON, not 'x'"),
        ({"user_id": "a", "history": 3}, "history: must be a list of item ids"),
        ({"user_id": "a", "history": [None]}, "history.0: must be an item id"),
    ],
)
def test_a_cell_that_cannot_be_read_names_its_column(record, sentence):
    with pytest.raises(RequestError, match=sentence):
        question_of(record, Question())
