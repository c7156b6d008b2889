"""The languages of recall, beside an independent reader of them, and the forms of a state, beside the bundles'."""

import dataclasses

import numpy as np
import pytest
import tiny
import torch

from dfssm.compiler.pipeline import Request, compile_model
from dfssm.eval.fair.language import END, TEACHER, seeded
from dfssm.eval.fair.recall import Plan, questions, recall_rows, recall_table
from dfssm.eval.fair.recall_language import LONGEST, TASKS, Recall
from dfssm.eval.fair.rows import run
from dfssm.eval.fair.states import FORMS, Feedback, likeliest
from dfssm.eval.fair.train import Student, Teacher
from dfssm.model.checkpoint import save_student
from dfssm.model.student import load_student
from dfssm.runtime import Engine


def words(language, document):
    return [language.words[i] for i in document.ids]


@pytest.fixture(scope="module")
def language():
    return Recall(most=4)


@pytest.mark.parametrize(
    ("task", "items", "shape"),
    [
        ("pairs", 1, "pairs key value ask key value"),
        ("pairs", 2, "pairs key value key value ask key value key value"),
        ("copy", 3, "copy value value value ask value value value"),
        ("needle", 1, "needle key value ask key value"),
    ],
)
def test_the_shortest_documents_are_these(language, task, items, shape):
    shape = shape.split()
    assert language.least(task, items) == len(shape)
    document = language.task(seeded(0, 0), task, items, len(shape))
    found = words(language, document)
    assert [word.rstrip("0123456789") for word in found[:-1]] == shape and document.ids[-1] == END
    asked = shape.index("ask")
    known = [i for i, word in enumerate(shape) if i > asked and word == "value"]
    assert np.flatnonzero(document.known).tolist() == known


@pytest.mark.parametrize("task", TASKS)
def test_what_is_known_follows_from_what_was_read(language, task):
    """A reader that looks pairs up, or copies, is right wherever a token can be known; the rest of a text is noise."""
    random, places = seeded(1, 0), set()
    for _ in range(100):
        items = 1 if task == "needle" else random.randint(1, 4)
        length = random.randint(language.least(task, items), 60)
        document = language.task(random, task, items, length)
        found = words(language, document)
        assert len(found) == length + 1
        mark, ask = found.index(task), found.index("ask")
        places.add(mark)
        before, after = found[mark + 1 : ask], found[ask + 1 : -1]
        if task == "copy":
            answers = before[: len(after)]
        else:
            pairs = dict(zip(before[: 2 * items : 2], before[1 : 2 * items : 2], strict=True))
            assert len(pairs) == items
            answers = [pairs[key] for key in after[::2]]
            after = after[1::2]
        assert after == answers and len(after) == items
        assert [found[i] for i in np.flatnonzero(document.known)] == answers
        assert {
            word.rstrip("0123456789") for word in before[len(before) - (length - language.least(task, items) - mark) :]
        } <= {"noise"}
    assert (len(places) > 10) == (task == "needle")


def test_documents_of_training_are_of_all_tasks_and_lengths(language):
    random = seeded(0, TEACHER)
    documents = [language.document(random) for _ in range(600)]
    assert {task for document in documents for task in TASKS if task in words(language, document)} == set(TASKS)
    lengths = [len(document.ids) - 1 for document in documents]
    assert max(lengths) <= LONGEST and np.median(lengths) < 300
    assert len({document.ids.tobytes() for document in documents}) == len(documents)


def test_the_error_of_a_store_is_added_to_the_next():
    """A row whose largest value is 127 has steps of 1: 0.4 is stored as 0, 0, 1, 0, 1, ..., and 0.4 in the mean."""
    store, state = Feedback(), torch.tensor([[[127.0, 0.4, -2.6]]])
    stored = torch.stack([store(state)[0, 0] for _ in range(5)])
    assert stored[:, 0].tolist() == [127.0] * 5
    assert stored[:, 1].tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]
    assert stored[:, 1].mean() == pytest.approx(0.4) and stored[:, 2].mean() == pytest.approx(-2.6)
    assert Feedback()(torch.zeros(1, 1, 3)).tolist() == [[[0.0, 0.0, 0.0]]]


@pytest.mark.parametrize("form", [form for form in FORMS if "fed back" not in form])
def test_a_form_is_what_a_bundle_stores(form, tmp_path):
    """The engine reads token by token; another order of sums moves few predictions of a random model."""
    config = dataclasses.replace(tiny.CONFIG, n_layer=1)
    save_student(tmp_path / "model.pt", config, {n: torch.from_numpy(t) for n, t in tiny.tensors(config).items()})
    compile_model(Request(tmp_path / "model.pt", "ort-cpu", tmp_path / "bundle", form, verify=False))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 90))
    engine = Engine.load(tmp_path / "bundle")
    state = engine.new_state(2)
    theirs = np.stack([engine.logits(ids[:, t : t + 1], state)[:, 0].argmax(-1) for t in range(90)], axis=1)
    ours = likeliest(load_student(tmp_path / "model.pt"), torch.from_numpy(ids), form).numpy()
    assert (ours == theirs).mean() > 0.97


def test_rows_and_table_of_a_tiny_teacher(tmp_path):
    """One that has learned nothing solves nothing; what a teacher solves, the student answers in every form."""
    plan = Plan(
        items=1, documents=4, lengths=(8, 16),
        teacher=Teacher(d_model=32, n_layer=1, d_state=8, headdim=16, tokens=512, window=64, batch=4),
        student=Student(share=1.0, window=64, batch=4),
    )  # fmt: skip
    rows = recall_rows(tmp_path, [0], plan)
    found = run(rows[:1], tmp_path, lambda line: None)
    assert found["recall/seed-0/teacher"]["pairs"].keys() == {"8", "16"}
    assert recall_table(found, plan).splitlines()[2].startswith("| not run | ")
    (figures,) = (found[row.name] for row in rows[:1])
    figures["copy"] = {"8": 0.96, "16": 0.94}
    student = rows[1].make(tmp_path, found)
    assert student["copy"].keys() == {"8"} and student["copy"]["8"].keys() == FORMS.keys()
    lines = recall_table({**found, "recall/seed-0/student": student}, plan).splitlines()
    assert [line.split(" | ")[:4] for line in lines[2:]] == [["| copy", "8", "1", "96.0 %"]]
    one, other = (questions(Recall(1), plan, "pairs", 16, seed) for seed in (0, 1))
    assert one[0].ids.tolist() != other[0].ids.tolist() and len(one) == 4
