"""README.md is run as it is printed: its commands and its Python, in order, on the demo model, in one folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT, commands, fenced, in_block

README = (ROOT / "README.md").read_text()

CHECKOUT = "sets up a checkout, which this is: .ci/run starts it on a clean machine"
INDEX = "asks a package index: .ci/clean_machine installs the wheel in a bare environment"
SIZE = "1.3B: minutes, and gigabytes of memory"

NOT_RUN = {
    "make demo": CHECKOUT,
    "make test": CHECKOUT,
    "make wheels": CHECKOUT,
    "source .venv/bin/activate": CHECKOUT,
    "pip install dist/dfssm-*.whl": INDEX,
    "scripts/install_torch.sh python3": INDEX,
    'pip install "$(echo dist/dfssm-*.whl)[compile]"': INDEX,
    "dfssm serve demo": "runs until it is stopped: tests/serve",
    "dfssm distill TEACHER --data text/ -o student": "trains on 32 million tokens; tests/cli/test_distill.py, on fewer",
    "dfssm init --preset mamba2-1.3b --seed 0 -o m.pt": SIZE,
    "dfcompile m.pt --target ort-cpu -o m-cpu": SIZE,
    "dfssm bench m-cpu --prompt 512 --peer llama.cpp --peer stock-ort": SIZE,
}
"""Command -> why it is not run here. Every other one is."""

QUESTION = {
    "piqa": {"query": "Question: Cool soup.\n", "choices": ["Blow on it.", "Heat it."], "gold": 0},
    "boolq": {"query": "Passage: Dogs -- Dogs bark.\nQuestion: do dogs bark?", "choices": ["no", "yes"], "gold": 1},
}


def steps() -> list[list[str]]:
    """The words that start each command and each piece of Python, in the order of the README."""
    found = []
    for language, body in fenced(README):
        assert language in ("", "python", "text"), f"a block of {language}: how is it run?"
        if language == "python":
            found.append([sys.executable, "-c", body])
        elif not language:
            found += [["bash", "-c", command] for command in in_block(body) if command not in NOT_RUN]
    return found


@pytest.fixture
def folder(tmp_path) -> Path:
    """What the README's lines name, as small as it goes: the examples, a teacher, text, questions."""
    examples = shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    held_out = examples / "demo/teacher/held_out.txt"
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(held_out.read_text()[:12000])
    held_out.write_text(held_out.read_text()[:4000])
    (tmp_path / "TEACHER").symlink_to(examples / "demo/teacher")
    (tmp_path / "questions").mkdir()
    for task, question in QUESTION.items():
        (tmp_path / "questions" / f"{task}.jsonl").write_text(json.dumps(question) + "\n")
    return tmp_path


@pytest.mark.slow
def test_every_line_runs_as_printed(folder):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = [ROOT / "scripts/clean_env.sh", "env", f"PATH={path}", "HF_HUB_OFFLINE=1"]
    for step in steps():
        done = subprocess.run(
            [*environment, *step], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0 and done.stdout, f"{step[-1]}\nends with {done.returncode}:\n{done.stderr}"


def test_what_is_not_run_is_in_the_readme():
    assert sorted(set(NOT_RUN) - set(commands(README))) == []
