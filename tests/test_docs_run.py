"""docs/trt.md and docs/triton.md are run as they are printed, in a folder with a model.pt: what needs no GPU, no server
and no checkout. The rest is listed with its reason. So is the Python of docs/runtime.md, with a bundle.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from chats import add_template
from commands import run_commands
from documents import ROOT, commands, fenced

from dfssm.model.checkpoint import save_student
from dfssm.targets import get_target

GPU = "needs a GPU"
SDK = "needs NVIDIA's TensorRT"
SERVER = "needs Triton Inference Server"
CHECKOUT = "is of a checkout, not of a user's folder"

NOT_RUN = {
    "docs/trt.md": {
        "dfcompile model.pt --target trt --builder tensorrt": SDK,
        "make test-gpu": CHECKOUT,
        "scripts/gpu_check.sh": CHECKOUT,
        "scripts/gpu_check.sh pack": CHECKOUT,
        "cd build/gpu_check": GPU,
        "dfssm verify batches": GPU,
        "dfssm compare batches": GPU,
        "dfssm bench batches": GPU,
        "trtexec": SDK,
        "polygraphy run bundle/model.engine": GPU,
        "polygraphy run portable/model.onnx --dfssm-ort --load-inputs golden/inputs.json --load-outputs trt.json": GPU,
        "python with_plugins.py": GPU,
        "g++": SDK,
        "./decode": GPU,
    },
    "docs/triton.md": {
        "cd repository && tritonserver": SERVER,
        "dfcompile model.pt --target trt --builder tensorrt": SDK,
    },
}
"""Document -> how a command begins -> why it is not run here. Every other one is."""


def listed(document: str) -> list[tuple[str, str]]:
    """Every command, and the longest entry of NOT_RUN that it begins with, "" for none."""
    known = sorted(NOT_RUN[document], key=len)
    found = commands((ROOT / document).read_text())
    return [(one, next((start for start in reversed(known) if one.startswith(start)), "")) for one in found]


def test_their_commands_run_as_printed(tmp_path):
    for target in ("trt", "ort-cpu"):
        if not (probe := get_target(target).probe()).usable or probe.needs.get("trt"):
            pytest.skip(probe.why_not or "tensorrt_rtx is not installed")
    tensors = {name: torch.from_numpy(array) for name, array in tiny.tensors().items()}
    save_student(tmp_path / "model.pt", tiny.CONFIG, tensors)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    to_run = [command for document in NOT_RUN for command, reason in listed(document) if not reason]
    # Ours first, in one process: most of the time of one is its imports.
    ours = [shlex.split(command) for command in to_run if command.startswith(("dfcompile ", "dfssm "))]
    for words, done in zip(ours, run_commands(ours, tmp_path), strict=True):
        assert done.status == 0 and done.out, f"{shlex.join(words)}\n{done.err}"
    for command in to_run:
        if shlex.split(command) not in ours:
            done = subprocess.run(
                ["bash", "-c", command], cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("document", NOT_RUN)
def test_what_is_not_run_is_in_it(document):
    assert {reason for _, reason in listed(document)} - {""} == set(NOT_RUN[document])


def test_the_python_of_the_runtime_runs_as_printed(cpu_target, tmp_path, monkeypatch, capsys):
    """One piece after the other, as a reader who goes on; `print` is what the first and the last ones do."""
    add_template(tiny.write_bundle(tmp_path / "model-ort-cpu", target=cpu_target, taps=True))
    monkeypatch.chdir(tmp_path)
    pieces = [body for language, body in fenced((ROOT / "docs/runtime.md").read_text()) if language == "python"]
    names = {"prefix_ids": [1, 2, 3], "question_ids": [4, 5]}
    for piece in pieces:
        exec(piece, names)
        if "print(" in piece:
            assert capsys.readouterr().out, piece
    assert (tmp_path / "prefix.state").is_file() and names["hidden"].states.shape[1] == 2
