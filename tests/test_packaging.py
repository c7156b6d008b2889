"""The wheel: what is in it, and that it works where the source tree is not."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"opset", "model", "export", "targets", "compiler", "runtime", "bench", "eval", "distill", "cli"}

pytestmark = [pytest.mark.packaging, pytest.mark.xdist_group("packaging")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """`pip wheel .`, in the build folder of the editable install: the objects are there already."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        ROOT,
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    (wheel,) = folder.glob("dfssm-*.whl")
    return wheel


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """The wheel in a virtual environment, its dependencies by a path: the editable dfssm does not follow."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    (site,) = folder.glob("lib/python*/site-packages")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        folder / "bin/python",
        "install",
        "-q",
        "--no-deps",
        wheel,
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run(environment: Path, *command: str) -> subprocess.CompletedProcess:
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DFSSM_ORT_LIBRARY")}
    return subprocess.run(
        [environment / "bin" / command[0], *command[1:]],
        env=variables,
        cwd=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[1] for name in names if name.startswith("dfssm/") and name.count("/") > 1}
    assert folders == PARTS
    assert "dfssm/libdfssm_ort_cpu.so" in names and "dfssm/eval/tasks/piqa.yaml" in names
    assert sum(name.startswith("dfssm/_native.") for name in names) == 1
    assert not [name for name in names if "__pycache__" in name or "test" in name]
    shipped = {name for name in names if name.endswith(".py")}
    tree = {f"dfssm/{path.relative_to(ROOT)}" for part in PARTS for path in (ROOT / part).rglob("*.py")}
    assert shipped == tree


def test_it_runs_outside_the_tree(environment):
    code = (
        "import dfssm._native as n, dfssm.opset as o, dfssm.targets.ort_cpu as t;"
        "print(n.__file__, o.__file__, t.find_library(), t.probe().why_not, sep='\\n')"
    )
    result = run(environment, "python", "-c", code)
    assert result.returncode == 0, result.stderr
    native, opset, library, why_not = result.stdout.split("\n")[:4]
    assert all(path.startswith(str(environment)) for path in (native, opset, library))
    assert Path(library).parent == Path(native).parent
    assert why_not == ""


@pytest.mark.parametrize("command", ["dfssm", "dfcompile"])
def test_the_commands_are_installed(environment, command):
    result = run(environment, command, "--help")
    assert result.returncode == 0, result.stderr
    assert f"Usage: {command}" in result.stdout


def test_the_op_library_shows_one_symbol_and_needs_no_onnxruntime(wheel, tmp_path):
    zipfile.ZipFile(wheel).extract("dfssm/libdfssm_ort_cpu.so", tmp_path)
    library = tmp_path / "dfssm" / "libdfssm_ort_cpu.so"
    symbols = subprocess.check_output(["nm", "-D", "--defined-only", library], text=True).splitlines()
    assert [line.split()[-1] for line in symbols] == ["RegisterCustomOps"]
    needed = subprocess.check_output(["readelf", "-d", library], text=True)
    assert "NEEDED" in needed and "onnxruntime" not in needed  # the loader hands its functions over
