"""Rows of facts: how much of what only weights hold a student keeps, and how much a weight can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dfssm.base.markdown import table
from dfssm.eval.scorer import open_scorer

from .facts_language import RELATIONS, Facts, stored
from .language import STUDENT, TEST, Fresh, seeded, text, tokenizer, vocab_size
from .measure import measure
from .rows import Figures, Found, Row
from .tables import number, of_models, of_seeds, percent
from .train import Student, Teacher, make_student, students_of, titles, train_teacher, weights_of

PASSES = 2  # each fact is asked so many times, in documents that differ


@dataclass(frozen=True)
class Plan:
    """A teacher of side^2 * RELATIONS facts, which are a `share` of the sentences, and its students."""

    side: int
    share: float
    teacher: Teacher
    students: tuple[Student, ...]


FACTS = Plan(
    side=16,
    share=0.5,
    teacher=Teacher(),
    students=(
        Student(),
        Student(planes=2),
        Student(share=0.05),
        Student(share=0.05, batch=4, window=64),
        Student(share=0.25),
        Student(share=1.0),
        Student(planes=2, share=0.05),
        Student(planes=2, share=0.25),
    ),
)

_FULL = Teacher(d_model=32, d_state=16, headdim=16, batch=16)
_STUDENTS = tuple(Student(planes, rank, share=0.5, batch=8) for planes, rank in ((1, 1), (1, 4), (2, 1)))
CAPACITY = tuple(Plan(side, 0.9, _FULL, _STUDENTS) for side in (16, 32, 45))


def rows_of(folder: Path, name: str, plan: Plan, seed: int, students: Iterable[Student]) -> list[Row]:
    """The teacher `folder`/`name`/teacher, and students of it."""
    language = Facts(plan.side, plan.share, seed)
    teacher = folder / name / "teacher" / "teacher"

    def figures(model: Path) -> Figures:
        random = seeded(seed, TEST)
        documents = [document for _ in range(PASSES) for document in language.everything(random)]
        found: Figures = measure(open_scorer(model), open_scorer(teacher), documents)
        facts = {"facts": stored(language.count, found["known"]), "count": language.count}
        return found | facts | {"weights": weights_of(teacher)}

    def make_teacher(place: Path, found: Found) -> Figures:
        source = Fresh(language, plan.teacher.window, seed)
        config = plan.teacher.config(vocab_size(language))
        model = train_teacher(plan.teacher, config, source, tokenizer(language), seed, place)
        return figures(model) | {"tokens": plan.teacher.tokens}

    def maker(student: Student) -> Callable[[Path, Found], Figures]:
        def make(place: Path, found: Found) -> Figures:
            fresh = partial(text, language, seeded(seed, STUDENT))
            model = make_student(teacher, fresh, student, plan.teacher.tokens, seed, place)
            tokens = round(student.share * plan.teacher.tokens)
            return figures(model) | {"tokens": tokens, "bytes": model.stat().st_size}

        return make

    setup: dict[str, Any] = {"side": plan.side, "share": plan.share, "seed": seed}
    setup["teacher"] = dataclasses.asdict(plan.teacher)
    rows = [Row(f"{name}/teacher", setup, plan.teacher.tokens, make_teacher)]
    for student in students:
        of_student = setup | {"student": dataclasses.asdict(student)}
        rows.append(Row(f"{name}/{student.name}", of_student, student.cost * plan.teacher.tokens, maker(student)))
    return rows


def facts_rows(folder: Path, seeds: Sequence[int], plan: Plan = FACTS) -> list[Row]:
    """Of each seed."""
    rows = []
    for seed in seeds:
        students = students_of(plan.students, seed == seeds[0])
        rows += rows_of(folder, f"facts/seed-{seed}", plan, seed, students)
    return rows


def capacity_rows(folder: Path, seeds: Sequence[int], plans: Sequence[Plan] = CAPACITY) -> list[Row]:
    """Of the first seed."""
    name = f"capacity/seed-{seeds[0]}"
    return [row for p in plans for row in rows_of(folder, f"{name}/{p.side}", p, seeds[0], p.students)]


def facts_table(found: Found, plan: Plan = FACTS) -> str:
    """The rows of all seeds, mean and standard deviation."""
    figures = {
        "perplexity / teacher's": ("ratio", number(3)),
        "KL": ("kl", number(3)),
        "same top token": ("same_top", percent),
        "facts recalled": ("known", percent),
    }
    return of_models(found, "facts", titles(plan.students), figures)


def capacity_table(found: Found, plans: Sequence[Plan] = CAPACITY) -> str:
    """Facts that are held, of each number of facts; at the end the most of them a weight."""
    held: dict[str, list[Figures]] = {}
    for plan in plans:
        for name, title in titles(plan.students).items():
            held.setdefault(title, []).extend(of_seeds(found, "capacity", f"{plan.side}/{name}"))
    counts = [plan.side**2 * RELATIONS for plan in plans]
    lines = []
    for title, figures in held.items():
        by_count = {f["count"]: f"{f['facts']:,.0f}" for f in figures}
        most = max((f["facts"] / f["weights"] for f in figures), default=None)
        shown = [by_count.get(count, "not run") for count in counts]
        lines.append([title, *shown, "not run" if most is None else f"{most:.3f}"])
    return table(["facts", *(f"{count:,}" for count in counts), "most a weight"], lines)
