"""The set-up scripts, without a network: what they ask apt for, and what they say when they cannot go on."""

import os
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
touch "$keys/debian-archive-trixie-automatic.gpg" "$headers/onnxruntime_c_api.h" "$headers/other.h" """,
    )
    fake(bin_folder, "curl", "exit 6")

    def run(**environment):
        return subprocess.run(
            ["sh", str(ROOT / "scripts/fetch_ort_headers.sh"), str(tmp_path / "headers")],
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
    assert {p.name for p in (folder / "headers").iterdir()} == {"onnxruntime_c_api.h", "other.h"}


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


def trt_headers(tmp_path, wheel: str) -> subprocess.CompletedProcess:
    """scripts/fetch_trt_headers.sh with a pip that runs `wheel`, a line of Python, in the download folder."""
    pip = f"""case "$*" in *"pip download"*)
  while [ "$1" != -d ]; do shift; done; cd "$2" && exec {sys.executable} -c '{wheel}';; esac
exec {sys.executable} "$@\""""
    fake(tmp_path, "python3", pip)
    command = ["sh", ROOT / "scripts/fetch_trt_headers.sh", tmp_path / "headers", tmp_path / "python3"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_trt_headers_arrive_whole(tmp_path):
    names = ["NvInferRuntime.h", "NvInferVersion.h"]
    files = "".join(f'z.writestr("kernel_lens/include/tensorrt/{name}", "");' for name in names)
    result = trt_headers(tmp_path, f'import zipfile; z = zipfile.ZipFile("a.whl", "w"); {files} z.close()')
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "headers").iterdir()) == names


@pytest.mark.parametrize(
    ("wheel", "message"),
    [
        ("raise SystemExit(1)", "could not download kernel-lens"),
        ('import zipfile; zipfile.ZipFile("a.whl", "w").close()', "has no TensorRT headers in it"),
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
        ["sh", str(ROOT / "scripts/bootstrap.sh"), str(tmp_path / "venv")],
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
