"""Name the plugin that is to run each of our nodes, and tell it what it cannot see.

TensorRT finds a plugin by op type, version and namespace. It asks a plugin for its number of outputs and the types it
takes before it shows those of the node; so the two ops that leave a choice there get an attribute of their own.
"""

import numpy as np
import onnx_graphsurgeon as gs

from dfssm.targets.trt_plugins import PLUGINS

from .graph import ours

OWN = {"SelectiveScanStep": {"int8_state"}, "Int8MatMul": {"w_words"}}
"""The attributes that only a plugin has."""


def run(graph: gs.Graph, version: str = "") -> list[str]:
    """Returns the names of the nodes that got attributes; written out are all, defaults too. `version`: of the plugins.
    An unknown attribute is a DfssmError: TensorRT's parser would drop it.
    """
    plugin = {"plugin_version": version, "plugin_namespace": ""}
    changed = []
    for node in ours(graph):
        own = plugin.keys() | OWN.get(node.op, set())
        given = {name: value for name, value in node.attrs.items() if name not in own}
        wanted = PLUGINS[node.op].resolve(given) | plugin
        if node.op == "SelectiveScanStep":
            wanted["int8_state"] = int(len(node.outputs) == 3)
        if node.op == "Int8MatMul":
            wanted["w_words"] = int(node.inputs[1].dtype == np.int32)
        if wanted != node.attrs:
            node.attrs = wanted
            changed.append(node.name)
    return changed
