"""Prompts with one right answer each, from a CSV file, and the tokens that a model reads of them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dfssm.base.errors import DfssmError
from dfssm.base.paths import file
from dfssm.base.reading import open_text
from dfssm.targets.text import encode

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ATLAS = Path(__file__).with_name("atlas.csv")
"""Our own prompts: 445 in 19 categories."""

COLUMNS = ("prompt", "answer", "category", "template")


@dataclass(frozen=True)
class Prompt:
    """A row: `answer` is what comes after the prompt and a blank; `template` names the wording."""

    prompt: str
    answer: str
    category: str
    template: str


@dataclass(frozen=True)
class Prompts:
    """Rows as a tokenizer reads them: `ids` of each prompt, and the first token of its answer, `answer_ids` i64[N].

    `whole`: bool[N], the answers that are one token.
    """

    rows: tuple[Prompt, ...]
    ids: list[np.ndarray]
    answer_ids: np.ndarray
    whole: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def categories(self) -> list[str]:
        """In the order of the file, each once."""
        return list(dict.fromkeys(row.category for row in self.rows))

    def labels(self, column: str) -> np.ndarray:
        """i64[N]: the values of a column numbered in the order in which they come."""
        values = [getattr(row, column) for row in self.rows]
        numbers = {value: i for i, value in enumerate(dict.fromkeys(values))}
        return np.array([numbers[value] for value in values])

    @property
    def uniform(self) -> list[bool]:
        """Of each category, whether all its prompts are of one wording: then the wording alone tells it."""
        wordings = {name: {row.template for row in self.rows if row.category == name} for name in self.categories}
        return [len(found) == 1 for found in wordings.values()]

    @property
    def answers_shared(self) -> bool:
        """Whether most prompts have their answer in common with another: then answers are labels, too."""
        labels = self.labels("answer")
        return bool(np.mean(np.bincount(labels)[labels] > 1) > 0.5)


def read_prompts(path: str | Path) -> list[Prompt]:
    """The rows of a CSV file with the COLUMNS, in any order, and perhaps others.

    Raises DfssmError for a file that has other columns, an empty field or too few prompts, naming the line.
    """
    path = file(path, "a CSV file of prompts (docs/study.md)")
    rows = []
    with open_text(path, "utf-8-sig", "strict") as lines:
        try:
            reader = csv.DictReader(lines, strict=True)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise DfssmError(f"{path}: has no column {missing[0]!r}: give {', '.join(COLUMNS)} in its first line")
            for row in reader:
                fields = [(row[name] or "").strip() for name in COLUMNS]
                if not all(fields):
                    empty = COLUMNS[fields.index("")]
                    raise DfssmError(f"{path}, line {reader.line_num}: {empty} is empty; fill it in")
                rows.append(Prompt(*fields))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DfssmError(f"{path}: is no CSV file in UTF-8 ({error}); save it as such") from None
    sizes = [sum(row.category == name for row in rows) for name in {row.category for row in rows}]
    if len(sizes) < 2 or min(sizes) < 2:
        raise DfssmError(f"{path}: has {len(sizes)} categories; give two or more, each of two prompts or more")
    return rows


def tokenize(rows: Sequence[Prompt], tokenizer: Tokenizer) -> Prompts:
    """The rows as tokens. DfssmError where a prompt's tokens are not those that it has before its answer, or where all
    answers begin with one token, as words do that a tokenizer does not know.
    """
    ids, answers, whole = [], [], []
    for row in rows:
        read, both = encode(row.prompt, tokenizer), encode(f"{row.prompt} {row.answer}", tokenizer)
        if both[: len(read)] != read or len(both) == len(read):
            why = "its tokens change when its answer follows"
            raise DfssmError(f"prompt {row.prompt!r}: {why}; change its end, or leave it out")
        ids.append(np.array(read))
        answers.append(both[len(read)])
        whole.append(len(both) == len(read) + 1)
    if len(set(answers)) == 1:
        raise DfssmError("all answers begin with the same token: the tokenizer does not know them; give other prompts")
    return Prompts(tuple(rows), ids, np.array(answers), np.array(whole))


def to_csv(rows: Sequence[Prompt]) -> str:
    """The text of a file that `read_prompts` reads."""
    from io import StringIO

    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([row.prompt, row.answer, row.category, row.template] for row in rows)
    return text.getvalue()
