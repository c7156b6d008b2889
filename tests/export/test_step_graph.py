"""The step graph: valid and fully typed for the ONNX tools, named as the contract says, and equal to the reference."""

import json

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import student_ref
import tiny
from onnx.reference import ReferenceEvaluator

from dfssm.export.graph import FORMAT_VERSION, build_step_graph
from dfssm.export.writer import PAGE, write_model
from dfssm.opset import OPS, layouts
from dfssm.opset.ops import IN_PLACE_OF
from dfssm.opset.schema import STATE_DTYPES
from dfssm.opset.tolerances import model_tolerance
from dfssm.targets import get_target

LAYOUTS = {layout.name: value for value, layout in layouts.LAYOUTS.items()}


STATES = [*STATE_DTYPES, "int8-deferred"]


def write(folder, config, state_dtype="fp32", layout="canonical"):
    value = LAYOUTS[layout]
    target = get_target("onnx" if value == layouts.LAYOUT_CANONICAL else "ort-cpu")
    model = build_step_graph(config, target.lower(tiny.tensors(config), value), state_dtype=state_dtype, layout=value)
    return write_model(model, folder / "model.onnx") and folder / "model.onnx"


def stock_session(path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(runner, ids, states, **extra) -> tuple[np.ndarray, dict]:
    """Logits and new states by name, from an InferenceSession or a ReferenceEvaluator."""
    logits, *new = runner.run(None, {"input_ids": ids, **states, **extra})
    return logits, dict(zip(states, new, strict=True))


def ids_of(config, batch, tokens):
    return np.random.default_rng(7).integers(0, config.vocab_size, (batch, tokens))


def assert_close(config, actual, expected, state_dtype="fp32"):
    """Logits and states of two backends. The activations' own rounding bounds both; the state's comes on top."""
    tolerance = model_tolerance(config.n_layer, config.d_model)
    tolerance.check(actual[0], expected[0], "logits")
    for name, want in expected[1].items():
        got = actual[1][name]
        assert got.dtype == want.dtype, name
        if want.dtype == np.int8:  # compared as what it stands for: q alone says nothing when the scale moved
            scale = name.replace("ssm_state", "ssm_scale")
            got, want = (q * states[scale][..., None] for q, states in ((got, actual[1]), (want, expected[1])))
        tolerance.check(np.asarray(got, np.float32), np.asarray(want, np.float32), name)


@pytest.mark.parametrize("name", student_ref.CONFIGS)
@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_valid_typed_and_named(name, state_dtype, layout, tmp_path):
    config = student_ref.config(name)
    path = write(tmp_path, config, state_dtype, layout)
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    typed = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)

    graph = typed.graph
    values = {v.name: v.type.tensor_type for v in (*graph.value_info, *graph.input, *graph.output)}
    for node in graph.node:
        for output in node.output:
            assert output in values, f"{output} has no type"
            assert all(d.dim_param or d.dim_value > 0 for d in values[output].shape.dim), f"{output} has no full shape"

    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    parts = "norm in_proj conv scan gated_norm out_proj residual".split()
    expected = [f"/layers.{i}/{part}" for i in range(config.n_layer) for part in parts]
    assert [n for n in names if n.startswith("/layers")] == expected
    assert names[-2:] == ["/norm_f", "/lm_head"]

    per_layer = ["conv_state", "ssm_state"]
    if state_dtype.endswith("-deferred"):
        per_layer += ["pending_x", "pending_B", "pending_decay", "pending_count"]
    if state_dtype.startswith("int8"):
        per_layer += ["ssm_scale"]
    states = [(part, i) for i in range(config.n_layer) for part in per_layer]
    assert [v.name for v in graph.input] == ["input_ids", "logits_to_keep", *(f"{p}.{i}" for p, i in states)]
    assert [v.name for v in graph.output] == ["logits", *(f"{p}_out.{i}" for p, i in states)]
    assert set(tiny.tensors(config)) <= {t.name for t in graph.initializer}
    form = IN_PLACE_OF if state_dtype.endswith("-deferred") else {}
    assert {f.name for f in model.functions} == {form.get(op, op) for op in OPS}
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 21), ("ai.dfssm", 1)]
    assert model.ir_version == 10

    properties = {p.key: p.value for p in model.metadata_props}
    assert properties["dfssm.format_version"] == str(FORMAT_VERSION)
    assert type(config).from_dict(json.loads(properties["dfssm.config"])) == config


