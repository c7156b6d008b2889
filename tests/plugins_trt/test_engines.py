"""The plugin library in a real TensorRT: TensorRT-RTX, which builds engines without a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from each import check_each
from onnx import TensorProto
from plugins_trt import engines, fused, lowered
from trt_graphs import DEMO, write_step

from dfssm.model.checkpoint import load_student_tensors
from dfssm.opset.cases import Case
from dfssm.targets import trt_child
from dfssm.targets.trt_lowering import lower
from dfssm.targets.trt_plugins import FUSED, PLUGINS

OWN = {"SelectiveScanStep": {"int8_state"}, "Int8MatMul": {"w_words"}}
"""Fields that only the plugins have: see plugins/trt/<op>/plugin.cpp."""

GOOD = {case.id: case for case in [case for case in lowered.CANONICAL if case.kind == "normal"][::2]}
"""Every other case: half of them are enough for shapes and types, and an engine takes 0.1 s."""


FUSED_GOOD = {case.id: case for case in fused.CASES}


def one(op: str, **sizes) -> Case:
    return next(c for c in lowered.CANONICAL if c.op == op and sizes.items() <= c.sizes.items())


def changed(case: Case, name: str, shape=None, dtype=None) -> dict[str, np.ndarray]:
    inputs = lowered.lowered_inputs(case)
    value = inputs[name]
    return inputs | {name: np.ones(value.shape if shape is None else shape, dtype or value.dtype)}


def of_bfloat16(case: Case) -> onnx.ModelProto:
    model = lowered.node_model(case)
    for tensor in model.graph.input:
        if tensor.name in lowered.TOKENS:
            tensor.type.tensor_type.elem_type = TensorProto.BFLOAT16
    return model


def wrong() -> dict[str, tuple]:
    """What is wrong -> (model, what our plugin says)."""
    scaffold, head = one("BinaryScaffoldMatMul", T=2), one("Int8MatMul", T=2)
    conv, scan = one("CausalConv1dStep", T=2, W=4), one("SelectiveScanStep", T=2)
    model = lowered.node_model
    return {
        "bits as bytes": (
            model(scaffold, scaffold.inputs()),
            "BinaryScaffoldMatMul '/the/node': input 'bits' has shape [17, 20], expected [Mp=17, K / 32 = 5]",
        ),
        "rank": (
            model(scaffold, changed(scaffold, "scale", (1, 17))),
            "BinaryScaffoldMatMul '/the/node': input 'scale' has shape [1, 17], expected [M]",
        ),
        "columns": (
            model(scaffold, changed(scaffold, "x", (1, 2, 144))),
            "BinaryScaffoldMatMul '/the/node': input 'x' has K=144, expected a multiple of 32",
        ),
        "rows": (
            model(head, changed(head, "w", (9, 64))),
            "Int8MatMul '/the/node': input 'w_scale' has shape [8], expected [M=9]",
        ),
        "weights of another type": (
            model(head, changed(head, "w_scale", dtype=np.float16)),
            "Int8MatMul '/the/node': input 'w_scale' has dtype float16, expected float32",
        ),
        "activations of bfloat16": (
            of_bfloat16(conv),
            "CausalConv1dStep '/the/node': input 'x' has dtype bfloat16, expected float32 or float16",
        ),
        "activations of another type": (
            model(scan, changed(scan, "dt", dtype=np.float16)),
            "SelectiveScanStep '/the/node': input 'dt' has dtype float16, expected that of 'x', float32",
        ),
        "state of another type": (
            model(conv, changed(conv, "state", dtype=np.float16)),
            "CausalConv1dStep '/the/node': input 'state' has dtype float16, expected float32",
        ),
        "attribute": (
            model(conv, activation="gelu"),
            "CausalConv1dStep '/the/node': attribute 'activation' is 'gelu', expected 'silu' or 'none'",
        ),
        "attribute of another type": (
            model(conv, activation=1),
            "CausalConv1dStep '/the/node': attribute 'activation' is not a string",
        ),
        "two where one is due": (
            model(one("GatedRMSNorm"), groups=[1, 2]),
            "GatedRMSNorm '/the/node': attribute 'groups' is not an integer",
        ),
        "int8 state not declared": (
            model(one("SelectiveScanStep", T=2, state="int8"), int8_state=0),
            "SelectiveScanStep '/the/node': 9 inputs and 2 outputs, expected 8 and 2",
        ),
        "columns of a wide tensor": (
            model(conv, x_start=1),
            "CausalConv1dStep '/the/node': input 'x' has shape [?, ?, 40], expected [B, T, >= x_start=1 + C=40]",
        ),
    }


def variants() -> dict:
    """Good models beside the case table: activations of 16 bits, defaults left out, a head of int32 words."""
    models = {}
    for op in PLUGINS:
        if op in FUSED:
            case, source = next(c for c in fused.CASES if c.op == op), fused
        else:
            case, source = one(op, T=7 if "Norm" in op else 2), lowered
        inputs = source.lowered_inputs(case)
        half = {k: v.astype(np.float16) if k in lowered.TOKENS else v for k, v in inputs.items()}
        models[f"{op} half"] = source.node_model(case, half)
        models[f"{op} defaults"] = source.node_model(case, **{name: None for name in PLUGINS[op].defaults})
    head = one("Int8MatMul", T=2)
    inputs = lowered.lowered_inputs(head)
    models["head of words"] = lowered.node_model(head, inputs | {"w": inputs["w"].view(np.int32)}, w_words=1)
    return models


def student(folder, name: str) -> onnx.ModelProto:
    """A whole model, lowered."""
    write_step(folder, name)
    lower(folder / "model.onnx", folder / "lowered.onnx", version=engines.version())
    return onnx.load(folder / "lowered.onnx")


def of_one_token(model: onnx.ModelProto) -> onnx.ModelProto:
    """For one row and one token alone."""
    for tensor in model.graph.input:
        for dim in tensor.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = 1
    return model


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    if reason := engines.missing():
        pytest.skip(reason)
    models = {name: lowered.node_model(case) for name, case in GOOD.items()}
    models |= {name: fused.node_model(case) for name, case in FUSED_GOOD.items()}
    models["student"] = student(tmp_path_factory.mktemp("student"), "plain")
    models["demo, a token"] = of_one_token(student(tmp_path_factory.mktemp("demo"), "demo"))
    models |= VARIANTS | {name: model for name, (model, _) in WRONG.items()}
    mine = tmp_path_factory.getbasetemp()  # under xdist one folder a worker, side by side
    return engines.build(models, (mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "engines")


def test_library_shows_four_symbols_and_needs_neither_tensorrt_nor_a_driver():
    if not (library := engines.library()):
        pytest.skip(engines.NO_LIBRARY)
    symbols = subprocess.check_output(["nm", "-D", "--defined-only", library], text=True).splitlines()
    names = ["dfssm_largest", "dfssm_total_weight", "getCreators", "setLoggerFinder"]
    assert [line.split()[-1] for line in symbols] == names
    needed = re.findall(r"NEEDED.*\[(.*)\]", subprocess.check_output(["readelf", "-d", library], text=True))
    assert needed and not [name for name in needed if re.search("nvinfer|tensorrt|cuda", name)]


def test_registry(built):
    creators = built[1]
    assert set(creators) == set(PLUGINS)
    kinds = {int: "INT32", float: "FLOAT32", str: "CHAR"}
    for op, fields in creators.items():
        schema = {name: kinds[type(default)] for name, default in PLUGINS[op].defaults.items()}
        assert schema.items() <= fields.items()
        assert set(fields) - set(schema) == OWN.get(op, set())


VARIANTS = variants()
WRONG = wrong()


@pytest.mark.parametrize("op", PLUGINS)
def test_engine(built, op):
    """The engine is the plugin and nothing that computes or copies, whether activations or a state."""

    def check(name):
        engine = built[0][name]
        assert not engine.errors
        assert engine.size
        assert [kind for _, kind, _ in engine.layers] == ["shape_call", "custom_layer"]  # the former is host code
        assert engine.layers[1][0].startswith("/the/node")
        # What the runtime makes the plugin from.
        assert set(engine.embedded) >= set(built[1][op])

    cases = [name for name, case in (GOOD | FUSED_GOOD).items() if case.op == op]
    check_each([*cases, *(name for name, model in VARIANTS.items() if model.graph.node[0].op_type == op)], check, str)


def test_layers_of_a_student(built):
    """Three plugins a layer and nothing between them; before them the embedding, after them norm and head."""
    engine = built[0]["student"]
    assert not engine.errors
    computing = [(name, kind) for name, kind, _ in engine.layers if kind not in ("Constant", "shape_call")]
    names = [re.sub(r"_myl\d+_\d+$", "", name) for name, _ in computing]
    first = names.index("/layers.0/in_proj")
    wanted = [f"/layers.{layer}/{part}" for layer in range(2) for part in ("in_proj", "scan", "out_proj")]
    assert names[first : first + len(wanted)] == wanted
    assert {kind for _, kind in computing[:first]} == {"kgen"}
    *between, norm, head = computing[first + len(wanted) :]
    assert [kind for _, kind in between] == ["kgen"]  # the tokens whose logits are wanted
    assert norm[0].startswith("/norm_f") and head[0].startswith("/lm_head")


def test_a_step_is_one_region_that_copies_nothing(built):
    """Neither the embedding's table, which a tied head reads too, nor a state: the memory between layers holds none."""
    engine = built[0]["demo, a token"]
    assert not engine.errors and not engine.copies
    layers = ["custom_layer"] * 6 * 3
    assert [kind for _, kind, _ in engine.layers] == ["kgen", *layers, "kgen", *["custom_layer"] * 2]
    config, _ = load_student_tensors(DEMO)
    state = config.nheads * config.d_state * config.headdim * 2
    assert 0 < engine.activations < min(state, config.vocab_size * config.d_model)


