"""The set-up scripts, without a network: what they ask apt for, and what they say when they cannot go on."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ONE_LINE = """\
# deb http://commented.example/debian trixie main
deb http://one.example/debian bookworm main
deb [arch=amd64 signed-by=/usr/share/keyrings/k.gpg] https://two.example/mirror/debian/ bookworm main contrib
deb-src http://source.example/debian bookworm main
deb http://security.example/debian-security bookworm-security main
deb http://one.example/debian bookworm-updates main
"""
DEB822 = """\
Types: deb
URIs: http://three.example/debian http://four.example/debian
Suites: bookworm bookworm-updates
Components: main

Types: deb
URIs: http://other.example/node
Suites: nodistro
Components: main
"""


def fake(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def copy_of_scripts(folder: Path, sums: str, names: list[str]) -> Path:
    """The scripts beside a cmake/`sums`.sha256 that wants empty files of these names. Returns their folder."""
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    (folder / "cmake").mkdir()
    empty = hashlib.sha256(b"").hexdigest()
    (folder / "cmake" / f"{sums}.sha256").write_text("".join(f"{empty}  {name}\n" for name in names))
    return folder / "scripts"


@pytest.fixture
def machine(tmp_path):
    """A machine whose apt knows no headers package and records its source lists, and which has no network."""
    bin_folder, apt = tmp_path / "bin", tmp_path / "apt"
    (apt / "sources.list.d").mkdir(parents=True)
    fake(
        bin_folder,
        "apt-get",
        f"""
for word; do case $word in Dir::Etc::SourceList=*) cat "${{word#*=}}" >>{tmp_path}/sources;; esac; done
case "$*" in
  *"download debian-archive-keyring"*) touch debian-archive-keyring_1_all.deb; exit 0;;
  *Dir::Etc::SourceList=*download*) [ -z "$FAKE_OFFERS" ] && exit 100; touch libonnxruntime-dev_1_amd64.deb;;
  *Dir::Etc::SourceList=*update*) exit 0;;
  *) exit 100;;
esac""",
    )
    fake(
        bin_folder,
        "dpkg",
        """