@pytest.mark.parametrize("name", student_ref.CONFIGS)
@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bodies_equal_reference(name, state_dtype, layout, tmp_path):
    """ONNX's own evaluator and stock ONNX Runtime, which run the function bodies, against the NumPy student."""
    config = student_ref.config(name)
    path = write(tmp_path, config, state_dtype, layout)
    ids, states = ids_of(config, 2, 5), student_ref.zero_states(config, 2, state_dtype)
    tensors = tiny.tensors(config)
    before = student_ref.step(config, tensors, ids, states)[1]
    expected = student_ref.step(config, tensors, ids, before)
    for runner in (ReferenceEvaluator(onnx.load(path)), stock_session(path)):
        assert_close(config, run(runner, ids, before), expected, state_dtype)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_batch_and_tokens_are_free(batch, tokens, tmp_path):
    config = student_ref.config("plain")
    session = stock_session(write(tmp_path, config))
    ids, states = ids_of(config, batch, tokens), student_ref.zero_states(config, batch, "fp32")
    expected = student_ref.step(config, tiny.tensors(config), ids, states)
    assert_close(config, run(session, ids, states), expected)


@pytest.mark.parametrize("name", ["plain", "groups", "odd"])
def test_prefill_equals_steps(name, tmp_path):
    config = student_ref.config(name)
    session = stock_session(write(tmp_path, config))
    ids, states = ids_of(config, 2, 64), student_ref.zero_states(config, 2, "fp32")
    prefill = run(session, ids, states)
    logits = []
    for t in range(ids.shape[1]):
        step_logits, states = run(session, ids[:, t : t + 1], states)
        logits.append(step_logits)
    assert_close(config, (np.concatenate(logits, axis=1), states), prefill)


@pytest.mark.parametrize("keep", [0, 1, 3, 7, 100])
def test_logits_to_keep(keep, tmp_path):
    config = student_ref.config("plain")
    session = stock_session(write(tmp_path, config))
    ids, states = ids_of(config, 2, 7), student_ref.zero_states(config, 2, "fp32")
    full, full_states = run(session, ids, states)
    kept, kept_states = run(session, ids, states, logits_to_keep=np.array(keep))
    np.testing.assert_array_equal(kept, full[:, -keep:])
    for name, state in full_states.items():
        np.testing.assert_array_equal(kept_states[name], state)


def test_data_file_is_mappable_and_shared(tmp_path):
    """Weights start on pages, and the tied head is the embedding's initialiser, not a copy."""
    config = student_ref.config("plain")
    model = onnx.load(write(tmp_path, config), load_external_data=False)
    entries = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data]
    assert entries
    assert all(int(e["offset"]) % PAGE == 0 and e["location"] == "model.onnx.data" for e in entries)
    assert model.graph.node[-1].input[1] == model.graph.node[0].input[0] == "embedding.weight"
    tensors = sum(array.nbytes for array in tiny.tensors(config).values())
    assert (tmp_path / "model.onnx.data").stat().st_size <= tensors + PAGE * len(entries)


def test_bytes_are_reproducible(tmp_path):
    config = student_ref.config("plain")
    files = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        path = write(folder, config, "int8", "row16")
        files.append((path.read_bytes(), (folder / "model.onnx.data").read_bytes()))
    assert files[0] == files[1]


def test_weights_are_read_one_at_a_time(tmp_path):
    """Each tensor is asked for when it is written and not before: a model larger than memory can be exported."""
    config = student_ref.config("plain")
    read = []

    class Lazy:
        def __init__(self, name, array):
            self.name, self.array = name, array
            self.shape, self.dtype = array.shape, array.dtype

        def __array__(self, dtype=None, copy=None):
            read.append(self.name)
            return self.array

    tensors = {name: Lazy(name, array) for name, array in tiny.tensors(config).items()}
    model = build_step_graph(config, tensors)
    assert not read
    seen = []
    write_model(model, tmp_path / "model.onnx", lambda done, total: seen.append((done, total)))
    assert sorted(read) == sorted(tensors)
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))] and len(seen) > 10
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]  # no draft of one


def test_missing_tensor_is_named():
    config = student_ref.config("plain")
    tensors = tiny.tensors(config)
    del tensors["layers.1.out_proj.up"]
    with pytest.raises(KeyError, match="layers.1.out_proj.up"):
        build_step_graph(config, tensors)


def test_graph_is_an_onnx_ir_model():
    """The graph can be changed with onnx-ir before it is written, for a pass of one's own."""
    config = student_ref.config("plain")
    model = build_step_graph(config, tiny.tensors(config))
    assert isinstance(model, onnx_ir.Model)
    assert [n.name for n in model.graph if n.op_type == "SelectiveScanStep"] == ["/layers.0/scan", "/layers.1/scan"]
