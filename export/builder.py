"""A thin layer over onnx-ir for writing a graph down node by node, every value with its name, dtype and shape."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from dfssm.opset import DOMAIN, OPS
from dfssm.opset.functions import function_proto

Shape = Sequence[int | str]


class GraphBuilder:
    """Nodes, values and initialisers of one graph, in the order they are added.

    The shape of every value is stated by the caller, who knows it from the config: a reader of the file sees all of
    them without running shape inference, and strict inference then checks what was stated.
    """

    def __init__(self, tensors: Mapping):
        self._tensors = tensors
        self._nodes: list[ir.Node] = []
        self._functions: dict[str, ir.Function] = {}
        self.initializers: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Shape) -> ir.Value:
        """A value fed from outside."""
        return _value(name, dtype, shape)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A small initialiser, kept inside the model file."""
        return self._initializer(name, ir.tensor(array, name=name))

    def weight(self, name: str) -> ir.Value:
        """The initialiser for the model's tensor `name`; asked for twice, it is the same one.

        Its bytes are read from the tensor when the file is written, and not kept.
        """
        if name in self.initializers:
            return self.initializers[name]
        source = self._tensors[name]
        dtype = ir.DataType.from_numpy(np.dtype(source.dtype))
        read = ir.LazyTensor(
            lambda: ir.tensor(np.ascontiguousarray(source)), dtype=dtype, shape=ir.Shape(source.shape), name=name
        )
        return self._initializer(name, read)

    def standard(
        self, op: str, inputs: Sequence[ir.Value], dtype: ir.DataType, shape: Shape, name: str, **attributes
    ) -> ir.Value:
        """A node of the standard domain with one output, called `<name>/out`."""
        value = _value(f"{name}/out", dtype, shape)
        self._nodes.append(ir.node(op, inputs, attributes, outputs=[value], name=name))
        return value

    def dfssm(
        self,
        op: str,
        inputs: Sequence[ir.Value],
        outputs: Sequence[tuple[ir.DataType, Shape]],
        name: str,
        rename: Mapping[str, str] | None = None,
        **attributes,
    ) -> list[ir.Value]:
        """A node of our domain. Outputs are called `<name>/<their name in the schema>` unless `rename` says otherwise.

        The body of the op joins the file as a function, once; attributes left out take the default of the schema.
        """
        attributes = OPS[op].resolve(attributes)
        values = [
            _value((rename or {}).get(spec.name, f"{name}/{spec.name}"), dtype, shape)
            for spec, (dtype, shape) in zip(OPS[op].outputs, outputs, strict=False)
        ]
        if op not in self._functions:
            state_dtype = outputs[1][0].numpy().name if op == "SelectiveScanStep" else "float32"
            proto = function_proto(op, state_dtype=state_dtype, **attributes)
            self._functions[op] = ir.serde.deserialize_function(proto)
        self._nodes.append(ir.node(op, inputs, attributes, domain=DOMAIN, outputs=values, name=name))
        return values

    def finish(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], name: str, opsets: Mapping) -> ir.Graph:
        """The graph of all that was added."""
        return ir.Graph(
            inputs,
            outputs,
            nodes=self._nodes,
            initializers=list(self.initializers.values()),
            opset_imports=dict(opsets),
            name=name,
        )

    @property
    def functions(self) -> list[ir.Function]:
        return list(self._functions.values())

    def _initializer(self, name: str, tensor) -> ir.Value:
        value = _value(name, tensor.dtype, tensor.shape)
        value.const_value = tensor
        self.initializers[name] = value
        return value


def _value(name: str, dtype: ir.DataType, shape: Shape) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
