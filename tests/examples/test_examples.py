"""The training examples at a tiny size: teacher, its schedule, resume, refusals, student; and the demo model's card."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from examples_as_modules import EXAMPLES, load
from tokenizers import Tokenizer

from dfssm.base.errors import DfssmError
from dfssm.model.hf_import import load_teacher
from dfssm.model.student import load_student

SHAPE = "--vocab-size 300 --d-model 32 --layers 1 --d-state 8 --headdim 16".split()
SMALL = "--batch 4 --tokens 32 --held-out 0.05 --threads 1".split()
STORY = "The cat sat on the mat. The dog sat by the door, and the cat ran."
BOOK = "A book without a mark between its parts — one line.\n"


@pytest.fixture(scope="module")
def example():
    """01_train_teacher.py as a module."""
    return load("01_train_teacher.py")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "stories.txt").write_text(f"{STORY}\n<|endoftext|>\n" * 150)
    (folder / "café.txt").write_text(BOOK * 100)
    (folder / "more.jsonl").write_text((json.dumps({"text": STORY}) + "\n") * 20)
    return folder


def train(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLES / "01_train_teacher.py"), *SHAPE, *SMALL, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def teacher(text, tmp_path_factory):
    """A teacher whose learning rate is too small for its loss to fall: the four measurements at 2 to 8 end its run."""
    folder = tmp_path_factory.mktemp("teacher")
    result = train("--data", text, "-o", folder, "--every", 2, "--lr", 1e-7)
    assert result.returncode == 0, result.stderr
    assert "10 steps, 1,280 tokens" in result.stdout and "held-out perplexity" in result.stdout
    return folder


def held_out(folder) -> list[tuple[int, float]]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(line["step"], line["held_out"]) for line in lines if "held_out" in line]


def test_the_teacher_ends_a_quarter_after_its_loss_stopped_and_is_complete(teacher):
    assert [step for step, _ in held_out(teacher)] == [2, 4, 6, 8, 10]
    model = load_teacher(teacher)
    tokenizer = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    assert model.config.vocab_size % 32 == 0 and model.config.vocab_size >= tokenizer.get_vocab_size()
    assert model.config.eos_token_id == tokenizer.token_to_id("<|endoftext|>") == 0
    assert tokenizer.decode(tokenizer.encode("é 😀").ids) == "é 😀"
    # All of the text is in the token file: each document once, followed by the token that ends it.
    ids = np.fromfile(teacher / "tokens" / "tokens.u32", np.uint32)
    assert (ids == 0).sum() == 150 + 1 + 20
    # Untrained it gives every token about the same chance; the logged loss is that of the folder.
    held = json.loads((teacher / "tokens" / "tokens.json").read_text())["held_out"]
    rows = torch.from_numpy(ids[-held:].astype(np.int64)).unfold(0, 33, 32)
    with torch.no_grad():
        loss = F.cross_entropy(model(rows[:, :-1])[0].transpose(1, 2), rows[:, 1:])
    assert held_out(teacher)[-1][1] == pytest.approx(float(loss), rel=1e-5)  # sums of fp32 in another order


def test_a_resumed_run_ends_where_an_unbroken_one_does(teacher, text, tmp_path):
    """Without its last checkpoint it is a run that was killed at step 9; the turn at step 8 is not forgotten."""
    again = tmp_path / "again"
    shutil.copytree(teacher, again)
    shutil.rmtree(again / "checkpoints" / "step-000010")
    for name in ("model.safetensors", "config.json"):
        (again / name).unlink()
    result = train("--data", text, "-o", again, "--every", 2, "--lr", 1e-7, "--resume")
    assert result.returncode == 0, result.stderr
    assert held_out(again) == held_out(teacher)
    assert (again / "model.safetensors").read_bytes() == (teacher / "model.safetensors").read_bytes()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("longest", [1, 3, 40, 1000])
def test_the_schedule_is_the_plain_loop(example, seed, longest):
    """Against the loop written out: constant after a warm-up, then a straight line to zero."""
    every, losses = 5, 3 - np.random.default_rng(seed).uniform(-1e-3, 3e-3, 1000).cumsum()
    plateau = example.Plateau(2e-3, 7, longest)
    step, best, bad, decay_from, end, turned = 0, math.inf, 0, None, None, None
    while True:
        if step == longest and decay_from is None:
            decay_from, end = step, step + max(1, step // 4)
        assert step < plateau.steps() or step == end == plateau.steps()
        if step == end:
            break
        rate = 2e-3 * min(1, (step + 1) / 7)
        if decay_from is not None:
            rate, turned = 2e-3 * (1 - (step - decay_from) / (end - decay_from)), True
        assert plateau.rate(step) == pytest.approx(rate, rel=1e-9)
        step += 1
        if step % every == 0:
            loss = losses[step // every]
            plateau.measured(step, loss)
            if decay_from is None:
                best, bad = (loss, 0) if loss < best - 1e-3 else (best, bad + 1)
                if bad == 3:
                    decay_from, end = step, step + step // 4
    assert turned and plateau.rate(step) == 0


def test_the_tokenizer_does_not_see_the_held_out_end(example, tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 10)  # one document
    (tmp_path / "b.txt").write_text("<|endoftext|>".join("abcde"))
    found = list(example.beginnings([tmp_path / "a.txt", tmp_path / "b.txt"], 0.2))
    assert found == ["0123456789" * 8, *"abcd"]
    assert list(example.beginnings([tmp_path / "b.txt"], 0.0)) == list("abcde")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nowhere"], "nowhere does not exist: give --data text"),
        (["--data", "{teacher}/tokens"], "no file in it ends in .txt"),
        (["--data", "{text}", "--resume"], "nothing to resume from"),
        (["--data", "{text}", "--tokens", "100000"], "two windows of 100,000 need 200,000; give more --data or fewer"),
        (["--data", "{text}", "--tokens", "1000"], "a window of 1,000 needs 1,001; give more --data or --held-out"),
        (["--data", "{text}", "-o", "{teacher}"], "holds a run already; go on with --resume"),
        (["--data", "{text}", "-o", "{teacher}", "--resume", "--every", "2"], "not 0.002; resume with"),
        (["--data", "{text}", "-o", "{teacher}", "--resume", "--d-model", "64"], "with d_model 32, not 64"),
        (["--data", "{text}", "--tokenizer", "{text}/stories.txt"], "stories.txt: is no tokenizer.json"),
        (["--data", "{text}", "--tokenizer", "{bare}"], "has no token <|endoftext|>"),
    ],
)
def test_refusals(example, teacher, text, tmp_path, arguments, message):
    bare = tmp_path / "bare.json"
    bare.write_text((teacher / "tokenizer.json").read_text().replace("endoftext", "end"))
    arguments = [a.format(teacher=teacher, text=text, bare=bare) for a in arguments]
    with pytest.raises(DfssmError, match=re.escape(message)):
        CliRunner().invoke(
            example.train_teacher, [*SHAPE, *SMALL, "-o", str(tmp_path / "o"), *arguments], catch_exceptions=False
        )


def test_a_refusal_is_one_line(tmp_path):
    result = train("--data", tmp_path / "nowhere", "-o", tmp_path)
    assert result.returncode == 1 and not list(tmp_path.iterdir())
    assert result.stderr.startswith("01_train_teacher.py: error: ") and result.stderr.count("\n") == 1


def test_a_student_is_distilled_compiled_and_writes(cpu_target, teacher, text, tmp_path):
    if cpu_target != "ort-cpu":
        pytest.skip("the library of ort-cpu is not built")
    options = [*SMALL, "--total-tokens", "512", "--data", str(text)]
    result = subprocess.run(
        [str(EXAMPLES / "02_distill.sh"), str(teacher), str(tmp_path), *options],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr.decode()
    assert load_student(tmp_path / "model.pt").config.rank == 2
    assert json.loads((tmp_path / "result.json").read_text())["tokens"] == 512
    assert (tmp_path / "bundle" / "manifest.json").is_file()


@torch.no_grad()
def test_demo_model_is_the_one_of_its_card():
    demo = EXAMPLES / "demo"
    assert (demo / "model.pt").stat().st_size <= 10e6
    student, tokenizer = load_student(demo / "model.pt"), Tokenizer.from_file(str(demo / "tokenizer.json"))
    assert tokenizer.get_vocab_size() <= student.config.vocab_size
    card = (demo / "README.md").read_text()
    scaffold = 8 * sum(t.numel() for name, t in student.state_dict().items() if name.endswith("bits"))
    assert f"{scaffold:,}" in card
    story = (
        "Once upon a time, there was a little girl named Lily. She had a small red ball. One day, Lily "
        "went to the park with her mom. She saw a big dog. The dog wanted to play with the ball."
    )
    ids = torch.tensor(tokenizer.encode(story).ids)
    loss = F.cross_entropy(student(ids[None, :-1])[0][0], ids[1:])
    # A sentence of the kind it was trained on: an untrained model is at the size of the vocabulary, 4096.
    assert math.exp(loss) < 30
