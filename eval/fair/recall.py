"""Rows of recall: how long a student remembers what it has read, with its state stored in each form."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dfssm.base.markdown import table
from dfssm.model.hf_import import load_teacher
from dfssm.model.student import load_student

from .language import STUDENT, TEST, Document, Fresh, seeded, text, tokenizer, vocab_size
from .recall_language import TASKS, Recall
from .rows import Figures, Found, Row
from .states import FORMS, answered
from .tables import of_seeds, percent, spread
from .train import Student, Teacher, make_student, train_teacher

SOLVED = 0.95
"""Share of the answers with which a teacher has solved a task at a length."""


@dataclass(frozen=True)
class Plan:
    """A teacher of all three tasks, a student, and the lengths at which they answer, with `items` to be recalled (the
    needle is one) in `documents` documents.
    """

    items: int
    documents: int
    lengths: tuple[int, ...]
    teacher: Teacher
    student: Student


RECALL = Plan(
    items=8,
    documents=64,
    lengths=(64, 256, 1024, 4096),
    teacher=Teacher(d_state=64, tokens=4_000_000, window=1024, batch=4, emphasis=8.0),
    student=Student(share=0.25, window=1024, batch=2),
)


def recall_rows(folder: Path, seeds: Sequence[int], plan: Plan = RECALL) -> list[Row]:
    """A teacher and a student for each seed."""
    rows = []
    for seed in seeds:
        setup = dataclasses.asdict(plan) | {"seed": seed}
        teacher = folder / f"recall/seed-{seed}/teacher/teacher"
        language = Recall(plan.items)

        def make_of_teacher(place: Path, found: Found, seed: int = seed, language: Recall = language) -> Figures:
            source = Fresh(language, plan.teacher.window, seed)
            config = plan.teacher.config(vocab_size(language))
            model = load_teacher(train_teacher(plan.teacher, config, source, tokenizer(language), seed, place))
            return {
                task: {str(n): answered(model, questions(language, plan, task, n, seed), "fp32") for n in plan.lengths}
                for task in TASKS
            }

        def make_of_student(
            place: Path, found: Found, seed: int = seed, language: Recall = language, teacher: Path = teacher
        ) -> Figures:
            fresh = partial(text, language, seeded(seed, STUDENT))
            model = load_student(make_student(teacher, fresh, plan.student, plan.teacher.tokens, seed, place))
            solved: dict[str, Any] = found[f"recall/seed-{seed}/teacher"]
            return {
                task: {
                    length: {form: answered(model, questions(language, plan, task, int(length), seed), form)
                             for form in FORMS}
                    for length, share in solved[task].items() if share >= SOLVED
                }
                for task in TASKS
            }  # fmt: skip

        rows.append(Row(f"recall/seed-{seed}/teacher", setup, plan.teacher.tokens, make_of_teacher))
        cost = 4 * plan.student.share * plan.teacher.tokens
        rows.append(Row(f"recall/seed-{seed}/student", setup, cost, make_of_student))
    return rows


def questions(language: Recall, plan: Plan, task: str, length: int, seed: int) -> list[Document]:
    """The documents of a task at a length."""
    random = seeded(seed, TEST, length * len(TASKS) + TASKS.index(task))
    items = 1 if task == "needle" else plan.items
    return [language.task(random, task, items, length) for _ in range(plan.documents)]


def recall_table(found: Found, plan: Plan = RECALL) -> str:
    """A line for each task and length that the teachers of all seeds solve."""
    teachers, students = (of_seeds(found, "recall", name) for name in ("teacher", "student"))
    lines = []
    for task in TASKS:
        for length in map(str, plan.lengths):
            of_teacher = [teacher[task][length] for teacher in teachers]
            of_student = [student[task][length] for student in students if length in student[task]]
            if not of_student:
                continue
            shown = [spread([forms[form] for forms in of_student], percent) for form in FORMS]
            lines.append([task, length, str(len(of_student)), spread(of_teacher, percent), *shown])
    head = ["task", "tokens", "seeds", "teacher", *FORMS]
    return table(head, lines or [["not run", *[""] * (len(head) - 1)]])
