"""Goldens travel with a bundle: what dfcompile computed, the machine that runs the bundle computes, or it is told where
it does not. Engines run over the stand-in for a device.
"""

import dataclasses
import json
import shutil
import warnings
from importlib.util import find_spec

import numpy as np
import pytest
import safetensors.numpy
import tiny
import torch
from click.testing import CliRunner
from commands import run_commands
from fake_device import FakeCuda, FakeEngine

from dfssm.base import DfssmError
from dfssm.base.paths import GOLDEN
from dfssm.cli.main import dfssm
from dfssm.compiler.pipeline import Request, compile_model
from dfssm.model.checkpoint import save_student
from dfssm.opset.tolerances import drift_tolerance, half_tolerance, model_tolerance, rms_error
from dfssm.runtime import Engine
from dfssm.targets import cuda, get_target, trt
from dfssm.targets.bundle import MANIFEST, Bundle, file_entry, open_bundle, read_manifest, sealed
from dfssm.verify import golden
from dfssm.verify.golden import Golden, compare_with_golden, verify_here


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save_student(path, tiny.CONFIG, {name: torch.from_numpy(array) for name, array in tiny.tensors().items()})
    return path


@pytest.fixture(scope="module")
def compiled(model, tmp_path_factory):
    """compiled(target, state_dtype): a verified bundle, made once. Not to be written to."""
    folders = {}

    def make(target, state_dtype="fp16", **options):
        if not (probe := get_target(target).probe(**options)).usable:
            pytest.skip(probe.why_not)
        key = target, state_dtype, *options.values()
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("golden") / "bundle"
            compile_model(Request(model, target, folders[key], state_dtype, options=options))
        return folders[key]

    return make


def verify(bundle, *options):
    """The command's exit status, and what it says: `--json` as its object."""
    done = CliRunner().invoke(dfssm, ["verify", str(bundle), *options], catch_exceptions=False)
    return done.exit_code, json.loads(done.stdout) if "--json" in options else done.stdout


def replace(bundle, name, content: bytes):
    """Other bytes in the place of a file, and a manifest that says so."""
    (bundle / name).write_bytes(content)
    document = json.loads((bundle / MANIFEST).read_text())
    document["files"][name] = file_entry(bundle / name)
    del document["manifest_sha256"]
    (bundle / MANIFEST).write_text(sealed(document))


