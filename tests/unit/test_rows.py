"""Rows with histories of any length: taken, joined and through Arrow they are those of plain lists."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_ray.core.offsets import offsets_of
from recsys_ray.two_tower.rows import from_table, histories_of, join, take, to_table

entry = st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 9))
tables = st.lists(st.tuples(st.integers(0, 2**40), st.lists(entry, max_size=5)), max_size=8)


def examples_of(rows):
    flat = [pair for _, history in rows for pair in history]
    uid = np.array([uid for uid, _ in rows], np.int64)
    return {
        "uid": uid,
        "taste": np.stack([uid, uid + 1], 1).astype(np.float32) / 7,
        "history": np.array([gid for gid, _ in flat], np.int32),
        "history_event": np.array([event for _, event in flat], np.int8),
        "offsets": offsets_of(np.array([len(history) for _, history in rows], np.int64)),
    }


def rows_of(examples):
    """The rows as lists, and the matrix column."""
    gids, events, offsets = histories_of(examples, np.arange(len(examples["uid"])))
    pairs = list(zip(gids.tolist(), events.tolist(), strict=True))
    rows = [(uid, pairs[a:b]) for uid, a, b in zip(examples["uid"].tolist(), offsets[:-1], offsets[1:], strict=True)]
    return rows, examples["taste"].tolist()


@given(tables, st.data())
@settings(max_examples=100, deadline=None)
def test_rows_are_taken_in_the_order_asked_for(rows, data):
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=12) if rows else st.just([]))
    taken = take(examples_of(rows), np.array(chosen, np.int64))
    assert rows_of(taken) == rows_of(examples_of([rows[k] for k in chosen]))


@given(st.lists(tables, min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_parts_are_joined_in_order(parts):
    joined = join([examples_of(rows) for rows in parts])
    assert rows_of(joined) == rows_of(examples_of([row for rows in parts for row in rows]))


@given(tables, st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_arrow_gives_back_what_it_got_whole_and_in_slices(rows, start, count):
    made, table = examples_of(rows), to_table(examples_of(rows))
    back = from_table(table)
    assert {name: column.dtype for name, column in back.items()} == {n: column.dtype for n, column in made.items()}
    assert rows_of(back) == rows_of(made)
    part = from_table(pa.concat_tables([table, table]).slice(start, count))
    assert rows_of(part) == rows_of(examples_of((rows + rows)[start : start + count]))
