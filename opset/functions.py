"""ONNX function bodies of the `ai.dfssm` ops: the ops once more, in standard ONNX ops (opset 21), fp32.

A model file carries these as model-local functions, so it runs in any ONNX runtime without our libraries; where our
kernel is registered, it wins over the body. The bodies are an oracle for the kernels too: they share no code.

A body is specialised where ONNX cannot branch on an attribute: `layout` and `activation` by their value, a start of
columns by whether it is -1, the scan by the dtype of its state. One file uses one variant of an op.
"""

from typing import Any

import onnx
from onnx import helper, parser

from .ops import ALL_OPS, FUSED
from .schema import DOMAIN, VERSION, Op, Tensor, Value, in_wider

ONNX_OPSET = 21
"""Opset of the bodies and of the exported graphs; ONNX IR version 10 goes with it."""

IR_VERSION = 10


def _size(op: Op, symbol: str, out: str) -> str:
    """`out` i64 [1], the value of one symbol of a shape: an attribute, or a dimension of an input."""
    if symbol in op.defaults:
        return f"""
  {out}_0 = Constant <value_int: int = @{symbol}> ()
  {out}_shape = Constant <value_ints = [1]> ()
  {out} = Reshape ({out}_0, {out}_shape)
"""
    shapes = {t.name: [str(dim) for dim in t.shape] for t in op.inputs if not t.start}
    name, axis = next((name, shape.index(symbol)) for name, shape in shapes.items() if symbol in shape)
    return f"""
  {out} = Shape <start = {axis}, end = {axis + 1}> ({name})
"""


def _columns(op: Op, tensor: Tensor) -> str:
    """`<tensor>`, the columns that the op reads of the parameter `<tensor>_all`."""
    name, factors = tensor.name, tensor.shape[-1].factors
    sizes = [f"{name}_size{i}" for i in range(len(factors))]
    return f"""
  {_size(op, str(tensor.start), f"{name}_begin")}
  {"".join(_size(op, factor, size) for factor, size in zip(factors, sizes, strict=True))}
  {name}_sizes = Concat <axis = 0> ({", ".join(sizes)})
  {name}_width = ReduceProd <keepdims = 1> ({name}_sizes)
  {name}_end = Add ({name}_begin, {name}_width)
  {name}_axis = Constant <value_ints = [2]> ()
  {name} = Slice ({name}_all, {name}_begin, {name}_end, {name}_axis)
"""


def function_proto(name: str, state_dtype: str = "float32", **attributes: Value) -> onnx.FunctionProto:
    """The body of op `name` as an ONNX function.

    `attributes` are the op's attributes at the node (`layout`, `activation` and whether a start is -1 choose the
    variant, the others stay references to the node's attributes); `state_dtype` (NumPy name) chooses the variant of
    SelectiveScanStep. An input that is read as a range of columns is called `<name>_all` in the body.
    The body of a fused op has nodes of the others; whoever uses it adds theirs.
    """
    op = (ALL_OPS | FUSED)[name]
    resolved = op.resolve(attributes)
    wanted = [t for t in op.inputs if not t.optional or state_dtype == "int8"]
    made = [t for t in op.outputs if not t.optional or state_dtype == "int8"]
    wider = [t for t in wanted if name not in FUSED and in_wider(t, resolved)]
    body = "".join(_columns(op, t) for t in wider) + op.body(resolved, state_dtype)
    inputs = ", ".join(f"{t.name}_all" if t in wider else t.name for t in wanted)
    outputs = ", ".join(t.name for t in made)
    imports = f'"": {ONNX_OPSET}' + (f', "{DOMAIN}": {VERSION}' if name in FUSED else "")
    text = f'<domain: "{DOMAIN}", opset_import: [{imports}]>\n{name} ({inputs}) => ({outputs}) {{{body}}}'
    function = parser.parse_function(text)
    function.attribute_proto.extend(helper.make_attribute(a.name, a.default) for a in op.attributes)
    function.doc_string = f"{DOMAIN} version {VERSION}, {name} in standard ops; semantics in docs/ops.md"
    return function


def make_node(name: str, inputs: list[str], outputs: list[str], node_name: str, **attributes: Value) -> onnx.NodeProto:
    """A node of op `name` with every attribute written out: onnx's ReferenceEvaluator does not fill the defaults of
    attributes that a function body refers to.
    """
    written: dict[str, Any] = {**ALL_OPS[name].resolve(attributes)}
    return helper.make_node(name, inputs, outputs, node_name, domain=DOMAIN, **written)
