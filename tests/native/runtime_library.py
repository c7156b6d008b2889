"""libdfssm_runtime.so, built for the tests with AddressSanitizer, and programs that use it."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

import onnxruntime
import pytest

from dfssm.targets.bundle import sealed
from dfssm.targets.library import installed

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
BUILD = ROOT / "build/runtime"
BIN = Path(sys.executable).parent

# Without optimisation or UndefinedBehaviorSanitizer, which take three times as long to compile the JSON library.
SANITIZE = ["-O0", "-fsanitize=address"]
STRICT = "-Wall -Wextra -Wpedantic -Werror".split()
C, CXX = ["gcc", "-std=c11", *STRICT], ["g++", "-std=c++17", *STRICT]


def run(*command: object, **options) -> subprocess.CompletedProcess:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, f"{command[0]}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done


def onnxruntime_library() -> Path:
    """The wheel's libonnxruntime.so."""
    found = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
    return found[0] if found else pytest.skip("this wheel of onnxruntime has no libonnxruntime.so")


def _python_library() -> Path:
    """This Python's shared library: the stand-in for tokenizers-cpp runs the package `tokenizers` in it."""
    place = Path(sysconfig.get_config_var("LIBDIR")) / (sysconfig.get_config_var("LDLIBRARY") or "")
    return place if place.suffix == ".so" and place.exists() else pytest.skip("this Python has no shared library")


@cache
def library() -> Path:
    """The library, with text and a toy of TensorRT. Kept in build/: compiled anew where its sources change."""
    python = _python_library()
    if not (shutil.which("gcc") and shutil.which("g++") and Path("/usr/include/openssl/evp.h").exists()):
        pytest.skip("no gcc and g++ here, or no headers of OpenSSL: apt-get install g++ libssl-dev")
    tokenizers = HERE / "tokenizers_c"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stand_in, source = BUILD / "libtokenizers_c.so", tokenizers / "tokenizers_c.cpp"
        if not stand_in.exists() or stand_in.stat().st_mtime < source.stat().st_mtime:
            include = f"-isystem{sysconfig.get_path('include')}"
            run(*CXX, "-shared", "-fPIC", include, source, "-o", stand_in, python, f"-Wl,-rpath,{python.parent}")
        options = {
            "CMAKE_BUILD_TYPE": "None", "CMAKE_CXX_FLAGS": " ".join(SANITIZE), "CMAKE_MAKE_PROGRAM": BIN / "ninja",
            "Python_EXECUTABLE": sys.executable, "DFSSM_TRT": "OFF", "DFSSM_RUNTIME": "ON", "DFSSM_WERROR": "ON",
            "DFSSM_TOKENIZERS": stand_in, "DFSSM_TOKENIZERS_INCLUDE_DIR": tokenizers,
            "DFSSM_TENSORRT_INCLUDE_DIRS": ROOT / "tests/examples/toy_tensorrt",
        }  # fmt: skip
        defines = [f"-D{name}={value}" for name, value in options.items()]
        run(BIN / "cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", *defines)
        run(BIN / "cmake", "--build", BUILD, "--target", "dfssm_runtime")
    return BUILD / "libdfssm_runtime.so"


@cache
def program(source: Path) -> Path:
    """A program in C or C++ over the library, compiled with all warnings as errors."""
    out, compiler = BUILD / source.stem, C if source.suffix == ".c" else CXX
    include, rpath = f"-I{ROOT / 'native/include'}", f"-Wl,-rpath,{BUILD}"
    draft = out.with_suffix(f".{os.getpid()}")  # another process may be running what it has made
    run(*compiler, *SANITIZE, include, source, library(), rpath, "-o", draft)
    os.replace(draft, out)
    return out


def environment(**more: str) -> dict[str, str]:
    """What the programs run in: with the wheel's ONNX Runtime and the installed kernels, and Python's packages."""
    found = {
        "DFSSM_ONNXRUNTIME": str(onnxruntime_library()),
        "DFSSM_ORT_LIBRARY": str(installed("libdfssm_ort_cpu.so")),
        "PYTHONHOME": sys.base_prefix,
        "PYTHONPATH": sysconfig.get_path("purelib"),
        # ONNX Runtime and Python keep what they have until the process ends.
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    return os.environ | found | more


def drive(*lines: str, **more: str) -> list[str]:
    """What driver.c answers to `lines`, one each, without the "ok"."""
    command, text = [str(program(HERE / "driver.c"))], "".join(f"{line}\n" for line in lines)
    done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=300, env=environment(**more))
    assert done.returncode == 0, done.stderr.decode()
    answers, said = [], ""
    for line in done.stdout.decode(errors="replace").splitlines():  # a damaged graph has names that are no text
        if line == "ok" or line.startswith("error"):
            answers.append(said.strip() if line == "ok" else line)
            said = ""
        else:
            said += line
    assert len(answers) == len(lines), done.stdout
    return answers


def ids_of(answer: str) -> list[int]:
    return [int(token) for token in answer.split()]


def reseal(bundle: Path, change) -> None:
    """Write the manifest anew after `change` of what it holds; its hash of itself is right."""
    path = bundle / "manifest.json"
    document = json.loads(path.read_text())
    del document["manifest_sha256"]
    change(document)
    path.write_text(sealed(document))