@pytest.mark.parametrize("state_dtype", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("target", ["ort-cpu", "onnx"])
def test_a_bundle_is_right_where_it_was_made(target, state_dtype, compiled):
    """With our kernels to the bit; what the other threads of ONNX Runtime's own add up need not be."""
    folder = compiled(target, state_dtype)
    for threads in (1, 2):
        result = verify_here(folder, threads)
        exact = get_target(target).EXACT
        assert result["passed"] and result["exact"] == exact and (result["identical"] or not exact)
        assert result["calls"] == [1, 31] + [1] * (1 if target == "onnx" else 2)
        layers = range(tiny.CONFIG.n_layer)
        states = [f"{kind}.{i}" for i in layers for kind in ("conv_state", "ssm_state")]
        assert list(result["outputs"]) == ["logits", *states, "choice"] and result["first"] is None


def test_other_kernels_are_right_within_the_drift(compiled, tmp_path):
    folder = compiled("ort-cpu")
    (done,) = run_commands([["dfssm", "verify", folder, "--json"]], tmp_path, DFSSM_ISA="scalar")
    result = json.loads(done.out)
    assert done.status == 0 and result["passed"] and not result["exact"] and result["kernels"].startswith("scalar of")
    outputs = result["outputs"]
    assert all(entry["rms_rel"] <= entry["tolerance"] < 0.1 for entry in outputs.values())
    assert outputs["conv_state.0"]["tolerance"] < outputs["logits"]["tolerance"], "first layers are held closer"
    assert {"torch", "onnx", "polygraphy"} & set(done.heavy) == set(), "it runs where bundles run"


def test_fp16_activations_are_allowed_what_they_cost(compiled):
    """Besides the drift of the goldens, what rounding does to the codes of as many layers."""
    with open_bundle(compiled("ort-cpu")) as bundle:
        goldens, engine = Golden.of(bundle), Engine.load(bundle.folder)
        plain = compare_with_golden(engine, goldens, False, lambda *_: None)["outputs"]
        engine.manifest = dataclasses.replace(engine.manifest, engine={"activations": "fp16"})
        half = compare_with_golden(engine, goldens, False, lambda *_: None)["outputs"]
    for name, layers in (("logits", tiny.CONFIG.n_layer), ("ssm_state.0", 1)):
        more = half[name]["tolerance"] - plain[name]["tolerance"]
        assert more == pytest.approx(half_tolerance(layers).relative) and "fp16" in half[name]["reason"]


X = tiny.CONFIG.d_inner + 3
"""A row of in_proj that makes a channel of x; the first ones make z."""


@pytest.mark.parametrize(
    "name, index, first, token",
    [
        ("layers.0.in_proj.scale", X, "conv_state.0", 1),
        ("layers.0.scan.A_log", 3, "ssm_state.0", 32),  # a first state decays from zero
        ("layers.0.out_proj.scale", 3, "conv_state.1", 1),
        ("layers.1.conv.bias", 3, "ssm_state.1", 1),
        ("layers.1.out_proj.scale", 3, "logits", 1),
    ],
)
def test_one_edited_number_is_found_by_the_same_kernels(name, index, first, token, compiled, tmp_path):
    def edit(tensors):
        tensors[name][index] *= 1.001

    good = compiled("ort-cpu")
    edited = tiny.write_bundle(tmp_path / "b", target="ort-cpu", state_dtype="fp16", edit=edit)
    replace(edited, GOLDEN, (good / GOLDEN).read_bytes())
    status, result = verify(edited, "--json")
    assert status == 1 and not result["passed"] and result["exact"] and not result["identical"]
    assert result["first"]["output"] == first and result["first"]["token"] == token
    status, text = verify(edited)
    assert status == 1 and f"FAILED after token {token}: {first} is off by " in text


def test_bits_that_no_digest_shows(compiled, tmp_path):
    folder = shutil.copytree(compiled("ort-cpu"), tmp_path / "b")
    with Bundle(folder) as bundle:
        made = Golden.of(bundle)
    made.hashes[1, 2, 7] ^= 1
    replace(folder, GOLDEN, made.to_bytes())
    assert "FAILED after token 32: conv_state.1 has other bits (" in verify(folder)[1]


@pytest.mark.parametrize("state_dtype", ["fp16", "int8"])
def test_a_wrong_matrix_is_found_by_other_kernels(state_dtype, compiled, tmp_path):
    def edit(tensors):
        tensors["layers.1.in_proj.bits"] ^= 255

    edited = tiny.write_bundle(tmp_path / "b", target="onnx", state_dtype=state_dtype, edit=edit)
    replace(edited, GOLDEN, (compiled("ort-cpu", state_dtype) / GOLDEN).read_bytes())
    status, result = verify(edited, "--json")
    assert status == 1 and not result["exact"] and result["first"]["output"] == "conv_state.1"
    assert result["first"]["rms_rel"] > result["first"]["tolerance"]
    assert result["outputs"]["ssm_state.0"]["rms_rel"] <= result["outputs"]["ssm_state.0"]["tolerance"]


@pytest.fixture
def device(compiled, monkeypatch):
    """A bundle of target trt, and the stand-in on which it then opens: its session and what CUDA says of the GPU."""
    if not find_spec("tensorrt_rtx"):
        pytest.skip("tensorrt_rtx is not installed")
    folder = compiled("trt", sm="86", max_tokens=20)
    session = get_target("onnx").open_session(compiled("onnx"), threads=1)
    fake = FakeCuda()
    gpus = [cuda.Device("GPU", 86)]
    monkeypatch.setattr(cuda, "devices", lambda: (gpus, ""))
    monkeypatch.setattr(trt, "check", lambda *arguments: None)
    monkeypatch.setattr("dfssm.runtime.cuda.Cuda", lambda library: fake)
    monkeypatch.setattr(trt, "open_engine", lambda *arguments: FakeEngine(fake, session, max_tokens=20))
    return folder, session, gpus


def warned(folder, **options):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Engine.load(folder, **options)
    return [str(warning.message) for warning in said]


def test_an_engine_says_that_it_was_never_verified_here_until_it_was(device, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder, _, gpus = device
    (said,) = warned(folder)
    assert said == (
        f"{folder} holds an engine that was never verified on this machine: run `dfssm verify {folder}` once"
    )
    status, result = verify(folder, "--json")
    assert status == 0 and result["passed"] and not result["exact"] and result["calls"] == [1, 20, 11, 1, 1]
    assert "GPU (SM 86)" in result["kernels"] and result["target"] == "trt"
    assert warned(folder) == []
    gpus[0] = cuda.Device("another GPU", 86)
    assert len(warned(folder)) == 1, "that was on another machine"
    gpus[0] = cuda.Device("GPU", 86)
    assert warned(folder) == []


def test_the_warning_names_what_can_be_done_and_is_of_one_bundle(device, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = shutil.copytree(device[0], tmp_path / "a b")
    (said,) = warned(folder, trust=True)
    assert said.endswith(f": run `dfssm verify '{folder}' --trust` once")
    assert verify(folder)[0] == 0 and warned(folder) == []
    document = json.loads((folder / MANIFEST).read_text())
    del document["files"][GOLDEN], document["manifest_sha256"]
    (folder / MANIFEST).write_text(sealed(document))
    (said,) = warned(folder)
    assert said.endswith(": it has no golden.safetensors, compile it again without --no-verify")


def test_a_wrong_kernel_is_found_and_the_record_withdrawn(device, tmp_path, monkeypatch):
    """The kernel of a prompt alone is wrong, in half the heads of a layer: the first token is right."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder, session, _ = device
    assert verify(folder)[0] == 0 and warned(folder) == []
    right = session.run

    class Wrong:
        def __getattr__(self, name):
            return getattr(session, name)

        def run(self, names, feeds):
            found = dict(zip(names, right(names, feeds), strict=True))
            if feeds["input_ids"].shape[1] > 1:
                found["ssm_state_out.1"][:, ::2] = 0
            return list(found.values())

    made = FakeCuda()
    monkeypatch.setattr("dfssm.runtime.cuda.Cuda", lambda library: made)
    monkeypatch.setattr(trt, "open_engine", lambda *arguments: FakeEngine(made, Wrong(), max_tokens=20))
    status, text = verify(folder)
    assert status == 1 and "FAILED after token 21: ssm_state.1 is off by" in text
    assert len(warned(folder)) == 1


def test_a_wrong_choice_is_found(device, tmp_path, monkeypatch):
    """The kernel that finds the largest logit: it runs from the second step on, after the engine, in its recording."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder, session, _ = device

    class Wrong(FakeCuda):
        def largest(self, logits, rows, vocab, count, tokens, values):
            super().largest(logits, rows, vocab, count, tokens, values)
            self.at(tokens, 4 * rows * count)[:] = 7

    made = Wrong()
    monkeypatch.setattr("dfssm.runtime.cuda.Cuda", lambda *arguments: made)
    monkeypatch.setattr(trt, "open_engine", lambda *arguments: FakeEngine(made, session, max_tokens=20))
    status, result = verify(folder, "--json")
    assert status == 1 and (result["first"]["output"], result["first"]["token"]) == ("choice", 33)
    assert all(entry["rms_rel"] <= entry["tolerance"] for name, entry in result["outputs"].items() if name != "choice")


def test_a_bundle_without_goldens_is_one_line(tiny_bundle):
    done = "has no golden.safetensors to be verified with: compile it again, without --no-verify"
    with pytest.raises(DfssmError, match=done):
        verify_here(tiny_bundle)


def test_goldens_of_another_model(compiled, tmp_path):
    folder = shutil.copytree(compiled("onnx"), tmp_path / "b")
    arrays = safetensors.numpy.load((folder / GOLDEN).read_bytes())
    with Bundle(folder) as bundle:
        made = Golden.of(bundle)
    names = made.names[2:]
    arrays = {name: value for name, value in vars(made).items() if isinstance(value, np.ndarray)}
    arrays |= {"digests": made.digests[:, 2:], "hashes": made.hashes[:, 2:], "drift": made.drift[2:]}
    replace(folder, GOLDEN, Golden(names, kernels="", **arrays).to_bytes())
    with pytest.raises(DfssmError, match="golden.safetensors is of another model: compile the model again"):
        verify_here(folder)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda data: b"", "Header|header"),
        (lambda data: data[:-8], "cannot be read"),
        (lambda data: data.replace(rb"\"version\": 1", rb"\"version\": 2"), "it is dfssm-golden version 2, not 1"),
        (lambda data: data.replace(b'"ids"', b'"idx"'), "idx"),
        (lambda data: data.replace(b"kernels", b"kernelz"), "kernels"),
    ],
)
def test_damaged_goldens_are_one_line(damage, words, compiled, tmp_path):
    folder = shutil.copytree(compiled("onnx"), tmp_path / "b")
    replace(folder, GOLDEN, damage((folder / GOLDEN).read_bytes()))
    with pytest.raises(DfssmError, match=words) as caught:
        verify_here(folder)
    assert "golden.safetensors cannot be read" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("ids", np.full(33, tiny.CONFIG.vocab_size)),
        ("ids", np.full(33, -1)),
        ("calls", np.array([34, -1])),
        ("calls", np.array([], np.int64)),
        ("calls", np.array([2**63 - 1, 2**63 - 1, 35])),  # 33, modulo 2**64
        ("drift", np.zeros(3, np.float32)),
        ("drift", np.full(5, np.nan, np.float32)),
        ("drift", np.full(5, -1, np.float32)),
        ("logits", np.zeros((2, tiny.CONFIG.vocab_size))),
    ],
)
def test_goldens_that_cannot_be(name, value, compiled, tmp_path):
    folder = shutil.copytree(compiled("onnx"), tmp_path / "b")
    with Bundle(folder) as bundle:
        made = Golden.of(bundle)
    replace(folder, GOLDEN, Golden(**vars(made) | {name: value}).to_bytes())
    with pytest.raises(DfssmError, match="golden.safetensors cannot be read .*: compile the model again"):
        verify_here(folder)


