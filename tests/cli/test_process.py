"""`dfssm` as a process: what goes where, and how it ends."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

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
