"""The schema's checks: what passes binds symbols, what does not is named."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from each import check_each

from dfssm.base import DfssmError
from dfssm.opset import OPS, header
from dfssm.opset.cases import Case, cases
from dfssm.opset.header import render
from dfssm.opset.ops import FUSED


@pytest.mark.parametrize("op", OPS)
def test_case_table_covers_every_op_with_unique_cases(op):
    ids = [case.id for case in cases(op)]
    assert len(ids) == len(set(ids)) >= 6
    assert {case.sizes["T"] for case in cases(op)} > {1}, "decode and prefill"


@pytest.mark.parametrize("op", OPS)
def test_sizes_are_bound_from_the_tensors(op):
    def check(case):
        bound = OPS[op].check(case.inputs(), case.attributes)
        assert {k: v for k, v in case.sizes.items() if k != "state"}.items() <= bound.items()

    check_each(cases(op), check)


def scaffold_inputs():
    return cases("BinaryScaffoldMatMul")[3].inputs()  # B=1 T=1 K=256 M=40 R=16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "input 'x' is missing"),
        ({"x": np.zeros((1, 1, 256))}, "input 'x' has dtype float64, expected float32"),
        ({"x": np.zeros((1, 256), np.float32)}, r"input 'x' has shape \[1, 256\], expected \[B, T, K\]"),
        (
            {"down": np.zeros((16, 255), np.int8)},
            r"input 'down' has shape \[16, 255\], expected \[R=16, K=256\]",
        ),
        ({"bits": np.zeros((40, 31), np.uint8)}, r"'bits' has shape \[40, 31\], expected \[Mp=40, K / 8 = 32\]"),
        ({"up_scale": np.zeros(41, np.float32)}, r"'up_scale' has shape \[41\], expected \[M=40\]"),
    ],
)
def test_wrong_input_is_named_with_expected_and_got(change, message):
    with pytest.raises(DfssmError, match=message):
        OPS["BinaryScaffoldMatMul"].check(scaffold_inputs() | change)


SCAN = Case("SelectiveScanStep", dict(B=1, T=2, H=4, P=8, N=6), {"ngroups": 2, "x_start": 3, "dt_start": 3})


@pytest.mark.parametrize(
    ("change", "attributes", "message"),
    [
        ({}, {"dt_start": 4}, "input 'dt' has shape [1, 2, 7], expected [B=1, T=2, >= dt_start=4 + H=4]"),
        ({}, {"x_start": 4}, "input 'x' has shape [1, 2, 35], expected [B=1, T=2, >= x_start=4 + H * P = 32]"),
        ({}, {"B_start": 1}, "input 'B' has shape [1, 2, 12], expected [B=1, T=2, >= B_start=1 + ngroups * N = 12]"),
        ({}, {"x_start": -1}, "input 'x' has shape [1, 2, 35], expected [B=1, T=2, H * P = 32]"),
        ({}, {"C_start": -2}, "attribute 'C_start' is -2, expected at least -1"),
        ({"dt": np.zeros((1, 1, 7), np.float32)}, {}, "input 'dt' has shape [1, 1, 7], expected [B=1, T=2, >= dt_"),
        ({"dt": np.zeros((1, 7), np.float32)}, {}, "input 'dt' has shape [1, 7], expected [B, T, >= dt_start=3 + H]"),
    ],
)
def test_a_range_of_columns_must_fit(change, attributes, message):
    inputs = SCAN.inputs()
    assert OPS[SCAN.op].check(inputs, SCAN.attributes)["H"] == 4
    with pytest.raises(DfssmError, match=f"^{re.escape(f'SelectiveScanStep: {message}')}"):
        OPS[SCAN.op].check(inputs | change, SCAN.attributes | attributes)


def test_a_wider_tensor_is_an_error_without_a_start():
    for op, wide in (("CausalConv1dStep", "x"), ("GatedRMSNorm", "z")):
        inputs = cases(op)[4].inputs()
        inputs[wide] = np.concatenate([inputs[wide]] * 2, axis=-1)
        with pytest.raises(DfssmError, match=f"^{op}: input"):
            OPS[op].check(inputs)
        OPS[op].check(inputs, {f"{wide}_start": 1})


def test_row16_layout_expects_padded_rows():
    with pytest.raises(DfssmError, match=r"'bits' has shape \[40, 32\], expected \[Mp=48, K / 8 = 32\]"):
        OPS["BinaryScaffoldMatMul"].check(scaffold_inputs(), {"layout": 1})


def test_wrong_attributes_and_requirements():
    with pytest.raises(DfssmError, match="unknown attribute 'plane'"):
        OPS["BinaryScaffoldMatMul"].resolve({"plane": 2})
    with pytest.raises(DfssmError, match="attribute 'activation' is 'relu', expected 'silu' or 'none'"):
        OPS["CausalConv1dStep"].resolve({"activation": "relu"})
    x, one = np.zeros((1, 1, 8), np.float32), np.ones(8, np.float32)
    with pytest.raises(DfssmError, match=r"GatedRMSNorm: input 'y' has C=8, expected a multiple of groups=3"):
        OPS["GatedRMSNorm"].check({"y": x, "z": x, "weight": one}, {"groups": 3})


def test_header_names_every_op_and_input():
    text = render()
    for op in (OPS | FUSED).values():
        struct = text[text.index(f"struct {op.name} {{") :].partition("\n};\n")[0]
        assert all(f'{{"{t.name}", ' in struct for t in (*op.inputs, *op.outputs))
        assert all(f" {a.name} = " in struct and f'visitor("{a.name}"' in struct for a in op.attributes)
        assert f"int64_t {', '.join(op.symbols)};" in struct
    assert "float dt_max = HUGE_VALF;" in text and "kTileRows[] = {1, 16" in text


def test_the_build_makes_the_same_header_without_numpy(tmp_path):
    """As CMake does: the script alone, before anything is installed."""
    script, out = Path(header.__file__).resolve(), tmp_path / "opset.h"
    done = subprocess.run([sys.executable, "-S", "-E", script, out], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert out.read_text() == render()
