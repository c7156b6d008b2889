"""The harness for a GPU without TensorRT (gpu_harness/), run over the host emulation: only the device is new there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_harness import checks, pack, speed
from gpu_harness.__main__ import NO_DEVICE
from gpu_harness.graph import Weights
from gpu_harness.plugins import Library, Plugin
from plugins_trt import adapter, engines
from trt_graphs import write_step

from dfssm.opset.schema import STATE_DTYPES
from dfssm.targets import get_target
from dfssm.targets.trt_lowering import lower
from dfssm.targets.trt_plugins import PLUGINS

PATHS = os.pathsep.join(sys.path)

pytestmark = pytest.mark.skipif(bool(adapter.missing()), reason=str(adapter.missing()))


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Library:
    return Library(pack.driver(tmp_path_factory.mktemp("driver")), adapter.plugin_library())


def packed(value, folder):
    """`value` as the other machine reads it."""
    torch.save(value, folder / "packed.pt")
    return torch.load(folder / "packed.pt", weights_only=True)


def test_every_op_case(library, tmp_path):
    cases = packed([pack.export_case(case) for case in pack.table()], tmp_path)
    assert {case["op"] for case in cases} == set(PLUGINS)
    count, failed = checks.check_ops(library, cases)
    assert not failed
    assert count == 2 * sum(len(case["outputs"]) for case in cases)


def test_the_largest_logits(library, tmp_path):
    cases = packed(pack.choices(1500, 40), tmp_path)
    assert checks.check_ops(library, cases) == (15, [])
    for name, words in (("tokens", "other tokens"), ("values", "other logits")):
        case = cases[0] | {name: cases[0][name] + 1}
        assert checks.check_largest(library, case) == (2, [f"the 1 largest of 1500, distinct: {words}"])
    case, totals = cases[2] | {"totals": cases[2]["totals"] + 1}, cases[2]["totals"].tolist()
    assert checks.check_largest(library, case) == (1, [f"the weight of 1500, distinct: {totals}"])


@pytest.mark.slow
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.skipif(not get_target("ort-cpu").probe().usable, reason="ort-cpu cannot be used here")
def test_demo_equals_ort_cpu(library, state_dtype, tmp_path):
    """The lowered graph, 32 tokens of one row from ort-cpu's states, 10 of three rows from its own."""
    demo = packed(pack.export_demo(state_dtype, tmp_path), tmp_path)
    assert [call["ids"].shape[1] for call in demo["calls"]] == [pack.PREFILL] + [1] * pack.STEPS
    assert checks.check_demo(library, demo)[1] == []


def test_what_is_wrong_is_found(library):
    """In a result, in what is written in place, in a dtype."""
    case = pack.export_case(next(case for case in pack.table() if case.op == "CausalConv1dStep"))
    assert checks.check_case(library, case) == (4, [])
    y = case["outputs"]["y"]
    for wrong, words in ((y + 1, "relative error"), (y.half(), "torch.float32"), (y * torch.nan, "relative error inf")):
        _, failed = checks.check_case(library, case | {"outputs": case["outputs"] | {"y": wrong}})
        assert len(failed) == 1 and f"{case['id']} y: " in failed[0] and words in failed[0]


def test_a_refused_node_is_named(library, capfd):
    case = pack.export_case(next(case for case in pack.table() if case.op == "RMSNorm"))
    with pytest.raises(RuntimeError, match="RMSNorm .*: createPlugin failed"):
        checks.check_case(library, case | {"attributes": {"eps": -1.0}})
    assert "attribute 'eps' is -1, expected a number >= 0" in capfd.readouterr().err


def test_times_of_a_model_without_its_weights(library, tmp_path):
    """As of the 1.3B on a GPU: what is timed was checked, every plugin has its time, and the floor its bytes."""
    _, tensors = write_step(tmp_path, "plain", "fp16")
    lower(tmp_path / "model.onnx", tmp_path / "lowered.onnx")
    graph = packed(pack.export_graph(tmp_path / "lowered.onnx", synthetic=True), tmp_path)
    drawn = [name for name, value in graph["weights"].items() if not isinstance(value, torch.Tensor)]
    assert "embedding.weight" in drawn and not [name for name in drawn if "scale" in name]
    one, six = speed.measure(Weights(library, graph), [(1, 1), (2, 3)], bandwidth=1e9, least=0)
    assert (one["rows"], one["tokens"], one["wrong"]) == (1, 1, "")
    assert (six["rows"], six["tokens"], six["wrong"]) == (2, 3, "")
    for node in graph["nodes"]:
        assert not node["plugin"] or min(one[node["op"]], six[node["op"]]) > 0
    assert [record["tok_s"] * record["us"] / 1e6 for record in (one, six)] == [pytest.approx(1), pytest.approx(6)]
    weights = sum(tensor.nbytes for tensor in tensors.values())
    states = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in graph["states"].values())
    assert one["floor_us"] == pytest.approx((weights + 2 * states) / 1e3)
    assert six["floor_us"] == pytest.approx((weights + 4 * states) / 1e3)


