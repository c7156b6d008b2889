"""A bundle on a GPU that it is not for, and the benchmark of one that it is for."""

import json
import shutil

import pytest
from click.testing import CliRunner
from gpu import devices
from gpu.devices import Device
from trt_graphs import DEMO

from dfssm.base import DfssmError
from dfssm.cli.main import dfssm
from dfssm.compiler.pipeline import Request, compile_model
from dfssm.runtime import Engine
from dfssm.targets import cuda, trt
from dfssm.targets.bundle import ENGINE, MANIFEST, sealed

# One process has the device, and compiles the model once.
pytestmark = pytest.mark.xdist_group("gpu")

STAND_IN = {
    "builder": "tensorrt-rtx",
    "version": "1.7.1",
    "sm": [86],
    "lowering": "native",
    "version_compatible": False,
    "hardware_compatible": False,
    "embed_plugins": False,
    "strip_weights": False,
}


@pytest.fixture(params=[devices.STAND_IN, *devices.ENGINES])
def bundle(request, opened, tmp_path, monkeypatch):
    """Folder of a bundle that may be changed. Of the stand-in, one that names a GPU which is said to be here."""
    folder = tmp_path / "bundle"
    shutil.copytree(opened(request.param, "fp16").folder, folder)
    if not request.param.builder:
        (folder / "model.onnx").rename(folder / ENGINE)
        document = json.loads((folder / MANIFEST).read_text())
        files = document["files"] | {ENGINE: document["files"].pop("model.onnx")}
        (folder / MANIFEST).write_text(sealed(document | {"target": "trt", "files": files, "engine": STAND_IN}))
        monkeypatch.setattr(cuda, "devices", lambda: ([cuda.Device("GPU", 86)], ""))
        monkeypatch.setattr(trt, "installed", lambda: {"tensorrt-rtx": "1.7.1"})
    return folder


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sm": [20], "hardware_compatible": False}, "SM 20; the GPU here is SM {sm}: compile with --sm {sm}"),
        ({"version": "1.0.0"}, " 1.0.0, SM {sm}; installed is {version}: install that version, or compile again here"),
        ({"builder": "tensorrt", "version": "1.0.0"}, "is for tensorrt 1.0.0, SM {sm}"),
        ({"strip_weights": True}, "has no weights: refit it with TensorRT, or compile without --strip-weights"),
    ],
    ids=["sm", "version", "builder", "weights"],
)
def test_a_mismatch_is_one_line(bundle, changes, words):
    document = json.loads((bundle / MANIFEST).read_text())
    made = document["engine"]
    facts = {"sm": cuda.devices()[0][0].sm, "version": trt.installed()[made["builder"]]}
    (bundle / MANIFEST).write_text(sealed(document | {"engine": made | changes}))
    with pytest.raises(DfssmError) as caught:
        Engine.load(bundle)
    assert words.format(**facts) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("builder", devices.BUILDERS)
def test_it_is_compared_with_its_student(builder, opened):
    folder = opened(Device(builder), "fp16").folder
    done = CliRunner().invoke(dfssm, ["compare", str(folder), str(DEMO), "--json"], catch_exceptions=False)
    result = json.loads(done.stdout)
    assert done.exit_code == 0 and result["passed"] and len(result["outputs"]) == 1 + 2 * 6


@pytest.mark.gpu
@pytest.mark.parametrize("builder", devices.BUILDERS)
def test_the_benchmark_runs(builder, opened):
    folder = opened(Device(builder), "fp16").folder
    command = ["bench", str(folder), "--rounds", "1", "--tokens", "4", "--prompt", "8", "--json"]
    result = json.loads(CliRunner().invoke(dfssm, command, catch_exceptions=False).stdout)
    assert result["gpu"]["builder"] == builder and [batch["batch"] for batch in result["batches"]] == [1]
    assert result["tok_s"] > 0 and result["batches"][0]["recorded"]


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", ["fp16", "int8"])
@pytest.mark.parametrize("lowering", ["plugin", "native"])
@pytest.mark.parametrize("builder", devices.BUILDERS)
def test_the_goldens_come_out_right(builder, lowering, state_dtype, tmp_path, recwarn):
    """What the step graph computed on the CPU; until then the engine says that it was not verified."""
    if reason := devices.missing_for(builder, lowering):
        pytest.skip(reason)
    options = {"builder": builder, "lowering": lowering, "sm": str(devices.sm())}
    compile_model(Request(DEMO, "trt", tmp_path / "b", state_dtype, options=options))
    Engine.load(tmp_path / "b")
    assert [str(warning.message) for warning in recwarn if "never verified" in str(warning.message)]
    done = CliRunner().invoke(dfssm, ["verify", str(tmp_path / "b"), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, json.loads(done.stdout)["first"]
    recwarn.clear()
    Engine.load(tmp_path / "b")
    assert not [str(warning.message) for warning in recwarn if "never verified" in str(warning.message)]
