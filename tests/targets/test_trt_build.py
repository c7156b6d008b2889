"""The building process: real engines where TensorRT-RTX is installed, and every way in which it can end."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import student_ref
import tiny
from trt_graphs import write_step

from dfssm.base import DfssmError
from dfssm.targets import trt, trt_build, trt_child
from dfssm.targets.bundle import read_manifest
from dfssm.targets.trt_build import BuildError, Request
from dfssm.targets.trt_child import build_engine
from dfssm.targets.trt_lowering import lower
from dfssm.targets.trt_lowering.graph import load, read, save
from dfssm.targets.trt_plugins import build_of
from dfssm.targets.trt_proof import weights_in

rtx = pytest.mark.skipif(not find_spec("tensorrt_rtx"), reason="tensorrt_rtx is not installed")


def no_library() -> str:
    try:
        trt.find_library()
    except DfssmError as error:
        return str(error)
    return ""


plugins = pytest.mark.skipif(bool(no_library()), reason=no_library() or "-")


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """Folder with the native lowering of a tiny student."""
    folder = tmp_path_factory.mktemp("native")
    write_step(folder, "plain")
    lower(folder / "model.onnx", folder / "lowered.onnx", "native")
    return folder


@pytest.fixture
def request_(native, tmp_path):
    engine, model = tmp_path / "model.engine", native / "lowered.onnx"
    return Request("tensorrt-rtx", str(model), str(engine), "", (86,), ((2, 1, 1, 1),))


@rtx
def test_native_engine(request_, native, tmp_path):
    seen = []
    built = build_engine(request_, lambda done, total: seen.append((done, total)))
    assert built["profiles"] == [{"min": [1, 1], "opt": [2, 1], "max": [2, 1], "logits": 1}]
    assert built["memory"]["weights"] > 10_000 and built["memory"]["activations"] > 0
    assert built["layers"] > 100 and built["peak_rss_bytes"] > 1e8
    assert seen and seen[-1][0] == seen[-1][1] > 1 and seen == sorted(seen)
    found, missing = weights_in(native / "lowered.onnx", tmp_path / "model.engine")
    assert found > 3 and "embedding.weight" not in missing


@rtx
def test_weight_that_is_not_in_the_engine(request_, native, tmp_path):
    build_engine(request_)
    _, before = weights_in(native / "lowered.onnx", tmp_path / "model.engine")
    plan = bytearray((tmp_path / "model.engine").read_bytes())
    table = [t for t in load(native / "lowered.onnx").tensors().values() if t.name == "embedding.weight"][0]
    where = plan.find(np.ascontiguousarray(read(table)).tobytes())
    plan[where + 5] ^= 1
    (tmp_path / "model.engine").write_bytes(plan)
    _, after = weights_in(native / "lowered.onnx", tmp_path / "model.engine")
    assert "embedding.weight" not in before and "embedding.weight" in after


@rtx
@plugins
@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["plain", "untied", "rank0", "planes2", "odd"])
def test_plugin_engine(name, state_dtype, tmp_path):
    write_step(tmp_path, name, state_dtype)
    files, engine = trt.build(tmp_path, builder="tensorrt-rtx", sm="86", max_batch=3, max_tokens=64)
    assert files == ["model.engine", trt.LIBRARY] and all((tmp_path / file).is_file() for file in files)
    step, prompt = engine["profiles"]
    assert step == {"min": [1, 1], "opt": [3, 1], "max": [3, 1], "logits": 1}
    assert prompt == {"min": [1, 1], "opt": [3, 64], "max": [3, 64], "logits": 64}
    memory, c = engine["memory"], student_ref.config(name)
    states = student_ref.zero_states(c, 3, state_dtype)
    assert memory["rows"] == 3 and memory["states"] == sum(state.nbytes for state in states.values())
    assert memory["logits"] == 3 * (1 + 64) * c.vocab_size * 4
    # Between the layers: at least what two of them hand on for 192 tokens.
    assert memory["activations"] > 3 * 64 * 4 * (c.d_in_proj + c.d_model)
    assert 10_000 < memory["weights"] < (tmp_path / "model.engine").stat().st_size
    assert memory["total"] == sum(memory[key] for key in ("weights", "states", "activations", "logits"))
    assert (engine["sm"], engine["lowering"], engine["builder"]) == ([86], "plugin", "tensorrt-rtx")
    assert (
        engine["weights"]["found"] > 5
        and not engine["weights"]["missing"]
        and engine["passes"]["words"] == 2 * student_ref.config(name).n_layer
    )


@rtx
@plugins
def test_plugin_engine_for_the_last_tokens_logits(tmp_path):
    write_step(tmp_path, "plain")
    _, engine = trt.build(tmp_path, builder="tensorrt-rtx", sm="86", max_tokens=64, max_logits=1)
    assert [profile["logits"] for profile in engine["profiles"]] == [1, 1]
    assert [profile["max"] for profile in engine["profiles"]] == [[1, 1], [1, 64]]


@rtx
@plugins
def test_embedded_plugins(tmp_path):
    write_step(tmp_path, "plain")
    files, engine = trt.build(tmp_path, sm="86,120", version_compatible=True, embed_plugins=True)
    assert files == ["model.engine"] and engine["embed_plugins"] and engine["sm"] == [86, 120]
    library = (tmp_path / trt.LIBRARY).read_bytes()
    assert library[:4096] in (tmp_path / "model.engine").read_bytes()


@rtx
def test_graph_that_does_not_parse(request_, native, tmp_path):
    graph = load(native / "lowered.onnx")
    graph.nodes[5].op = "NoSuchOp"
    for path in native.glob("*data"):
        (tmp_path / path.name).symlink_to(path)
    save(graph, tmp_path / "bad.onnx")
    with pytest.raises(DfssmError, match="tensorrt-rtx built no engine: the graph does not parse: .*node /layers.0/"):
        build_engine(replace(request_, model=str(tmp_path / "bad.onnx")))


@rtx
@plugins
def test_error_of_a_plugin_is_shown(tmp_path):
    write_step(tmp_path, "plain")
    lower(tmp_path / "model.onnx", tmp_path / "lowered.onnx", version=build_of(trt.find_library()).version)
    graph = load(tmp_path / "lowered.onnx")
    norm = next(node for node in graph.nodes if node.op == "RMSNorm")
    norm.inputs[1] = gs.Constant("wrong", np.ones(33, np.float32))
    save(graph, tmp_path / "lowered.onnx")
    engine, library = tmp_path / "model.engine", trt.find_library()
    words = r"the graph does not parse: RMSNorm '/norm_f': input 'weight' has shape \[33\]"
    with pytest.raises(DfssmError, match=words) as caught:
        build_engine(Request("tensorrt-rtx", str(tmp_path / "lowered.onnx"), str(engine), str(library), (86,), ()))
    assert "\n" not in str(caught.value)


@rtx
def test_library_that_is_none(request_, tmp_path):
    (tmp_path / "lib.so").write_text("text")
    with pytest.raises(DfssmError, match="lib.so does not load into TensorRT 1."):
        build_engine(replace(request_, library=str(tmp_path / "lib.so")))


ABORT = "import os, sys; sys.stdin.read(); print('terminate called after throwing', flush=True); os.abort()"
KILLED = "import os, signal, sys; sys.stdin.read(); os.kill(os.getpid(), signal.SIGKILL)"
NO_MEMORY = """
import json, sys
sys.stdin.read()
print(json.dumps({"log": ["error", "Requested amount of GPU memory could not be allocated: OutOfMemory"]}), flush=True)
print(json.dumps({"error": "buildSerializedNetwork: Error Code 2: OutOfMemory"}))
sys.exit(1)
"""
EXITS = "import sys; sys.stdin.read(); sys.exit(3)"


@pytest.mark.parametrize(
    "code, words",
    [
        (ABORT, "the builder was ended by SIGABRT; its last words: terminate called after throwing"),
        (KILLED, "out of memory (the system killed the builder): free some, or use a larger machine"),
        (NO_MEMORY, "out of memory (buildSerializedNetwork: Error Code 2: OutOfMemory): free some"),
        (EXITS, "the builder exited with 3; its last words: none"),
        ("import sys; print('null', 5, [1], sep='\\n'); sys.stdin.read(); sys.exit(3)", "3; its last words: [1]"),
    ],
)
def test_ends_of_the_process(code, words, request_, monkeypatch):
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **keywords: popen([sys.executable, "-c", code], **keywords)
    )
    with pytest.raises(DfssmError) as caught:
        build_engine(request_)
    assert str(caught.value) == f"tensorrt-rtx built no engine: {words}" or words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_libraries_get_their_unversioned_names(tmp_path, monkeypatch):
    (tmp_path / "wheel").mkdir()
    (tmp_path / "links").mkdir()
    for name in ("libtensorrt_rtx.so.1", "libother.so", "notes.txt"):
        (tmp_path / "wheel" / name).touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "wheel")])
    monkeypatch.setattr(trt_child, "find_spec", lambda name: spec if name == "tensorrt_rtx_libs" else None)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine")
    environment = trt_child._environment("tensorrt-rtx", tmp_path / "links")
    assert environment["LD_LIBRARY_PATH"] == f"{tmp_path / 'links'}:/mine"
    assert [path.name for path in (tmp_path / "links").iterdir()] == ["libtensorrt_rtx.so"]
    monkeypatch.delenv("LD_LIBRARY_PATH")
    assert trt_child._environment("tensorrt", tmp_path / "links")["LD_LIBRARY_PATH"] == str(tmp_path / "links")


class Recorder:
    """Stands for any TensorRT object: remembers what was called on it and set."""

    def __init__(self, **answers):
        self.__dict__.update(answers, calls=[])

    def __getattr__(self, name):
        return lambda *args, **kw: self.calls.append((name, *args))


def fake_tensorrt(flags: dict, config: Recorder, builder: Recorder) -> SimpleNamespace:
    """A `tensorrt` with these flags: 10.x has STRONGLY_TYPED, 11 has strongly typed networks only and no such flag."""
    shape = SimpleNamespace(name="input_ids", shape=(-1, -1))
    state, logits = SimpleNamespace(name="ssm_state.0", shape=(-1, 4, 8, 16)), SimpleNamespace(name="logits")
    places = SimpleNamespace(name="logits_at", shape=(-1,))
    network = SimpleNamespace(
        num_inputs=3,
        num_outputs=1,
        num_layers=7,
        get_input=lambda i: (shape, places, state)[i],
        get_output=lambda i: logits,
    )
    profile = Recorder()

    def build_serialized_network(network, config):
        for size in (10, 20):
            builder.log.log(3, f"Total Activation Memory: {size} bytes")
        builder.log.log(3, "Total Weights Memory: 70 bytes")
        return b"plan"

    builder.__dict__ |= {
        "create_network": lambda bits: builder.calls.append(("create_network", bits)) or network,
        "tensors": (shape, places, state, logits),
        "shapes": profile.calls,
        "create_builder_config": lambda: config,
        "create_optimization_profile": lambda: profile,
        "build_serialized_network": build_serialized_network,
    }
    severity = SimpleNamespace(ERROR=1, WARNING=2)
    return SimpleNamespace(
        __version__="11.0.0",
        ILogger=type("ILogger", (), {"Severity": severity}),
        Builder=lambda log: builder.__dict__.update(log=log) or builder,
        OnnxParser=lambda network, log: SimpleNamespace(parse_from_file=lambda path: True),
        NetworkDefinitionCreationFlag=SimpleNamespace(**flags),
        BuilderFlag=SimpleNamespace(VERSION_COMPATIBLE="VC", STRIP_PLAN="SP", TF32="TF32"),
        TensorFormat=SimpleNamespace(LINEAR=0),
        HardwareCompatibilityLevel=SimpleNamespace(AMPERE_PLUS="ampere"),
        get_plugin_registry=lambda: SimpleNamespace(load_library=lambda path: "handle"),
    )


@pytest.mark.parametrize("flags, bits", [({"STRONGLY_TYPED": 1}, 2), ({}, 0)])
def test_what_versions_of_tensorrt_differ_in(flags, bits, tmp_path):
    """A flag or a monitor that a version lacks is not asked for; all else is set the same."""
    cache = Recorder()
    cache.serialize = lambda: b"timings"
    config, builder = Recorder(), Recorder()
    config.__dict__ |= {
        "create_timing_cache": lambda data: data,
        "set_timing_cache": lambda cache, ignore_mismatch: True,
        "get_timing_cache": lambda: cache,
    }
    engine, timings = tmp_path / "model.engine", tmp_path / "timings"
    request = Request(
        *("tensorrt", "lowered.onnx", str(engine), "lib.so", (), ((2, 1, 1, 1), (2, 64, 64, 9)), str(timings)),
        version_compatible=True, hardware_compatible=True, embed_plugins=True,
    )  # fmt: skip
    fake = fake_tensorrt(flags, config, builder)
    built = trt_build.build(fake, request)
    assert engine.read_bytes() == b"plan" and timings.read_bytes() == b"timings"
    assert ("create_network", bits) in builder.calls
    assert ("set_flag", "VC") in config.calls and ("set_flag", "SP") not in config.calls
    assert ("clear_flag", "TF32") in config.calls
    assert [tensor.allowed_formats for tensor in builder.tensors] == [1, 1, 1, 1]
    assert config.hardware_compatibility_level == "ampere" and config.plugins_to_serialize == ["lib.so"]
    assert [(profile["max"], profile["logits"]) for profile in built["profiles"]] == [([2, 1], 1), ([2, 64], 9)]
    assert [call[1] for call in builder.shapes if call[1] == "logits_at"] == ["logits_at"] * 2
    assert [call[2:] for call in builder.shapes if call[1] == "logits_at"] == [([1], [1], [1]), ([1], [1], [9])]
    assert built["memory"] == {"weights": 70, "activations": 20}  # of the profile that takes most
    assert not hasattr(fake, "ComputeCapability") and trt_build.known_sms(fake) == []


def test_flag_that_a_version_lacks(tmp_path):
    config = Recorder()
    fake = fake_tensorrt({}, config, Recorder())
    del fake.BuilderFlag.STRIP_PLAN
    request = Request("tensorrt", "x", str(tmp_path / "e"), "", (), ((1, 1, 1, 1),), strip_weights=True)
    with pytest.raises(BuildError, match="TensorRT 11.0.0 has no STRIP_PLAN"):
        trt_build.build(fake, request)


def test_request_travels_whole():
    request = Request("tensorrt", "m", "e", "l", (86, 89), ((1, 1, 1, 1), (2, 64, 64, 9)), "t", True, True, True, True)
    document = json.loads(request.to_json())
    again = Request(**document)
    assert again.to_json() == request.to_json() and document["sm"] == [86, 89]


@rtx
@plugins
def test_bundle_of_the_tiny_student(tmp_path):
    """tests/tiny.py makes bundles of any target by the same interface; without --sm, for all GPUs that there may be."""
    engine = read_manifest(tiny.write_bundle(tmp_path / "b", target="trt")).engine
    build = build_of(trt.find_library())
    assert engine["plugins"] == {"version": build.version, "sm": list(build.sm), "cuda": build.cuda}
    assert engine["sm"] == [sm for sm in trt_build.known_sms(import_module("tensorrt_rtx")) if build.runs_on(sm)]


@rtx
@plugins
def test_what_is_not_fused_is_in_the_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr("dfssm.targets.trt_lowering.fuse.MOST_COLUMNS", 32)
    write_step(tmp_path, "plain")
    _, engine = trt.build(tmp_path, sm="86")
    wide = [f"/layers.{i}/out_proj" for i in range(student_ref.config("plain").n_layer)]
    assert list(engine["refused"]["fuse"]) == wide and engine["passes"]["fuse"] == len(wide)
    assert engine["refused"]["fuse"][wide[0]] == (
        "GatedRMSNorm /layers.0/gated_norm has 64 columns, shared memory holds 32"
    )
