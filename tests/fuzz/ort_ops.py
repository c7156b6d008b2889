"""The op library in ONNX Runtime: one node with shapes, types and attributes that are mostly wrong.

What the schema (opset/) refuses, the op refuses, with an error of ONNX Runtime; what it allows gives the reference's
result. The bytes of an input are no more than the seed of the choices.
"""

import functools
import random

import nodes
import numpy as np
import onnxruntime
from onnx import helper

from dfssm.base import DfssmError
from dfssm.opset import DOMAIN
from dfssm.opset.cases import Case
from dfssm.opset.ops import ALL_OPS
from dfssm.targets.ort_cpu import find_library

CASES = (
    Case("BinaryScaffoldMatMul", dict(B=1, T=2, K=64, M=40, R=4)),
    Case("BinaryScaffoldMatMul", dict(B=2, T=1, K=32, M=17, R=0), {"layout": 1, "planes": 2}),
    Case("Int8MatMul", dict(B=1, T=2, K=33, M=5)),
    Case("CausalConv1dStep", dict(B=2, T=2, C=8, W=4), {"x_start": 3}),
    Case("SelectiveScanStep", dict(B=1, T=2, H=4, P=8, N=6), {"ngroups": 2}),
    Case("SelectiveScanStep", dict(B=1, T=1, H=2, P=3, N=2, state="int8"), {"ngroups": 1}),
    Case("DeferredConv1dStep", dict(B=2, T=3, C=8, W=3, count=7)),
    Case("DeferredScanStep", dict(B=2, T=9, H=2, P=5, N=4, count=7, state="float16"), {"ngroups": 2, "x_start": 2}),
    Case("DeferredScanStep", dict(B=1, T=1, H=4, P=8, N=2, count=15, state="int8")),
    Case("RMSNorm", dict(B=1, T=2, C=8)),
    Case("GatedRMSNorm", dict(B=1, T=2, C=12), {"groups": 4, "z_start": 3}),
)
VALUES = (
    -(2**63),
    -1,
    0,
    1,
    2,
    3,
    4,
    5,
    8,
    2**31,
    2**62,
    0.0,
    -1.0,
    1e-5,
    float("nan"),
    "",
    "silu",
    "none",
    [0.0, 1.0],
    [1],
    ["silu", "none"],
)
REFUSALS = tuple(
    getattr(onnxruntime.capi.onnxruntime_pybind11_state, name)
    for name in ("Fail", "InvalidArgument", "InvalidGraph", "NotImplemented", "RuntimeException")
)


@functools.cache
def options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.register_custom_ops_library(str(find_library()))
    return options


def run(data: bytes) -> bool:
    """Whether the node ran; False: it was refused. AssertionError where it should not have been, or the other way."""
    rng = random.Random(data)
    case = rng.choice(CASES)
    # Columns that must not be read are NaN in a case; with another range they would be.
    inputs = {name: np.nan_to_num(value) for name, value in case.inputs().items()}
    attributes = dict(case.attributes)
    for _ in range(rng.randrange(3)):
        name = rng.choice(list(inputs))
        inputs[name] = np.asarray(_reshaped(inputs[name], rng))  # NumPy gives scalars of no dimensions
    for _ in range(rng.randrange(2)):
        # A name one letter off in place of the right one; ONNX Runtime tells an op of no other that is unknown.
        known = [attribute.name for attribute in ALL_OPS[case.op].attributes]
        misspelt = [f"{name}s" for name in known if name not in attributes]
        if known:
            attributes[rng.choice(known + misspelt)] = rng.choice(VALUES)
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node(case.op, list(inputs), nodes.output_names(case), domain=DOMAIN, **attributes)],
            "one",
            [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
                for name, value in inputs.items()
            ],
            [helper.make_empty_tensor_value_info(name) for name in nodes.output_names(case)],
        ),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options(), ["CPUExecutionProvider"])
        outputs = session.run(None, inputs)
    except REFUSALS:
        return False
    # What the schema says of its own accord is a refusal that the op should have made.
    try:
        ALL_OPS[case.op].check(inputs, attributes)
    except DfssmError as error:
        raise AssertionError(f"{case.op} took what its schema refuses: {error}") from None
    # A norm of zeros without eps is 0 / 0.
    nodes.check_outputs(Case(case.op, case.sizes, attributes), outputs, inputs, finite=False)
    return True


def _reshaped(value: np.ndarray, rng: random.Random) -> np.ndarray:
    shape = list(value.shape)
    match rng.randrange(5):
        case 0 | 1 if shape:
            axis = rng.randrange(len(shape))
            shape[axis] = rng.choice((0, 1, shape[axis] + 1, max(shape[axis] - 1, 0), 2 * shape[axis], 32))
        case 2:
            shape.insert(rng.randrange(len(shape) + 1), rng.choice((0, 1, 2)))
        case 3 if shape:
            del shape[rng.randrange(len(shape))]
        case 4:
            return np.clip(value, 0, 100).astype(
                rng.choice((np.float32, np.float16, np.int8, np.uint8, np.int64, np.float64))
            )
    return np.resize(value, shape).astype(value.dtype) if value.size else np.zeros(shape, value.dtype)