def test_times_of_torch_itself(monkeypatch):
    """The copy and the int8 products, each checked before it is timed."""
    assert speed.copy_bandwidth("cpu", 1 << 16) > 0
    monkeypatch.setattr(speed, "PRODUCTS", ((16, 24), (40, 8)))
    small, large = speed.int8_products("cpu", [32])
    assert (small["M"], small["K"], large["M"], large["K"]) == (16, 24, 40, 8)
    for record in (small, large):
        assert record["tera_ops"] * record["us"] * 1e6 == pytest.approx(2 * 32 * record["M"] * record["K"])


def test_the_baseline_is_mamba2():
    """Its Triton kernels in Triton's interpreter, beside plain torch; fp32, so that only the order of sums differs."""
    pytest.importorskip("triton")
    code = """
from gpu_harness import baselines
sizes = baselines.Sizes(vocabulary=97, width=48, layers=2, heads=4, headdim=16, state=32)
baselines.TOLERANCE = 1e-5
print(baselines.check_baseline(sizes, "cpu", baselines.torch.float32))
"""
    environment = os.environ | {"PYTHONPATH": PATHS, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_report(tmp_path, library):
    """Steps are processes; one that does not end, or cannot begin, is told and costs no other."""
    torch.save([pack.export_case(case) for case in pack.table()[:3]], tmp_path / "cases.pt")
    shutil.copy(library.driver._name, tmp_path / "libgpu_harness.so")
    command = [sys.executable, "-m", "gpu_harness", tmp_path, "--library", adapter.plugin_library(), "--steps"]
    environment = os.environ | {"PYTHONPATH": PATHS, "PATH": ""}

    def run(steps: str) -> tuple[int, dict]:
        done = subprocess.run([*command, steps], env=environment, capture_output=True, text=True)
        assert done.stdout == (tmp_path / "report.txt").read_text()
        return done.returncode, json.loads((tmp_path / "report.json").read_text())

    code, report = run("ops")
    assert (code, report["failures"]) == (0, [])
    assert report["steps"]["ops"]["records"] == [{"table": "cases", "compared": 6, "failed": []}]
    code, report = run("demo,memcheck")
    (failure,) = report["failures"]
    assert code == 1 and failure.startswith("demo: exit status 1: ") and "demo_fp32.pt" in failure
    assert report["steps"]["memcheck"]["error"].startswith("not run: ")
    assert run("memcheck")[0] == 2
    if not torch.cuda.is_available():  # one line, and no other step is tried
        done = subprocess.run([*command, "device,ops"], env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.splitlines()[1:] == [f"device: exit status 1: {NO_DEVICE}"]


@pytest.mark.skipif(not engines.library(), reason=engines.NO_LIBRARY)
def test_the_shipped_library_is_driven_alike(library, capfd):
    """With no GPU, up to the launch: types and shapes of every case are those of the emulated one."""
    shipped = Library(Path(library.driver._name), engines.library())
    assert (shipped.device, library.device) == ("cuda", "cpu")
    for case in map(pack.export_case, pack.table()):
        named = case["op"], case["id"], case["attributes"], list(case["inputs"].values())
        one, other = Plugin(shipped, *named), Plugin(library, *named)
        assert one.outputs == other.outputs == [(value.dtype, value.shape) for value in case["outputs"].values()]
    if not torch.cuda.is_available():
        shipped.device = "cpu"  # where torch's memory is; the launch finds that CUDA has none
        with pytest.raises(RuntimeError, match="enqueue failed"):
            checks.run_case(shipped, case, in_place=False)
        assert "the launch failed: " in capfd.readouterr().err
