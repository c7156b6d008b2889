"""Packages that are missing: what each command then says, in environments that hold only some of them."""

import json
import re
import subprocess
from importlib.metadata import requires
from pathlib import Path

import pytest
import tiny
from commands import environment, run_commands
from packaging.requirements import Requirement
from packaging.version import Version

from dfssm.base import DfssmError, extras

EXAMPLE = Path(__file__).parents[2] / "examples" / "01_train_teacher.py"
LEAST = extras._declared()
COMPILE = ["torch", "onnx", "onnx-ir"]


def lacks(*packages, install):
    *others, last = packages
    listed = f"{', '.join(others)} and {last} are" if others else f"{last} is"
    return f"{listed} not installed: pip install {install}"


INIT, DISTILL = "dfssm init --preset mamba2-130m -o new.pt", "dfssm distill teacher --data a.txt -o new"
STUDENT = lacks("torch", install="'dfssm[compile]'")
MISSING = {
    "dfcompile model.pt --target ort-cpu": lacks(*COMPILE, install="'dfssm[compile]'"),
    "dfcompile model.pt --target onnx -o new": lacks(*COMPILE, install="'dfssm[compile]'"),
    "dfcompile model.pt --target trt": lacks(
        *COMPILE, "onnx-graphsurgeon", "tensorrt-rtx-cu13", install="'dfssm[compile,trt]'"
    ),
    INIT: STUDENT,
    "dfssm convert teacher -o new.pt": STUDENT,
    "dfssm convert teacher -o new.pt --data more": lacks(
        "torch", "pyarrow", install=f"'dfssm[compile]' 'pyarrow>={LEAST['distill']['pyarrow']}'"
    ),
    "dfssm inspect model.pt": STUDENT,
    "dfssm compare b model.pt": lacks("torch", "onnx", "polygraphy", install="'dfssm[compile]'"),
    "dfssm verify b --bisect": lacks("onnx", install="'dfssm[compile]'"),
    "dfssm verify b --polygraphy new": lacks("polygraphy", install="'dfssm[compile]'"),
    "dfssm bench b --peer stock-ort": lacks("onnx", "onnx-ir", install="'dfssm[compile]'"),
    "dfssm bench b --peer llama.cpp": lacks("llama-cpp-python", "gguf", install="llama-cpp-python gguf"),
    DISTILL: lacks("torch", install="'dfssm[distill]'"),
    "dfssm distill teacher --data a.txt --data more -o new": lacks("torch", "pyarrow", install="'dfssm[distill]'"),
    "dfssm distill teacher --data hf:a -o new --tensorboard --wandb p": lacks(
        "torch", "datasets", "tensorboard", "wandb", install="'dfssm[distill]' tensorboard wandb"
    ),
    "dfssm eval perplexity model.pt --data a.txt": STUDENT,
    "dfssm eval perplexity b --data a.txt --reference teacher": STUDENT,
    "dfssm eval perplexity b --data more": lacks("pyarrow", install=f"'pyarrow>={LEAST['distill']['pyarrow']}'"),
    "dfssm analyze b -o new": lacks("matplotlib", "torch", install="'dfssm[analysis,compile]'"),
    "dfssm serve b": lacks("fastapi", "uvicorn", "prometheus-client", install="'dfssm[serve]'"),
    "dfssm serve b --ray": lacks("fastapi", "uvicorn", "prometheus-client", "ray", install="'dfssm[serve,ray]'"),
    "dfssm eval tasks b --tasks piqa": lacks("lm-eval", install="'dfssm[eval]'"),
    "dfssm eval tasks teacher --tasks piqa": lacks("lm-eval", "torch", install="'dfssm[eval,compile]'"),
}
"""Every command that takes more than the packages of a bare install -> what it says there."""