def test_goldens_are_small_and_the_same_again(compiled, model, tmp_path):
    folder = compiled("ort-cpu")
    assert read_manifest(folder).files[GOLDEN]["bytes"] < 12e3
    compile_model(Request(model, "ort-cpu", tmp_path / "b"))
    assert (tmp_path / "b" / GOLDEN).read_bytes() == (folder / GOLDEN).read_bytes()


@pytest.mark.parametrize("most, prompt", [(1, [1] * 31), (20, [20, 11]), (31, [31]), (512, [31])])
def test_calls_are_those_that_an_engine_can_make(most, prompt, compiled, tmp_path):
    folder = shutil.copytree(compiled("onnx"), tmp_path / "b")
    made = golden.make_golden(get_target("onnx"), folder, tiny.CONFIG.vocab_size, most, lambda done, total: None)
    assert made.calls.tolist() == [1, *prompt, 1] and len(made.ids) == 33
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in compiled("onnx").iterdir())


def test_without_verification_there_are_none(model, tmp_path):
    compile_model(Request(model, "onnx", tmp_path / "b", verify=False))
    assert GOLDEN not in read_manifest(tmp_path / "b").files and not (tmp_path / "b" / GOLDEN).exists()


def test_an_error_of_a_digest_is_that_of_its_numbers():
    rng = np.random.default_rng(3)
    numbers = rng.standard_normal((4, 16, 128))
    errors = []
    for share in (1e-5, 1e-2):
        other = numbers + share * rng.standard_normal(numbers.shape)
        errors.append(rms_error(golden._digest(other), golden._digest(numbers)) / rms_error(other, numbers))
    # A mean of squares of 16 numbers scatters by 1/sqrt(8): three times that, and of two such.
    assert all(1 / 2.5 < error < 2.5 for error in errors)
    ones = golden._signs(1 << 16).astype(int)
    assert set(ones) == {-1, 1} and abs(ones.sum()) < 4 * 2**8, "as coins fall"
    assert abs((ones[1:] * ones[:-1]).sum()) < 4 * 2**8
    (stretch,) = np.nonzero(golden._digest(np.eye(1, 160, 47)[0]))
    assert stretch.tolist() == [4], "a number is in one sum"


