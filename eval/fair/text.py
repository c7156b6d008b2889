"""Rows of text that is read once: a teacher that cannot memorise it, and its students."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from dfssm.base.files import write_file
from dfssm.base.hashing import sha256
from dfssm.base.reading import open_file
from dfssm.distill.data import Tokens, Windows, tokenize
from dfssm.distill.vocabulary import beginnings, train_tokenizer
from dfssm.eval.perplexity import measure
from dfssm.eval.scorer import open_scorer
from dfssm.eval.text import Text
from dfssm.model.text import text_files

from .language import END
from .rows import Figures, Found, Row
from .tables import number, of_models, percent
from .train import HELD_OUT, Student, Teacher, make_student, students_of, titles, train_teacher, weights_of


@dataclass(frozen=True)
class Plan:
    """A teacher of a text that it reads once, whatever its `tokens` say, and its students.

    `vocab`: of its tokenizer, which is trained on the same text. `measured`: tokens of the held-out text, at most.
    """

    vocab: int
    measured: int
    teacher: Teacher
    students: tuple[Student, ...]


TEXT = Plan(
    vocab=8192,
    measured=50_000,
    teacher=Teacher(d_model=160, n_layer=4, d_state=64, tokens=0, lr=2e-3),
    students=(
        Student(rank=2),
        Student(planes=2, rank=2),
        Student(rank=2, share=0.05),
        Student(rank=2, share=0.25),
        Student(planes=2, rank=2, share=0.25),
        Student(rank=2, share=1.0),
    ),
)
_GROUPS = 2


def text_rows(folder: Path, seeds: Sequence[int], files: Sequence[str], plan: Plan = TEXT) -> list[Row]:
    """Of each seed. The tokenizer and the tokens are made for the first row. No rows where there are no files."""
    if not files:
        return []
    found_files = text_files(files)
    source = [_described(file) for file in found_files]
    size = sum(described["bytes"] for described in source)
    rows = []
    for seed in seeds:
        setup = dataclasses.asdict(plan.teacher) | {"vocab": plan.vocab, "text": source, "seed": seed}
        teacher = folder / f"text/seed-{seed}/teacher/teacher"

        def make_of_teacher(place: Path, found: Found, seed: int = seed) -> Figures:
            file, text = _tokens(folder, found_files, plan)
            windows = Windows(text.train, plan.teacher.window, seed)
            once = dataclasses.replace(plan.teacher, tokens=windows.per_epoch * plan.teacher.window)
            config = plan.teacher.config(-(-plan.vocab // 32) * 32, ngroups=_GROUPS)
            model = train_teacher(once, config, windows, file.read_text(), seed, place)
            return _figures(model, model, text, plan) | {"tokens": once.tokens}

        def maker(student: Student, seed: int = seed, teacher: Path = teacher) -> Callable[[Path, Found], Figures]:
            def make(place: Path, found: Found) -> Figures:
                _, text = _tokens(folder, found_files, plan)
                tokens = len(text.train)
                names = list(map(str, found_files))
                model = make_student(teacher, lambda count, place: names, student, tokens, seed, place)
                more = {"tokens": round(student.share * tokens), "bytes": model.stat().st_size}
                return _figures(model, teacher, text, plan) | more

            return make

        rows.append(Row(f"text/seed-{seed}/teacher", setup, size, make_of_teacher))
        for student in students_of(plan.students, seed == seeds[0]):
            of_student = setup | {"student": dataclasses.asdict(student)}
            rows.append(Row(f"text/seed-{seed}/{student.name}", of_student, student.cost * size, maker(student)))
    return rows


def _described(file: Path) -> dict[str, Any]:
    with open_file(file) as content:
        return {"name": file.name, "bytes": file.stat().st_size, "sha256": sha256(content)}


def _tokens(folder: Path, files: Sequence[Path], plan: Plan) -> tuple[Path, Tokens]:
    """The tokenizer's file and the tokens of the text, made where they are not there yet."""
    file = folder / "text" / "tokenizer.json"
    if not file.is_file():
        write_file(file, str(train_tokenizer(beginnings(files, HELD_OUT), plan.vocab).to_str()), parents=True)
    tokenizer = Tokenizer.from_file(str(file))
    return file, tokenize(files, tokenizer, END, plan.vocab, HELD_OUT, folder / "text" / "tokens", plan.teacher.window)


def _figures(model: Path, teacher: Path, text: Tokens, plan: Plan) -> Figures:
    """On the held-out text, in windows from a zero state."""
    ids = np.array(text.held_out[: plan.measured + 1], np.int64)
    window = plan.teacher.window
    scorer, reference = open_scorer(model), open_scorer(teacher)
    found = measure(scorer, Text(ids, np.zeros(len(ids), np.int64)), window + 1, window, reference=reference)
    assert found.against
    figures = {"perplexity": found.perplexity, "kl": found.against.kl, "same_top": found.against.same_top}
    ratio = found.perplexity / float(np.exp(found.against.nats / found.tokens))
    return figures | {"ratio": ratio, "weights": weights_of(teacher)}


def text_table(found: Found, plan: Plan = TEXT) -> str:
    """The rows of all seeds, mean and standard deviation."""
    figures = {
        "perplexity": ("perplexity", number(2)),
        "perplexity / teacher's": ("ratio", number(3)),
        "KL": ("kl", number(3)),
        "same top token": ("same_top", percent),
    }
    return of_models(found, "text", titles(plan.students), figures)