KINDS = {"half": "HALF"}


def test_output_types(built):
    """Activations as they came in, logits fp32, states as they are stored."""

    def check(name):
        case = GOOD.get(name) or one(VARIANTS[name].graph.node[0].op_type)
        state = {"float16": "HALF", "int8": "INT8"}.get(case.state_dtype, "FLOAT")
        made = {"new_state": state, "new_state_scale": "FLOAT"}
        activations = "FLOAT" if case.op == "Int8MatMul" else KINDS.get(name.split()[-1], "FLOAT")
        for output, dtype in built[0][name].outputs:
            assert dtype == made.get(output, activations)

    check_each([*GOOD, *(name for name in VARIANTS if name.split()[0] not in FUSED)], check, str)


@pytest.mark.parametrize("op", ["BinaryScaffoldMatMul", "Int8MatMul"])
def test_workspace_is_for_the_largest_shapes(built, kernels, op):
    def check(case):
        n, sizes = engines.MAX_BATCH * engines.MAX_TOKENS, case.sizes
        if op == "Int8MatMul":
            wanted = kernels.sized("dfssm_trt_int8_workspace", n, sizes["K"])
        else:
            wanted = kernels.sized("dfssm_trt_scaffold_workspace", n, sizes["K"], sizes["M"], sizes["R"])
        assert wanted <= built[0][case.id].scratch < wanted + 1024  # the builder rounds up

    check_each([case for case in GOOD.values() if case.op == op], check)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.split()[0] in FUSED])
