"""dfssm in Polygraphy: two runners for `polygraphy run`, and the goldens of a bundle in Polygraphy's own files.

Polygraphy finds the runners by the entry point `polygraphy.run.plugins`. `--dfssm-ort` is ONNX Runtime with our op
library, in which any graph with ops of ai.dfssm may be run; `--dfssm-engine` is a bundle as the runtime runs it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from polygraphy.backend.base import BaseLoader, BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import IterationResult, RunResults
from polygraphy.datatype import DataType
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER
from polygraphy.tools.args import ModelArgs, OnnxLoadArgs
from polygraphy.tools.args.base import BaseRunnerArgs
from polygraphy.tools.script import Script, make_invocable
from polygraphy.util import invoke_if_callable

from dfssm.base.errors import DfssmError
from dfssm.base.files import new_folder
from dfssm.model.config import DFSSMConfig
from dfssm.runtime import Engine
from dfssm.targets import ort_cpu
from dfssm.targets.bundle import open_bundle

from .golden import Golden

INPUTS, OUTPUTS = "inputs.json", "outputs.json"


def argument_groups() -> list[BaseRunnerArgs]:
    """What `polygraphy run` adds to its own."""
    return [OrtArgs(), EngineArgs()]


class OrtArgs(BaseRunnerArgs):
    """
    ONNX-Runtime with dfssm's kernels: running graphs with ops of ai.dfssm.

    Depends on:

        - ModelArgs
        - OnnxLoadArgs
    """

    def get_name_opt_impl(self) -> tuple[str, str]:
        return "ONNX-Runtime with dfssm's kernels", "dfssm-ort"

    def add_to_script_impl(self, script: Script) -> None:
        onnx = self.arg_groups[OnnxLoadArgs]
        changed = onnx.must_use_onnx_loader()  # by --onnx-outputs, say
        model = onnx.add_to_script(script, serialize_model=True) if changed else self.arg_groups[ModelArgs].path
        script.add_import(imports=["OnnxrtRunner"], frm="polygraphy.backend.onnxrt")
        script.add_import(imports=["SessionWithKernels"], frm=__name__)
        loader = script.add_loader(make_invocable("SessionWithKernels", model), "session_with_kernels")
        script.add_runner(make_invocable("OnnxrtRunner", loader, name="dfssm-ort"))


class EngineArgs(BaseRunnerArgs):
    """
    Runtime of dfssm: running the bundle that the model is a file of.

    Depends on:

        - ModelArgs
    """

    def get_name_opt_impl(self) -> tuple[str, str]:
        return "the runtime of dfssm", "dfssm-engine"

    def get_extra_help_text_impl(self) -> str:
        return "The model is a file of a bundle. Each state is one buffer, which a step reads and writes."

    def add_to_script_impl(self, script: Script) -> None:
        script.add_import(imports=["EngineRunner"], frm=__name__)
        folder = str(Path(self.arg_groups[ModelArgs].path).parent)
        script.add_runner(make_invocable("EngineRunner", folder, name="dfssm-engine"))


class SessionWithKernels(BaseLoader):
    """Makes an ONNX Runtime session, with the op library, of a model: its path, its bytes, or a loader of these."""

    def __init__(self, model: Any):
        self._model = model

    def call_impl(self) -> Any:
        model, _ = invoke_if_callable(self._model)
        return _critical(ort_cpu.open_model, model)


class EngineRunner(BaseRunner):
    """Runs the bundle in `folder` by `Engine`, from the states that are fed. Inputs and outputs are those of the step
    graph, whatever the target.
    """

    def __init__(self, folder: str, name: str | None = None):
        super().__init__(name, prefix="dfssm-engine")
        self._folder = folder

    def activate_impl(self) -> None:
        self.engine = _critical(Engine.load, self._folder)

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        metadata.add("input_ids", DataType.INT64, (-1, -1))
        for name, (dtype, shape) in self.engine.backend.layout.items():
            metadata.add(name, DataType.from_dtype(dtype), (-1, *shape))
        return metadata

    def infer_impl(self, feed_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids = np.asarray(feed_dict["input_ids"])
        state = self.engine.new_state(len(ids))
        for name, tensor in state.tensors.items():
            tensor[...] = feed_dict[name]
        state.push()
        start = time.perf_counter()
        logits = _critical(self.engine.logits, ids, state)
        self.inference_time = time.perf_counter() - start
        written = {name.replace(".", "_out."): np.array(tensor) for name, tensor in state.tensors.items()}
        return {"logits": logits} | written

    def deactivate_impl(self) -> None:
        del self.engine


def write_golden(path: Path, folder: Path) -> dict[str, str]:
    """Write the first call of a bundle's goldens to a new `folder`: INPUTS for `--load-inputs`, which are a token and
    zero states, and OUTPUTS for `--load-outputs`, its logits. Returns their paths, by "inputs" and "outputs".
    """
    with open_bundle(path) as bundle:
        golden, manifest = Golden.of(bundle), bundle.manifest
    config = DFSSMConfig.from_dict(manifest.config)
    kinds = config.states(manifest.state_dtype)
    feed = {"input_ids": golden.ids[None, : golden.calls[0]]}
    for layer in range(config.n_layer):
        feed |= {f"{kind}.{layer}": np.zeros((1, *shape), dtype) for kind, (dtype, shape) in kinds.items()}
    logits = IterationResult({"logits": golden.logits[:1, None]}, runner_name="golden")
    with new_folder(folder) as draft:
        save_json([feed], str(draft / INPUTS))
        save_json(RunResults([("golden", [logits])]), str(draft / OUTPUTS))
    return {"inputs": str(folder / INPUTS), "outputs": str(folder / OUTPUTS)}


def _critical(function: Any, *arguments: Any) -> Any:
    """What the function returns; its DfssmError as one of Polygraphy's, which has no traceback."""
    try:
        return function(*arguments)
    except DfssmError as error:
        G_LOGGER.critical(str(error))
