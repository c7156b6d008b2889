"""Every kernel file compiles with nvcc for every GPU asked for, without a warning, and its kernels spill no register.

DFSSM_CUDA_ARCHS says which (`86,90`, ...); sm_86 unless told otherwise. No GPU is needed.
"""

import glob
import os
import re
import shutil
import site
import subprocess
from pathlib import Path

import pytest
from plugins_trt.emulated import PLUGINS, ROOT

ARCHS = os.environ.get("DFSSM_CUDA_ARCHS", "86").split(",")
SOURCES = sorted(PLUGINS.glob("*/kernel.cu"))
FLAGS = "-std=c++17 -O3 --expt-relaxed-constexpr -Werror all-warnings -Xptxas -v".split()


def find_nvcc() -> str | None:
    """On the path, where CUDA installs itself, or out of the wheel nvidia-cuda-nvcc."""
    wheels = [path for folder in site.getsitepackages() for path in glob.glob(f"{folder}/nvidia/*/bin/nvcc")]
    found = [shutil.which(path) for path in ("nvcc", "/usr/local/cuda/bin/nvcc", *wheels)]
    return next(filter(None, found), None)


def resources(log: str) -> dict[str, dict[str, int]]:
    """Kernel -> its numbers, from what `ptxas -v` prints."""
    out = {}
    for block in log.split("Compiling entry function ")[1:]:
        name = re.match(r"'(\w+)'", block)[1]
        counts = {
            "registers": r"Used (\d+) registers",
            "shared": r"(\d+) bytes smem",
            "stack": r"(\d+) bytes stack frame",
            "spill stores": r"(\d+) bytes spill stores",
            "spill loads": r"(\d+) bytes spill loads",
        }
        found = {what: re.search(pattern, block) for what, pattern in counts.items()}
        out[name] = {what: int(match[1]) if match else 0 for what, match in found.items()}
        assert found["registers"] and found["spill stores"], f"ptxas says nothing of {name}:\n{block}"
    return out


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_compiles_and_spills_nothing(source: Path, arch: str, tmp_path):
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc here (CUDA toolkit, or pip install nvidia-cuda-nvcc)")
    command = [nvcc, *FLAGS, f"-arch=sm_{arch}", f"-I{PLUGINS}", "-cubin", "-o", tmp_path / "kernel.cubin", source]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    kernels = resources(done.stderr)
    assert kernels, "no kernel in this file"
    for name, numbers in kernels.items():
        print(f"sm_{arch} {name}:", ", ".join(f"{what} {n}" for what, n in numbers.items()))
    spilling = {name: n for name, n in kernels.items() if n["spill stores"] or n["spill loads"]}
    assert not spilling


def test_spills_are_seen(tmp_path):
    """The reader of ptxas's report, on a kernel that cannot but spill."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc here (CUDA toolkit, or pip install nvidia-cuda-nvcc)")
    source = tmp_path / "spill.cu"
    source.write_text("""
        __global__ void __launch_bounds__(1024) spill(const float* in, float* out) {
          float x[128];
        #pragma unroll
          for (int i = 0; i < 128; ++i) x[i] = in[i * 1024 + threadIdx.x];
          __syncthreads();
        #pragma unroll
          for (int i = 0; i < 128; ++i) out[i * 1024 + threadIdx.x] = x[127 - i] * x[i];
        }""")
    command = [nvcc, *FLAGS, f"-arch=sm_{ARCHS[0]}", "-cubin", "-o", tmp_path / "spill.cubin", source]
    done = subprocess.run(command, capture_output=True, text=True)
    (numbers,) = resources(done.stderr).values()
    assert numbers["spill stores"] > 0 and numbers["spill loads"] > 0 and numbers["registers"] <= 64
