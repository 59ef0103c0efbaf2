"""Ids, words, lists and flags in the forms in which programs write them."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys_ray.data.convert import convert


@pytest.mark.parametrize(
    "column",
    [
        pa.array([17, 2**60]),
        pa.array([17, 2**60], pa.uint64()),
        pa.array([Decimal(17), Decimal(2**60)], pa.decimal128(38, 10)),
        pa.array([Decimal(17), Decimal(2**60)], pa.decimal256(50, 3)),
        pa.array(["17", str(2**60)]),
        pa.array([" 17.0 ", f"{2**60}.00"]),
        pa.array(["17", str(2**60)]).dictionary_encode(),
    ],
)
def test_one_id_in_all_its_forms(column: pa.Array) -> None:
    converted = convert(column, "id", 2)
    assert converted.values.to_pylist() == ["17", str(2**60)] and not converted.bad.any()


def test_ids_that_are_not_numbers_stay_as_they_are() -> None:
    ids = ["0017", "v1.0", "1.0.0", "1e5", "17.5", "A.0", "-3", "naN", "Nullius", "日本.0"]
    assert convert(pa.array(ids), "id", len(ids)).values.to_pylist() == ids
    assert convert(pa.array([0.0, -4.0, np.nan]), "id", 3).values.to_pylist() == ["0", "-4", None]
    assert convert(pa.array([Decimal("0"), None], pa.decimal128(20, 9)), "id", 2).values.to_pylist() == ["0", None]


def test_numbers_that_cannot_be_ids() -> None:
    assert convert(pa.array([2.5, 2.0**53, np.inf, np.nan]), "id", 4).bad.tolist() == [True, True, True, False]
    halves = pa.array([Decimal("2.5"), Decimal("3")], pa.decimal128(20, 1))
    assert convert(halves, "id", 2).bad.tolist() == [True, False]


@pytest.mark.parametrize(
    "word", ["NULL", "null", "None", "nan", "NaN", "\\N", "<NA>", "#N/A", "n/a", "(null)", "  ", ""]
)
@pytest.mark.parametrize("kind", ["id", "name", "text", "number", "flag", "seconds", "vector"])
def test_words_for_nothing(word: str, kind: Any) -> None:
    converted = convert(pa.array([word]), kind, 1)
    assert converted.values.to_pylist() == [None] and not converted.bad.any()


def test_na_is_nothing_but_where_it_is_a_word() -> None:
    assert convert(pa.array(["NA"]), "id", 1).values.to_pylist() == [None]
    assert convert(pa.array(["NA"]), "number", 1).values.to_pylist() == [None]
    assert convert(pa.array(["NA"]), "text", 1).values.to_pylist() == ["NA"]  # Namibia
    assert convert(pa.array(["NA|nan|EU"]), "labels", 1).values.to_pylist() == [["NA", "EU"]]


def test_texts_that_are_numbers() -> None:
    assert convert(pa.array([1984.0, 2.5, np.nan]), "text", 3).values.to_pylist() == ["1984", "2.5", None]
    assert convert(pa.array(["1984.0"]), "text", 1).values.to_pylist() == ["1984.0"]
    assert not convert(pa.array([2.5]), "text", 1).bad.any()


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ("home| garden |home", ["home", "garden"]),
        ('["home", "Ga\\u00e4rten"]', ["home", "Gaärten"]),
        ("['home', \"kids' rooms\"]", ["home", "kids' rooms"]),
        ("['home' 'garden'\n 'tools']", ["home", "garden", "tools"]),
        ("[['home', 'garden'], ['tools', 'home']]", ["home", "garden", "tools"]),
        ("('home', 'garden')", ["home", "garden"]),
        ('{home,"big garden"}', ["home", "big garden"]),
        ("{'home', 'garden'}", ["home", "garden"]),
        ("[home, big garden]", ["home", "big garden"]),
        ("[Kids' rooms, home]", ["Kids' rooms", "home"]),
        ("['home', nan, None]", ["home"]),
        ("[{'id': 3, 'name': 'home'}, {'id': 4, 'name': 'garden'}]", ["home", "garden"]),
        ("[]", []),
        ("{}", []),
        ("nan", []),
        ("Home &amp; Garden|Kids&#39; Rooms", ["Home & Garden", "Kids' Rooms"]),
        ("['Home &amp; Garden']", ["Home & Garden"]),
        ("home (indoor)", ["home (indoor)"]),
        ("(indoor)", ["(indoor)"]),
        ("a, b", ["a, b"]),
        ("[" * 100_000 + "]" * 100_000, []),
    ],
    ids=lambda value: str(value)[:30],
)
def test_lists_written_as_text(cell: str, labels: list[str]) -> None:
    assert convert(pa.array([cell]), "labels", 1).values.to_pylist() == [labels]


def test_lists_of_arrow() -> None:
    nested = pa.array([[["home &amp; garden", None], ["tools"]], None, [[]]])
    assert convert(nested, "labels", 3).values.to_pylist() == [["home & garden", "tools"], [], []]


@pytest.mark.parametrize("cell", ["[0.5, -1]", "[0.5 -1. ]", "{0.5,-1}", "(0.5,-1e0)", "[ 0.5\n -1]"])
def test_vectors_written_as_text(cell: str) -> None:
    converted = convert(pa.array([cell, "0.5", "[nan, 1]", "[a]", "[]"]), "vector", 5)
    assert converted.values.to_pylist() == [[0.5, -1.0], None, None, None, None]
    assert converted.bad.tolist() == [False, True, True, True, True]


def test_flags() -> None:
    cells = ["t", "F", "Yes", "no", "ON", "off", "y", "N", "1", "0", "1.0", "TRUE", "false"]
    expected = [True, False] * 5 + [True, True, False]
    assert convert(pa.array(cells), "flag", len(cells)).values.to_pylist() == expected
    assert convert(pa.array([1.0, 0.0, np.nan]), "flag", 3).values.to_pylist() == [True, False, None]
    assert convert(pa.array(["perhaps", "2"]), "flag", 2).bad.tolist() == [True, True]


def test_entities_in_words() -> None:
    for kind in ("text", "name"):
        assert convert(pa.array(["Toys &amp; Games", "&nbsp;"]), kind, 2).values.to_pylist() == ["Toys & Games", None]
