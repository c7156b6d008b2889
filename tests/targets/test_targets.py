"""The target modules: what they say of the machine, how they lower, what they open, and every way that can fail."""

import os
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import student_ref
import tiny

from dfssm import _native
from dfssm.base import DfssmError
from dfssm.opset.layouts import LAYOUT_ROW64, LAYOUTS
from dfssm.opset.packing import from_layout, up_from_layout
from dfssm.opset.tolerances import model_tolerance
from dfssm.targets import TARGETS, get_target, ort_cpu

RUN = """
import sys
from pathlib import Path
import numpy as np
from dfssm.targets import ort_cpu
folder, feeds, out = sys.argv[1:]
feeds = dict(np.load(feeds))
session = ort_cpu.open_session(Path(folder), threads=2)
np.savez(out, **{v.name: a for v, a in zip(session.get_outputs(), session.run(None, feeds), strict=True)})
"""


RUN_HERE = [name for name in TARGETS if name in get_target(name).VERIFIED_BY]


def one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_target_lists_the_known():
    with pytest.raises(DfssmError) as caught:
        get_target("gpu")
    assert TARGETS[:3] == ("ort-cpu", "onnx", "trt")
    assert one_line(caught) == f"unknown target 'gpu': choose one of {', '.join(TARGETS)}"


@pytest.mark.parametrize("name", RUN_HERE)
def test_probe(name):
    probe = get_target(name).probe()
    assert probe.usable and not probe.why_not
    assert probe.uses["onnxruntime"] == onnxruntime.__version__
    if name == "ort-cpu":
        assert probe.uses["isa"] in _native.isas() and os.path.isfile(probe.uses["library"])


