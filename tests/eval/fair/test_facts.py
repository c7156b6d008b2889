"""The rows of facts at a tiny size, and the figures of a bundle beside those of its student."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from dfssm.compiler.pipeline import Request, compile_model
from dfssm.eval.fair import facts
from dfssm.eval.fair.facts import Plan, facts_rows, facts_table
from dfssm.eval.fair.facts_language import Facts
from dfssm.eval.fair.language import END, TEST, Document, seeded
from dfssm.eval.fair.measure import measure
from dfssm.eval.fair.rows import run
from dfssm.eval.fair.train import Student, Teacher, rate
from dfssm.eval.scorer import open_scorer
from dfssm.model.student import load_student

SMALL = Plan(
    side=2,
    share=0.7,
    teacher=Teacher(d_model=32, n_layer=1, d_state=8, headdim=16, tokens=60_000, window=64, batch=8, lr=1e-2),
    students=(Student(planes=2), Student(share=0.25, window=64), Student(share=1.0, window=64)),
)
LANGUAGE = Facts(side=2, share=0.7, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fair")


@pytest.fixture(scope="module")
def found(folder):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plan = dataclasses.replace(SMALL, students=SMALL.students[:2])
    yield run(facts_rows(folder, [0], plan), folder, lambda line: None)
    torch.set_num_threads(threads)


def test_the_teacher_knows_its_facts_and_students_lose_some_likeness(found):
    teacher, data_free, student = found.values()
    assert teacher["known"] == 1.0 and teacher["facts"] == teacher["count"] == 16
    assert teacher["ratio"] == 1.0 and teacher["kl"] == 0.0 and teacher["same_top"] == 1.0
    assert data_free["kl"] > 0 and data_free["tokens"] == 0
    assert student["tokens"] == 15_000 and 0 < student["kl"] and student["known"] > 0.5
    assert student["bytes"] < data_free["bytes"]  # one plane, not two


def test_a_student_is_what_distill_leaves(folder, found):
    model = load_student(folder / "facts/seed-0/1-plane-rank-1-25%-by-256/student/model.pt")
    assert (model.config.planes, model.config.rank) == (1, 1)


def test_a_bundle_has_its_students_perplexity_and_recall(folder, found, tmp_path):
    model = folder / "facts/seed-0/1-plane-rank-1-25%-by-256/student/model.pt"
    documents = list(LANGUAGE.everything(seeded(0, TEST)))
    teacher = open_scorer(folder / "facts/seed-0/teacher/teacher")
    compile_model(Request(model, "ort-cpu", tmp_path / "bundle", "fp32"))
    ours, shipped = (measure(open_scorer(path), teacher, documents) for path in (model, tmp_path / "bundle"))
    assert shipped["perplexity"] == pytest.approx(ours["perplexity"], rel=1e-3)
    assert shipped["known"] == ours["known"]


def test_all_of_the_tokens_is_for_one_seed(folder):
    names = [row.name for row in facts_rows(folder, [3, 4], SMALL)]
    assert sum("100%" in name for name in names) == 1 and len(names) == 7
    assert next(name for name in names if "100%" in name).startswith("facts/seed-3/")


def test_the_table_says_what_was_not_run(found):
    lines = facts_table(found, SMALL).splitlines()
    assert (
        lines[2].startswith("| teacher | 1 | 60,000 |") and "| 1.000 |" in lines[2] and lines[2].endswith("| 100.0 % |")
    )
    assert lines[-1] == "| 1 plane, rank 1, 100 % of the tokens, 256 a step |" + " not run |" * 7


def test_the_table_has_mean_and_deviation():
    row = {"tokens": 50, "weights": 100, "kl": 0.5, "same_top": 1.0, "known": 0.25, "ratio": 1.0}
    found = {"facts/seed-0/teacher": row, "facts/seed-1/teacher": row | {"ratio": 1.1, "known": 0.75}}
    line = facts_table(found, SMALL).splitlines()[2]
    # Two values 0.1 apart: a standard deviation of 0.1 / sqrt(2).
    assert line == "| teacher | 2 | 50 | 0.50 | 1.050 ± 0.071 | 0.500 ± 0.000 | 100.0 % ± 0.0 % | 50.0 % ± 35.4 % |"


def test_the_learning_rate_rises_stays_and_falls():
    assert [rate(p) for p in (0.0, 0.025, 0.05, 0.5, 0.85, 1.0)] == pytest.approx([0, 0.5, 1, 1, 0.5, 0.02])


class Table:
    """A model whose next token depends on the last one only: its logits are rows of a table."""

    def __init__(self, logits):
        self.table = np.array(logits, np.float32)

    def new_state(self, batch):
        return None

    def logits(self, ids, state):
        return self.table[ids], state


def test_figures_are_those_worked_by_hand():
    """Two documents of unequal lengths over the tokens 0, 1, 2; all probabilities are powers of 1/2."""
    half, quarter = np.log(1 / 2), np.log(1 / 4)
    teacher = Table([[quarter, half, quarter], [half, quarter, quarter], [quarter, quarter, half]])
    student = Table([[quarter, quarter, half], [half, quarter, quarter], [quarter, quarter, half]])
    documents = [Document.of([1], [True]), Document.of([2, 2], [False, True])]
    found = measure(student, teacher, documents)
    # 0 1 0: 1/4 after 0, 1/2 after 1. 0 2 2 0: 1/2, 1/2, 1/4. The teacher: 1/2, 1/2; 1/4, 1/2, 1/4.
    assert found["perplexity"] == pytest.approx(2 ** (7 / 5))
    assert found["ratio"] == pytest.approx(2 ** ((7 - 7) / 5))
    # Both documents begin after END, where the two differ: 1/2 log 2 - 1/4 log 2, at 2 of 5 tokens.
    assert found["kl"] == pytest.approx(2 / 5 * np.log(2) / 4, rel=1e-5)
    assert found["same_top"] == pytest.approx(3 / 5)
    assert found["known"] == pytest.approx(1 / 2)  # of 1 after 0, and 2 after 2
    assert END == 0


def test_a_killed_row_goes_on_from_its_checkpoint(folder, found, tmp_path, monkeypatch):
    """The model is the same to the bit, whether its training was ended in between or not."""
    plan = dataclasses.replace(SMALL, students=SMALL.students[1:2])
    shutil.copytree(folder / "facts/seed-0/teacher", tmp_path / "facts/seed-0/teacher")
    replaced, steps = facts.make_student, []

    def ended(*arguments):
        from dfssm.distill.trainer import Trainer

        def step(trainer, original=Trainer._step):
            steps.append(trainer.step)
            if len(steps) == 40:
                raise KeyboardInterrupt
            return original(trainer)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_step", step)
            return replaced(*arguments)

    monkeypatch.setattr("dfssm.eval.fair.train.SAVE_EVERY", 16)
    monkeypatch.setattr(facts, "make_student", ended)
    with pytest.raises(KeyboardInterrupt):
        run(facts_rows(tmp_path, [0], plan), tmp_path, lambda line: None)
    steps[:] = [0] * 40
    run(facts_rows(tmp_path, [0], plan), tmp_path, lambda line: None)
    assert steps[40] == 32  # where the newest checkpoint was
    one, other = (place / "facts/seed-0/1-plane-rank-1-25%-by-256/student/model.pt" for place in (folder, tmp_path))
    assert one.read_bytes() == other.read_bytes()
