"""The wheels: what is in them, which systems they run on, and that they work where the source tree is not."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import arm
import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = {path.name for path in (ROOT / "dfssm").iterdir() if path.is_symlink()}
NOT_SHIPPED = {"dfssm/bench/kernels.py"}  # needs dfssm._native
EXPORTS = ["RegisterCustomOps", *(f"dfssm_cpu_{name}" for name in ("clock", "error", "isa", "isas"))]
EXPORTS += ["dfssm_memory_bandwidth", "dfssm_memory_patterns", "dfssm_op_seconds", "dfssm_time_ops"]

pytestmark = [pytest.mark.packaging, pytest.mark.xdist_group("packaging")]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    """The folder of the wheels, and what `make wheels` prints; in the build folder of the editable install, which has
    the objects already.
    """
    folder = tmp_path_factory.mktemp("wheels")
    command = [ROOT / "scripts/build_wheels.sh", folder, sys.executable]
    archs = {"DFSSM_CUDA_ARCHS": "86,89"}  # all of the wheel's take four times as long: CI's second stage builds them
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | archs)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (wheel,) = built[0].glob("dfssm-*.whl")
    return wheel


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """The wheel in a virtual environment, its dependencies by a path: the editable dfssm does not follow."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    (site,) = folder.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin/python"]
    subprocess.run([*pip, "install", "-q", "--no-deps", wheel], check=True, capture_output=True, timeout=300)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run(environment: Path, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [ROOT / "scripts/clean_env.sh", environment / "bin" / command[0], *command[1:]],
        cwd=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[1] for name in names if name.startswith("dfssm/") and name.count("/") > 1}
    assert folders == PARTS
    data = {"dfssm/eval/tasks/piqa.yaml", "dfssm/serve/page.html", "dfssm/analysis/atlas.csv"}
    assert data | {"dfssm/libdfssm_ort_cpu.so"} <= set(names)
    assert not [name for name in names if "__pycache__" in name or "test" in name or "_native" in name]
    shipped = {name for name in names if name.endswith(".py")}
    tree = {f"dfssm/{path.relative_to(ROOT)}" for part in PARTS for path in (ROOT / part).rglob("*.py")}
    assert shipped == (tree | {"dfssm/__init__.py"}) - NOT_SHIPPED and "dfssm/py.typed" in names


def test_one_wheel_serves_every_python(wheel):
    assert wheel.name.endswith(f"-py3-none-manylinux_2_28_{os.uname().machine}.whl")
    record = zipfile.ZipFile(wheel).read(next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("/WHEEL")))
    assert b"Tag: py3-none-manylinux_2_28_" in record


def test_the_verdict_of_auditwheel_is_shown(built, wheel):
    assert f"dfssm-0.1.0-py3-none-linux_{os.uname().machine}.whl is consistent with" in built[1]
    assert wheel.name in built[1], "with its sha256"


def test_the_cuda_plugins_are_a_wheel_or_a_line(built):
    folder, printed = built
    wheels = list(folder.glob("dfssm_trt-*.whl"))
    if shutil.which(os.environ.get("CUDACXX", "nvcc")):
        (wheel,) = wheels
        files = {name for name in zipfile.ZipFile(wheel).namelist() if name[-1] != "/"}
        assert {name for name in files if "dist-info" not in name} == {"dfssm/libdfssm_trt.so"}
        licences = {name.rpartition("/")[2] for name in files if ".dist-info/licenses/" in name}
        assert licences == {"LICENSE", "THIRD_PARTY.md"}, "it bundles the CUDA runtime"
        assert "dfssm_trt-0.1.0-py3-none-linux" in printed and "left out" not in printed
    else:
        assert not wheels
        assert "dfssm-trt is left out: nvcc is neither on PATH nor in CUDACXX" in printed


def test_it_runs_outside_the_tree(environment):
    code = (
        "import dfssm.opset as o, dfssm.targets.ort_cpu as t;"
        "print(o.__file__, t.find_library(), t.probe().why_not, sep='\\n')"
    )
    result = run(environment, "python", "-c", code)
    assert result.returncode == 0, result.stderr
    opset, library, why_not = result.stdout.split("\n")[:3]
    assert all(path.startswith(str(environment)) for path in (opset, library))
    assert why_not == ""


@pytest.mark.parametrize("command", ["dfssm", "dfcompile"])
def test_the_commands_are_installed(environment, command):
    result = run(environment, command, "--help")
    assert result.returncode == 0, result.stderr
    assert f"Usage: {command}" in result.stdout


def test_the_op_library_shows_its_c_functions_and_needs_no_onnxruntime(wheel, tmp_path):
    zipfile.ZipFile(wheel).extract("dfssm/libdfssm_ort_cpu.so", tmp_path)
    library = tmp_path / "dfssm" / "libdfssm_ort_cpu.so"
    symbols = subprocess.check_output(["nm", "-D", "--defined-only", library], text=True).splitlines()
    assert sorted(line.split()[-1] for line in symbols) == EXPORTS
    needed = subprocess.check_output(["readelf", "-d", library], text=True)
    assert "NEEDED" in needed and "onnxruntime" not in needed  # the loader hands its functions over


def test_a_wheel_for_arm_is_cross_compiled(wheel, tmp_path):
    """It holds what the wheel for this machine does, and its library loads where the emulator is."""
    arm.native("i8mm")  # or skips
    command = [ROOT / "scripts/build_arm.sh", tmp_path, sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (built,) = tmp_path.iterdir()
    assert built.name == "dfssm-0.1.0-py3-none-manylinux_2_28_aarch64.whl" and built.name in done.stdout
    here, there = ({name for name in zipfile.ZipFile(w).namelist() if name[-1] != "/"} for w in (wheel, built))
    assert here == there
    library = zipfile.ZipFile(built).extract("dfssm/libdfssm_ort_cpu.so", tmp_path)
    loaded = subprocess.run(arm.command("neoverse-n1", "load_library", library), capture_output=True, text=True)
    assert loaded.stdout.startswith("scalar dotprod\n"), loaded.stderr


def test_the_source_distribution_holds_each_part_once(tmp_path):
    build = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=ROOT, check=True, capture_output=True, timeout=120)
    (archive,) = tmp_path.glob("dfssm-*.tar.gz")
    with tarfile.open(archive) as files:
        assert not [member.name for member in files.getmembers() if not member.isreg()], "links in it need the clone"
        names = [name.partition("/")[2] for name in files.getnames()]
    python = sorted(name for name in names if name.endswith(".py") and name.startswith("dfssm/"))
    tree = {f"dfssm/{path.relative_to(ROOT)}" for part in PARTS for path in (ROOT / part).rglob("*.py")}
    assert python == sorted(tree | {"dfssm/__init__.py"})
    assert not [name for name in names if name.endswith(".pyc")], "they name the folder of the checkout"
    assert not [name for name in names if name.partition("/")[0] in {*PARTS, "tests", "examples", "build", ".venv"}]
    assert {"pyproject.toml", "CMakeLists.txt", "scripts/build_wheels.sh", "plugins/trt/pyproject.toml"} <= set(names)
