"""Builds a TensorRT engine, as a process of its own: `python -m dfssm.targets.trt_build` with a request on stdin.

The request is one JSON object (`Request`); what comes on stdout is one object a line: `{"log": [severity, text]}`,
`{"progress": [done, total]}`, and last `{"result": {...}}` or `{"error": "..."}`. A process of its own, because then an
abort inside the native builder, or the end of memory, is a message to the caller and not the caller's end too.
"""

import json
import re
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from .trt_plugins import PLUGINS

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
"""Name of a builder -> the Python module it is."""

LOGITS_AT = "logits_at"
"""The input of an engine that names the tokens whose logits it gives: see `trt_lowering.logits_at`."""

# What the builder says of memory: of each profile, and of the weights of them all.
_MEMORY = re.compile(r"Total (Activation|Weights) Memory: (\d+) bytes")

# Of every model with token ids: they are bound as int64, as the step graph has them.
_EXPECTED_WARNING = "Int64 binding"


class Profile(NamedTuple):
    """The shapes that one optimisation profile is for: up to so many of each, from 1 on, and what it is best at."""

    rows: int
    best: int
    tokens: int
    logits: int


@dataclass(frozen=True)
class Request:
    """One engine to build.

    `model`: the lowered graph. `engine`: the file to write. `library`: the plugin library, "" for a graph without
    plugins. `sm`: compute capabilities, for tensorrt-rtx. `timing_cache`: a file to read, if it is there, and to write;
    "" for none.
    """

    builder: str
    model: str
    engine: str
    library: str
    sm: tuple[int, ...]
    profiles: tuple[Profile, ...]
    timing_cache: str = ""
    version_compatible: bool = False
    hardware_compatible: bool = False
    embed_plugins: bool = False
    strip_weights: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class BuildError(Exception):
    """What TensorRT has against the request, in one line."""


def main() -> None:
    """Serve the request on stdin. Exit status 1 after an `error`."""
    document = json.load(sys.stdin)
    request = Request(**{field.name: document[field.name] for field in fields(Request)})
    try:
        _say(result=build(import_module(MODULES[request.builder]), request))
    except (BuildError, MemoryError, OSError, ImportError) as error:
        _say(error=" ".join(str(error).split()) or type(error).__name__)
        raise SystemExit(1) from None


