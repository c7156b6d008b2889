"""Files of text -> documents: plain text, JSON lines, parquet, and folders of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dfssm.base.endings import END_OF_TEXT
from dfssm.base.errors import DfssmError, reason
from dfssm.base.extras import require
from dfssm.base.paths import file_or_folder
from dfssm.base.reading import open_text

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

FIELD = "text"  # of a JSON line, and column of a parquet file
_JSON, _PARQUET = (".jsonl", ".ndjson", ".json"), (".parquet",)
_IN_FOLDERS = (".txt", ".jsonl", ".ndjson", ".parquet")  # a .json there is mostly a configuration
_PIECE = 1 << 20  # characters of a plain text file read at once
_LONGEST = 1 << 21  # characters of a document: tokenizers take hundreds of bytes for each
_ROWS = 1024  # of a parquet file read at once
_SPARE = 64 << 20  # bytes that a group of rows of a parquet file may take, beside four times the size of the file
_BATCH = 1 << 20  # characters tokenised at once; the tokenizer takes a hundred bytes for each


def text_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files named, and all text, JSON lines and parquet files below the folders named, sorted.

    Raises DfssmError for what does not exist or cannot be read, and for a folder without such a file.
    """
    files = []
    for path in paths:
        path = file_or_folder(path, "--data text, JSON lines or parquet files, or a folder of them")
        found = [path]
        if path.is_dir():
            found = sorted(f for f in path.rglob("*") if f.suffix in _IN_FOLDERS and f.is_file())
        if not found:
            raise DfssmError(f"{path}: no file in it ends in {', '.join(_IN_FOLDERS)}; name the files themselves")
        files += found
    return files


def packages(files: Sequence[Path]) -> list[str]:
    """The packages that reading these files takes."""
    return ["pyarrow"] if any(file.suffix in _PARQUET for file in files) else []


def documents(path: Path) -> Iterator[str]:
    """The documents of one file without white space around them, none empty; the suffix says what the file is.

    Any file is read piece by piece; a document is cut after 2 million characters, at the end of a line or
    else of a word. Raises DfssmError for what cannot be read, naming the line or row.
    """
    read = _json_lines if path.suffix in _JSON else _parquet if path.suffix in _PARQUET else _plain
    try:
        for text in read(path):
            yield from filter(None, map(str.strip, _cut(text)))
    except OSError as error:
        raise DfssmError(f"{path}: cannot be read ({reason(error)}); give --data other files") from None


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Documents to be tokenised together: about a million characters, or one document that has more."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def text_of(row: object, where: str) -> str:
    """The document in a row of JSON lines, parquet or a data set. Raises DfssmError if it has none."""
    text = row.get(FIELD) if isinstance(row, dict) else None
    if not isinstance(text, str):
        found = type(row).__name__
        if isinstance(row, dict):
            found = ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items()) or "nothing"
        raise DfssmError(f"{where}: has no string {FIELD!r} but {' '.join(found.split())}; give each document as one")
    return text


def _plain(path: Path) -> Iterator[str]:
    rest = ""
    with open_text(path, "utf-8-sig", "replace") as file:
        while piece := file.read(_PIECE):
            if "\0" in piece:  # packed, or of another encoding: it would be trained on as it is
                raise DfssmError(f"{path}: is no UTF-8 text; unpack or convert it")
            *whole, rest = (rest + piece).split(END_OF_TEXT)
            yield from whole
            *whole, rest = _cut(rest)
            yield from whole
    yield rest


def _cut(text: str) -> Iterator[str]:
    """Parts of a text of about _LONGEST characters at most; the last is long enough to hold the beginning of a mark."""
    start = 0
    while len(text) - start > _LONGEST + len(END_OF_TEXT):
        end = start + _LONGEST
        cut = text.rfind("\n", start, end) + 1 or text.rfind(" ", start, end) + 1 or end
        yield text[start:cut]
        start = cut
    yield text[start:]


def _json_lines(path: Path) -> Iterator[str]:
    with open_text(path, "utf-8-sig", "replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # also a number of more digits than Python reads
                why = error.msg if isinstance(error, json.JSONDecodeError) else reason(error)
                raise DfssmError(f"{path}, line {number}: is no JSON ({why}); mend or remove the line") from None
            # Half a surrogate pair can be written in JSON, but is no text for a tokenizer.
            yield text_of(row, f"{path}, line {number}").encode(errors="replace").decode()


def _parquet(path: Path) -> Iterator[str]:
    require({"": packages([path])})
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns, groups = file.schema_arrow.names, file.metadata
        if FIELD not in columns:
            names = " ".join(", ".join(columns).split())
            raise DfssmError(f"{path}: has no column {FIELD!r} but {names}; rename that of the text")
        sizes, shared = _unpacked(groups, 4 * path.stat().st_size + _SPARE)
        # A text that many rows have is held once; pyarrow cannot where texts share their beginnings.
        with pyarrow.parquet.ParquetFile(path, read_dictionary=[] if shared else [FIELD]) as file:
            number = 0
            for group, size in enumerate(sizes):
                # Each of those may be as long as all take together.
                rows = min(_ROWS, _SPARE // max(size, 1) + 1) if shared else _ROWS
                for batch in file.iter_batches(rows, row_groups=[group], columns=[FIELD]):
                    for text in batch.column(0):
                        number += 1
                        yield text_of({FIELD: text.as_py()}, f"{path}, row {number}")
    except (pyarrow.ArrowException, ValueError) as error:  # ValueError: bytes of a text that are not UTF-8
        raise DfssmError(f"{path}: is no parquet file that can be read ({reason(error)}); give another") from None


def _unpacked(groups: pyarrow.parquet.FileMetaData, most: int) -> tuple[list[int], bool]:
    """Bytes of the texts in each group of rows when they are unpacked, and whether texts may share their beginnings.

    ValueError where a group takes more than `most` bytes.
    """
    sizes: list[int] = []
    encodings: set[str] = set()
    for group in map(groups.row_group, range(groups.num_row_groups)):
        columns = map(group.column, range(group.num_columns))
        texts = [column for column in columns if column.path_in_schema.partition(".")[0] == FIELD]
        sizes.append(sum(column.total_uncompressed_size for column in texts))
        encodings.update(*(column.encodings for column in texts))
        if sizes[-1] > most:
            raise ValueError(f"a group of rows unpacks to {sizes[-1]:,} bytes, write smaller ones")
    return sizes, any(encoding.startswith("DELTA") for encoding in encodings)