keys=$3/usr/share/keyrings; headers=$3/usr/include/onnxruntime
mkdir -p "$keys" "$headers"
touch "$keys/debian-archive-trixie-automatic.gpg" "$headers/other.h"
printf %s "$FAKE_HEADER" >"$headers/onnxruntime_c_api.h" """,
    )
    fake(bin_folder, "curl", "exit 6")
    scripts = copy_of_scripts(tmp_path / "tree", "ort-headers", ["onnxruntime_c_api.h"])

    def run(**environment):
        return subprocess.run(
            ["sh", str(scripts / "fetch_ort_headers.sh"), str(tmp_path / "headers")],
            env={
                **os.environ,
                "PATH": f"{bin_folder}:{os.environ['PATH']}",
                "DFSSM_APT_DIR": str(apt),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=60,
        )

    return apt, run, tmp_path


@pytest.mark.parametrize(
    ("name", "text", "mirrors"),
    [
        ("sources.list", ONE_LINE, ["http://one.example/debian", "https://two.example/mirror/debian/"]),
        (
            "sources.list.d/x.list",
            ONE_LINE,
            ["http://one.example/debian", "https://two.example/mirror/debian/"],
        ),
        (
            "sources.list.d/debian.sources",
            DEB822,
            ["http://three.example/debian", "http://four.example/debian"],
        ),
    ],
)
def test_the_mirror_is_the_machines_own(machine, name, text, mirrors):
    apt, run, folder = machine
    (apt / name).write_text(text)
    result = run()
    assert result.returncode == 1
    assert "no source worked" in result.stderr and "DFSSM_ORT_INCLUDE_DIR" in result.stderr
    asked = list(dict.fromkeys((folder / "sources").read_text().splitlines()))
    assert [line.split("] ")[1] for line in asked] == [f"{mirror} trixie main" for mirror in mirrors]
    assert all(line.startswith("deb [signed-by=/") for line in asked), "never without a signature"


def test_headers_arrive_whole(machine):
    apt, run, folder = machine
    (apt / "sources.list").write_text(ONE_LINE)
    result = run(FAKE_OFFERS="1")
    assert result.returncode == 0, result.stderr
    assert "from_trixie" in result.stdout
    assert [p.name for p in (folder / "headers").iterdir()] == ["onnxruntime_c_api.h"]
    (folder / "sources").unlink()
    assert run().returncode == 0 and not (folder / "sources").exists(), "nothing is fetched a second time"


def test_another_header_is_refused(machine):
    apt, run, folder = machine
    (apt / "sources.list").write_text(ONE_LINE)
    result = run(FAKE_OFFERS="1", FAKE_HEADER="not the one")
    assert result.returncode == 1 and not list((folder / "headers").iterdir())
    assert "are not those of cmake/ort-headers.sha256" in result.stderr
    # One that was changed after it was fetched is fetched anew.
    (folder / "headers" / "onnxruntime_c_api.h").write_text("changed")
    assert run(FAKE_OFFERS="1").returncode == 0
    assert (folder / "headers" / "onnxruntime_c_api.h").read_text() == ""


def test_no_debian_mirror_is_a_clean_end(machine):
    _, run, _ = machine
    result = run()
    assert result.returncode == 1
    assert "no source worked" in result.stderr


def cmake_headers(**variables) -> subprocess.CompletedProcess:
    definitions = [f"-D{name}={value}" for name, value in variables.items()]
    return subprocess.run(
        [
            Path(sys.executable).with_name("cmake"),
            f"-DPROJECT_SOURCE_DIR={ROOT}",
            *definitions,
            "-P",
            "cmake/OnnxRuntimeHeaders.cmake",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_folder_without_the_headers_is_named(tmp_path):
    result = cmake_headers(DFSSM_ORT_INCLUDE_DIR=tmp_path)
    assert result.returncode != 0
    assert f"{tmp_path}, but" in " ".join(result.stderr.split())
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "onnxruntime_c_api.h").touch()
    assert f"headers: {tmp_path}/onnxruntime" in cmake_headers(DFSSM_ORT_INCLUDE_DIR=tmp_path).stdout


TRT_HEADERS = ["NvInferRuntime.h", "NvInferVersion.h"]


def trt_wheel(*names: str, content: str = "") -> str:
    """A line of Python that writes a wheel with these TensorRT headers."""
    files = "".join(f'z.writestr("kernel_lens/include/tensorrt/{name}", "{content}");' for name in names)
    return f'import zipfile; z = zipfile.ZipFile("a.whl", "w"); {files} z.close()'


def trt_headers(tmp_path, wheel: str) -> subprocess.CompletedProcess:
    """scripts/fetch_trt_headers.sh with a pip that runs `wheel`, a line of Python, in the download folder."""
    pip = f"""case "$*" in *"pip download"*)
  while [ "$1" != -d ]; do shift; done; cd "$2" && exec {sys.executable} -c '{wheel}';; esac
exec {sys.executable} "$@\""""
    fake(tmp_path, "python3", pip)
    scripts = copy_of_scripts(tmp_path / "tree", "trt-headers", TRT_HEADERS)
    command = ["sh", scripts / "fetch_trt_headers.sh", tmp_path / "headers", tmp_path / "python3"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_trt_headers_arrive_whole(tmp_path):
    result = trt_headers(tmp_path, trt_wheel(*TRT_HEADERS, "other.h"))
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "headers").iterdir()) == TRT_HEADERS


