"""Recognises files whose content does not match their name (a zip, an HTML page, text in another format) and says how
to convert them."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

from recsys_ray.core.errors import DataError

HEAD = 1 << 20  # bytes by which a file is judged
_DOWNLOAD = "download the file itself"
_SAVE = "open it in its program and save it as CSV in UTF-8"
_CONVERT = "convert it to Parquet or CSV"
# First bytes -> what the file is, what to do.
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive (Excel's .xlsx files are zip archives, too)", f"unpack it, or {_SAVE}"),
    (b"PK\x05\x06", "an empty zip archive", _DOWNLOAD),
    (b"\x1f\x8b", "compressed with gzip", "unpack it with gunzip, or, if it contains CSV, end its name in .csv.gz"),
    (b"BZh", "compressed with bzip2", "unpack it with bunzip2"),
    (b"\xfd7zXZ\x00", "compressed with xz", "unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it with unzstd"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", "unpack it with unlz4"),
    (b"\xff\x06\x00\x00sNaPpY", "compressed with snappy", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it with 7z x"),
    (b"Rar!", "a rar archive", "unpack it"),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Office file (.xls)", _SAVE),
    (b"PAR1", "a Parquet file", "end its name in .parquet"),
    (b"PARE", "an encrypted Parquet file", "decrypt it"),
    (b"ARROW1", "an Arrow (Feather) file", _CONVERT),
    (b"FEA1", "a Feather file", _CONVERT),
    (b"ORC", "an ORC file", _CONVERT),
    (b"Obj\x01", "an Avro file", _CONVERT),
    (b"\x89HDF", "an HDF5 file", _CONVERT),
    (b"\x93NUMPY", "a NumPy file", _CONVERT),
    (b"SQLite format 3", "a SQLite database", "export the table as CSV"),
    (b"%PDF", "a PDF", _DOWNLOAD),
    (b"\x89PNG", "a PNG picture", _DOWNLOAD),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the file with: git lfs pull"),
    (b"/annex/objects/", "a git-annex pointer, not the file itself", "fetch the file with: git annex get"),
    (b"\x00\x00\xfe\xff", "text in UTF-32", "convert it with: iconv -f utf-32 -t utf-8 {file} > new.csv"),
    (b"\xff\xfe\x00\x00", "text in UTF-32", "convert it with: iconv -f utf-32 -t utf-8 {file} > new.csv"),
    (b"\xff\xfe", "text in UTF-16", "convert it with: iconv -f utf-16 -t utf-8 {file} > new.csv"),
    (b"\xfe\xff", "text in UTF-16", "convert it with: iconv -f utf-16 -t utf-8 {file} > new.csv"),
)
_TEXT: tuple[tuple[re.Pattern[bytes], str, str], ...] = (
    (re.compile(rb"<(!doctype html|html|head|body)", re.I), "an HTML page (often a login or error page)", _DOWNLOAD),
    (re.compile(rb"<\?xml|<[a-z]+[ >]", re.I), "XML", _CONVERT),
    (re.compile(rb'\{\s*"|\[\s*[{\[]'), "JSON", _CONVERT),
    (
        re.compile(rb'"?sep=.{1,2}\r?\n', re.I),
        "not supported CSV: it begins with Excel's line 'sep='",
        "remove this first line",
    ),
)
_DIVIDERS = {
    "::": "'::'",
    "\t": "tabs",
    ";": "semicolons",
    "\x01": "Ctrl-A characters (\\x01)",
    "|": "'|'",
    " ": "blanks",
}
_DATUM = re.compile(r"[-+]?\d+([.,:/\-T ]\d+)*Z?")


def not_that_kind(file: str, head: bytes) -> DataError | None:
    """An error that says what the file is, if its first bytes are not those of CSV. ``head``: up to HEAD bytes."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for magic, what, advice in _MAGIC:
        if head.startswith(magic):
            return _is(file, what, advice)
    for pattern, what, advice in _TEXT:
        if pattern.match(text):
            return _is(file, what, advice)
    zeros = head[:1000].count(b"\x00")
    if zeros > len(head[:1000]) // 4:
        if any(half.count(b"\x00") > 0.9 * len(half) for half in (head[:1000:2], head[1:1000:2])):
            return _is(file, "text in UTF-16", "convert it with: iconv -f utf-16 -t utf-8 {file} > new.csv")
        return _is(file, "binary", "a table is a Parquet or a CSV file")
    return None


def _is(file: str, what: str, advice: str) -> DataError:
    return DataError(f"{file} is {what}; {advice.format(file=file)}")