@pytest.fixture(scope="module")
def folder(tiny_bundle, tmp_path_factory):
    """A bundle that is one; of a student and a teacher what is looked at before they are read."""
    folder = tmp_path_factory.mktemp("extras")
    (folder / "b").symlink_to(tiny_bundle)
    for name in ("teacher", "more"):
        (folder / name).mkdir()
    for name in ("tokenizer.json", "teacher/tokenizer.json"):
        tiny.write_tokenizer(folder / name)
    (folder / "model.pt").write_bytes(b"PK")
    (folder / "teacher" / "config.json").write_text("{}")
    (folder / "a.txt").write_text("hello world, hello")
    (folder / "more" / "a.parquet").touch()
    (folder / "shape.json").write_text(json.dumps({"vocab_size": 40, "d_model": 32, "n_layer": 1, "headdim": 8}))
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The python of an environment with dfssm and what every install of it brings."""
    return environment(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def missing(folder, bare):
    before = sorted(str(path) for path in folder.rglob("*"))
    found = run_commands([command.split() for command in MISSING], folder, bare)
    assert sorted(str(path) for path in folder.rglob("*")) == before
    return dict(zip(MISSING, found, strict=True))


@pytest.mark.parametrize("command", MISSING)
def test_a_bare_install_names_all_that_a_command_takes(missing, command):
    done = missing[command]
    assert (done.status, done.out) == (1, "")
    assert done.err == f"{command.split()[0]}: error: {MISSING[command]}\n"


@pytest.mark.parametrize(
    "command, message",
    [
        (
            ["-m", "dfssm.cli.main", "eval", "harness", "run", "--model", "dfssm"],
            f"dfssm: error: {MISSING['dfssm eval tasks b --tasks piqa']}\n",
        ),
        (
            [EXAMPLE, "--data", "a.txt"],
            f"01_train_teacher.py: error: {lacks('torch', install=repr('dfssm[distill]'))}\n",
        ),
    ],
)
def test_so_do_the_other_programs(folder, bare, command, message):
    done = subprocess.run([bare, *command], cwd=folder, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)


def test_what_a_bare_install_does(folder, bare):
    run, perplexity, inspect, doctor = run_commands(
        [
            ["dfssm", "run", "b", "-p", "hello", "-n", "3", "--json"],
            ["dfssm", "eval", "perplexity", "b", "--data", "a.txt", "--json"],
            ["dfssm", "inspect", "b", "--json"],
            ["dfssm", "doctor", "--json"],
        ],
        folder,
        bare,
    )
    assert [done.status for done in (run, perplexity, inspect, doctor)] == [0] * 4
    assert json.loads(run.out)["new_tokens"] == 3 and json.loads(perplexity.out)["kind"] == "bundle"
    found = json.loads(doctor.out)
    uses = found["usable_for"]
    assert found["packages"]["torch"] is None
    assert uses["run"] == {key: found["targets"]["ort-cpu"][key] for key in ("usable", "why_not")}
    assert uses["compile"] == {"usable": False, "why_not": MISSING["dfcompile model.pt --target ort-cpu"]}
    assert uses["train"]["why_not"] == MISSING[DISTILL]
    assert uses["evaluate"]["why_not"] == MISSING["dfssm eval tasks b --tasks piqa"]
    assert uses["tensorrt_build"]["why_not"] == MISSING["dfcompile model.pt --target trt"]
    assert not uses["tensorrt_run"]["usable"]


def test_what_is_named_is_enough(folder, tmp_path):
    """With the packages that dfcompile names it works, and so do the commands that name some of them."""
    python, here = environment(tmp_path / "compile", *COMPILE), tmp_path / "here"
    here.mkdir()
    init, inspect, onnx, compare, trt = run_commands(
        [
            ["dfssm", "init", "--config", folder / "shape.json", "-o", "new.pt"],
            ["dfssm", "inspect", "new.pt", "--json"],
            ["dfcompile", "new.pt", "--target", "onnx", "-o", "new", "--json"],
            ["dfssm", "compare", "new", "new.pt"],
            ["dfcompile", "new.pt", "--target", "trt"],
        ],
        here,
        python,
    )
    assert init.status == 0, init.err
    assert json.loads(inspect.out)["config"]["d_model"] == 32
    assert json.loads(onnx.out)["verification"]["passed"]
    assert compare.err == f"dfssm: error: {lacks('polygraphy', install=repr('dfssm[compile]'))}\n"
    needed = lacks("onnx-graphsurgeon", "tensorrt-rtx-cu13", install=repr("dfssm[compile,trt]"))
    assert trt.err == f"dfcompile: error: {needed}\n"


def test_tasks_of_a_bundle_take_no_torch(folder, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    (tmp_path / "piqa.jsonl").write_text('{"query": "hello", "choices": ["a", "b"], "gold": 0}\n')
    python = environment(tmp_path / "eval", "lm-eval")
    tasks, teacher = run_commands(
        [
            ["dfssm", "eval", "tasks", model, "--tasks", "piqa", "--data", tmp_path, "--json"]
            for model in ("b", "teacher")
        ],
        folder,
        python,
    )
    assert tasks.status == 0 and "torch" not in tasks.heavy, tasks.err
    assert json.loads(tasks.out)["tasks"]["piqa"]["count"] == 1
    assert teacher.err == f"dfssm: error: {STUDENT}\n"


def test_one_that_is_too_old_is_named_with_both_versions(folder, bare, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('it was imported')")
    (tmp_path / "torch-2.0.1.dist-info").mkdir()
    (tmp_path / "torch-2.0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.0.1+cpu\n"
    )
    init, distill = run_commands(
        [INIT.split(), DISTILL.split()],
        folder,
        bare,
        PYTHONPATH=str(tmp_path),
    )
    for done, extra in ((init, "compile"), (distill, "distill")):
        least = LEAST[extra]["torch"]
        old = f"torch is 2.0.1+cpu, {least} or newer is needed"
        assert done.err == f"dfssm: error: {old}: pip install 'dfssm[{extra}]'\n"


def test_a_folder_of_the_name_is_no_package(folder, bare, tmp_path):
    """As wandb/, in which W&B keeps its logs, or datasets/ with data."""
    (tmp_path / "torch").mkdir()
    (done,) = run_commands([["dfssm", "inspect", "model.pt"]], folder, bare, PYTHONPATH=str(tmp_path))
    assert done.err == f"dfssm: error: {STUDENT}\n"


def test_the_bounds_are_those_of_the_metadata():
    for requirement in map(Requirement, requires("dfssm")):
        specifiers = list(requirement.specifier)
        found = re.search('extra == "(.*)"', str(requirement.marker or ""))
        least = LEAST[found[1] if found else ""][requirement.name]
        assert [str(one) for one in specifiers] == ([f">={least}"] if least else [])


@pytest.mark.parametrize(
    "texts", [("2.13.0+cpu", "2.4"), ("2.4", "2.4.0"), ("10.0", "9.9.9"), ("2.4.1", "2.4"), ("26.0rc1", "25")]
)
def test_versions_compare_as_pip_compares_them(texts):
    newer, older = texts
    assert Version(newer) >= Version(older) and extras._release(newer) >= extras._release(older)
    assert Version(newer) == Version(older) or extras._release(newer) > extras._release(older)


def test_what_is_installed_is_not_lacking():
    extras.require({"": ["numpy", "click"]}, {})
    with pytest.raises(DfssmError, match="^no-such-package is not installed: pip install no-such-package$"):
        extras.require({"": ["numpy", "no-such-package"]})
    with pytest.raises(KeyError):  # a slip of ours
        extras.require({"compile": ["numpy"]})