@pytest.mark.parametrize(
    ("wheel", "message"),
    [
        ("raise SystemExit(1)", "could not download kernel-lens"),
        (trt_wheel(), "has no TensorRT headers in it"),
        (trt_wheel("NvInferRuntime.h"), "are not those of cmake/trt-headers.sha256"),
        (trt_wheel(*TRT_HEADERS, content="other"), "are not those of cmake/trt-headers.sha256"),
    ],
)
def test_no_trt_headers_is_a_clean_end(tmp_path, wheel, message):
    result = trt_headers(tmp_path, wheel)
    assert result.returncode == 1
    assert result.stderr.startswith("fetch_trt_headers: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not list((tmp_path / "headers").iterdir())


def bootstrap(tmp_path, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["sh", str(ROOT / "scripts/bootstrap.sh"), str(tmp_path / "venv"), "demo"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_an_old_python_is_refused_in_one_line(tmp_path):
    fake(tmp_path, "python3", '[ "$1" = -V ] && echo Python 3.9.2; [ "$1" = -V ]')
    result = bootstrap(tmp_path, PYTHON=str(tmp_path / "python3"))
    assert result.returncode == 1
    assert result.stderr.startswith("bootstrap: ") and result.stderr.count("\n") == 1
    assert "is Python 3.9.2, 3.11 or newer is needed" in result.stderr


def test_what_an_ordinary_user_must_install_is_said_in_one_line(tmp_path):
    fake(tmp_path, "id", "echo 1000")
    result = bootstrap(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", CXX="no-such-compiler")
    assert result.returncode == 1
    assert result.stderr == "bootstrap: missing: g++; install with: sudo apt-get install g++\n"


@pytest.fixture
def torch_machine(tmp_path):
    """run(local, index, gpu) -> the pip calls and the result of install_torch.sh on a machine that has these."""

    def run(local=False, index=False, gpu=False, installed="", **environment):
        shutil.rmtree(tmp_path / "bin", ignore_errors=True)
        (tmp_path / "calls").unlink(missing_ok=True)
        fake(
            tmp_path / "bin",
            "python",
            f"""case "$*" in
  -V) echo Python 3.11.2;;
  -c*) [ -n "{installed}" ] && echo {installed};;
  *) echo "$*" >>{tmp_path}/calls
     case "$*" in *--no-index*) {str(local).lower()};; *--index-url*) {str(index).lower()};; esac;;
esac""",
        )
        fake(tmp_path / "bin", "nvidia-smi", "exit 0" if gpu else "exit 9")
        result = subprocess.run(
            ["sh", ROOT / "scripts/install_torch.sh", tmp_path / "bin/python"],
            env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "DFSSM_TORCH": "", **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return calls, result

    return run


def test_a_local_cpu_wheel_of_torch_comes_first(torch_machine):
    (call,), result = torch_machine(local=True, index=True)
    assert result.returncode == 0 and "--no-index --no-deps" in call and call.endswith("requirements/torch.txt")


def test_then_the_cpu_index(torch_machine):
    calls, result = torch_machine(index=True)
    assert result.returncode == 0 and len(calls) == 2 and "--index-url" in calls[1] and "--no-deps" in calls[1]


def test_no_cpu_build_of_torch_is_one_line_and_no_cuda(torch_machine):
    calls, result = torch_machine()
    assert result.returncode == 1 and len(calls) == 2
    assert result.stderr.startswith("install_torch: no CPU wheel of torch 2.") and result.stderr.count("\n") == 1
    assert "DFSSM_TORCH=any" in result.stderr


@pytest.mark.parametrize("machine", [{"gpu": True}, {"DFSSM_TORCH": "any"}], ids=["gpu", "any"])
def test_the_build_of_the_package_index_where_there_is_a_gpu_or_it_is_asked_for(torch_machine, machine):
    (call,), result = torch_machine(local=True, index=True, **machine)
    assert result.returncode == 0 and "index" not in call and "--no-deps" not in call


@pytest.mark.parametrize(("installed", "calls"), [("2.13.0+cpu", 0), ("2.13.0", 0), ("2.13.01", 1), ("2.12.0", 1)])
def test_the_torch_that_is_there_stays(torch_machine, installed, calls):
    assert "torch==2.13.0\n" in (ROOT / "requirements/torch.txt").read_text()
    made, result = torch_machine(local=True, installed=installed)
    assert result.returncode == 0 and len(made) == calls


def test_a_clean_environment_keeps_what_a_machine_needs_alone():
    kept = {"PATH": os.environ["PATH"], "HOME": "/nowhere", "LC_ALL": "C.UTF-8", "PIP_CERT": "a b", "HTTPS_PROXY": "p"}
    dropped = {"DFSSM_ISA": "scalar", "PYTHONPATH": "x", "CXXFLAGS": "-O0", "OMP_NUM_THREADS": "9", "LD_PRELOAD": "",
               "MAKEFLAGS": "k", "odd.name": "1\nPATH=2"}  # fmt: skip
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    command = [ROOT / "scripts/clean_env.sh", "env", "DFSSM_ISA=avx2", sys.executable, "-c", code]
    done = subprocess.run(command, env=kept | dropped, capture_output=True, text=True, check=True)
    left = json.loads(done.stdout)
    assert left.items() >= (kept | {"DFSSM_ISA": "avx2"}).items()
    assert not left.keys() & (dropped.keys() - {"DFSSM_ISA", "odd.name"})


def bare(folder: Path, command: str, there: dict[str, str]) -> subprocess.CompletedProcess:
    """A script on a machine that has nothing but a shell, and the programs `there`: name -> what it does."""
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name, script in there.items():
        fake(folder / "bin", name, script)
    for name in ("sh", "dirname", "grep", "echo"):
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).symlink_to(shutil.which(name))
    script, *arguments = command.split()
    environment = {"PATH": str(folder / "bin")}
    return subprocess.run([folder / "scripts" / script, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("command", "there", "words"),
    [
        ("gpu_check.sh pack", {}, "gpu_check: no environment in {root}/.venv: make build"),
        (
            "gpu_check.sh run {root}/packed",
            {},
            "gpu_check: {root}/packed is not packed: scripts/gpu_check.sh pack",
        ),
        ("gpu_check.sh fly", {}, "gpu_check: usage: "),
        ("build_arm.sh dist", {}, "build_arm: no aarch64-linux-gnu-g++: apt-get install g++-aarch64-linux-gnu"),
        ("build_jetson.sh dist", {}, "build_jetson: no aarch64-linux-gnu-g++: apt-get install g++-aarch64-linux-gnu"),
        (
            "build_jetson.sh dist",
            {"aarch64-linux-gnu-g++": ""},
            "build_jetson: no nvcc on PATH: install the CUDA toolkit",
        ),
        (
            "build_jetson.sh dist",
            {"nvcc": "echo release 12.6", "aarch64-linux-gnu-g++": ""},
            "build_jetson: nvcc is not of CUDA 13.0, as the runtime library for Arm is",
        ),
    ],
)
def test_what_a_script_misses_is_one_line(command, there, words, tmp_path):
    done = bare(tmp_path, command.format(root=tmp_path), there)
    assert done.returncode == 1 and done.stderr.startswith(words.format(root=tmp_path)), done.stderr
    assert done.stderr.count("\n") == 1


def test_a_gpu_check_without_nvcc_is_no_error(tmp_path):
    """`make test-gpu` goes on with what it has."""
    done = bare(tmp_path, "gpu_check.sh", {})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "gpu_check: not run: no nvcc on PATH to build the plugins with\n"


CHANGES = (
    "# Changelog\n\n## [Unreleased]\n\n- new\n\n## [1.2.0] - 2026-01-02\n\n### Added\n- old\n\n## [1.1.0]\n- older\n"
)


@pytest.mark.parametrize(
    ("version", "wanted", "said"),
    [("1.2.0", "### Added\n- old", ""), ("1.1.0", "- older", ""), ("1.3.0", "- new", "no section [1.3.0]")],
)
def test_changes_is_the_section_of_a_version(tmp_path, version, wanted, said):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "CHANGELOG.md").write_text(CHANGES)
    done = subprocess.run([tmp_path / "scripts/changes.sh", version], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == wanted
    assert said in done.stderr and bool(said) == bool(done.stderr)


def test_a_release_is_of_a_commit(tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "tree/scripts")
    subprocess.run(["git", "init", "-q", tmp_path / "tree"], check=True)
    command = [tmp_path / "tree/scripts/release.sh", tmp_path / "out", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and list((tmp_path / "out").iterdir()) == []
    assert done.stderr == "release: there are changes that are not committed, and a release is of a commit\n"
