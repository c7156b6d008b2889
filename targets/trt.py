"""Target `trt`: a TensorRT engine, and libdfssm_trt.so with the plugins that are its ops.

Built with TensorRT-RTX on any machine, or with TensorRT on one with a GPU; run on a GPU only. So what `dfcompile`
proves here is everything but the run: see `VERIFIED_BY` and docs/trt.md.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dfssm.base import DfssmError
from dfssm.base.extras import require
from dfssm.opset.schema import LAYOUT_CANONICAL

from . import cuda
from .bundle import ENGINE, MODEL, Manifest
from .files import Files, opened
from .library import locate
from .target import Probe, Progress, Tensors
from .trt_build import MODULES, Request
from .trt_memory import memory
from .trt_options import OPTIONS as OPTIONS
from .trt_options import PACKAGES, SHIPPED, Options, Plan, installed, remedy, resolve
from .trt_plugins import Build, build_of
from .trust import require_engine

if TYPE_CHECKING:
    import onnxruntime

NAME = "trt"
SUMMARY = "a TensorRT engine"
LAYOUTS = (LAYOUT_CANONICAL,)

# As for ort-cpu: the state is the largest thing that a step reads and writes after the weights.
DEFAULT_STATE_DTYPE = "fp16"

VERIFY_STEPS = 8

# The step graph from which the engine is built, run on the CPU: with our kernels where they are installed.
VERIFIED_BY = ("ort-cpu", "onnx")

IS_ENGINE = True
FILES = (ENGINE,)
WEIGHTS = ENGINE
DEFERRED = False
IN_PLACE = False  # as far as the target knows: the engine itself says which outputs lie on their inputs
EXACT = False  # TensorRT-RTX chooses kernels as it runs

LIBRARY = "libdfssm_trt.so"
LIBRARY_VARIABLE = "DFSSM_TRT_LIBRARY"

LOWERED = f"lowered.{MODEL}"
"""The graph that TensorRT's parser reads, beside the step graph while the engine is built."""


def probe(**options: Any) -> Probe:
    """The builder, library and GPU that these options of `dfcompile` come to here."""
    gpus, no_gpu = cuda.devices()
    uses = {"gpu": ", ".join(f"{gpu.name} (SM {gpu.sm})" for gpu in gpus) or f"none, {no_gpu}"}
    uses |= installed()
    needs = {"compile": ["onnx-graphsurgeon"]}
    if options.get("builder", "auto") in ("auto", SHIPPED) and not installed():
        needs["trt"] = [PACKAGES[SHIPPED][0]]
    try:
        plan = resolve(Options(**options))
        uses["builder"] = f"{plan.builder} ({plan.why})"
        if plan.options.lowering == "plugin":
            library = find_library()
            uses["library"] = f"{library} ({build_of(library)})"
            _covered(plan, library)
    except DfssmError as error:
        return Probe(NAME, uses, str(error), needs)
    return Probe(NAME, uses, needs=needs)


def find_library(own: Path | None = None) -> Path:
    """The plugin library, by `locate`."""
    return locate(
        LIBRARY,
        LIBRARY_VARIABLE,
        own,
        f"install dfssm-trt, trust the bundle's own with --trust, set {LIBRARY_VARIABLE} to the file, "
        "or compile with --lowering native",
    )


def machine(**options: Any) -> str:
    """This one: TensorRT builds for it."""
    return platform.machine()


def triton_backend(**options: Any) -> str:
    """That of TensorRT, which opens no engines of TensorRT-RTX."""
    plan = resolve(Options(**options))
    builder = plan.builder
    if builder != "tensorrt":
        raise DfssmError(
            f"Triton runs engines of builder tensorrt, this one would be of {builder}: compile with --builder tensorrt "
            "on a machine that has it, or for --target ort-cpu"
        )
    if plan.profiles[-1].logits > 1:  # their places have no row for each sequence, and so can be no input for Triton
        raise DfssmError("Triton asks for the logits of the last token only: compile with --max-logits 1")
    return "tensorrt"


def layout(**options: Any) -> int:
    """The canonical one, which the plugins read."""
    return LAYOUT_CANONICAL


def lower(tensors: Tensors, layout: int) -> Tensors:
    """The tensors as they are."""
    return tensors


