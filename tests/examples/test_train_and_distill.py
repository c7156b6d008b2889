"""The two training examples at a tiny size, as commands: teacher, student, resume, and refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfssm.model.hf_import import load_teacher
from dfssm.model.student import load_student

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # the examples are scripts; what they share is imported as they import it

from corpus import load_tokenizer, perplexity  # noqa: E402

SMALL = "--steps 12 --batch 4 --tokens 32 --save-every 5 --threads 1".split()


def run(script: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text, and a teacher trained on it for a moment."""
    folder = tmp_path_factory.mktemp("examples")
    story = "The cat sat on the mat. The dog sat by the door, and the cat ran.\n<|endoftext|>\n"
    (folder / "text").mkdir()
    (folder / "text" / "stories.txt").write_text(story * 150)
    (folder / "text" / "café.txt").write_text("A book without a mark between its parts — one line.\n" * 100)
    shape = "--vocab-size 300 --d-model 32 --layers 1 --d-state 8 --headdim 16".split()
    result = run("01_train_teacher.py", "--data", folder / "text", "-o", folder / "teacher", *shape, *SMALL)
    assert result.returncode == 0, result.stderr
    assert "held-out perplexity" in result.stdout
    return folder


def distill(folder, output, *more):
    paths = ("--teacher", folder / "teacher", "--data", folder / "text", "-o", output)
    return run("02_distill_student.py", *paths, "--prompt", "The cat", *SMALL, *more)


def test_student_of_the_teacher_ships_with_its_numbers(folder, tmp_path):
    result = distill(folder, tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    vocabulary = load_teacher(folder / "teacher").config.vocab_size
    assert all(1 < value < 2 * vocabulary for value in report["perplexity"].values())
    assert report["tokens"] == 12 * 4 * 32 and report["sample"].startswith("The cat")
    student = load_student(tmp_path / "model.pt")
    assert student.config.rank == 2
    assert student(torch.tensor([[1, 2]]))[0].isfinite().all()
    tokenizers = [path / "tokenizer.json" for path in (tmp_path, folder / "teacher")]
    assert len({path.read_text() for path in tokenizers}) == 1


def test_resumed_run_ends_where_an_unbroken_one_does(folder, tmp_path):
    """The checkpoint of step 10 is put back: the last two steps again give the same bits."""
    assert distill(folder, tmp_path / "a").returncode == 0
    assert torch.load(tmp_path / "a" / "training.pt", weights_only=True)["step"] == 12
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import training\n"
        "original = training.atomic_write\n"
        "def stop_at_ten(path, write):\n"
        "    original(path, write)\n"
        "    if training.torch.load(path, weights_only=True)['step'] == 10: raise SystemExit(0)\n"
        "training.atomic_write = stop_at_ten\n"
        "import runpy; sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    arguments = ("--teacher", folder / "teacher", "--data", folder / "text", "-o", tmp_path / "b", *SMALL)
    stopped = subprocess.run(
        [sys.executable, "-c", script, str(EXAMPLES), str(EXAMPLES / "02_distill_student.py"),
         *map(str, arguments)], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert stopped.returncode == 0, stopped.stderr
    assert torch.load(tmp_path / "b" / "training.pt", weights_only=True)["step"] == 10
    assert distill(folder, tmp_path / "b", "--resume").returncode == 0
    a, b = (load_student(tmp_path / name / "model.pt").state_dict() for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--data", "{folder}/teacher"], "no *.txt file"),
        (["--data", "{folder}/text", "--resume"], "nothing to resume from"),
        (["--data", "{folder}/text", "--tokens", "100000"], "give more --data"),
    ],
)
def test_refusals_are_one_line(folder, tmp_path, arguments, message):
    arguments = [a.format(folder=folder) for a in arguments]
    (tmp_path / "tokenizer.json").write_text((folder / "teacher" / "tokenizer.json").read_text())
    result = run("01_train_teacher.py", *SMALL, "-o", tmp_path, *arguments)
    assert result.returncode == 1 and message in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@torch.no_grad()
def test_demo_model_is_the_one_of_its_card():
    demo = EXAMPLES / "demo"
    assert (demo / "model.pt").stat().st_size <= 10e6
    student, tokenizer = load_student(demo / "model.pt"), load_tokenizer(demo / "tokenizer.json")
    assert tokenizer.get_vocab_size() <= student.config.vocab_size
    card = (demo / "README.md").read_text()
    scaffold = 8 * sum(t.numel() for name, t in student.state_dict().items() if name.endswith("bits"))
    assert f"{scaffold:,}" in card
    story = (
        "Once upon a time, there was a little girl named Lily. She had a small red ball. One day, Lily "
        "went to the park with her mom. She saw a big dog. The dog wanted to play with the ball."
    )
    ids = torch.tensor(tokenizer.encode(story).ids)
    # A sentence of the kind it was trained on: an untrained model is at the size of the vocabulary, 4096.
    assert perplexity(lambda x: student(x)[0], ids, len(ids) - 1) < 30
