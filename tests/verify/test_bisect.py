"""`dfssm verify --bisect` names the op that is wrong: kernels that differ in one value of one op."""

import json

import numpy as np
import onnx
import pytest
import tiny
from click.testing import CliRunner
from commands import run_commands

from dfssm.base import DfssmError
from dfssm.cli.main import dfssm
from dfssm.targets import get_target, ort_cpu
from dfssm.targets.bundle import ENGINE, Manifest, file_entry
from dfssm.verify.bisect import bisect


@pytest.fixture(scope="module", params=["fp16", "int8"])
def bundle(request, tmp_path_factory):
    if not (probe := get_target("ort-cpu").probe()).usable:
        pytest.skip(probe.why_not)
    folder = tmp_path_factory.mktemp("bisect") / request.param
    return tiny.write_bundle(folder, target="ort-cpu", state_dtype=request.param, tokenizer=False)


def run(bundle, *options):
    done = CliRunner().invoke(dfssm, ["verify", str(bundle), "--bisect", *options], catch_exceptions=False)
    return done.exit_code, done.stdout


def test_every_op_is_as_it_is_defined(bundle):
    status, out = run(bundle, "--json")
    result = json.loads(out)
    assert status == 0 and result["passed"] and result["first"] is None and result["tokens"] == 33
    assert len(result["outputs"]) == 10
    assert all(found["max_rel"] <= found["tolerance"] < 1e-2 for found in result["outputs"].values())
    assert any(found["max_rel"] > 0 for found in result["outputs"].values()), "they are two backends"


def test_kernels_of_another_instruction_set(bundle, tmp_path):
    (done,) = run_commands([["dfssm", "verify", bundle, "--bisect"]], tmp_path, DFSSM_ISA="scalar")
    assert done.status == 0 and "passed: every op is computed as it is defined" in done.out
    assert "torch" not in done.heavy


WRONG = [
    ("/embed/mul/out", "/embed"),
    ("/layers.0/in_proj/y", "/layers.0/in_proj"),
    ("/layers.1/conv/y", "/layers.1/conv"),
    ("conv_state_out.0", "/layers.0/conv"),
    ("/layers.0/scan/y", "/layers.0/scan"),
    ("ssm_state_out.1", "/layers.1/scan"),
    ("/layers.1/residual/out", "/layers.1/residual"),
    ("logits", "/lm_head"),
]


@pytest.mark.parametrize("output, node", WRONG)
def test_the_wrong_op_is_named(output, node, bundle, monkeypatch):
    """One op makes a hundredth too much. What reads that is right: it is compared on equal inputs."""
    open_session = ort_cpu.open_session

    def with_wrong_kernel(folder, threads, model, own):
        graph = onnx.load(folder / model, load_external_data=False)
        changed = output.replace("ssm_state", "ssm_scale") if "int8" in str(bundle) else output
        (value,) = (v for v in graph.graph.output if v.name == changed)
        (made,) = (n for n in graph.graph.node if changed in n.output)
        made.output[list(made.output).index(changed)] = "right"
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1.01, dtype), "factor"))
        at = list(graph.graph.node).index(made) + 1
        graph.graph.node.insert(at, onnx.helper.make_node("Mul", ["right", "factor"], [changed]))
        onnx.save(graph, folder / model)
        return open_session(folder, threads, model, own)

    monkeypatch.setattr(ort_cpu, "open_session", with_wrong_kernel)
    result = bisect(bundle, 1, lambda done, total: None)
    first = result["first"]
    assert not result["passed"] and (first["node"], first["output"], first["token"]) == (node, output, 32)
    wrong = [name for name, found in result["outputs"].items() if found["max_rel"] > found["tolerance"]]
    assert len(wrong) == 1 and first["max_rel"] == pytest.approx(0.01, rel=0.2)
    if output == "logits":
        status, out = run(bundle)
        assert status == 1 and "FAILED at /lm_head, after token 32: logits is off by 0.01" in out


def test_what_cannot_be_bisected_is_one_line(tmp_path):
    portable = tiny.write_bundle(tmp_path / "a", target="onnx", tokenizer=False)
    with pytest.raises(DfssmError, match="runs by the ops' definitions: there is nothing to compare them with"):
        bisect(portable, 0, lambda done, total: None)
    (tmp_path / ENGINE).write_bytes(b"engine")
    manifest = Manifest(
        "trt", tiny.CONFIG.to_dict(), "fp16", 0, {ENGINE: file_entry(tmp_path / ENGINE)}, engine={"a": 1}
    )
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    with pytest.raises(DfssmError, match="holds an engine, which shows no ops: `dfssm verify` names the layer"):
        bisect(tmp_path, 0, lambda done, total: None)
