"""The rows of text at a tiny size."""

import hashlib

import numpy as np

from dfssm.eval.fair.rows import run
from dfssm.eval.fair.text import Plan, text_rows, text_table
from dfssm.eval.fair.train import Student, Teacher
from dfssm.model.hf_import import load_teacher

SMALL = Plan(
    vocab=288,
    measured=200,
    # A rate at which so few tokens teach it something: else students differ from it by less than by the machine.
    teacher=Teacher(d_model=32, n_layer=1, d_state=8, headdim=16, tokens=0, window=32, batch=4, lr=2e-2),
    students=(Student(rank=2), Student(rank=2, share=0.2, window=32, batch=2)),
)


def test_a_text_is_read_once_and_recorded(tmp_path):
    words = np.random.default_rng(0).choice("all the words of a text that is small".split(), 4000)
    file = tmp_path / "a.txt"
    file.write_text(" ".join(words))
    rows = text_rows(tmp_path / "fair", [0], [str(file)], SMALL)
    source = {"name": "a.txt", "bytes": len(file.read_bytes()), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert [row.setup["text"] for row in rows] == [[source]] * 3
    found = run(rows, tmp_path / "fair", lambda line: None)
    teacher, data_free, student = found.values()
    model = load_teacher(tmp_path / "fair/text/seed-0/teacher/teacher")
    assert model.config.ngroups == 2 and teacher["weights"] == sum(p.numel() for p in model.parameters())
    assert teacher["ratio"] == 1.0 and teacher["kl"] == 0.0
    # Of windows, as the teacher's, all but the two at the ends are read.
    assert 0.2 * teacher["tokens"] <= student["tokens"] <= 0.2 * (teacher["tokens"] + 2 * 32)
    assert student["kl"] < data_free["kl"]
    lines = text_table(found, SMALL).splitlines()
    assert lines[2].startswith(f"| teacher | 1 | {teacher['tokens']:,} |") and "not run" not in lines[4]
    assert text_table({}, SMALL).count("not run") == 3 * 7
    assert text_rows(tmp_path, [0], []) == []
