"""Target trt before and after a build: which builder, for which GPUs; what a machine must have to run the result."""

import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from dfssm.base import DfssmError
from dfssm.targets import cuda, trt, trt_options
from dfssm.targets.bundle import Manifest
from dfssm.targets.trt_options import Options, resolve
from dfssm.targets.trt_plugins import Build, build_of

BOTH = {"tensorrt-rtx": "1.7.1", "tensorrt": "10.14.1"}
NO_GPU = ([], "there is no CUDA driver (libcuda.so.1)")
KNOWN = [75, 80, 86, 89, 120, 121]
AMPERE, ADA = cuda.Device("A10", 86), cuda.Device("L4", 89)


@pytest.fixture
def machine(monkeypatch):
    """Sets what the machine has: builders and GPUs."""

    def has(builders: dict, gpus: list[cuda.Device]) -> None:
        monkeypatch.setattr(cuda, "devices", lambda: (gpus, "") if gpus else NO_GPU)
        monkeypatch.setattr(cuda, "driver", lambda: "13.0" if gpus else "none")
        for module in (trt_options, trt):
            monkeypatch.setattr(module, "installed", lambda: builders)
        monkeypatch.setattr(trt_options, "_known", lambda builder: KNOWN)

    return has


def write_library(path: Path, version: str = "0123456789abcdef", sm: str = "75,80,86,87,89,90,100,110,120") -> Path:
    """What there is to see of a plugin library without loading it."""
    path.write_bytes(b"\x7fELF...\0dfssm_trt version=%b sm=%b\0..." % (version.encode(), sm.encode()))
    return path


@pytest.mark.parametrize(
    "builders, gpus, builder, why",
    [
        (BOTH, [], "tensorrt-rtx", "there is no CUDA driver (libcuda.so.1), and it needs none"),
        (BOTH, [ADA], "tensorrt", "it is installed, and there is a GPU to build on"),
        ({"tensorrt-rtx": "1.7.1"}, [ADA], "tensorrt-rtx", "tensorrt is not installed"),
    ],
)
def test_auto_picks_and_says_why(builders, gpus, builder, why, machine):
    machine(builders, gpus)
    plan = resolve(Options())
    assert (plan.builder, plan.why) == (builder, why)
    assert plan.sm == ((89,) if gpus else tuple(KNOWN))


def test_profiles(machine):
    machine(BOTH, [ADA])
    sizes = {"max_batch": 4, "max_tokens": 256}
    for builder in BOTH:
        assert resolve(Options(builder=builder, **sizes)).profiles == ((4, 1, 1, 1), (4, 256, 256, 64))
        assert resolve(Options(builder=builder, lowering="native", **sizes)).profiles == ((4, 1, 1, 1),)


@pytest.mark.parametrize(
    "batch, tokens, prompts",
    [
        (1, 1, []),
        (3, 2, [(3, 2, 2, 2)]),
        (128, 512, [(8, 512, 512, 64)]),
        (128, 100, [(40, 100, 100, 64)]),
        (128, 10_000, [(1, 10_000, 10_000, 64)]),
    ],
)
def test_the_tokens_of_a_call_are_bounded(batch, tokens, prompts, machine):
    """What lies between the layers grows with them, and not with the largest batch of steps."""
    machine(BOTH, [])
    step, *others = resolve(Options(max_batch=batch, max_tokens=tokens)).profiles
    assert step == (batch, 1, 1, 1) and others == prompts


def test_sm_is_a_list(machine):
    machine(BOTH, [])
    assert resolve(Options(sm="86, 89,86")).sm == (86, 89)


