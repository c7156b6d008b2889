"""`polygraphy run` as a command with our runners, the goldens in its files, the runner of bundles over the stand-in."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from fake_device import FakeCuda, FakeEngine
from polygraphy.exception import PolygraphyException
from polygraphy.tools import main as polygraphy_main

from dfssm.cli.main import dfssm
from dfssm.compiler.pipeline import Request, compile_model
from dfssm.model.checkpoint import save_student
from dfssm.opset.tolerances import model_tolerance
from dfssm.runtime import Engine
from dfssm.runtime.tensorrt import TensorRTBackend
from dfssm.targets import get_target
from dfssm.targets.bundle import DATA
from dfssm.verify import polygraphy

pytestmark = pytest.mark.filterwarnings("ignore:SelectableGroups")  # Polygraphy's look at entry points

TOLERANCE = model_tolerance(tiny.CONFIG.n_layer, tiny.CONFIG.d_model).relative
ONE_TOKEN = ["--input-shapes", "input_ids:[1,1]", "--val-range", f"input_ids:[0,{tiny.CONFIG.vocab_size - 1}]"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    if not (probe := get_target("ort-cpu").probe()).usable:
        pytest.skip(probe.why_not)
    folder = tmp_path_factory.mktemp("polygraphy")
    tensors = {name: torch.from_numpy(array) for name, array in tiny.tensors().items()}
    save_student(folder / "model.pt", tiny.CONFIG, tensors)
    compile_model(Request(folder / "model.pt", "ort-cpu", folder / "bundle"))
    return folder / "bundle"


@pytest.fixture
def run(capfd):
    """run(*arguments): the exit status of `polygraphy run`, in this process, and what it says."""

    def call(*arguments) -> tuple[int, str]:
        status = polygraphy_main(["run", *map(str, arguments)])
        return status, "".join(capfd.readouterr())

    return call


@pytest.fixture(scope="module")
def golden(bundle):
    folder = bundle.parent / "golden"
    command = ["verify", str(bundle), "--polygraphy", str(folder), "--json"]
    done = CliRunner().invoke(dfssm, command, catch_exceptions=False)
    assert done.exit_code == 0
    paths = json.loads(done.stdout)
    assert sorted(path.name for path in folder.iterdir()) == ["inputs.json", "outputs.json"]
    return ["--load-inputs", paths["inputs"], "--load-outputs", paths["outputs"]]


def test_kernels_bodies_and_runtime_agree(bundle):
    """As a command, three runners in it: our kernels, ONNX Runtime's own ops, the bundle with states in place."""
    runners = ["--dfssm-ort", "--onnxrt", "--dfssm-engine"]
    limits = ["--atol", str(TOLERANCE), "--check-error-stat", "max"]
    command = [
        Path(sys.executable).with_name("polygraphy"),
        "run",
        bundle / "model.onnx",
        *runners,
        *ONE_TOKEN,
        *limits,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    out = done.stdout
    assert done.returncode == 0 and out.count("Pass Rate: 100.00%") == 2, out
    assert "dfssm-ort vs. onnxrt" in out and "vs. dfssm-engine" in out and "ssm_state_out.1" in out


def test_the_goldens_are_what_our_kernels_compute(bundle, golden, run):
    runners = ["--dfssm-ort", "--dfssm-engine"]
    status, out = run(bundle / "model.onnx", *runners, *golden, "--atol", 0, "--rtol", 0)
    assert status == 0 and "dfssm-ort vs. dfssm-engine" in out and "dfssm-engine vs. golden" in out, out


def test_an_edited_weight_is_found(bundle, golden, tmp_path, run):
    def edit(tensors):
        tensors["norm_f.weight"] *= 1.001

    edited = tiny.write_bundle(tmp_path / "b", target="ort-cpu", state_dtype="fp16", edit=edit)
    status, out = run(edited / "model.onnx", "--dfssm-ort", *golden, "--atol", 0, "--rtol", 0)
    assert status == 1 and "FAILED | Output: 'logits'" in out, out


def test_values_inside_may_be_outputs(bundle, run):
    """Polygraphy changes the graph then, and hands it over as bytes."""
    outputs = ["--onnx-outputs", "/layers.0/conv/y"]
    status, out = run(bundle / "model.onnx", "--dfssm-ort", *ONE_TOKEN, *outputs)
    assert status == 0 and f"/layers.0/conv/y [dtype=float32, shape=(1, 1, {tiny.CONFIG.conv_dim})]" in out, out


def test_the_runtime_over_a_device(bundle, monkeypatch):
    """Its inputs and outputs are the graph's, and a state goes in and out through one buffer."""
    fake = FakeCuda()
    engine = Engine.load(bundle)
    device = TensorRTBackend(FakeEngine(fake, engine.backend.session, max_batch=2, max_tokens=4), fake)
    monkeypatch.setattr(Engine, "load", lambda folder: Engine(engine.folder, engine.manifest, device, 1))
    rng = np.random.default_rng(0)
    states = {
        name: rng.standard_normal((2, *shape)).astype(dtype) for name, (dtype, shape) in engine.backend.layout.items()
    }
    ids = rng.integers(0, 200, (2, 3))
    with polygraphy.EngineRunner(str(bundle)) as runner:
        metadata = runner.get_input_metadata(use_numpy_dtypes=False)
        found = runner.infer(states | {"input_ids": ids})
    assert set(metadata) == {"input_ids", *states} and tuple(metadata["input_ids"].shape) == (-1, -1)
    expected = engine.backend.session.run(None, states | {"input_ids": ids})
    names = [value.name for value in engine.backend.session.get_outputs()]
    assert set(found) == set(names) and found["logits"].shape == (2, 3, tiny.CONFIG.vocab_size)
    for name, value in zip(names, expected, strict=True):
        assert np.array_equal(found[name], value), name


def test_an_error_of_ours_is_one_of_polygraphys(bundle, tmp_path):
    for path in bundle.iterdir():
        if path.name != DATA:
            (tmp_path / path.name).symlink_to(path)
    session = polygraphy.SessionWithKernels(str(tmp_path / "model.onnx"))
    for load in (session, polygraphy.EngineRunner(str(tmp_path)).activate):
        with pytest.raises(PolygraphyException, match=DATA) as caught:
            load()
        assert "\n" not in str(caught.value)


def test_two_ways_at_once_are_wrong_usage(bundle):
    done = CliRunner().invoke(dfssm, ["verify", str(bundle), "--bisect", "--polygraphy", "x"])
    assert done.exit_code == 2 and "give one of them" in done.output