def test_output_types_of_the_fused(built, name):
    """Activations as they came in; the state of the convolution is fp32."""
    activations = KINDS.get(name.split()[-1], "FLOAT")
    for output, dtype in built[0][name].outputs:
        assert dtype == ("FLOAT" if output == "new_state" else activations)


@pytest.mark.parametrize("op", FUSED)
def test_workspace_of_the_fused(built, kernels, op):
    """For the largest shapes."""

    def check(case):
        n = engines.MAX_BATCH * engines.MAX_TOKENS
        wanted = kernels.sized("dfssm_trt_scaffold_workspace", n, *(case.sizes[key] for key in "KMR"))
        assert wanted <= built[0][case.id].scratch < wanted + 1024  # the builder rounds up

    check_each([case for case in FUSED_GOOD.values() if case.op == op], check)


def test_the_script_of_the_documents_gives_polygraphy_the_plugins(built, tmp_path):
    """docs/trt.md's with_plugins.py; to convert is what needs no GPU."""
    text = (Path(__file__).parents[2] / "docs" / "trt.md").read_text()
    (script,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "load_library" in block)
    (tmp_path / "with_plugins.py").write_text(script)
    student(tmp_path / "student", "plain")
    links = trt_child._environment("tensorrt-rtx", tmp_path)  # the parser wants them, see engines.py
    command = [sys.executable, "with_plugins.py", engines.library(), "convert", "student/lowered.onnx", "--convert-to"]
    command += ["trt", "--strongly-typed", "-o", "out.engine"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=links)
    assert done.returncode == 0 and (tmp_path / "out.engine").stat().st_size, done.stdout[-2000:] + done.stderr


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(built, name):
    engine = built[0][name]
    assert not engine.size
    assert WRONG[name][1] in engine.errors