def build(trt: ModuleType, request: Request) -> dict[str, Any]:
    """Build `request` with the module `trt` and write the engine. Returns figures and what the engine is for."""
    start = time.perf_counter()
    log = _logger(trt)
    if request.library:
        _load_plugins(trt, request.library, log)
    builder = trt.Builder(log)
    if builder is None:
        raise BuildError(log.last or f"TensorRT {trt.__version__} makes no builder here")
    network = builder.create_network(_flags(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request.model):
        raise BuildError(f"the graph does not parse: {_parser_error(parser, log)}")
    parsed = time.perf_counter()
    _make_linear(trt, network)
    config, profiles = _config(trt, builder, network, request)
    monitor = _monitor(trt)
    if monitor:
        config.progress_monitor = monitor
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError(log.last or "TensorRT built nothing and said nothing")
    Path(request.engine).write_bytes(memoryview(engine))
    if request.timing_cache:
        Path(request.timing_cache).write_bytes(memoryview(config.get_timing_cache().serialize()))
    return {
        "version": trt.__version__,
        "layers": network.num_layers,
        "profiles": profiles,
        "memory": {kind: max(log.memory[kind], default=None) for kind in log.memory},
        "parse_seconds": parsed - start,
        "build_seconds": time.perf_counter() - parsed,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def known_sms(trt: ModuleType) -> list[int]:
    """The compute capabilities that `trt` builds for without having one; none if it takes the GPU it finds."""
    names = getattr(getattr(trt, "ComputeCapability", None), "__members__", ())
    return sorted(int(name[2:]) for name in names if name.startswith("SM") and name[2:].isdigit())


def _flags(enum: Any, *names: str) -> int:
    """The bits of those flags that this version still has: TensorRT 11 has strongly typed networks only."""
    return sum(1 << int(getattr(enum, name)) for name in names if hasattr(enum, name))


def _load_plugins(trt: ModuleType, library: str, log: Any) -> None:
    registry = trt.get_plugin_registry()
    if registry.load_library(library) is None:
        raise BuildError(f"{library} does not load into TensorRT {trt.__version__}: {log.last or 'no reason given'}")


def _config(trt: ModuleType, builder: Any, network: Any, request: Request) -> tuple[Any, list[dict[str, Any]]]:
    """The builder's configuration for `request`, and the bounds of its profiles as the manifest tells them."""
    config = builder.create_builder_config()
    for name, wanted in {
        "VERSION_COMPATIBLE": request.version_compatible,
        # The runtime that such an engine carries for later versions is no part of TensorRT-RTX.
        "EXCLUDE_LEAN_RUNTIME": request.version_compatible and request.builder == "tensorrt-rtx",
        "STRIP_PLAN": request.strip_weights,
    }.items():
        if wanted:
            if not hasattr(trt.BuilderFlag, name):
                raise BuildError(f"TensorRT {trt.__version__} has no {name}")
            config.set_flag(getattr(trt.BuilderFlag, name))
    # fp32 is to mean fp32: TensorRT may round the factors of its own products to ten bits otherwise.
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)
    if request.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if request.embed_plugins:
        config.plugins_to_serialize = [request.library]
    if request.timing_cache:
        path = Path(request.timing_cache)
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if not config.set_timing_cache(cache, ignore_mismatch=False):
            raise BuildError(f"{path} is the timing cache of another GPU or TensorRT: remove it or name another")
    if request.builder == "tensorrt-rtx":
        _set_capabilities(trt, config, request.sm)
    profiles = [_add_profile(builder, config, network, Profile(*profile)) for profile in request.profiles]
    return config, profiles


def _make_linear(trt: ModuleType, network: Any) -> None:
    """As the runtime binds tensors: a state that TensorRT reformats would be another buffer for the plugin."""
    for index in range(network.num_inputs):
        network.get_input(index).allowed_formats = 1 << int(trt.TensorFormat.LINEAR)
    for index in range(network.num_outputs):
        network.get_output(index).allowed_formats = 1 << int(trt.TensorFormat.LINEAR)


def _set_capabilities(trt: ModuleType, config: Any, sm: Sequence[int]) -> None:
    config.num_compute_capabilities = len(sm)
    for index, number in enumerate(sm):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{number}"), index)


def _add_profile(builder: Any, config: Any, network: Any, most: Profile) -> dict[str, Any]:
    """One optimisation profile; returns what it means for `input_ids`, and how many `logits` a row it gives."""
    profile = builder.create_optimization_profile()
    sizes = {"min": (1, 1, 1), "opt": (most.rows, most.best, 1), "max": (most.rows, most.tokens, most.logits)}
    bounds: dict[str, Any] = {"logits": most.logits}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        # The open dimensions are the rows, first in every input but logits_at [K], and the tokens of input_ids [B,T].
        axes = (2,) if tensor.name == LOGITS_AT else (0, 1)
        shapes = {
            name: [size if size != -1 else of[axes[min(axis, 1)]] for axis, size in enumerate(tensor.shape)]
            for name, of in sizes.items()
        }
        profile.set_shape(tensor.name, *shapes.values())
        if tensor.name == "input_ids":
            bounds |= shapes
    config.add_optimization_profile(profile)
    return bounds


def _parser_error(parser: Any, log: Any) -> str:
    if log.last.startswith(tuple(PLUGINS)) or not parser.num_errors:
        return str(log.last)
    error = parser.get_error(0)
    return f"{error.desc()} (node {error.node_name()})"


def _logger(trt: Any) -> Any:
    """A TensorRT logger that says everything on stdout but details; `last` is the error to show.

    That is the last one, but an error of a plugin stays: it names the node and the shapes, and what TensorRT says
    after it is only that a plugin failed. `memory`: bytes of "weights", and of the "activations" of each profile.
    """

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.last = ""
            self.memory: dict[str, list[int]] = {"weights": [], "activations": []}

        def log(self, severity: Any, text: str) -> None:
            if found := _MEMORY.search(text):
                self.memory["weights" if found[1] == "Weights" else "activations"].append(int(found[2]))
            if severity <= trt.ILogger.Severity.ERROR and not self.last.startswith(tuple(PLUGINS)):
                self.last = " ".join(text.split())
            if severity <= trt.ILogger.Severity.WARNING and _EXPECTED_WARNING not in text:
                _say(log=[severity.name.lower(), " ".join(text.split())])

    return Logger()


def _monitor(trt: Any) -> Any:
    """Tells how far the build is, by its outermost phase; None where this TensorRT has no progress monitor."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.phase, self.steps = "", 0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.phase, self.steps = name, steps

        def step_complete(self, name: str, step: int) -> bool:
            if name == self.phase:
                _say(progress=[step + 1, self.steps])
            return True

        def phase_finish(self, name: str) -> None:
            if name == self.phase:  # not every step of it is told of
                _say(progress=[self.steps, self.steps])

    return Monitor()


def _say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
