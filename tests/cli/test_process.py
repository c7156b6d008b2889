"""`dfssm` as a process: what goes where, and how it ends."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import tiny
import torch

from dfssm.cli.process import errors_in_one_line
from dfssm.model.checkpoint import save_student

DFSSM = [sys.executable, "-c", "from dfssm.cli.entry import dfssm; dfssm()"]
DFCOMPILE = [sys.executable, "-c", "from dfssm.cli.entry import dfcompile; dfcompile()"]
EXAMPLE = Path(__file__).parents[2] / "examples" / "01_train_teacher.py"


def dfssm(*arguments, **options):
    return subprocess.run([*DFSSM, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="module")
def endless(cpu_target, tmp_path_factory):
    """A bundle without an end-of-text token, which a random model would draw sooner or later."""
    config = dataclasses.replace(tiny.CONFIG, eos_token_id=None)
    return tiny.write_bundle(tmp_path_factory.mktemp("endless") / "bundle", config, target=cpu_target)


def test_a_warning_is_one_line_on_stderr(capsys):
    before = warnings.showwarning
    with errors_in_one_line("dfssm"):
        warnings.warn("never\nverified", RuntimeWarning, stacklevel=1)
    assert capsys.readouterr() == ("", "dfssm: warning: never verified\n") and warnings.showwarning is before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 64.0 GiB for an array"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_is_one_line(error, capsys):
    with pytest.raises(SystemExit) as end, errors_in_one_line("dfssm"):
        raise error
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.count("\n") == 1
    assert said == f"dfssm: error: there is too little memory ({error}): free some, or ask for less\n"


def test_no_folder_for_temporary_files_is_one_line(tmp_path, monkeypatch, capsys):
    """Some libraries need one to be imported."""
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    with pytest.raises(SystemExit) as end, errors_in_one_line("dfssm"):
        tempfile.gettempdir()
    said = "there is no folder for temporary files that can be written to: set TMPDIR to one"
    assert (end.value.code, capsys.readouterr().err) == (1, f"dfssm: error: {said}\n")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ImportError("no module named x")])
def test_an_error_that_is_none_of_memory_is_raised(error):
    with pytest.raises(type(error)), errors_in_one_line("dfssm"):
        raise error


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
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "dfssm run: error: No such option '--no-such-option': see dfssm run --help\n"
    assert dfssm("nonsense").returncode == 2


@pytest.mark.parametrize(
    "command, option",
    [("run b", "-p"), ("run b", "--save-state"), ("eval perplexity b", "--data"), ("bench", "--threads")],
)
def test_an_option_without_its_value_names_its_command(command, option):
    done = dfssm(*command.split(), option)
    command = "dfssm " + command.removesuffix(" b")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{command}: error: Option '{option}' requires an argument: see {command} --help\n"


def test_too_many_open_files_are_named_as_such(tiny_bundle):
    """A bundle has five files, each open while it is checked; copying it again would not help."""
    messages = set()
    for limit in range(7, 12):
        set_limit = lambda n=limit: resource.setrlimit(resource.RLIMIT_NOFILE, (n, n))  # noqa: E731
        done = dfssm("inspect", tiny_bundle, preexec_fn=set_limit)
        messages |= {done.stderr.replace(str(limit), "N")} if done.returncode else set()
    remedy = "raise the limit, with ulimit -n 1024"
    assert messages == {f"dfssm: error: too many files are open, N may be: {remedy}\n"}


@pytest.mark.parametrize("command", [[], ["eval"]])
def test_no_command_is_the_help(command):
    done = dfssm(*command)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == dfssm(*command, "--help").stdout


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


# A file at whose writing the process waits; what it prints, it does first.
WAITING = """
import sys, time
from dfssm.cli.process import errors_in_one_line
from dfssm.base.files import new_folder

with errors_in_one_line("wait"), new_folder(sys.argv[1], replace=True) as draft:
    (draft / "a").write_text("new")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("ignored", [False, True])
def test_an_end_by_signal_leaves_no_draft(number, ignored, tmp_path):
    handler = signal.SIG_IGN if ignored else signal.SIG_DFL  # nohup ignores SIGHUP
    code = WAITING.replace("60", "0.5") if ignored else WAITING
    command = [sys.executable, "-c", code, tmp_path / "target"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=lambda: signal.signal(number, handler))
    assert process.stdout.readline() == b"writing\n" and len(os.listdir(tmp_path)) == 1
    process.send_signal(number)
    assert process.wait(timeout=60) == (0 if ignored else 128 + number)
    assert os.listdir(tmp_path) == (["target"] if ignored else [])


