"""The ONNX Runtime ops against the references: the cases of every backend, each instruction set there is."""

import threading

import nodes
import numpy as np
import onnx
import onnxruntime
import pytest
from each import check_each
from onnx.reference import ReferenceEvaluator

from dfssm.opset.cases import Case, cases

ONE_OF_EACH = [
    *[next(case for case in cases(op) if case.sizes["T"] > 1) for op in nodes.ALL_OPS],
    *[next(case for case in cases("SelectiveScanStep") if case.state_dtype == d) for d in ("float16", "int8")],
    next(case for case in cases("DeferredScanStep") if case.state_dtype == "int8" and case.sizes["T"] > 8),
    next(case for case in cases("BinaryScaffoldMatMul") if case.attributes == {"layout": 1}),
    *[  # ranges of columns
        next(case for case in cases(op) if start in case.attributes and case.sizes["T"] > 1)
        for op, start in (
            ("CausalConv1dStep", "x_start"),
            ("SelectiveScanStep", "x_start"),
            ("GatedRMSNorm", "z_start"),
        )
    ],
]
LARGE = [  # enough work for several chunks on the thread pool
    Case("BinaryScaffoldMatMul", dict(B=1, T=1, K=2048, M=4097, R=16), {"layout": 1}),
    Case("BinaryScaffoldMatMul", dict(B=2, T=35, K=512, M=1030, R=8), {"layout": 1}),
    Case("BinaryScaffoldMatMul", dict(B=1, T=1, K=2048, M=4097, R=16), {"layout": 2}),
    Case("BinaryScaffoldMatMul", dict(B=2, T=35, K=544, M=1030, R=8), {"layout": 2}),
    Case("BinaryScaffoldMatMul", dict(B=1, T=9, K=512, M=1030, R=8), {"layout": 0}),
    Case("Int8MatMul", dict(B=1, T=1, K=1024, M=2003)),
    Case("CausalConv1dStep", dict(B=2, T=40, C=1100, W=4)),
    Case("CausalConv1dStep", dict(B=2, T=40, C=1100, W=4), {"x_start": 1001}),
    Case("SelectiveScanStep", dict(B=1, T=1, H=24, P=64, N=128)),
    Case("SelectiveScanStep", dict(B=2, T=17, H=6, P=33, N=40, state="int8"), {"ngroups": 2}),
    Case("SelectiveScanStep", dict(B=2, T=2, H=12, P=64, N=128), {"x_start": 1, "B_start": 768, "C_start": 896}),
    Case("DeferredConv1dStep", dict(B=2, T=40, C=1100, W=4, count=9), {"x_start": 1001}),
    Case("DeferredScanStep", dict(B=1, T=1, H=24, P=64, N=128, count=8, state="int8")),
    Case("DeferredScanStep", dict(B=2, T=17, H=6, P=33, N=40, count=5, state="float16"), {"ngroups": 2}),
    Case("GatedRMSNorm", dict(B=2, T=40, C=1000), {"groups": 4}),
    Case("GatedRMSNorm", dict(B=2, T=40, C=1000), {"groups": 4, "z_start": 7}),
    Case("RMSNorm", dict(B=2, T=80, C=1000)),
]
IDS = dict(ids=lambda case: case.id)


def op_case(op: str, **sizes) -> Case:
    return next(c for c in cases(op) if sizes.items() <= c.sizes.items())


@pytest.mark.parametrize("op", nodes.ALL_OPS)
def test_op_is_the_reference(library, op):
    def check(case):
        model = nodes.node_model(case, constants=True)
        nodes.check_outputs(case, library.session(model).run(None, nodes.feeds(case.inputs())))

    check_each(cases(op), check)


@pytest.mark.parametrize("case", ONE_OF_EACH, **IDS)
def test_weights_may_be_inputs(default_library, case):
    nodes.check_outputs(case, default_library.session(nodes.node_model(case)).run(None, case.inputs()))


@pytest.mark.parametrize("case", ONE_OF_EACH, **IDS)
def test_one_file_runs_three_ways(default_library, case):
    model = nodes.node_model(case, constants=True, body=True)
    fed = nodes.feeds(case.inputs())
    stock = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for run in (default_library.session(model).run, stock.run, ReferenceEvaluator(model).run):
        nodes.check_outputs(case, run(None, fed))


