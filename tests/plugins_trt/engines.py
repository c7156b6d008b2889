"""Engines of small lowered models, built by TensorRT-RTX with the real plugin library, in a process of its own.

That process needs the unversioned name of TensorRT's library in LD_LIBRARY_PATH when it starts: its ONNX parser opens
that name when it meets a plugin, and ends the process if there is none. All models of a test module are built by one.
"""

import fcntl
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import onnx

from dfssm.targets.trt_plugins import build_of

LIBRARY = "libdfssm_trt.so"
NO_LIBRARY = f"{LIBRARY} is not installed: it is built where nvcc is"
MODULE = "tensorrt_rtx"
SMS = ("86", "89")
MAX_BATCH, MAX_TOKENS = 4, 70


def library() -> Path | None:
    """The plugin library: $DFSSM_TRT_LIBRARY, else the installed one."""
    native = find_spec("dfssm._native")
    chosen = os.environ.get("DFSSM_TRT_LIBRARY") or (native and Path(native.origin).with_name(LIBRARY))
    return Path(chosen) if chosen and Path(chosen).is_file() else None


def version() -> str:
    """That of its plugins; of those of the emulation, which nothing is found by, where there is none."""
    path = library()
    return build_of(path).version if path else "0" * 16


def missing() -> str | None:
    """Why no engine can be built here."""
    if not find_spec(MODULE):
        return f"{MODULE} is not installed"
    return None if library() else NO_LIBRARY


@dataclass
class Built:
    """What came of a model: `size` of its engine (0: none), its `layers` as (name, type, plugin), `outputs` as (name,
    dtype), the workspace of the largest layer (`scratch`), all memory between layers (`activations`), how many copies
    of constants the builder put in (`copies`), the plugin fields that are `embedded` in it, and the `errors` that were
    logged.
    """

    size: int
    layers: list[tuple[str, str, str]]
    outputs: list[tuple[str, str]]
    scratch: int
    activations: int
    copies: int
    embedded: list[str]
    errors: list[str]


def build(models: dict[str, onnx.ModelProto], folder: Path) -> tuple[dict[str, Built], dict[str, dict[str, str]]]:
    """Engines of `models`, and the creators of the registry: name -> {field: type}. Once for all test processes that
    name the same folder."""
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "built.json").exists():
            _build(models, folder)
    said = json.loads((folder / "built.json").read_text())
    return {name: Built(**built) for name, built in zip(models, said["built"], strict=True)}, said["creators"]


def _build(models: dict[str, onnx.ModelProto], folder: Path) -> None:
    links = folder / "links"
    links.mkdir(exist_ok=True)
    for name in ("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so"):
        for place in find_spec(f"{MODULE}_libs").submodule_search_locations:
            if (path := Path(place) / f"{name}.1").exists():
                (links / name).unlink(missing_ok=True)
                (links / name).symlink_to(path)
    for i, model in enumerate(models.values()):
        (folder / f"{i}.onnx").write_bytes(model.SerializeToString())
    paths = [str(links), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    child = subprocess.run(
        [sys.executable, __file__, str(library()), str(folder), str(len(models))],
        env=os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, f"the builder ended with {child.returncode}:\n{child.stdout[-2000:]}{child.stderr}"


_LAYER = re.compile(r"^Name: (.*?), LayerType: (\w+), .*?(?:PluginType: (\w+).*)?$", re.MULTILINE)
_SCRATCH = re.compile(r"Max Scratch Memory: (\d+) bytes")
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")


def main() -> None:
    import tensorrt_rtx as trt

    class Logger(trt.ILogger):
        def __init__(self):
            super().__init__()
            self.lines = []

        def log(self, severity, message):
            self.lines.append((severity, message))

    logger = Logger()
    path, folder, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    registry = trt.get_plugin_registry()
    before = len(list(registry.all_creators))
    assert registry.load_library(path), f"{path} does not load"
    mine = list(registry.all_creators)[before:]
    creators = {
        c.name: {f.name: f.type.name for f in c.field_names}
        for c in mine
        if (c.plugin_version, c.plugin_namespace) == (build_of(Path(path)).version, "")
    }

    def engine(model: bytes) -> tuple[bytes, list]:
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        if not trt.OnnxParser(network, logger).parse(model):
            return b"", []
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.num_compute_capabilities = len(SMS)
        for i, sm in enumerate(SMS):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), i)
        profile = builder.create_optimization_profile()
        for tensor in map(network.get_input, range(network.num_inputs)):
            least = [max(size, 1) for size in tensor.shape]
            most = [size if size > 0 else (MAX_BATCH, MAX_TOKENS)[axis] for axis, size in enumerate(tensor.shape)]
            profile.set_shape(tensor.name, least, least, most)
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        outputs = map(network.get_output, range(network.num_outputs))
        return bytes(plan or b""), [(tensor.name, tensor.dtype.name) for tensor in outputs]

    built = []
    for i in range(count):
        logger.lines.clear()
        plan, outputs = engine((folder / f"{i}.onnx").read_bytes())
        text = "\n".join(message for _, message in logger.lines)
        scratch, activations = _SCRATCH.search(text), _ACTIVATIONS.search(text)
        built.append(
            {
                "size": len(plan),
                "outputs": outputs,
                "layers": _LAYER.findall(text.rpartition("\nLayers:")[2]),
                "scratch": int(scratch[1]) if scratch else 0,
                "activations": int(activations[1]) if activations else 0,
                "copies": text.count("Insert CopyNode"),
                "errors": [message for severity, message in logger.lines if severity <= trt.ILogger.Severity.ERROR],
                "embedded": [name for names in creators.values() for name in names if name.encode() in plan],
            }
        )
    (folder / "built.json").write_text(json.dumps({"built": built, "creators": creators}))


if __name__ == "__main__":
    main()
