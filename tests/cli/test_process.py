"""`dfssm` as a process: what goes where, and how it ends."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

DFSSM = [sys.executable, "-c", "from dfssm.cli.main import main; main()"]


def dfssm(*arguments, **options):
    return subprocess.run([*DFSSM, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="module")
def endless(cpu_target, tmp_path_factory):
    """A bundle without an end-of-text token, which a random model would draw sooner or later."""
    config = dataclasses.replace(tiny.CONFIG, eos_token_id=None)
    return tiny.write_bundle(tmp_path_factory.mktemp("endless") / "bundle", config, target=cpu_target)


def test_json_is_all_of_stdout(tiny_bundle):
    done = dfssm("run", tiny_bundle, "-p", "hello", "-n", 3, "--json")
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout)["new_tokens"] == 3


@pytest.mark.parametrize("command", ["run", "bench", "inspect"])
def test_a_users_error_is_one_line_and_1(command, tmp_path):
    more = ["-p", "a"] if command == "run" else []
    done = dfssm(command, tmp_path / "nothing", *more, "--json")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("dfssm: error: ") and done.stderr.count("\n") == 1


def test_wrong_usage_is_2():
    done = dfssm("run", "--no-such-option")
    assert done.returncode == 2 and done.stdout == "" and "No such option" in done.stderr
    assert dfssm("nonsense").returncode == 2


def test_help_waits_for_nothing_heavy():
    code = (
        "import sys\nfrom dfssm.cli.main import dfssm\n"
        "dfssm.main(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'polygraphy', 'transformers'}\n"
        "print(heavy & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set()"


def test_a_bug_keeps_its_traceback(tiny_bundle):
    code = (
        "from dfssm.cli.main import main\nfrom dfssm.runtime import Engine\n"
        "Engine.generate = None\n"
        f"main(['run', {str(tiny_bundle)!r}, '-p', 'a'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "TypeError" in done.stderr


def test_a_closed_pipe_is_quiet(endless):
    process = subprocess.Popen(
        [*DFSSM, "run", str(endless), "-p", "hello", "-n", "100000", "--temperature", "3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.read(1)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=60) == 1 and error == b""


def test_ctrl_c_is_130_and_leaves_no_traceback(endless, tmp_path):
    state = tmp_path / "a.state"
    process = subprocess.Popen(
        [*DFSSM, "run", str(endless), "-p", "hello", "-n", "1000000", "--temperature", "3"]
        + ["--save-state", str(state)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts what goes to its background, as these tests may, with the signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.read(1)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in error
    assert os.listdir(tmp_path) == []


def test_a_terminal_that_lacks_a_character_goes_on(tiny_bundle):
    done = dfssm(
        *("run", tiny_bundle, "-p", "hello", "-n", 60, "--temperature", 3, "--seed", 1),
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
    )
    assert done.returncode == 0 and "?" in done.stdout


def test_a_full_disk_behind_stdout_is_one_line(tiny_bundle):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*DFSSM, "inspect", tiny_bundle], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "the output cannot be written (No space left on device)" in done.stderr


def test_a_closed_stdout_is_no_bug(tiny_bundle):
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *DFSSM, "inspect", str(tiny_bundle)], stderr=subprocess.PIPE, text=True
    )
    assert "Traceback" not in done.stderr


def test_nothing_is_written_below_home(tiny_bundle, tmp_path):
    """ONNX Runtime 1.32 keeps an identity of the machine there, for its telemetry."""
    (tmp_path / "home").mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    done = dfssm("run", tiny_bundle, "-p", "a", "-n", 2, env=environment | {"HOME": str(tmp_path / "home")})
    assert done.returncode == 0 and os.listdir(tmp_path / "home") == []


def test_what_is_read_is_not_written_over(tiny_bundle, tmp_path):
    teacher = shutil.copytree(Path(__file__).parents[2] / "examples/demo/teacher", tmp_path / "teacher")
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (tmp_path / "link").symlink_to(teacher / "model.safetensors")
    before = {path: path.read_bytes() for folder in (teacher, bundle) for path in folder.iterdir() if path.is_file()}
    for arguments in (
        ["convert", teacher, "-o", teacher / "model.safetensors"],
        ["convert", teacher, "-o", tmp_path / "link"],
        ["distill", teacher, "--data", teacher / "held_out.txt", "-o", teacher],
        ["run", bundle, "-p", "a", "-n", 1, "--save-state", bundle / "manifest.json"],
    ):
        done = dfssm(*arguments)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "cannot write" in done.stderr, arguments
    assert {path: path.read_bytes() for path in before} == before
