"""Files as they come: what is read, what is refused and with which words. No record is lost without being told."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recsys_ray.config import DataConfig
from recsys_ray.core.errors import DataError
from recsys_ray.data.csv_records import Records
from recsys_ray.data.files import table_fingerprint
from recsys_ray.data.reading import _parse, find_source, read_batches
from recsys_ray.data.validate import check_users

SONGS = [{"item_id": f"s{i}", "item_type": "song", "title": f"Song {i}"} for i in range(12)]
LISTENS = [{"user_id": 7 + i, "item_id": "s1", "event": "play", "timestamp": 1_700_000_000 + i} for i in range(5)]


def write(path: Path, rows: list[dict[str, Any]], sep: str = ",", encoding: str = "utf-8", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=sep, lineterminator="\n", **options)
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(out.getvalue().encode(encoding))
    return path


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def read(table: str, path: Path | str | list[str]) -> tuple[list[dict[str, Any]], list[tuple[int, str, str]]]:
    """Rows with their numbers, and malformed ones."""
    source = find_source(table, str(path) if isinstance(path, Path) else path)
    batches = [batch for fragment in source.fragments for batch in read_batches(fragment)]
    rows = [{"row": n, **row} for b in batches for n, row in zip(b.rows.tolist(), b.table.to_pylist(), strict=True)]
    return rows, [malformed for batch in batches for malformed in batch.malformed]


def titles(path: Path) -> list[str | None]:
    return [row["title"] for row in read("items", path)[0]]


def refusal(table: str, path: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        read(table, path)
    return str(caught.value)


# -- records ---------------------------------------------------------------------------------------------------------


def parsed(text: bytes, block: int) -> tuple[list[str], list[int], list[tuple[str | None, ...]], list[Any]]:
    records = Records(io.BytesIO(text), "t.csv", block)
    rows: list[int] = []
    cells: list[tuple[str | None, ...]] = []
    malformed = []
    for piece in records:
        table = _parse(piece, len(records.names), range(len(records.names)))
        rows += piece.rows.tolist()
        cells += zip(*(column.to_pylist() for column in table.columns), strict=True)
        malformed += piece.malformed
    return records.names, rows, cells, malformed


_cell = st.text(st.sampled_from('ab ,"\n\r\té☃|'), max_size=9)


@settings(deadline=None)
@given(
    st.integers(1, 4).flatmap(lambda width: st.lists(st.tuples(*[_cell] * width), min_size=1, max_size=9)),
    st.sampled_from([(csv.QUOTE_ALL, "\n"), (csv.QUOTE_MINIMAL, "\r\n")]),
    st.integers(1, 40),
)
def test_what_a_writer_wrote_comes_back(rows: list[tuple[str, ...]], form: tuple[Any, str], block: int) -> None:
    rows = [(str(i), *row[1:]) for i, row in enumerate(rows)]
    names = [f"n{i}" for i in range(len(rows[0]))]
    out = io.StringIO()
    writer = csv.writer(out, quoting=form[0], lineterminator=form[1])
    writer.writerows([names, *rows])
    found, numbers, cells, malformed = parsed(out.getvalue().encode(), block)
    assert found == names and malformed == []
    assert cells == [tuple(cell or None for cell in row) for row in rows]
    assert numbers == list(range(1, len(rows) + 1))


@settings(deadline=None)
@given(st.text(st.sampled_from('a1,"\\\n\r '), max_size=40), st.integers(1, 20))
@example('1,"a\\",1\n1,"a\\"",1\n', 3)
@example('1,"a\n1,a\n1,"a"\n', 1)
@example('"a"a,aa,a\n', 1)
@example("\\\r\\1,", 1)
def test_any_text_is_read_alike_in_blocks_of_any_size_and_every_row_is_told(text: str, block: int) -> None:
    whole = ("x,y\n" + text).encode()
    names, rows, cells, malformed = parsed(whole, 1 << 20)
    assert (names, rows, cells, malformed) == parsed(whole, block)
    assert sorted([*rows, *(row for row, _, _ in malformed)]) == list(range(1, len(rows) + len(malformed) + 1))


def test_a_stray_quote_takes_no_record_along_in_silence(tmp_path: Path) -> None:
    songs = [dict(song) for song in SONGS]
    songs[2]["title"], songs[8]["title"] = '"Yesterday', 'Nine" nails'
    lines = ["item_id,item_type,title", *(",".join(song.values()) for song in songs)]
    file = tmp_path / "songs.csv"
    file.write_text("\n".join(lines) + "\n")
    rows, malformed = read("items", file)
    assert [row["row"] for row in rows] == [1, 2, 10, 11, 12]
    assert [(row, text) for row, text, _ in malformed] == [(n, lines[n]) for n in range(3, 10)]
    said = f"the record in row 3 of {file} is malformed and spans 7 lines"
    assert all(wrong.startswith(said) for _, _, wrong in malformed)


@pytest.mark.parametrize("last", ['Nine nails"', '"Nine nails', "Nine nails"])
def test_a_stray_quote_that_is_closed_by_chance(tmp_path: Path, last: str) -> None:
    """By the letter the first of these is one good record of three cells; the third is never closed."""
    file = tmp_path / "songs.csv"
    file.write_text(f'item_id,item_type,title\n1,song,"One\n2,song,Two\n3,song,{last}\n')
    rows, malformed = read("items", file)
    assert rows == [] and [row for row, _, _ in malformed] == [1, 2, 3]
    assert "spans 3 lines" in malformed[0][2]


def test_line_breaks_that_a_writer_meant(tmp_path: Path) -> None:
    text = "Verse, one\nVerse, two\n\nVerse, three"
    file = write(tmp_path / "songs.csv", [{**SONGS[0], "title": text}, SONGS[1]])
    assert titles(file) == [text, "Song 1"]


def test_quotes_as_other_writers_have_them(tmp_path: Path) -> None:
    file = tmp_path / "songs.csv"
    lines = {
        r'"1","song","The \"Best\" of"': 'The "Best" of',
        r'"2","song","Say \"no\", \"no\""': 'Say "no", "no"',
        r'"3","song","\"Heroes\""': '"Heroes"',
        r'"4","song","a \\ b"': r"a \ b",
        '"5","song","He said ""yes"", twice"': 'He said "yes", twice',
        '6, song, "Blank, before a quote"': "Blank, before a quote",
        '7,song,12" vinyl': '12" vinyl',
        '8,song,"Heroes" (live)': '"Heroes" (live)',
        '9,song,"A "good" one"': 'A "good" one',
    }
    file.write_text("\n".join(["item_id,item_type,title", *lines]))
    rows, malformed = read("items", file)
    assert malformed == []
    assert [row["title"] for row in rows] == list(lines.values())
    file.write_text('item_id,item_type,title\n1,song,"C:\\"\n2,song,"D:\\E\\"\n')  # a backslash, and no escape
    assert titles(file) == ["C:\\", "D:\\E\\"]


def test_cells_of_any_length_and_odd_characters(tmp_path: Path) -> None:
    long, odd = "word " * 200_000, "\U0001f3a7 \u0645\u0648\u0633\u202e nul\x00 <b>&lt;"
    file = write(tmp_path / "songs.csv", [{**SONGS[0], "title": long}, {**SONGS[1], "title": odd}])
    assert titles(file) == [long, odd]


def test_a_record_that_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys_ray.data.csv_records.LONGEST", 1000)
    monkeypatch.setattr("recsys_ray.data.reading._CSV_BLOCK", 300)
    file = write(tmp_path / "songs.csv", [*SONGS, *SONGS * 90])
    lines = file.read_text().splitlines()
    lines[5] = 's4,song,"Song'
    file.write_text("\n".join(lines))
    assert "row 5 of" in (said := refusal("items", file)) and "never closed" in said


def test_gzip(tmp_path: Path) -> None:
    plain = write(tmp_path / "songs.csv", SONGS).read_bytes()
    file = tmp_path / "packed.csv.gz"
    file.write_bytes(gzip.compress(plain))
    assert len(read("items", file)[0]) == 12
    file.write_bytes(gzip.compress(plain)[:-12])
    assert "cannot be read" in refusal("items", file)
    file.write_bytes(plain)
    assert "not compressed with gzip" in refusal("items", file)


# -- refusals that say what the file is ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"PK\x03\x04" + bytes(range(256)), "zip archive"),
        ("a.csv", gzip.compress(b"item_id,item_type,title\n", mtime=0), r"compressed with gzip.*\.csv\.gz"),
        ("a.csv", b"\n<!DOCTYPE html><html>", "HTML page"),
        ("a.csv", b'<?xml version="1.0"?><items/>', "XML"),
        ("a.csv", b'{"item_id": 1, "item_type": "song", "title": "x"}\n', "JSON"),
        ("a.csv", b'[\n  {"item_id": 1}]', "JSON"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer.*git lfs pull"),
        ("a.csv", b"PAR1 and more", r"Parquet file.*name in \.parquet"),
        ("a.csv", b"sep=,\nitem_id,item_type,title\n1,song,x\n", "Excel's line 'sep='.*first line"),
        ("a.csv", "item_id,item_type,title\n1,song,x\n".encode("utf-16"), "UTF-16.*iconv"),
        ("a.csv", "item_id,item_type,title\n1,song,x\n".encode("utf-16-le"), "UTF-16.*iconv"),
        ("a.csv", b"\x00\x01\x02\x00\x00" * 30, "binary"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        ("a.parquet", b"item_id,item_type,title\n", r"is text, not a Parquet file.*\.csv"),
        ("a.parquet", b"PAR1" + bytes(100), "incomplete Parquet file"),
        ("a.tsv", b"item_id\titem_type\ttitle\n1\tsong\tx\n", "separated by tabs"),
        ("a.csv", b"item_id\titem_type\ttitle\n1\tsong\tx, y\n", "separated by tabs"),
        ("a.csv", b"item_id|item_type|title\n1|song|x\n", r"separated by '\|'"),
        ("a.csv", b'"item_id";"item_type";"title"\n1;song;x\n', "separated by semicolons(?!.*UTF-8).*sep=';'"),
        ("a.csv", 'item_id;item_type;title\n1;song;"x\\" é"\n'.encode("latin-1"), "semicolons.*not UTF-8 .*Latin-1"),
        ("a.csv", b"1::Toy Story::Animation|Children's\n", "'::'.*no line of column names.*item_id,item_type,title"),
        ("a.csv", b"1,song,x\n2,song,y\n", "no line of column names.*1,song,x"),
        ("a.txt", b"item_id,item_type,title\n1,song,x\n", r"name does not end in .*\.csv"),
    ],
)
def test_what_a_file_is(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} .*(?s:{said})"):
        read("items", tmp_path / name)


def test_text_that_is_not_utf8_names_the_row(tmp_path: Path) -> None:
    songs = [{**song, "title": "Café del Mar" if i == 6 else song["title"]} for i, song in enumerate(SONGS)]
    file = write(tmp_path / "songs.csv", songs, encoding="latin-1")
    assert "row 7 has" in (said := refusal("items", file)) and "iconv -f latin1 -t utf-8" in said
    songs[6]["title"] = "Куда уходит детство"
    assert "cp1251" in refusal("items", write(tmp_path / "songs.csv", songs, encoding="cp1251"))
    file.write_bytes(write(file, songs).read_bytes().replace(b"Song 9", b"Song\xe9"))
    assert "row 10 has" in (said := refusal("items", file)) and "iconv" not in said  # the rest is UTF-8
    many = write(file, SONGS * 9000).read_bytes()  # far behind what is looked at first
    file.write_bytes(many + b"s1,song,\xe9t\xe9\n")
    assert f"row {9000 * 12 + 1} has" in refusal("items", file)


def test_all_wrong_names_in_one_sentence(tmp_path: Path) -> None:
    renamed = [{"UserId": e["user_id"], "item": e["item_id"], "Event": e["event"], "when": 5} for e in LISTENS]
    said = refusal("interactions", write(tmp_path / "log.csv", renamed))
    assert "no columns 'user_id', 'item_id', 'event', 'timestamp'" in said
    assert "its columns are: UserId, item, Event, when" in said
    assert "rename 'UserId' to 'user_id', 'item' to 'item_id', 'Event' to 'event' and add 'timestamp'" in said


# -- columns ---------------------------------------------------------------------------------------------------------


def test_names_are_trimmed_and_columns_without_a_name_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "log.csv"
    file.write_text("\n".join([",user_id, item_id, event,timestamp ,,", "0,u, a, play,5,,", "1,v, b, play,6,,"]))
    source = find_source("interactions", str(file))
    assert source.extra == []
    rows, malformed = read("interactions", file)
    assert not malformed and rows[1] == {"row": 2, "user_id": "v", "item_id": " b", "event": " play", "timestamp": "6"}
    columns = {" user_id": ["u"], "item_id ": ["a"], "event": ["play"], "timestamp": [5], "": [1]}
    rows, _ = read("interactions", write_parquet(tmp_path / "log.parquet", columns))
    assert rows == [{"row": 1, "user_id": "u", "item_id": "a", "event": "play", "timestamp": 5}]
    file.write_text("user_id,x,x,age, age\n1,2,3,4,5\n")
    assert "column 'age' twice" in refusal("users", file)


def test_columns_in_the_names_of_folders(tmp_path: Path) -> None:
    for kind in ("song", "audio%20book", "__HIVE_DEFAULT_PARTITION__"):
        write_parquet(tmp_path / "items" / f"item_type={kind}" / "p.parquet", {"item_id": [kind[0]], "title": ["x"]})
        rest = [{"user_id": 1, "item_id": kind[0], "timestamp": 5}]
        write(tmp_path / "log" / "day=2024-01-01" / f"event={kind}" / "p.csv", rest)
    assert {(row["item_id"], row["item_type"]) for row in read("items", tmp_path / "items")[0]} == {
        ("s", "song"),
        ("a", "audio book"),
        ("_", None),
    }
    assert find_source("interactions", str(tmp_path / "log")).extra == ["day"]
    assert [row["event"] for row in read("interactions", tmp_path / "log")[0]] == [None, "audio book", "song"]
    one = read("interactions", str(tmp_path / "log/*/event=s*"))[0]
    assert [(row["item_id"], row["event"]) for row in one] == [("s", "song")]


def test_binary_columns_are_text(tmp_path: Path) -> None:
    columns = {
        "item_id": pa.array([b"1", b"\xc3\xa9"]),
        "item_type": pa.array([b"song", b"song"]).dictionary_encode(),
        "title": pa.array([b"x", None], pa.large_binary()),
        "categories": pa.array([[b"a"], [b"b", None]]),
    }
    rows, malformed = read("items", write_parquet(tmp_path / "a.parquet", columns))
    assert not malformed
    assert rows[1] == {"row": 2, "item_id": "é", "item_type": "song", "title": None, "categories": ["b", None]}


def test_parquet_text_that_is_not_utf8_is_told_row_by_row(tmp_path: Path) -> None:
    def unchecked(cells: list[bytes | None]) -> pa.Array:
        binary = pa.array(cells, pa.binary())
        return pa.Array.from_buffers(pa.string(), len(binary), binary.buffers())

    labels = pa.ListArray.from_arrays(pa.array([0, 1, 3, 3, 4]), unchecked([b"a", b"b", b"\xff", b"c"]))
    columns = {
        "item_id": ["1", "2", "3", "4"],
        "item_type": pa.array([b"song", b"song", b"song", b"\xe9"]),
        "title": unchecked([b"caf\xe9", b"x", None, b"y"]),
        "categories": labels,
    }
    file = write_parquet(tmp_path / "a.parquet", columns)
    rows, malformed = read("items", file)
    assert [row["row"] for row in rows] == [3]
    assert [row for row, _, _ in malformed] == [1, 2, 4]
    assert malformed[0][2] == f"in row 1 of {file} title is not UTF-8 text: b'caf\\xe9'"
    assert json.loads(malformed[0][1])["item_id"] == "1"
    assert "categories is not" in malformed[1][2] and "item_type is not" in malformed[2][2]


# -- files -----------------------------------------------------------------------------------------------------------


def test_empty_parts_are_passed_over_and_told(tmp_path: Path) -> None:
    write(tmp_path / "part-0.csv", SONGS)
    for name in ("part-1.csv", "part-2.parquet", "part-3.csv.gz", "_SUCCESS"):
        (tmp_path / name).touch()
    (tmp_path / "part-4.csv").write_text("item_id,item_type,title\n")
    write_parquet(tmp_path / "part-5.parquet", {name: pa.nulls(0) for name in ("item_id", "other")})
    (tmp_path / "notes.txt").write_text("x")
    source = find_source("items", str(tmp_path))
    assert len(read("items", tmp_path)[0]) == 12
    assert [Path(file).name for file in source.empty] == [f"part-{i}" + e for i, e in zip(
        range(1, 6), (".csv", ".parquet", ".csv.gz", ".csv", ".parquet"), strict=True
    )]  # fmt: skip
    assert len(source.notes) == 2 and "5 files are empty" in source.notes[1] and "notes.txt" in source.notes[0]
    (tmp_path / "part-0.csv").unlink()
    assert "has no rows" in refusal("items", tmp_path)


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    first, second = (write(tmp_path / "log" / f"{day}.csv", [LISTENS[day]]) for day in (1, 2))
    write(tmp_path / "log" / "[3].csv", [LISTENS[3]])
    forms = {"~/log/1.csv": 1, "$HOME/log/*.csv": 3, f"{tmp_path}/**/[12].csv": 2, f"{tmp_path}/log/[3].csv": 1}
    for path, rows in forms.items():
        assert len(read("interactions", path)[0]) == rows
    both = [str(second), "~/log/1.csv", str(first)]
    assert [row["user_id"] for row in read("interactions", both)[0]] == ["9", "8"]  # in this order, each once
    assert "nothing matches" in refusal("interactions", f"{tmp_path}/*.pq")
    assert "no file or folder" in refusal("interactions", "~/elsewhere")
    hashes = [table_fingerprint("interactions", path) for path in (str(first), both, both[::-1], [str(first)])]
    assert hashes[0] == hashes[3] and len(set(hashes)) == 3
    assert DataConfig(interactions=both).interactions == both


def test_partitions_are_part_of_what_a_source_is(tmp_path: Path) -> None:
    for event in ("play", "skip"):
        write(tmp_path / f"event={event}" / "p.csv", [{"user_id": 1, "item_id": 2, "timestamp": 3}])
    hashes = [table_fingerprint("interactions", str(tmp_path / f"event={event}")) for event in ("play", "skip")]
    assert hashes[0] != hashes[1]


def test_row_numbers_over_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys_ray.data.reading._CSV_BLOCK", 50)
    lines = ["item_id,item_type,title"]
    for i, kind in zip(range(200), itertools.cycle(["good", "few", "lines", "blank"]), strict=False):
        lines += {
            "good": [f"{i},song,t"],
            "few": [f"{i},song"],
            "lines": [f'{i},song,"a', '""b"', ""],
            "blank": ["", "\r"],
        }[kind]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    rows, malformed = read("items", tmp_path / "a.csv")
    assert [row["row"] for row in rows] == [n for n in range(1, 151) if n % 3 != 2]
    assert [row for row, _, _ in malformed] == [n for n in range(1, 151) if n % 3 == 2]
    assert malformed[0][2].endswith("it has 2 cells where the header has 3")


def test_parquet_rows_are_numbered_over_row_groups(tmp_path: Path) -> None:
    table = pa.table({"user_id": [str(i) for i in range(10)], "extra": list(range(10))})
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=4)
    pq.write_table(table.slice(0, 0), tmp_path / "a.parquet")
    source = find_source("users", str(tmp_path))
    assert [f.first_row for f in source.fragments] == [0, 4, 8]
    assert source.extra == ["extra"] and source.rows == 10
    assert read("users", tmp_path)[0] == [{"row": i + 1, "user_id": str(i)} for i in range(10)]


def test_vectors_in_csv(tmp_path: Path) -> None:
    file = tmp_path / "users.csv"
    file.write_text('\ufeffuser_id,age,music,note\nu1,3,,x\nu2,4,"[0.5, 1]",[sic]\n', encoding="utf-8")
    source = find_source("users", str(file))
    assert source.taste == ["music"]
    batch = next(read_batches(source.fragments[0]))
    assert check_users(batch, "f", ["music"]).good["music"].to_pylist() == [None, [0.5, 1.0]]
