"""The TensorRT plugins under ONNX Runtime, on the host emulation (tests/tools/cuda_emulation/ort/): built once, and
sessions that run a lowered graph with them.
"""

import fcntl
import functools
import hashlib
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import onnx
import onnxruntime
from plugins_trt import emulated

OPS = sorted(emulated.PLUGINS.glob("*/plugin.cpp"))
ADAPTER = sorted(emulated.EMULATION.glob("ort/*.cpp"))
REGISTERED = [emulated.PLUGINS / "register.cpp", emulated.PLUGINS / "common/tensorrt.cpp"]
HOST = emulated.ROOT / "tests/gpu_harness/plugin_host.h"
GENERATED = emulated.BUILD / "generated"
TRT_HEADER, ORT_HEADER = "NvInferRuntime.h", "onnxruntime_c_api.h"


def _first_with(header: str, *folders) -> Path | None:
    return next((Path(folder) for folder in folders if folder and (Path(folder) / header).is_file()), None)


@functools.cache
def headers() -> dict[str, Path | None]:
    """Folders of the TensorRT and ONNX Runtime headers, where the build (cmake/) finds or puts them."""
    cache, system = emulated.ROOT / ".cache", ("/usr/include", "/usr/include/x86_64-linux-gnu", "/usr/local/include")
    lens = find_spec("kernel_lens")
    wheel = lens and Path(lens.origin).parent / "include/tensorrt"
    given = {name: os.environ.get(name) for name in ("DFSSM_TRT_INCLUDE_DIR", "DFSSM_ORT_INCLUDE_DIR")}
    ort = (given["DFSSM_ORT_INCLUDE_DIR"], "/usr/include/onnxruntime", *system, cache / "ort-headers")
    return {
        TRT_HEADER: _first_with(TRT_HEADER, given["DFSSM_TRT_INCLUDE_DIR"], *system, wheel, cache / "trt-headers"),
        ORT_HEADER: _first_with(ORT_HEADER, *ort),
    }


def missing() -> str | None:
    """Why the adapter cannot be built here."""
    if not emulated.compiler():
        return "no g++ here: the emulation needs its -fsanitize=thread"
    return next((f"no {header} here" for header, folder in headers().items() if not folder), None)


def _run(*command) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert not done.returncode, done.stderr


def _compile(source: Path, flags: list[str], key: str) -> Path:
    out = emulated.BUILD / f"adapter-{source.parent.name}-{source.stem}-{key}.o"
    if not out.exists():
        _run(emulated.compiler(), *flags, "-c", source, "-o", out.with_suffix(".part"))
        out.with_suffix(".part").rename(out)
    return out


def _library(name: str, sources: list[Path], *link: str, version: str = "0" * 16) -> Path:
    """lib`name`.so of `sources`, made again when anything it is made of has changed."""
    kernels = emulated.load().path
    GENERATED.mkdir(parents=True, exist_ok=True)
    with open(emulated.BUILD / "adapter.lock", "w") as lock, ThreadPoolExecutor(2) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _run(sys.executable, emulated.ROOT / "opset/header.py", GENERATED / "dfssm_opset.h")
        flags = [*"-std=c++17 -O1 -fPIC -Wall -Wextra -fvisibility=hidden -DDFSSM_EMULATION".split()]
        flags += [f'-DDFSSM_TRT_VERSION="{version}"', '-DDFSSM_TRT_ARCHS="86,89"', '-DDFSSM_TRT_CUDA="13.0"']
        flags += [f"-I{folder}" for folder in (emulated.PLUGINS, GENERATED, HOST.parent)]
        flags += [f"-isystem{emulated.EMULATION}"]
        flags += [f"-isystem{folder}" for folder in headers().values()]
        read = {*OPS, *ADAPTER, *REGISTERED, HOST, *emulated.PLUGINS.glob("*/*.h")}
        contents = b"".join(path.read_bytes() for path in sorted({*read, *GENERATED.iterdir()}))
        key = hashlib.sha256(repr(flags).encode() + contents).hexdigest()[:16]
        library = emulated.BUILD / f"lib{name}-{key}-{kernels.stem[-16:]}.so"
        if not library.exists():
            old_objects = {path for path in emulated.BUILD.glob("adapter-*.o") if key not in path.name}
            for stale in {*old_objects, *emulated.BUILD.glob(f"lib{name}-*.so")}:
                stale.unlink()
            objects = pool.map(lambda source: _compile(source, flags, key), sources)
            # The kernels stay in the library they were built into; it lies beside this one.
            link = ["-shared", "-Wl,--no-undefined", "-Wl,-rpath,$ORIGIN", *link]
            _run(emulated.compiler(), *link, "-o", library.with_suffix(".part"), *objects, kernels)
            library.with_suffix(".part").rename(library)
        return library


@functools.cache
def build() -> Path:
    """The plugins as custom ops of ONNX Runtime."""
    return _library("dfssm_trt_emulated_ort", [*OPS, *ADAPTER])


@functools.cache
def plugin_library() -> Path:
    """The plugins as TensorRT loads them, the kernels being those of the emulation."""
    exports = f"-Wl,--version-script={emulated.PLUGINS}/exports.map"
    return _library("dfssm_trt_emulated_plugins", [*OPS, *REGISTERED], exports)


def fake_tensorrt(folder: Path) -> Path:
    """fake_tensorrt.cpp under the name of the TensorRT of the headers."""
    version = (headers()[TRT_HEADER] / "NvInferVersion.h").read_text()
    major = re.search(r"define (?:TRT_MAJOR_ENTERPRISE|NV_TENSORRT_MAJOR) (\d+)", version)[1]
    name = f"libnvinfer.so.{major}"
    includes = [f"-isystem{folder}" for folder in (emulated.EMULATION, headers()[TRT_HEADER])]
    source = Path(__file__).with_name("fake_tensorrt.cpp")
    flags = "-std=c++17 -O1 -fPIC -shared -Wno-deprecated-declarations".split()
    _run(emulated.compiler(), *flags, *includes, f"-Wl,-soname,{name}", source, "-o", folder / name)
    return folder / name


def session(model: onnx.ModelProto | str | Path) -> onnxruntime.InferenceSession:
    """The lowered graph, ready to run with the emulated plugins."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.register_custom_ops_library(str(build()))
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
