"""Activations between our nodes in fp16: half the bytes, and half the registers and shared memory of a prompt's scan.

The plugins take them as they are, and compute in fp32; logits and states stay what they were. What reaches our nodes
from others, the embedding, is cast; its tensor keeps its name, so that the nodes after it are wired as before.
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from dfssm.opset.schema import Tensor
from dfssm.targets.trt_plugins import PLUGINS

from .graph import ours

HALF = np.dtype(np.float16)


def is_activation(spec: Tensor) -> bool:
    """Whether the plugins take it as fp16 too: fp32 of [B,T,columns]."""
    return spec.dtypes == ("float32",) and [str(dim) for dim in spec.shape[:-1]] == ["B", "T"]


def run(graph: gs.Graph) -> list[str]:
    """Returns the names of the tensors that are fp16 now."""
    changed: list[str] = []
    nodes = list(graph.cleanup().toposort().nodes)
    mine = {id(node) for node in ours(graph)}
    for node in nodes:
        if id(node) not in mine:  # a residual, a choice of tokens
            made = node.outputs if any(tensor.dtype == HALF for tensor in node.inputs) else []
        else:
            specs = PLUGINS[node.op]
            for spec, tensor in zip(specs.inputs, node.inputs, strict=False):
                if is_activation(spec) and tensor.dtype != HALF:
                    changed.append(_cast(graph, tensor))
            # The head's are logits.
            activations = [is_activation(spec) and node.op != "Int8MatMul" for spec in specs.outputs]
            made = [tensor for tensor, half in zip(node.outputs, activations, strict=False) if half]
        for tensor in made:
            tensor.dtype = HALF
            changed.append(tensor.name)
    return changed


def _cast(graph: gs.Graph, tensor: gs.Variable) -> str:
    """Make `tensor` the fp16 of what it was."""
    (producer,) = tensor.inputs
    wide = gs.Variable(f"{tensor.name}.fp32", tensor.dtype, tensor.shape)
    producer.outputs[producer.outputs.index(tensor)] = wide
    graph.nodes.append(gs.Node("Cast", f"{tensor.name}.half", {"to": onnx.TensorProto.FLOAT16}, [wide], [tensor]))
    tensor.dtype = HALF
    return str(tensor.name)
