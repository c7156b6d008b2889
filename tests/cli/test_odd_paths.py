"""Paths and texts that are unlike others: bytes that are not UTF-8, links, devices and pipes."""

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny
import torch
from commands import run_commands

from dfssm.model.checkpoint import save_student
from dfssm.runtime.state import State

LATIN = os.fsdecode(b"caf\xe9")


@pytest.fixture
def folder(tiny_bundle, tmp_path) -> Path:
    """A bundle, a student in both formats and their tokenizer, all with names that are not UTF-8."""
    shutil.copytree(tiny_bundle, tmp_path / LATIN)
    tiny.write_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").rename(tmp_path / f"{LATIN}.json")
    tensors = {name: torch.from_numpy(array) for name, array in tiny.tensors().items()}
    for suffix in ("pt", "safetensors"):
        save_student(tmp_path / f"{LATIN}.{suffix}", tiny.CONFIG, tensors)
    return tmp_path


def test_names_need_not_be_utf8(folder, cpu_target):
    new = f"new{LATIN}"
    tokenizer = ["--tokenizer", f"{LATIN}.json"]
    compiled = [
        ["dfcompile", f"{LATIN}.{suffix}", "--target", cpu_target, "-o", f"{new}-{suffix}", *tokenizer]
        for suffix in ("pt", "safetensors")
    ]
    run = ["dfssm", "run", f"{new}-pt", "-n", "3", "--json"]
    done = run_commands(
        [
            *compiled,
            [*run, "-p", "a", "--save-state", f"{LATIN}.state"],
            [*run, "--load-state", f"{LATIN}.state"],
            ["dfssm", "inspect", LATIN, "--json"],
            ["dfssm", "inspect", f"{LATIN}.pt", "--json"],
            ["dfssm", "compare", f"{new}-safetensors", f"{LATIN}.pt", "--tokens", "8", "--json"],
        ],
        folder,
    )
    assert [(result.status, result.err) for result in done if result.status] == []
    assert json.loads(done[4].out)["path"] == LATIN and json.loads(done[6].out)["passed"]


@pytest.mark.parametrize("options", [["-p", LATIN], ["-p", "a", "--stop", LATIN]])
def test_a_text_that_is_not_utf8_is_one_line_before_anything_is_loaded(folder, options):
    (folder / LATIN / "model.onnx.data").unlink()
    (done,) = run_commands([["dfssm", "run", LATIN, *options]], folder)
    assert (done.status, done.out) == (1, "")
    assert done.err == r"dfssm: error: the text 'caf\udce9' is not UTF-8: convert it, or give its token ids" + "\n"


def run(bundle: Path, state: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dfssm.cli.main", "run", bundle, "-p", "a", "-n", "3", "--save-state", state]
    return subprocess.run(command, capture_output=True, timeout=120)


def test_a_state_goes_through_a_pipe_or_a_device_and_where_a_link_points(tiny_bundle, tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    assert run(tiny_bundle, pipe).returncode == 0
    reader.join()
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    (tmp_path / "elsewhere").mkdir()
    link.symlink_to("elsewhere/a.state")
    assert run(tiny_bundle, link).returncode == 0
    assert link.is_symlink() and not (tmp_path / "elsewhere/a.state").is_symlink()
    (tmp_path / "read").write_bytes(read[0])
    for path in (link, tmp_path / "read"):
        assert State.load(path).tokens.tolist() == [4]
    device = tmp_path / "null"
    device.symlink_to("/dev/null")
    assert run(tiny_bundle, device).returncode == 0
    assert device.is_symlink() and stat.S_ISCHR(device.stat().st_mode)
    done = run(tiny_bundle, Path("/dev/stdout"))
    assert done.returncode == 0 and b"dfssm-state" in done.stdout, done.stderr
    refused = run(tiny_bundle, tmp_path / "elsewhere")
    assert refused.returncode == 1 and b"it is a folder; give the name of a file" in refused.stderr
