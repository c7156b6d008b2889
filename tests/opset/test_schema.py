"""The schema's checks: what passes binds symbols, what does not is named."""

import numpy as np
import pytest

from dfssm.opset import OPS, DfssmError
from dfssm.opset.cases import CASES, cases
from dfssm.opset.header import render


@pytest.mark.parametrize("op", OPS)
def test_case_table_covers_every_op_with_unique_cases(op):
    ids = [case.id for case in cases(op)]
    assert len(ids) == len(set(ids)) >= 6
    assert {case.sizes["T"] for case in cases(op)} > {1}, "decode and prefill"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_sizes_are_bound_from_the_tensors(case):
    bound = OPS[case.op].check(case.inputs(), case.attributes)
    assert {k: v for k, v in case.sizes.items() if k != "state"}.items() <= bound.items()


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
        ({"bits": np.zeros((40, 31), np.uint8)}, r"'bits' has shape \[40, 31\], expected \[40, 32\]"),
        ({"up_scale": np.zeros(41, np.float32)}, r"'up_scale' has shape \[41\], expected \[M=40\]"),
    ],
)
def test_wrong_input_is_named_with_expected_and_got(change, message):
    with pytest.raises(DfssmError, match=message):
        OPS["BinaryScaffoldMatMul"].check(scaffold_inputs() | change)


def test_row16_layout_expects_padded_rows():
    with pytest.raises(DfssmError, match=r"'bits' has shape \[40, 32\], expected \[48, 32\]"):
        OPS["BinaryScaffoldMatMul"].check(scaffold_inputs(), {"layout": 1})


def test_wrong_attributes_and_requirements():
    with pytest.raises(DfssmError, match="unknown attribute 'plane'"):
        OPS["BinaryScaffoldMatMul"].resolve({"plane": 2})
    with pytest.raises(DfssmError, match="attribute 'activation' is 'relu', expected one of"):
        OPS["CausalConv1dStep"].resolve({"activation": "relu"})
    x, one = np.zeros((1, 1, 8), np.float32), np.ones(8, np.float32)
    with pytest.raises(DfssmError, match=r"GatedRMSNorm: .* multiple of groups \(got C=8, groups=3\)"):
        OPS["GatedRMSNorm"].check({"y": x, "z": x, "weight": one}, {"groups": 3})


def test_header_names_every_op_and_input():
    text = render()
    for op in OPS.values():
        assert f"struct {op.name} {{" in text
        assert all(f'"{t.name}"' in text for t in (*op.inputs, *op.outputs))
        assert all(f"kDefault_{a.name} = " in text for a in op.attributes)
    assert "kDefault_dt_max = HUGE_VALF;" in text