@pytest.mark.parametrize(
    "options, builders, gpus, words",
    [
        ({"builder": "onnx"}, BOTH, [], "unknown builder 'onnx': choose one of auto, tensorrt-rtx, tensorrt"),
        ({"lowering": "both"}, BOTH, [], "unknown lowering 'both': choose one of plugin, native"),
        ({"activations": "bf16"}, BOTH, [], "unknown activations 'bf16': choose one of fp32, fp16"),
        (
            {"activations": "fp16", "lowering": "native"},
            BOTH,
            [],
            "--activations fp16: a native engine computes in fp32",
        ),
        ({"max_batch": 0}, BOTH, [], "--max-batch is 0: give 1 or more"),
        ({"sm": "86,90"}, BOTH, [], "tensorrt-rtx 1.7.1 builds no engine for SM 90, only for 75, 80, 86, 89, 120, 121"),
        ({"sm": "75", "lowering": "native"}, BOTH, [], "builds no native engine for SM 75, only for 80, 86, 89, 120"),
        ({}, {"tensorrt-rtx": "1.7.1"}, [cuda.Device("H100", 90)], "builds no engine for SM 90"),
        ({"max_tokens": -3}, BOTH, [], "--max-tokens is -3"),
        ({"max_logits": 0}, BOTH, [], "--max-logits is 0"),
        ({"sm": "8.6"}, BOTH, [], "--sm is '8.6': give compute capabilities as in 86,89"),
        ({}, {}, [], "builder tensorrt-rtx is not installed (no module tensorrt_rtx): pip install 'dfssm[trt]'"),
        ({}, {}, [ADA], "builder tensorrt is not installed"),
        ({"builder": "tensorrt"}, BOTH, [], "builder tensorrt needs a GPU, and there is no CUDA driver"),
        ({"builder": "tensorrt", "sm": "86"}, BOTH, [ADA], "tensorrt builds for the GPU here, SM 89"),
        ({"sm": "86", "timing_cache": Path("t")}, BOTH, [], "--timing-cache: tensorrt-rtx times nothing"),
        ({"timing_cache": "/"}, BOTH, [ADA], "cannot write /: it is a folder; give the name of a file"),
        ({"timing_cache": ""}, BOTH, [ADA], "an empty path names nothing: give the name of a file"),
        ({"sm": "86", "hardware_compatible": True}, BOTH, [], "--hardware-compatible is for builder tensorrt"),
        ({"sm": "86", "strip_weights": True}, BOTH, [], "--strip-weights: tensorrt-rtx needs a GPU for that"),
        ({"sm": "86", "embed_plugins": True}, BOTH, [], "add --version-compatible"),
        (
            {"sm": "86", "embed_plugins": True, "version_compatible": True, "lowering": "native"},
            *(BOTH, [], "a native engine has no plugins"),
        ),
    ],
)
def test_what_cannot_be_is_one_line(options, builders, gpus, words, machine):
    machine(builders, gpus)
    with pytest.raises(DfssmError) as caught:
        resolve(Options(**options))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_probe_says_what_would_be_used(machine, monkeypatch, tmp_path):
    library = write_library(tmp_path / trt.LIBRARY, sm="86,89")
    monkeypatch.setenv(trt.LIBRARY_VARIABLE, str(library))
    machine(BOTH, [ADA])
    probe = trt.probe()
    assert probe.usable and probe.uses["gpu"] == "L4 (SM 89)"
    assert probe.uses["library"] == f"{library} (build 0123456789abcdef for SM 86, 89)"
    assert probe.uses["tensorrt-rtx"] == "1.7.1"
    assert trt.probe(builder="tensorrt").uses["builder"] == "tensorrt (--builder)"
    machine(BOTH, [])
    assert trt.probe().usable and trt.probe(max_batch=0).why_not == "--max-batch is 0: give 1 or more"
    machine({}, [])
    assert "builder tensorrt-rtx is not installed" in trt.probe().why_not


def test_what_running_takes(machine, monkeypatch, tmp_path):
    library = tmp_path / trt.LIBRARY
    monkeypatch.setenv(trt.LIBRARY_VARIABLE, str(library))
    machine(BOTH, [])
    driver = "run it on a machine with an NVIDIA GPU and its driver"
    assert trt.why_not_run() == f"there is no CUDA driver (libcuda.so.1): {driver}"
    machine({}, [ADA])
    assert trt.why_not_run() == "TensorRT is not installed: pip install 'dfssm[trt]'"
    machine(BOTH, [ADA])
    assert "there is no such file" in trt.why_not_run()
    write_library(library)
    assert trt.why_not_run() == ""
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    bindings = "cuda-bindings is not installed: pip install 'dfssm[trt]'"
    assert trt.why_not_run() == bindings
    with pytest.raises(DfssmError, match=re.escape(bindings)):
        trt.check(tmp_path, bundle())