def test_a_terminal_that_lacks_a_character_goes_on(tiny_bundle):
    done = dfssm(
        *("run", tiny_bundle, "-p", "hello", "-n", 60, "--temperature", 3, "--seed", 1),
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        encoding="latin-1",
    )
    assert done.returncode == 0 and "?" in done.stdout


@pytest.fixture(scope="module")
def printing(tiny_bundle, tmp_path_factory):
    """What each kind of command prints: a result as text and as JSON, help, the version, text that streams."""
    folder = tmp_path_factory.mktemp("printing")
    model = folder / "model.pt"
    tensors = {name: torch.from_numpy(array) for name, array in tiny.tensors().items()}
    save_student(model, tiny.CONFIG, tensors)
    compiled = [model, "--target", "onnx", "--no-verify", "--force", "-o", folder / "bundle"]
    return {
        "inspect": [*DFSSM, "inspect", tiny_bundle],
        "json": [*DFSSM, "inspect", tiny_bundle, "--json"],
        "help": [*DFSSM, "bench", "--help"],
        "version": [*DFSSM, "--version"],
        "run": [*DFSSM, "run", tiny_bundle, "-p", "hello", "-n", 3],
        "dfcompile": [*DFCOMPILE, *compiled],
        "dfcompile json": [*DFCOMPILE, *compiled, "--json"],
        "example": [sys.executable, EXAMPLE, "--help"],
    }


PRINTING = ["inspect", "json", "help", "version", "run", "dfcompile", "dfcompile json", "example"]


@pytest.mark.parametrize("name", PRINTING)
def test_a_full_disk_behind_stdout_is_one_line(printing, name):
    with open("/dev/full", "w") as full:
        done = subprocess.run(list(map(str, printing[name])), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        ": error: the output cannot be written (No space left on device): make room"
    )
    assert "Traceback" not in done.stderr and done.stderr.count("error") == 1


@pytest.mark.parametrize("name", PRINTING)
def test_a_pipe_that_nobody_reads_is_quiet(printing, name):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(list(map(str, printing[name])), stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1 and "rror" not in done.stderr and "Traceback" not in done.stderr


CLOSED = [(name, closed) for name in ("inspect", "json", "help", "version", "run") for closed in ("1", "2", "0", "1 2")]
CLOSED += [("dfcompile", "1 2"), ("dfcompile json", "0"), ("example", "1 2")]  # each takes seconds to import torch


@pytest.mark.parametrize("name, closed", CLOSED)
def test_a_closed_stream_is_no_bug(printing, name, closed):
    """The command does its work; its files get nothing of what is printed."""
    closing = " ".join(f"{number}>&-" for number in closed.split())
    done = subprocess.run(["sh", "-c", f'exec "$@" {closing}', "sh", *map(str, printing[name])], capture_output=True)
    assert done.returncode == 0 and b"rror" not in done.stderr and b"Traceback" not in done.stderr
    assert bool(done.stdout) == ("1" not in closed)


def test_errors_go_nowhere_where_stderr_is_full(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*DFSSM, "inspect", tmp_path / "none"], stdout=subprocess.PIPE, stderr=full)
    assert (done.returncode, done.stdout) == (1, b"")


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


ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def with_signals():
    """In a child before it begins: they are not ignored, as they are where a background job or nohup runs the tests."""
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize("command, module", [(DFSSM, "click"), (DFCOMPILE, "click"), (DFSSM, "numpy")])
def test_a_signal_while_modules_are_imported_leaves_no_traceback(command, module, number, tmp_path):
    (tmp_path / f"{module}.py").write_text(f"import os, time\nos.kill(os.getpid(), {number})\ntime.sleep(60)\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    options = dict(env=environment, capture_output=True, text=True, timeout=30, preexec_fn=with_signals)
    done = subprocess.run([*command, "doctor"], **options)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (128 + number, "", "")


def test_a_signal_at_the_end_leaves_no_traceback():
    code = "import atexit, os; atexit.register(os.kill, os.getpid(), 2); from dfssm.cli.entry import dfssm; dfssm()"
    command = [sys.executable, "-c", code, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=with_signals)
    assert (done.returncode, done.stderr) == (130, "") and "Commands:" in done.stdout
