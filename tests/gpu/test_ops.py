"""Each plugin on the GPU over its case table, in an engine of nothing else, against the reference."""

import numpy as np
import onnxruntime
import pytest
from fake_device import FakeCuda, FakeEngine
from gpu import devices, ops
from nodes import check_outputs, node_model
from plugins_trt import adapter, engines, fused, lowered

from dfssm.opset.cases import Case
from dfssm.runtime.cuda import Cuda
from dfssm.targets import trt
from dfssm.targets.bundle import ENGINE
from dfssm.targets.trt_plugins import PLUGINS

pytestmark = pytest.mark.xdist_group("gpu")

STATEFUL = ("CausalConv1dStep", "SelectiveScanStep", "NormScaffoldConv")
PRODUCTS = ("BinaryScaffoldMatMul", "Int8MatMul")

CASES = {op: [case for case in (*lowered.CANONICAL, *fused.CASES) if case.op == op] for op in PLUGINS}
WHOLE = {op: [ops.whole(case) for case in CASES[op] if case.kind == "normal"] for op in PRODUCTS}


def check(case: Case | fused.FusedCase, outputs: list[np.ndarray]) -> None:
    check_outputs(case, outputs) if isinstance(case, Case) else case.check(outputs, case.inputs())


def check_exact(case: ops.Whole, outputs: list[np.ndarray]) -> None:
    (expected,) = ops.outputs(case).values()
    assert np.abs(expected).max() < 2**24 and np.array_equal(expected, np.rint(expected))
    np.testing.assert_array_equal(outputs[0], expected, err_msg=case.id)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs cases on the GPU, in an engine of `builder`."""
    cuda = Cuda()

    def run(cases, builder: str, in_place: bool = True) -> list[list[np.ndarray]]:
        if reason := devices.missing_for(builder):
            pytest.skip(reason)
        folder = tmp_path_factory.mktemp("ops")
        engine = trt.open_engine(folder, ops.build(cases, builder, devices.sm(), folder))
        return ops.run(engine, cuda, cases, in_place=in_place)

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("op", PLUGINS)
@pytest.mark.parametrize("builder", devices.BUILDERS)
def test_plugin_is_the_reference(run, builder, op):
    for case, outputs in zip(CASES[op], run(CASES[op], builder), strict=True):
        check(case, outputs)


@pytest.mark.gpu
@pytest.mark.parametrize("op", STATEFUL)
@pytest.mark.parametrize("builder", devices.BUILDERS)
def test_a_state_in_place_is_that_of_two_buffers(run, builder, op):
    together, apart = (run(CASES[op], builder, in_place=in_place) for in_place in (True, False))
    for case, *both in zip(CASES[op], together, apart, strict=True):
        for one, other in zip(*both, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=case.id)


@pytest.mark.gpu
@pytest.mark.parametrize("op", PRODUCTS)
@pytest.mark.parametrize("builder", devices.BUILDERS)
def test_whole_numbers_are_exact(run, builder, op):
    for case, outputs in zip(WHOLE[op], run(WHOLE[op], builder), strict=True):
        check_exact(case, outputs)


SOME = [case for op in PLUGINS for case in (CASES[op] + WHOLE.get(op, []))[1::9]]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)
def test_over_the_stand_in(case, in_place):
    """What the tests above do with an engine, done with one case in ONNX Runtime."""
    if isinstance(case, Case):
        model = node_model(case, constants=True, body=True).SerializeToString()
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    elif reason := adapter.missing():
        pytest.skip(reason)
    else:
        session = adapter.session(fused.node_model(case))
    cuda = FakeCuda()
    (outputs,) = ops.run(FakeEngine(cuda, session), cuda, [case], prefix=False, in_place=in_place)
    check_exact(case, outputs) if isinstance(case, ops.Whole) else check(case, outputs)
    assert not cuda.memory


@pytest.mark.skipif(bool(engines.missing()), reason=str(engines.missing()))
@pytest.mark.parametrize("op", PLUGINS)
def test_engine_of_all_cases(op, tmp_path):
    """TensorRT-RTX builds it without a GPU; what it is built of are the cases, with their own sizes."""
    ops.build(CASES[op], "tensorrt-rtx", 86, tmp_path)
    assert (tmp_path / ENGINE).stat().st_size > 1000 * len(CASES[op])
    for value in ops.network(CASES[op]).graph.input:
        number, _, name = value.name.partition("/")
        sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert sizes == list(ops.feeds(CASES[op][int(number)])[name].shape)