@pytest.mark.parametrize("count", [1, 3, 16, 17])
def test_digests_of_few_numbers(count):
    assert golden._digest(np.ones(count)).shape == (golden.SUMS,) and golden._digest(np.ones(count)).any()


def test_a_tolerance_is_what_the_model_drifts_and_no_less_than_a_few_flips():
    flips = model_tolerance(4, 64)
    assert drift_tolerance(4, 64, 0.0) == flips
    deep = drift_tolerance(4, 64, 0.2)
    assert deep.relative == pytest.approx(0.8) and "float noise" in deep.reason
    ones = np.ones(9)
    assert drift_tolerance(48, 64, 5.0).relative < rms_error(0 * ones, ones) == 1, "nothing is not allowed"


def test_logits_that_are_not_finite_are_an_error(compiled, tmp_path):
    def edit(tensors):
        tensors["norm_f.weight"][0] = np.nan

    edited = tiny.write_bundle(tmp_path / "b", target="ort-cpu", state_dtype="fp16", edit=edit)
    replace(edited, GOLDEN, (compiled("ort-cpu") / GOLDEN).read_bytes())
    with pytest.raises(DfssmError, match="not finite"):
        verify_here(edited)


def test_numbers_that_are_not_finite_are_off(compiled):
    folder = compiled("onnx")
    with open_bundle(folder) as bundle:
        made = Golden.of(bundle)
    made.digests[0, 0, 0] = np.nan
    result = compare_with_golden(Engine.load(folder), made, exact=False, progress=lambda done, total: None)
    assert not result["passed"] and result["first"]["output"] == "conv_state.0"