def build(folder: Path, progress: Progress | None = None, **options: Any) -> tuple[list[str], dict[str, Any]]:
    """Lowers the step graph in `folder` and builds model.engine of it; copies the plugin library beside it.

    Returns the names of the bundle's files, which are these two, and the manifest's `engine`. Raises DfssmError when
    an option cannot be met, or with what the builder says.
    """
    from .trt_child import build_engine
    from .trt_lowering import lower as lower_graph
    from .trt_lowering.graph import Changes
    from .trt_proof import weights_in

    plan = resolve(Options(**options))
    choice, sm, files, plugins = plan.options, plan.sm, [ENGINE], None
    if choice.lowering == "plugin":
        library = find_library()
        plugins, sm = build_of(library), _covered(plan, library)
        shutil.copyfile(library, folder / LIBRARY)
        files.append(LIBRARY)
    version = plugins.version if plugins else ""
    only_last = plan.profiles[-1].logits == 1
    changed = lower_graph(folder / MODEL, folder / LOWERED, choice.lowering, version, only_last, choice.activations)
    built = build_engine(_request(plan, sm, folder), progress)
    found, missing = weights_in(folder / LOWERED, folder / ENGINE)
    # Plugins take weights as they are; of a graph without them TensorRT may fold some, and stripped ones are gone.
    if missing and choice.lowering == "plugin" and not choice.strip_weights:
        raise DfssmError(f"the engine that {plan.builder} built does not hold {missing[0]} as it is: report this")
    if choice.embed_plugins:
        files.remove(LIBRARY)
    return files, {
        "builder": plan.builder,
        "why": plan.why,
        "sm": list(sm),
        "plugins": asdict(plugins) | {"sm": list(plugins.sm)} if plugins else None,
        "lowering": choice.lowering,
        "activations": choice.activations,
        "passes": {name: len(names) for name, names in changed.items()},
        "refused": {name: names.refused for name, names in changed.items() if isinstance(names, Changes)},
        "version_compatible": choice.version_compatible,
        "hardware_compatible": choice.hardware_compatible,
        "embed_plugins": choice.embed_plugins,
        "strip_weights": choice.strip_weights,
        "weights": {"found": found, "missing": len(missing)},
        **{key: built[key] for key in ("version", "layers", "profiles")},
        "memory": memory(built["memory"], folder / MODEL, plan.profiles),
    }


def _covered(plan: Plan, library: Path) -> tuple[int, ...]:
    """The GPUs of `plan` that the library has code for. DfssmError where none was left open and it lacks one."""
    build = build_of(library)
    covered = tuple(sm for sm in plan.sm if build.runs_on(sm))
    if not covered or (plan.options.sm and covered != plan.sm):
        lacking = ",".join(str(sm) for sm in plan.sm if sm not in covered)
        raise DfssmError(_no_code(f"{library} has", build.sm, lacking))
    return covered


def _no_code(what_has: str, sm: Sequence[int], lacking: str) -> str:
    return (
        f"{what_has} no code for SM {lacking}, only for {', '.join(map(str, sm))}: install dfssm-trt, "
        f"or build it with DFSSM_CUDA_ARCHS={lacking}"
    )


def _request(plan: Plan, sm: tuple[int, ...], folder: Path) -> Request:
    choice = plan.options
    return Request(
        builder=plan.builder,
        model=str(folder / LOWERED),
        engine=str(folder / ENGINE),
        library=str(folder / LIBRARY) if choice.lowering == "plugin" else "",
        sm=sm if plan.builder == "tensorrt-rtx" else (),
        profiles=plan.profiles,
        timing_cache=str(choice.timing_cache or ""),
        version_compatible=choice.version_compatible,
        hardware_compatible=choice.hardware_compatible,
        embed_plugins=choice.embed_plugins,
        strip_weights=choice.strip_weights,
    )


def why_not_run() -> str:
    """What this machine lacks to run engines: a GPU, TensorRT, the CUDA bindings, the plugin library; "" if nothing."""
    _, no_gpu = cuda.devices()
    if no_gpu:
        return f"{no_gpu}: run it on a machine with an NVIDIA GPU and its driver"
    if not installed():
        return f"TensorRT is not installed: {remedy(SHIPPED)}"
    try:
        require(cuda.PACKAGES)
        find_library()
    except DfssmError as error:
        return str(error)
    return ""


def kernels(own: Path | None = None) -> str:
    """The GPU, its driver, TensorRT. The build of the plugins is the engine's own."""
    gpus, no_gpu = cuda.devices()
    gpu = f"{gpus[0].name} (SM {gpus[0].sm}), driver {cuda.driver()}" if gpus else no_gpu
    return ", ".join([gpu, *(f"{name} {version}" for name, version in installed().items())])


