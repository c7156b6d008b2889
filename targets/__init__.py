"""Targets of `dfcompile`: one module a target, all with the same small interface.

A target module has

- `NAME`, `LAYOUT` (of the scaffold's bits, see `dfssm.opset.packing`), `DEFAULT_STATE_DTYPE` (a `--state-dtype`),
  `VERIFY_STEPS` (how many one-token steps the verification runs, besides prefill);
- `probe() -> Probe`: what this machine has for it, what would be used, why not;
- `lower(tensors) -> tensors`: the model's tensors as this target stores them, each made only when it is read;
- `build(folder) -> list[str]`: what the target adds to a folder that holds `model.onnx`: names of the files it wrote;
- `open_session(folder, threads=0, model="model.onnx") -> onnxruntime.InferenceSession`: opens a built folder for
  running; `model` names another graph in it over the same weights.

Importing a target needs neither torch nor onnx: the runtime opens bundles through these modules.
"""

from importlib import import_module
from types import ModuleType

from dfssm.opset import DfssmError

_MODULES = {"ort-cpu": ".ort_cpu", "onnx": ".onnx"}

TARGETS = tuple(_MODULES)
"""Names of the known targets, the first being the one to recommend."""


def get_target(name: str) -> ModuleType:
    """The module of the target `name`. Raises DfssmError listing the known ones."""
    if name not in _MODULES:
        raise DfssmError(f"unknown target '{name}': choose one of {', '.join(TARGETS)}")
    return import_module(_MODULES[name], __name__)
