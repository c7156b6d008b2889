"""Questions in local files, as the task files of tasks/ read them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets

from dfssm.base import paths
from dfssm.base.errors import DfssmError, reason
from dfssm.base.reading import read_text

from . import harness  # noqa: F401 (whoever reads a task file knows `--model dfssm`, the command lm_eval too)

# What `ctx_b` of a HellaSwag question was: the sentence left unfinished, where it begins in lower case.
_UNFINISHED = re.compile(r"(?<=[.!?] )[a-z][^.!?]*$")


def json_lines(file: str, data: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """The harness's `custom_dataset`: folder `data` / `file`, one JSON object a line, as the split "test".

    Raises DfssmError when there is no such file, or a line is no object with the keys of the first.
    """
    path, text = _read(file, data)
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(filter(str.strip, text.split("\n")), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DfssmError(f"{path}, question {number}: is no JSON ({error})") from None
        if not isinstance(row, dict) or (rows and row.keys() != rows[0].keys()):
            raise DfssmError(f"{path}, question {number}: is no object with the keys of the first")
        rows.append(row)
    return _test_split(path, rows)


def hellaswag(file: str, data: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """As `json_lines`, of six lines a question: the beginning, the index of the right ending, four endings.

    The harness capitalises the sentence that is to be finished; such a file has it as it was.
    """
    path, text = _read(file, data)
    lines, rows = text.rstrip("\n").split("\n"), []
    for number, begin in enumerate(range(0, len(lines), 6), 1):
        question = lines[begin : begin + 6]
        if len(question) != 6 or question[1] not in ("0", "1", "2", "3"):
            raise DfssmError(f"{path}, question {number}: expected a beginning, an index from 0 to 3 and four endings")
        query, gold, *choices = question
        query = _UNFINISHED.sub(lambda match: match[0].capitalize(), query)
        rows.append({"query": query, "choices": choices, "gold": int(gold)})
    return _test_split(path, rows)


def _read(file: str, data: str | None) -> tuple[Path, str]:
    if data is None:
        raise DfssmError(f"the task reads {file} of a folder that was not given: --data DIR, or --metadata data=DIR")
    path = paths.file(Path(data) / file, "--data the folder it is in")
    try:
        return path, read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DfssmError(f"{path}: cannot be read ({reason(error)}); give --data the folder it is in") from None


def _test_split(path: Path, rows: list[dict]) -> dict[str, datasets.Dataset]:
    if not rows:
        raise DfssmError(f"{path}: holds no questions")
    return {"test": datasets.Dataset.from_list(rows)}