def check(folder: Path, manifest: Manifest, own: Path | None = None) -> None:
    """Raises DfssmError naming what this machine lacks to run the bundle: a GPU, its TensorRT, the plugin library, or a
    GPU that the engine is for.
    """
    engine = manifest.engine
    made_for = _made_for(folder, engine)
    gpus, no_gpu = cuda.devices()
    if no_gpu:
        raise DfssmError(f"{made_for}, and {no_gpu} here: run it on such a GPU, or compile with --target ort-cpu")
    version = installed().get(engine["builder"])
    if version is None:
        raise DfssmError(f"{made_for}, which is not installed: {remedy(engine['builder'])}")
    require(cuda.PACKAGES)
    if not _runs_in(engine, version):
        raise DfssmError(f"{made_for}; installed is {version}: install that version, or compile again here")
    if engine["strip_weights"]:
        raise DfssmError(
            f"{folder / ENGINE} has no weights: refit it with TensorRT, or compile without --strip-weights"
        )
    # What is built to be hardware-compatible runs on Ampere and on whatever came later.
    sm = gpus[0].sm
    if not (sm >= 80 if engine["hardware_compatible"] else sm in engine["sm"]):
        raise DfssmError(f"{made_for}; the GPU here is SM {sm}: compile with --sm {sm}")
    if engine["lowering"] == "plugin":
        _check_plugins(folder / ENGINE, engine, own, sm)


def _check_plugins(path: Path, engine: dict[str, Any], own: Path | None, sm: int) -> None:
    made = engine.get("plugins") or {"version": "1", "sm": engine["sm"]}  # of before builds had versions
    if not engine["embed_plugins"]:
        library = find_library(own)
        if (found := build_of(library)).version != made["version"]:
            raise DfssmError(
                f"{path} is for build {made['version']} of {LIBRARY}, {library} is {found}: use the bundle's own "
                "library with --trust, or compile the model again"
            )
    if not Build(made["version"], tuple(made["sm"])).runs_on(sm):
        raise DfssmError(_no_code(f"{path} has plugins that have", made["sm"], str(sm)) + ", and compile again")
    needed, driver = made.get("cuda", ""), cuda.driver()
    if needed and _major(driver) < _major(needed):
        raise DfssmError(f"{path} has plugins of CUDA {needed}, the driver here is for {driver}: install a newer one")


def _major(version: str) -> int:
    """CUDA's runtime runs with every driver of its major version and later."""
    return int(version.split(".")[0])


def open_engine(folder: str | Path | Files, manifest: Manifest, own: Path | None = None, trust: bool = False) -> Any:
    """The bundle's engine as TensorRT's ICudaEngine, after `check`.

    Raises DfssmError when it is not trusted, or when TensorRT refuses it or the plugin library.
    """
    files, engine = opened(folder), manifest.engine
    path, data = files.folder / ENGINE, files.read(ENGINE)
    require_engine(path, hashlib.sha256(data).hexdigest(), trust)  # of the bytes that are run
    trt = import_module(MODULES[engine["builder"]])
    logger = trt.Logger(trt.Logger.ERROR)
    if library := plugin_library(engine, own):
        _load_plugins(trt, library)
    runtime = trt.Runtime(logger)
    # Plugins in the engine, or its own runtime, are code that it brings, as trusted as the engine itself.
    runtime.engine_host_code_allowed = engine["version_compatible"]
    built = runtime.deserialize_cuda_engine(data)
    if built is None:
        raise DfssmError(f"{engine['builder']} {trt.__version__} cannot load {path}: see its message above")
    return built


def open_session(
    folder: str | Path | Files, threads: int = 0, model: str = MODEL, own: Path | None = None, mmap: bool = True
) -> onnxruntime.InferenceSession:
    """Raises DfssmError: what compares a graph's inner values asks for it, and an engine shows none."""
    raise DfssmError(f"{folder} is a TensorRT engine, not a graph for ONNX Runtime: use a bundle of --target ort-cpu")


def _load_plugins(trt: ModuleType, library: Path) -> None:
    """Each build once a process, wherever it lies: TensorRT refuses a second plugin of one name and version."""
    registry, version = trt.get_plugin_registry(), build_of(library).version
    if registry.get_creator("RMSNorm", version, "") is None and registry.load_library(str(library)) is None:
        raise DfssmError(
            f"{library} does not load into {trt.__name__} {trt.__version__}: see its message above; "
            "install the dfssm-trt that is made for it"
        )


def plugin_library(engine: dict[str, Any], own: Path | None = None) -> Path | None:
    """The library that `open_engine` loads, where the engine needs one and does not hold it."""
    return find_library(own) if engine["lowering"] == "plugin" and not engine["embed_plugins"] else None


def _made_for(folder: Path, engine: dict[str, Any]) -> str:
    return f"{folder / ENGINE} is for {engine['builder']} {engine['version']}, SM {', '.join(map(str, engine['sm']))}"


def _runs_in(engine: dict[str, Any], version: str) -> bool:
    """An engine runs in the TensorRT that built it; a version-compatible one in later ones of its major version."""
    # A wheel may have a suffix that TensorRT's own version has not: 10.14.1.48.post1.
    here, built = ([int(part) for part in text.split(".") if part.isdigit()] for text in (version, engine["version"]))
    return here == built or engine["version_compatible"] and here[:1] == built[:1] and here > built
