"""A tape of onnx-ir with the model's tensors and the ops of our domain, every value with its name, dtype and shape."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from dfssm.opset import DOMAIN
from dfssm.opset.functions import function_proto
from dfssm.opset.ops import ALL_OPS

Shape = Sequence[int | str]


class GraphBuilder(ir.tape.Tape):
    """Nodes and initialisers of one graph, in the order they are added.

    The shape of every value is stated by the caller, who knows it from the config: a reader of the file sees all of
    them without running shape inference, and strict inference then checks what was stated.
    """

    def __init__(self, tensors: Mapping):
        super().__init__()
        self._tensors = tensors
        self._weights: dict[str, ir.Value] = {}
        self._functions: dict[str, ir.Function] = {}

    def weight(self, name: str) -> ir.Value:
        """The initialiser for the model's tensor `name`; asked for twice, it is the same one.

        Its bytes are read from the tensor when the file is written, and not kept.
        """
        if name not in self._weights:
            source = self._tensors[name]
            dtype, shape = ir.DataType.from_numpy(np.dtype(source.dtype)), ir.Shape(source.shape)
            read = ir.LazyTensor(lambda: ir.tensor(np.ascontiguousarray(source)), dtype=dtype, shape=shape, name=name)
            self._weights[name] = self.initializer(read)
        return self._weights[name]

    def standard(
        self, op: str, inputs: Sequence[ir.Value], dtype: ir.DataType, shape: Shape, name: str, **attributes
    ) -> ir.Value:
        """A node of the standard domain with one output, called `<name>/out`."""
        return self.op(op, inputs, attributes, output=ir.val(f"{name}/out", dtype, shape), name=name)

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
        schema = ALL_OPS[op]
        attributes = schema.resolve(attributes)
        values = [
            ir.val((rename or {}).get(spec.name, f"{name}/{spec.name}"), dtype, shape)
            for spec, (dtype, shape) in zip(schema.outputs, outputs, strict=False)
        ]
        if op not in self._functions:
            state_dtype = outputs[1][0].numpy().name if op.endswith("ScanStep") else "float32"
            proto = function_proto(op, state_dtype=state_dtype, **attributes)
            self._functions[op] = ir.serde.deserialize_function(proto)
        self.op_multi_out(op, inputs, attributes, outputs=values, domain=DOMAIN, name=name)
        return values

    @property
    def functions(self) -> list[ir.Function]:
        return list(self._functions.values())
