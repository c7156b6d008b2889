"""From the step graph to the graph that TensorRT's parser reads: passes over an onnx-graphsurgeon graph, in order.

A pass is a module with `run(graph) -> list[str]`: it changes the graph and returns what it changed, by name; one that
may refuse a node returns `Changes`, which say why. Weights stay where they are: a pass never reads the data file, it
relabels or rewires tensors. (The `native` passes do read the scaffold, one matrix at a time, for they store it
differently.)
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import onnx_graphsurgeon as gs

from .check import check_in_place, check_lowered
from .graph import load, save

LOWERINGS = {
    "plugin": ("functions", "logits_at", "embedding", "words", "fuse", "plugin_attributes", "dtypes"),
    "native": ("functions", "one_token", "native", "embedding", "dtypes"),
}
"""Name of a lowering -> its passes. `plugin` has our ops, some fused, for libdfssm_trt.so; `native` none of them."""


def passes(
    lowering: str, version: str = "", only_last: bool = False, activations: str = "fp32"
) -> dict[str, Callable[[gs.Graph], list[str]]]:
    """The passes of `lowering` by name, in order; the other arguments as in `lower`."""
    names = list(LOWERINGS[lowering])
    if activations == "fp16":
        names.insert(names.index("plugin_attributes"), "half")
    found = {name: import_module(f".{name}", __name__).run for name in names}
    if lowering == "plugin":
        found["plugin_attributes"] = partial(found["plugin_attributes"], version=version)
        found["logits_at"] = partial(found["logits_at"], only_last=only_last)
    return found


def lower(
    model: Path,
    output: Path,
    lowering: str = "plugin",
    version: str = "",
    only_last: bool = False,
    activations: str = "fp32",
) -> dict[str, list[str]]:
    """Lower the step graph `model` and write it to `output`, in the same folder, over the same data file. `version`:
    that of the plugins (`trt_plugins.build_of`), by which TensorRT finds them; `only_last`: the logits are those of the
    last token; `activations`: what they are stored as between the plugins, fp32 or fp16.

    Returns what each pass changed. Raises ValueError when what came out is not the graph that went in: that is a bug
    of a pass. DfssmError where plugins cannot update a state in place.
    """
    graph = load(model)
    changed = {name: run(graph) for name, run in passes(lowering, version, only_last, activations).items()}
    save(graph, output)
    written = load(output)
    check_lowered(load(model), written, lowering)
    if lowering == "plugin":
        check_in_place(written)
    return changed