def test_library(machine, monkeypatch, tmp_path):
    machine(BOTH, [])
    monkeypatch.setenv(trt.LIBRARY_VARIABLE, "/nowhere/lib.so")
    with pytest.raises(DfssmError, match="DFSSM_TRT_LIBRARY is /nowhere/lib.so: there is no such file"):
        trt.find_library()
    assert not trt.probe(sm="86").usable and trt.probe(sm="86", lowering="native").usable
    monkeypatch.delenv(trt.LIBRARY_VARIABLE)
    monkeypatch.setattr("dfssm.targets.library.installed", lambda library: None)
    with pytest.raises(DfssmError, match="libdfssm_trt.so is not installed: .* or compile with --lowering native"):
        trt.find_library()
    (tmp_path / trt.LIBRARY).touch()
    assert trt.find_library(tmp_path / trt.LIBRARY) == tmp_path / trt.LIBRARY


ENGINE = {
    "builder": "tensorrt-rtx",
    "version": "1.7.1",
    "sm": [86, 89],
    "lowering": "native",
    "plugins": {"version": "0123456789abcdef", "sm": [86, 89]},
    "version_compatible": False,
    "hardware_compatible": False,
    "embed_plugins": False,
    "strip_weights": False,
}


def bundle(**engine) -> Manifest:
    return Manifest("trt", {}, "fp16", 0, {}, engine=ENGINE | engine)


