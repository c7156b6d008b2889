"""Targets of `dfcompile`: one module a target, all with the same small interface.

A target module has

- `NAME`, `LAYOUT` (of the scaffold's bits, see `dfssm.opset.packing`), `DEFAULT_STATE_DTYPE` (a `--state-dtype`),
  `VERIFY_STEPS` (how many one-token steps the verification runs, besides prefill), `OPTIONS` (names of the options of
  dfcompile that are this target's alone), `VERIFIED_BY` (names of targets: the first one usable here runs the folder's
  graph when it is verified; a target that runs on any machine names itself);
- `probe(**options) -> Probe`: what this machine has for it, what would be used, why not, which packages building takes;
- `lower(tensors) -> tensors`: the model's tensors as this target stores them, each made only when it is read;
- `build(folder, progress, **options) -> (list[str], dict)`: makes what the bundle is to be of a folder that holds
  `model.onnx`: names of the bundle's files, and the manifest's `engine`;
- `open_session(folder, threads=0, model="model.onnx") -> onnxruntime.InferenceSession`: opens a built folder for
  running; `model` names another graph in it over the same weights.

One that builds an engine has `check(folder, manifest)` and `open_engine(folder, manifest)` for the runtime.

Importing a target needs neither torch nor onnx: the runtime opens bundles through these modules.
"""

from importlib import import_module
from types import ModuleType

from dfssm.opset import DfssmError

_MODULES = {"ort-cpu": ".ort_cpu", "onnx": ".onnx", "trt": ".trt"}

TARGETS = tuple(_MODULES)
"""Names of the known targets, the first being the one to recommend."""


def get_target(name: str) -> ModuleType:
    """The module of the target `name`. Raises DfssmError listing the known ones."""
    if name not in _MODULES:
        raise DfssmError(f"unknown target '{name}': choose one of {', '.join(TARGETS)}")
    return import_module(_MODULES[name], __name__)
