"""Some file events of each command; `make test-file-events` tries all of them, on three kinds of file systems."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if not compiler:
        pytest.skip("no C compiler: as root, apt-get install gcc")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run(
        [compiler, "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, HERE / "shim.c", "-ldl"], check=True
    )
    return library


def drive(shim, folder, *options) -> str:
    environment = os.environ | {"LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "driver.py", folder, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_command_that_is_killed_or_finds_the_disk_full(shim, tmp_path):
    names = ("dfcompile", "convert", "run --save-state")
    said = drive(shim, tmp_path, "--sample", "2", *(word for name in names for word in ("--command", name)))
    assert said.splitlines()[-1].startswith("0 faults") and said.count("kill: ") == 4


def test_the_shim_is_not_blind(shim, tmp_path):
    """A writer that knows nothing of drafts is caught: half of its file is there, then nothing of its error."""
    code = """
import ctypes, os, sys
shim = ctypes.CDLL(None)
shim.file_events_arm(sys.argv[1].encode(), ctypes.c_long(int(sys.argv[2])), int(sys.argv[3]))
with open(sys.argv[1] + "/a", "wb", buffering=0) as file:
    file.write(b"x" * 100)
os.rename(sys.argv[1] + "/a", sys.argv[1] + "/b")
"""
    found = []
    for event, full in ((1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (3, 1), (4, 1)):
        for name in ("a", "b"):
            (tmp_path / name).unlink(missing_ok=True)
        command = [sys.executable, "-c", code, tmp_path, str(event), str(full)]
        done = subprocess.run(command, env=os.environ | {"LD_PRELOAD": str(shim)}, capture_output=True, text=True)
        left = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
        found.append((done.returncode, "No space left" in done.stderr, left))
    killed = [(-9, False, {}), (-9, False, {"a": 50}), (-9, False, {"a": 100})]
    assert found[:3] == killed
    assert found[3:] == [(1, True, {}), (1, True, {"a": 0}), (1, True, {"a": 100}), (0, False, {"b": 100})]
