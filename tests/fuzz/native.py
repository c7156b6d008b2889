"""Builds the fuzz entries of the kernels into build/fuzz/, with the clang that is there, and keeps them.

python tests/fuzz/native.py      prints their paths
"""

import fcntl
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import simulated_avx512  # noqa: E402

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build/fuzz"
NAMES = sorted(path.stem for path in HERE.glob("*.cpp"))


class Unavailable(Exception):
    """What this machine lacks."""


def clang() -> str:
    """The newest clang++ that has libFuzzer and the sanitizers."""
    found = {name for folder in ("/usr/bin", "/usr/local/bin") for name in Path(folder).glob("clang++*")}
    names = [path.name for path in found if re.fullmatch(r"clang\+\+(-\d+)?", path.name)]
    for name in sorted(names, key=lambda name: int(name.partition("-")[2] or 1000), reverse=True):
        runtime = f"libclang_rt.fuzzer-{platform.machine()}.a"
        said = subprocess.run([name, f"-print-file-name={runtime}"], capture_output=True, text=True, check=False)
        resources = subprocess.run([name, "-print-resource-dir"], capture_output=True, text=True, check=False)
        places = [Path(said.stdout.strip()), Path(resources.stdout.strip(), "lib/linux", runtime)]
        if any(place.is_absolute() and place.is_file() for place in places):
            return name
    raise Unavailable(
        "no clang with libFuzzer: as root, apt-get install clang libclang-rt-14-dev (or that of your clang)"
    )


def build(simulated: bool = False) -> list[Path]:
    """The programs, up to date; `simulated`: with the kernels of AVX-VNNI, AVX-512 VNNI and VBMI for a CPU without.

    Raises Unavailable where they cannot be built, AssertionError where they do not build.
    """
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if not cmake:
        raise Unavailable("cmake is not installed: make build")
    compiler, simde = clang(), ""
    if simulated:
        try:
            simde = simulated_avx512.simde()
        except simulated_avx512.Unavailable as error:
            raise Unavailable(str(error)) from None
    folder = BUILD / "simulated" if simulated else BUILD
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            [
                *[cmake, "-S", HERE, "-B", folder, f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_CXX_FLAGS="],
                f"-DSIMDE_INCLUDE_DIR={simde}",
            ],
            [cmake, "--build", folder, "-j2"],
        ):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            assert not done.returncode, f"{command}:\n{done.stdout[-3000:]}"
    return [folder / name for name in NAMES]


if __name__ == "__main__":
    try:
        print(*build())
    except Unavailable as error:
        sys.exit(f"fuzz: {error}")