def test_probe_on_another_machine(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    probe = ort_cpu.probe()  # the scalar kernels run anywhere: what the library says counts, not the machine's name
    assert probe.usable and probe.uses["machine"] == "aarch64"


@pytest.mark.parametrize("layout", ort_cpu.LAYOUTS)
def test_lowering_is_lazy_and_can_be_undone(layout):
    config = student_ref.config("planes2")
    tensors = tiny.tensors(config)
    lowered = ort_cpu.lower(tensors, layout)
    assert list(lowered) == list(tensors)
    for name, tensor in tensors.items():
        got, rows = lowered[name], tensor.shape[-2] if tensor.ndim > 1 else 0
        if name.endswith(".bits"):
            np.testing.assert_array_equal(from_layout(np.asarray(got), rows, LAYOUTS[layout]), tensor)
        elif name.endswith(".up"):
            np.testing.assert_array_equal(up_from_layout(np.asarray(got), rows, LAYOUTS[layout]), tensor)
        else:
            assert got is tensor
        assert got.shape == np.asarray(got).shape and got.dtype == np.asarray(got).dtype
    assert get_target("onnx").lower(tensors, 0) is tensors


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("laid_out_for", ["avx2", "avx512vnni"])
@pytest.mark.parametrize(
    "name, state_dtype", [("plain", "fp32"), ("odd", "fp16"), ("groups", "int8"), ("groups", "int8-deferred")]
)
def test_library_equals_reference_on_every_isa(isa, laid_out_for, name, state_dtype, tmp_path):
    config = student_ref.config(name)
    folder = tiny.write_bundle(
        tmp_path / "bundle", config, "ort-cpu", state_dtype, tokenizer=False, options={"isa": laid_out_for}
    )
    tensors = tiny.tensors(config)
    ids = np.random.default_rng(3).integers(0, config.vocab_size, (2, 9))
    states = student_ref.step(config, tensors, ids[:, :8], student_ref.zero_states(config, 2, state_dtype))[1]
    np.savez(tmp_path / "feeds.npz", input_ids=ids[:, 8:], **states)
    subprocess.run(
        [sys.executable, "-c", RUN, str(folder), tmp_path / "feeds.npz", tmp_path / "out.npz"],
        env=os.environ | {"DFSSM_ISA": isa},
        check=True,
        timeout=120,
    )
    actual = dict(np.load(tmp_path / "out.npz"))
    logits, new = student_ref.step(config, tensors, ids[:, 8:], states)
    tolerance = model_tolerance(config.n_layer, config.d_model)
    tolerance.check(actual["logits"], logits, "logits")
    for i in range(config.n_layer):
        tolerance.check(actual[f"conv_state_out.{i}"], new[f"conv_state.{i}"], f"conv_state.{i}")
        got, want = actual[f"ssm_state_out.{i}"], new[f"ssm_state.{i}"]
        if state_dtype.startswith("int8"):
            got, want = got * actual[f"ssm_scale_out.{i}"][..., None], want * new[f"ssm_scale.{i}"][..., None]
        tolerance.check(got.astype(np.float32), want.astype(np.float32), f"ssm_state.{i}")


@pytest.mark.parametrize("batch, tokens", [(1, 1), (3, 1), (1, 7), (3, 7), (3, 64)])
def test_library_equals_bodies(batch, tokens, tmp_path):
    """The same file with our kernels and without: the kernels win over the bodies, and compute the same."""
    config = student_ref.config("plain")
    folder = tiny.write_bundle(tmp_path / "bundle", config, "ort-cpu", tokenizer=False)
    feeds = student_ref.zero_states(config, batch, "fp32")
    feeds["input_ids"] = np.random.default_rng(3).integers(0, config.vocab_size, (batch, tokens))
    ours, bodies = (get_target(name).open_session(folder).run(None, feeds) for name in ("ort-cpu", "onnx"))
    for got, want in zip(ours, bodies, strict=True):
        model_tolerance(config.n_layer, config.d_model).check(got, want)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny.write_bundle(tmp_path_factory.mktemp("targets") / "bundle")


def test_library_is_found_in_this_order(bundle, tmp_path, monkeypatch):
    monkeypatch.delenv(ort_cpu.LIBRARY_VARIABLE, raising=False)
    installed = ort_cpu.find_library()
    own = bundle / ort_cpu.LIBRARY
    assert ort_cpu.find_library(own) == own != installed
    with pytest.raises(DfssmError, match="none is gone, the bundle was replaced: load it again"):
        ort_cpu.find_library(tmp_path / "none")
    monkeypatch.setenv(ort_cpu.LIBRARY_VARIABLE, str(installed))
    assert ort_cpu.find_library(own) == installed


def test_library_named_but_missing(bundle, monkeypatch):
    monkeypatch.setenv(ort_cpu.LIBRARY_VARIABLE, "/nowhere/lib.so")
    with pytest.raises(DfssmError, match="DFSSM_ORT_LIBRARY is /nowhere/lib.so: there is no such file") as caught:
        ort_cpu.open_session(bundle)
    one_line(caught)
    assert "no such file" in ort_cpu.probe().why_not


def test_library_not_installed(monkeypatch):
    monkeypatch.delenv(ort_cpu.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr("dfssm.targets.library.installed", lambda library: None)
    with pytest.raises(DfssmError, match="libdfssm_ort_cpu.so is not installed"):
        ort_cpu.find_library()
    assert not ort_cpu.probe().usable


@pytest.mark.parametrize("what", ["text", "another library"])
def test_library_that_does_not_load(bundle, tmp_path, monkeypatch, what):
    path = _native.__file__
    if what == "text":
        path = tmp_path / "lib.so"
        path.write_text("not a library")
    monkeypatch.setenv(ort_cpu.LIBRARY_VARIABLE, str(path))
    with pytest.raises(DfssmError, match="does not load into ONNX Runtime") as caught:
        ort_cpu.open_session(bundle)
    assert str(path) in one_line(caught)


def test_library_without_our_kernels(bundle, monkeypatch):
    """A library of another version of the ops registers, but ONNX Runtime finds no kernel in it and runs the bodies."""
    monkeypatch.setattr(ort_cpu, "_register", lambda options, library: None)
    with pytest.raises(DfssmError, match="has no kernel for BinaryScaffoldMatMul, CausalConv1dStep") as caught:
        ort_cpu.open_session(bundle)
    one_line(caught)


def test_unusable_isa(bundle):
    code = "import sys; from dfssm.targets import ort_cpu; ort_cpu.open_session(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", code, bundle],
        env=os.environ | {"DFSSM_ISA": "mmx"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    last = result.stderr.strip().splitlines()[-1]
    assert "DfssmError" in last and "mmx" in last and _native.isas()[0] in last and last.endswith(": unset DFSSM_ISA")


@pytest.mark.parametrize("name", RUN_HERE)
def test_session_that_does_not_open(name, bundle, tmp_path):
    target = get_target(name)
    with pytest.raises(DfssmError, match="model.onnx is missing"):
        target.open_session(tmp_path)
    graph = (bundle / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(graph)
    with pytest.raises(DfssmError, match="model.onnx.data is missing"):
        target.open_session(tmp_path)
    weights = (bundle / "model.onnx.data").read_bytes()
    (tmp_path / "model.onnx.data").write_bytes(weights[:-5000])
    with pytest.raises(DfssmError, match="model.onnx cannot be read .* cannot lie in the .* bytes of model.onnx.data"):
        target.open_session(tmp_path)
    (tmp_path / "model.onnx.data").write_bytes(weights)
    (tmp_path / "model.onnx").write_bytes(graph[:-100])
    with pytest.raises(DfssmError, match=r"model.onnx cannot be read \(it is cut off\)"):
        target.open_session(tmp_path)
    (tmp_path / "model.onnx").write_bytes(graph.replace(b"Gather", b"Gathxx"))
    with pytest.raises(DfssmError, match="cannot open .*model.onnx") as caught:
        target.open_session(tmp_path)
    one_line(caught)
    with pytest.raises(DfssmError, match="threads is -1"):
        target.open_session(bundle, threads=-1)


def test_an_unknown_instruction_set_is_one_line():
    with pytest.raises(
        DfssmError, match="^--isa is avx: give avx512vbmi, avx512vnni, avxvnni, avx2, scalar for x86_64, or "
    ):
        ort_cpu.layout(isa="avx", machine="x86_64")


def test_another_machine_has_its_own_instruction_sets(monkeypatch):
    assert ort_cpu.layout(machine="aarch64") == ort_cpu.layout(machine="aarch64", isa="dotprod") == LAYOUT_ROW64
    with pytest.raises(DfssmError, match="^--isa is avx2: give i8mm, dotprod, scalar for aarch64, or another --"):
        ort_cpu.layout(machine="aarch64", isa="avx2")
    with pytest.raises(DfssmError, match="^--machine is sparc: give x86_64, aarch64$"):
        ort_cpu.layout(machine="sparc")
    with pytest.raises(DfssmError, match="^--machine is sparc: "):
        ort_cpu.machine(machine="sparc")
    monkeypatch.setattr("platform.machine", lambda: "riscv64")  # one that there are no kernels for but the plain ones
    assert ort_cpu.machine() == "riscv64" and ort_cpu.layout(isa="scalar") in ort_cpu.LAYOUTS
