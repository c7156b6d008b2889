"""Paths and texts that are unlike others: bytes that are not UTF-8, links, devices and pipes."""

import json
import os
import resource
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

from dfssm.base import DfssmError
from dfssm.model.checkpoint import save_student
from dfssm.model.config import Mamba2Config
from dfssm.model.hf_import import save_teacher
from dfssm.model.teacher import Mamba2LM
from dfssm.runtime import Engine
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


@pytest.fixture
def teacher(tmp_path) -> Path:
    end = tiny.CONFIG.eos_token_id
    save_teacher(Mamba2LM(Mamba2Config(end + 1, 32, 1, d_state=8, headdim=8, eos_token_id=end)), tmp_path / "teacher")
    tiny.write_tokenizer(tmp_path / "teacher" / "tokenizer.json")
    return tmp_path / "teacher"


def test_names_need_not_be_utf8_in_training_and_measuring(teacher, tmp_path):
    teacher.rename(tmp_path / LATIN)
    (tmp_path / f"{LATIN}.txt").write_text("hello world or so. " * 60)
    data = ["--data", f"{LATIN}.txt"]
    sizes = "--tokens 16 --batch 1 --total-tokens 16 --held-out 0.1 --rank 2 --threads 1".split()
    done = run_commands(
        [
            ["dfssm", "convert", LATIN, "-o", f"{LATIN}.safetensors", "--rank", "2"],
            ["dfssm", "distill", LATIN, *data, "-o", f"new{LATIN}", *sizes],
            ["dfssm", "eval", "perplexity", f"new{LATIN}/model.pt", *data, "--tokens", "20", "--reference", LATIN],
        ],
        tmp_path,
    )
    assert [(result.status, result.err) for result in done if result.status] == []
    assert "caf?" in (tmp_path / f"new{LATIN}" / "report.html").read_text()


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
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    assert run(tiny_bundle, pipe).returncode == 0
    reader.join(timeout=60)
    assert stat.S_ISFIFO(pipe.stat().st_mode) and len(read) == 1
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


@pytest.fixture
def small_files():
    """No file can be larger than 80 kB: a disk that is full, for one user alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_student_that_does_not_fit_the_disk_is_one_line(name, small_files, invoke, tmp_path):
    """safetensors takes its file away when it fails, and so makes room: there is no other sign of a full disk."""
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 264, "d_model": 128, "n_layer": 8, "headdim": 8}))
    with pytest.raises(DfssmError) as caught:
        invoke("init", "--config", tmp_path / "config.json", "-o", tmp_path / name, "--rank", 2)
    assert str(caught.value) == f"cannot write {tmp_path / name}: File too large; choose another place"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_state_that_several_threads_save_is_whole(tiny_bundle, tmp_path):
    """As do containers that share a volume: in each of them the process has the same id."""
    engine, path = Engine.load(tiny_bundle, threads=1), tmp_path / "a.state"
    state = engine.new_state()
    engine.prefill([1, 2], state)
    state.save(path)
    errors: list[Exception] = []

    def call(function, *arguments):
        try:
            for _ in range(50):
                function(*arguments)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(state.save, path)) for _ in range(4)]
    threads.append(threading.Thread(target=call, args=(State.load, path)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and [path.name for path in tmp_path.iterdir()] == ["a.state"]


@pytest.mark.skipif(not os.access("/proc/kmsg", os.R_OK), reason="only root may read /proc/kmsg, whose reads wait")
def test_no_command_waits_for_a_file_of_the_kernel(tiny_bundle, teacher, tmp_path):
    for name in ("a", "a.pt", "a.safetensors", "a.json", "a.txt", "a.jsonl", "a.parquet", "a.state"):
        (tmp_path / name).symlink_to("/proc/kmsg")
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    save_student(tmp_path / "model.pt", tiny.CONFIG, {k: torch.from_numpy(v) for k, v in tiny.tensors().items()})
    for name in ("config.json", "model.safetensors"):
        shutil.copytree(teacher, tmp_path / f"without-{name}")
        (tmp_path / f"without-{name}" / name).unlink()
        (tmp_path / f"without-{name}" / name).symlink_to("/proc/kmsg")
    for name in ("manifest.json", "model.onnx"):
        shutil.copytree(tiny_bundle, tmp_path / f"without-{name}")
        (tmp_path / f"without-{name}" / name).unlink()
        (tmp_path / f"without-{name}" / name).symlink_to("/proc/kmsg")
    to = ["--target", "onnx", "-o", "new"]
    done = run_commands(
        [
            ["dfssm", "run", "a", "-p", "a"],
            ["dfssm", "run", "bundle", "--load-state", "a.state"],
            *(["dfssm", "run", f"without-{name}", "-p", "a"] for name in ("manifest.json", "model.onnx")),
            *(["dfcompile", f"a.{suffix}", *to] for suffix in ("pt", "safetensors")),
            ["dfcompile", "model.pt", "--tokenizer", "a.json", *to],
            ["dfssm", "inspect", "a.pt"],
            *(["dfssm", "convert", f"without-{name}", "-o", "new.pt"] for name in ("config.json", "model.safetensors")),
            ["dfssm", "init", "--config", "a.json", "-o", "new.pt"],
            ["dfssm", "serve", "bundle", "--port", "0", "--api-key-file", "a"],
            *(["dfssm", "eval", "perplexity", "bundle", "--data", f"a.{kind}"] for kind in ("txt", "jsonl", "parquet")),
        ],
        tmp_path,
    )
    assert [(result.status, result.err.count("\n")) for result in done] == [(1, 1)] * len(done), done