@pytest.mark.parametrize(
    "engine, builders, gpus, words",
    [
        ({}, BOTH, [], "SM 86, 89, and there is no CUDA driver (libcuda.so.1) here: run it on such a GPU"),
        ({}, {"tensorrt": "10.14.1"}, [ADA], "which is not installed: pip install 'dfssm[trt]'"),
        ({}, {"tensorrt-rtx": "1.8.0"}, [ADA], "for tensorrt-rtx 1.7.1, SM 86, 89; installed is 1.8.0"),
        ({"version_compatible": True}, {"tensorrt-rtx": "1.6.3"}, [ADA], "installed is 1.6.3"),
        ({"version_compatible": True}, {"tensorrt-rtx": "2.0.0"}, [ADA], "installed is 2.0.0"),
        ({"strip_weights": True}, BOTH, [ADA], "has no weights: refit it"),
        ({"lowering": "plugin"}, BOTH, [ADA], "libdfssm_trt.so is not installed"),
    ],
)
def test_check_names_what_is_missing(engine, builders, gpus, words, machine, monkeypatch, tmp_path):
    machine(builders, gpus)
    monkeypatch.delenv(trt.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr("dfssm.targets.library.installed", lambda library: None)
    with pytest.raises(DfssmError) as caught:
        trt.check(tmp_path, bundle(**engine))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_check_passes(machine, tmp_path):
    machine({"tensorrt-rtx": "1.8.0"}, [ADA])
    trt.check(tmp_path, bundle(version_compatible=True))
    trt.check(tmp_path, bundle(version_compatible=True, lowering="plugin", embed_plugins=True))
    machine({"tensorrt-rtx": "1.7.1.post1"}, [AMPERE])
    trt.check(tmp_path, bundle())


def test_engine_for_another_gpu(machine, tmp_path):
    machine({"tensorrt-rtx": "1.7.1"}, [cuda.Device("RTX 5090", 120), ADA])
    with pytest.raises(DfssmError, match="for tensorrt-rtx 1.7.1, SM 86, 89; the GPU here is SM 120: compile with"):
        trt.check(tmp_path, bundle())
    trt.check(tmp_path, bundle(hardware_compatible=True, sm=[80]))
    machine({"tensorrt-rtx": "1.7.1"}, [cuda.Device("T4", 75)])
    with pytest.raises(DfssmError, match="the GPU here is SM 75"):
        trt.check(tmp_path, bundle(hardware_compatible=True, sm=[80]))


@pytest.mark.parametrize(
    "has, runs, fails",
    [
        ((86, 89), [86, 89, 90, 100, 120], [75, 80, 87]),  # PTX of 89 for what is newer
        ((75, 80, 86, 87, 89, 90, 100, 110, 120), [75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121], [70, 72]),
        ((80, 120), [80, 86, 89, 120, 121], [75, 87, 90, 100, 110]),  # a card's code runs on its generation
        ((87, 120), [87], [80, 86, 89]),  # Orin's does not
    ],
)
def test_which_gpus_a_library_runs_on(has, runs, fails):
    build = Build("", has)
    assert [sm for sm in (*runs, *fails) if build.runs_on(sm)] == runs


def test_a_library_says_what_it_is(tmp_path):
    assert build_of(write_library(tmp_path / "lib.so", "f" * 16, "86,120")) == Build("f" * 16, (86, 120))
    write_library(tmp_path / "lib.so", "f" * 16, "86 cuda=13.0")
    assert build_of(tmp_path / "lib.so") == Build("f" * 16, (86,), "13.0")
    (tmp_path / "lib.so").write_bytes(b"dfssm_trt version=1")
    with pytest.raises(DfssmError, match="lib.so is no libdfssm_trt.so, or that of an older dfssm: install the"):
        build_of(tmp_path / "lib.so")
    with pytest.raises(DfssmError, match=r"cannot read .*none.so: No such file or directory"):
        build_of(tmp_path / "none.so")


def test_engines_are_for_gpus_that_the_library_has_code_for(machine, monkeypatch, tmp_path):
    monkeypatch.setenv(trt.LIBRARY_VARIABLE, str(library := write_library(tmp_path / trt.LIBRARY, sm="86,89")))
    machine(BOTH, [])
    assert trt._covered(resolve(Options()), library) == (86, 89, 120, 121)
    assert trt.probe(sm="86,89").usable
    words = (
        f"{library} has no code for SM 75,80, only for 86, 89: install dfssm-trt, or build it with DFSSM_CUDA_ARCHS="
    )
    assert trt.probe(sm="75,80,86").why_not.startswith(words)
    assert trt.probe(sm="80", lowering="native").usable
    machine(BOTH, [cuda.Device("T4", 75)])
    assert "has no code for SM 75, only for 86, 89" in trt.probe().why_not


def test_an_engine_runs_with_the_library_that_it_was_built_for(machine, monkeypatch, tmp_path):
    machine(BOTH, [ADA])
    library = write_library(tmp_path / trt.LIBRARY)
    monkeypatch.setenv(trt.LIBRARY_VARIABLE, str(library))
    trt.check(tmp_path, bundle(lowering="plugin"))
    write_library(library, "f" * 16)
    words = (
        rf"is for build 0123456789abcdef of libdfssm_trt.so, {library} is build f{{16}} for SM .*: use the bundle's own"
    )
    with pytest.raises(DfssmError, match=words):
        trt.check(tmp_path, bundle(lowering="plugin"))
    trt.check(tmp_path, bundle(lowering="plugin", version_compatible=True, embed_plugins=True))
    earlier = {key: value for key, value in ENGINE.items() if key != "plugins"} | {"lowering": "plugin"}
    with pytest.raises(DfssmError, match="is for build 1 of libdfssm_trt.so"):
        trt.check(tmp_path, Manifest("trt", {}, "fp16", 0, {}, engine=earlier))


def test_a_gpu_that_the_plugins_have_no_code_for(machine, monkeypatch, tmp_path):
    machine({"tensorrt-rtx": "1.7.1"}, [cuda.Device("A100", 80)])
    monkeypatch.setenv(trt.LIBRARY_VARIABLE, str(write_library(tmp_path / trt.LIBRARY, sm="86,89")))
    with pytest.raises(DfssmError, match=r"model.engine has plugins that have no code for SM 80, only for 86, 89: ins"):
        trt.check(tmp_path, bundle(lowering="plugin", sm=[80]))


@pytest.mark.parametrize("driver, runs", [("12.9", False), ("13.0", True), ("14.1", True)])
def test_a_driver_that_is_older_than_the_plugins(driver, runs, machine, monkeypatch, tmp_path):
    """The runtime in them would refuse each launch; a driver takes any of its major version."""
    machine({"tensorrt-rtx": "1.7.1"}, [ADA])
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    monkeypatch.setenv(trt.LIBRARY_VARIABLE, str(write_library(tmp_path / trt.LIBRARY)))
    engine = bundle(lowering="plugin", plugins=ENGINE["plugins"] | {"cuda": "13.1"})
    if runs:
        trt.check(tmp_path, engine)
    else:
        with pytest.raises(DfssmError, match="plugins of CUDA 13.1, the driver here is for 12.9: install a newer one"):
            trt.check(tmp_path, engine)


def test_the_wheel_has_code_for_all_that_engines_are_built_for():
    """TensorRT-RTX's list, and those of which only TensorRT builds."""
    project = Path(trt.__file__).resolve().parents[1] / "plugins" / "trt" / "pyproject.toml"
    archs = tomllib.loads(project.read_text())["tool"]["scikit-build"]["cmake"]["define"]["DFSSM_CUDA_ARCHS"]
    build = Build("", tuple(map(int, archs.split(";"))))
    assert [sm for sm in (*KNOWN, 87, 90, 100, 110) if not build.runs_on(sm)] == []
    assert set(KNOWN) - {121} <= set(build.sm), "machine code, not PTX"


TWO_BUILDS = """
import sys
from pathlib import Path
import tensorrt_rtx
from dfssm.targets import trt
for path in sys.argv[1:]:
    trt._load_plugins(tensorrt_rtx, Path(path))
    creators = [c for c in tensorrt_rtx.get_plugin_registry().all_creators if c.name == "SelectiveScanStep"]
    print(*sorted(c.plugin_version for c in creators))
"""


@pytest.mark.skipif(not find_spec("tensorrt_rtx"), reason="tensorrt_rtx is not installed")
def test_two_builds_of_the_library_in_one_process(tmp_path):
    """As two bundles bring them; the same build again, at another place, is one."""
    try:
        library = trt.find_library()
    except DfssmError as error:
        pytest.skip(str(error))
    version = build_of(library).version
    paths = [tmp_path / name for name in ("first.so", "again.so", "second.so")]
    for path, written in zip(paths, (version, version, "f" * 16), strict=True):
        path.write_bytes(library.read_bytes().replace(version.encode(), written.encode()))
    done = subprocess.run([sys.executable, "-c", TWO_BUILDS, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [version, version, f"{version} {'f' * 16}"]


def test_no_session():
    with pytest.raises(DfssmError, match="is a TensorRT engine, not a graph for ONNX Runtime"):
        trt.open_session("bundle")


def test_options_are_those_of_the_target():
    assert [(option.name, option.default) for option in trt.OPTIONS] == list(vars(Options()).items())


def test_driver_is_asked(monkeypatch):
    """Two GPUs, as the driver's own functions tell of them."""

    class Driver:
        def __init__(self, code=0, count=2):
            self.code, self.count = code, count

        def cuInit(self, flags):
            return self.code

        def cuDeviceGetCount(self, count):
            count._obj.value = self.count
            return 0

        def cuDeviceGetName(self, name, size, index):
            name.value = [b"first", b"second"][index]

        def cuDeviceGetAttribute(self, number, attribute, index):
            number._obj.value = {75: [8, 12], 76: [6, 0]}[attribute][index]

    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: Driver())
    assert cuda.devices() == ([cuda.Device("first", 86), cuda.Device("second", 120)], "")
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: Driver(code=100))
    assert cuda.devices() == ([], "the CUDA driver finds no GPU (error 100)")
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: Driver(count=0))
    assert cuda.devices() == ([], "the CUDA driver finds no GPU")