def test_the_kernel_wins_over_the_body(default_library):
    case = op_case("RMSNorm", C=64)
    model = nodes.node_model(case, body=True)
    del model.functions[0].node[:]
    model.functions[0].node.append(onnx.helper.make_node("Identity", ["x"], ["out"]))
    nodes.check_outputs(case, default_library.session(model).run(None, case.inputs()))


@pytest.mark.parametrize("case", LARGE, **IDS)
def test_threads_do_not_change_a_bit(library, case):
    model, inputs = nodes.node_model(case, constants=True), case.inputs()
    one, two, three = (library.session(model, n).run(None, nodes.feeds(inputs)) for n in (1, 2, 3))
    nodes.check_outputs(case, one, inputs)
    for a, b, c in zip(one, two, three, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


@pytest.mark.parametrize("op", nodes.ALL_OPS)
def test_one_session_takes_any_batch_and_length(default_library, op):
    base = ONE_OF_EACH[list(nodes.ALL_OPS).index(op)]
    session = default_library.session(nodes.node_model(base, constants=True))
    weights = {k: v for k, v in base.inputs().items() if k not in nodes.ACTIVATIONS}
    for batch, tokens in ((1, 1), (3, 4), (1, 40), (2, 1), (1, 1)):
        case = Case(op, base.sizes | {"B": batch, "T": tokens}, base.attributes)
        inputs = case.inputs() | weights
        nodes.check_outputs(case, session.run(None, nodes.feeds(inputs)), inputs)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(
    "base",
    [
        op_case("CausalConv1dStep", W=4),
        op_case("DeferredConv1dStep", W=4),
        *(c for c in ONE_OF_EACH if c.op.endswith("ScanStep")),
    ],
    **IDS,
)
def test_state_in_place(library, base, tokens):
    """Two calls on bound buffers, the state's input and output one and the same."""
    case = Case(base.op, base.sizes | {"T": tokens}, base.attributes)
    nodes.check_state_in_place(case, library.session(nodes.node_model(case, constants=True), threads=2))


ORT_VERSION = tuple(map(int, onnxruntime.__version__.split(".")[:2]))


# ONNX Runtime before 1.24 is not trusted with optional inputs, see ort.h.
INFERRED = [case for case in ONE_OF_EACH if not case.op.endswith("ScanStep") or ORT_VERSION >= (1, 24)]


@pytest.mark.parametrize(
    "case",
    [case for case in INFERRED if "x_start" not in case.attributes],
    **IDS,
)
def test_output_shapes_are_inferred(default_library, case):
    """Without declared outputs the session knows them: symbols of the inputs, sizes of the weights."""
    session = default_library.session(nodes.node_model(case, constants=True, types=False))
    fed = {i.name: i.shape for i in session.get_inputs()}
    main = next(iter(fed.values()))
    matmul = case.op in ("BinaryScaffoldMatMul", "Int8MatMul")
    wanted = [[*main[:2], case.sizes["M"]] if matmul else main]
    wanted += [fed["state"]] if "state" in fed else []
    assert [o.shape for o in session.get_outputs()][: len(wanted)] == wanted
    types = {"float16": "tensor(float16)", "int8": "tensor(int8)"}
    if "state" in fed:
        assert session.get_outputs()[1].type == types.get(case.state_dtype, "tensor(float)")


@pytest.mark.parametrize("case", [case for case in INFERRED if "x_start" in case.attributes], **IDS)
def test_output_of_a_range_of_columns_is_as_wide_as_the_range(default_library, case):
    model, inputs = nodes.node_model(case, constants=True, types=False), case.inputs()
    state = next(value for value in model.graph.input if value.name == "state")
    for dim, size in zip(state.type.tensor_type.shape.dim, inputs["state"].shape, strict=True):
        dim.dim_value = size  # as in a real model; of symbols there is no product
    sizes = case.sizes
    width = sizes["C"] if "C" in sizes else sizes["H"] * sizes["P"]
    y, new_state = default_library.session(model).get_outputs()
    assert y.shape == ["x_0", "x_1", width]
    assert new_state.shape == list(inputs["state"].shape)


def test_two_threads_share_a_session(default_library):
    case = LARGE[1]
    session = default_library.session(nodes.node_model(case, constants=True), threads=2)
    inputs = case.inputs()
    expected = session.run(None, nodes.feeds(inputs))[0]
    wrong = []

    def work():
        for _ in range(10):
            if not np.array_equal(session.run(None, nodes.feeds(inputs))[0], expected):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
