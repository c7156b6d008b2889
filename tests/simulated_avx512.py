"""The kernels of AVX-512 VNNI and VBMI and of AVX-VNNI for a CPU without: tools/simulated_avx512, built into build/ and
kept there.

The kernel tests run over it where the CPU lacks one, as isa "avx512vnni-simulated", "avxvnni-simulated" and so on; with
its name in DFSSM_SIMULATE in the environment also where the CPU has it, beside the real kernels.
"""

import fcntl
import functools
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

NAMES = {isa: f"{isa}-simulated" for isa in ("avxvnni", "avx512vnni", "avx512vbmi")}
"""What can be simulated, and what it is called then."""

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "tests/tools/simulated_avx512"
BUILD = ROOT / "build/simulated_avx512"
LIBRARY = BUILD / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"

HEADER = "simde/x86/avx512.h"
SYSTEM = Path("/usr/include")
FETCHED = ROOT / ".cache/simde/usr/include"


class Unavailable(Exception):
    """What this machine lacks for the simulation."""


def forced() -> str:
    """What the environment asks to simulate, whatever the CPU has; "" for nothing."""
    value = os.environ.get("DFSSM_SIMULATE", "")
    if value not in ("", *NAMES):
        raise ValueError(f"DFSSM_SIMULATE is '{value}'; what can be simulated is {', '.join(NAMES)}")
    return value


def native() -> ModuleType:
    """The module; skips the test, with the reason, where it cannot be built."""
    outcome = _load()
    if isinstance(outcome, Unavailable):
        pytest.skip(str(outcome))
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


@functools.cache
def _load() -> ModuleType | Exception:
    """The module, or what went wrong: a session of a thousand tests tries once."""
    try:
        build()
    except (Unavailable, AssertionError) as error:
        return error
    spec = importlib.util.spec_from_file_location(f"{SOURCE.name}._native", LIBRARY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build() -> None:
    """LIBRARY is up to date; safe beside another process that does the same."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise Unavailable(f"AVX-512 is simulated on x86-64 only, this is {platform.machine()}")
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    pybind11 = importlib.util.find_spec("pybind11")
    if not cmake or not pybind11:
        raise Unavailable(f"{'pybind11' if cmake else 'cmake'} is not installed: no simulation of AVX-512")
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        definitions = {
            "CMAKE_CXX_FLAGS": "",  # not those of CXXFLAGS, which may hold -march=native
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": Path(pybind11.origin).parent / "share/cmake/pybind11",
            "SIMDE_INCLUDE_DIR": simde(),
        }
        # What fails here is something that the machine lacks; what fails to compile is a fault of ours.
        configured = _run(cmake, "-S", SOURCE, "-B", BUILD, *(f"-D{k}={v}" for k, v in definitions.items()))
        if configured.returncode:
            raise Unavailable(f"cmake finds no way to simulate AVX-512:\n{configured.stdout}")
        built = _run(cmake, "--build", BUILD, "-j2")
        assert not built.returncode, f"the simulated AVX-512 kernels do not build:\n{built.stdout}"


def simde() -> Path:
    """Folder of SIMDe's headers: the system's, or those of Debian's package, fetched once."""
    for folder in (SYSTEM, FETCHED):
        if (folder / HEADER).is_file():
            return folder
    fetched = _run("sh", SOURCE / "fetch_simde.sh", FETCHED.parents[1])
    if not (FETCHED / HEADER).is_file():
        raise Unavailable(f"libsimde-dev is not installed and could not be fetched: {fetched.stdout}")
    return FETCHED


def _run(*command) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