def not_parquet(file: str, head: bytes, tail: bytes) -> DataError | None:
    """An error that says what a file is whose name ends as that of a Parquet file, if it is none."""
    if head.startswith(b"PAR1"):
        if tail.endswith(b"PAR1"):
            return None
        return DataError(f"{file} is an incomplete Parquet file, perhaps from an interrupted copy; copy it again")
    known = not_that_kind(file, head)
    if known or b"\x00" in head[:1000]:
        return known or DataError(
            f"{file} is not a Parquet file although its name ends in .parquet; replace or remove it"
        )
    return DataError(
        f"{file} is text, not a Parquet file, although its name ends in .parquet; if it is CSV, end its name in .csv"
    )


def not_our_csv(file: str, head: bytes, names: Sequence[str], known: Sequence[str], required: Sequence[str]) -> str:
    """What tells this text from CSV with commas and a line of column names, as a sentence; empty: nothing does.

    Args:
        names: what the first line has, read as CSV.
        known: names of columns that a table may have.
        required: those that this table must have.
    """
    if set(required) <= set(names):
        return ""
    line = next((line for line in head.removeprefix(b"\xef\xbb\xbf").splitlines() if line.strip()), b"")
    text = line.decode("utf-8", "replace")
    divider = _divider(text, known)
    cells = [cell.strip().strip('"') for cell in text.split(divider or ",")]
    bare = {_bare(name) for name in known}
    headless = not any(_bare(cell) in bare for cell in cells) and any(map(_DATUM.fullmatch, cells))
    faults, wanted = [], []
    if divider:
        faults.append(f"its cells are separated by {_DIVIDERS[divider]}")
        wanted.append("with commas")
    if headless:
        shown = text if len(text) <= 80 else f"{text[:77]}..."
        faults.append(f"it has no line of column names (it begins with {shown!r})")
        wanted.append(f"with a first line of column names ({','.join(required)})")
    if not faults:
        return ""
    at = bad_utf8(head)
    if at is not None:
        faults.append(f"it is not UTF-8 ({_encoding(head)[0]})")
        wanted.append("in UTF-8")
    how = "" if divider is None else _with_pandas(divider, at is not None, rb"\"" in head, headless)
    return f"{file} is not supported CSV: {', and '.join(faults)}; write it {', '.join(wanted)}{how}"


def _divider(line: str, known: Sequence[str]) -> str | None:
    """What divides the cells of a line, if it is not the comma."""
    for divider in _DIVIDERS:
        cells = [cell.strip().strip('"') for cell in line.split(divider)]
        named = sum(cell in known or _DATUM.fullmatch(cell) is not None for cell in cells)
        commas = line.count(",")
        many = len(cells) - 1 > commas if divider not in " |" else commas == 0
        if len(cells) > 1 and (named > 1 if divider == " " else many or len(set(cells) & set(known)) > 1):
            return divider
    return None


def _with_pandas(divider: str, foreign: bool, escapes: bool, headless: bool) -> str:
    more = [
        "encoding='latin-1'" * foreign,
        r"escapechar='\\'" * escapes,
        "engine='python'" * (len(divider) > 1),
        "header=None, names=[...]" * headless,
    ]
    arguments = ", ".join(["path", f"sep={divider!r}", *filter(None, more)])
    return f", as pandas does: read_csv({arguments}).to_csv('new.csv', index=False)"


def bad_utf8(text: bytes, whole: bool = False) -> int | None:
    """Where text stops being UTF-8. A character that is cut off at the end counts if the text is ``whole``."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(text, whole)
    except UnicodeDecodeError as error:
        return error.start
    return None


def not_utf8(file: str, text: bytes, at: int, where: str) -> str:
    """A sentence on text that is not UTF-8.

    Args:
        text: some of the file's text.
        at: the first byte of it that does not fit.
        where: "row 12"
    """
    begin = max(text.rfind(b"\n", 0, at) + 1, at - 20)
    shown = text[begin : at + 12].splitlines()[0]
    what, name = _encoding(text)
    said = f"{file} is not UTF-8: {where} has {shown!r}"
    decoded = text.decode("utf-8", "replace")
    strange = decoded.count("\ufffd")
    if sum(letter > "\x7f" for letter in decoded) > 2 * strange:
        return f"{said}, although most of it is; repair these rows"
    what, name = _encoding(text)
    return f"{said}; it is {what}, so convert it, as in: iconv -f {name} -t utf-8 {file} > new.csv"


def _encoding(text: bytes) -> tuple[str, str]:
    """A guess of the encoding, as a phrase and as a name for iconv. Western letters beyond ASCII occur singly between
    others; letters of other scripts follow one another."""
    alone = len(re.findall(rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])", text))
    together = len(re.findall(rb"[\x80-\xff]{2,}", text))
    if alone >= together:
        return (
            ("probably Windows-1252", "cp1252") if re.search(rb"[\x80-\x9f]", text) else ("probably Latin-1", "latin1")
        )
    return "in an encoding of another script, such as cp1251, gb18030, shift_jis or euc-kr", "cp1251"


def _bare(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()
