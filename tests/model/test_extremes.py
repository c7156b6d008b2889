"""NaN, infinities and the ends of fp32 through the torch arithmetic."""

import extremes
import numpy as np
import pytest
import torch
from each import check_each

from dfssm.model import functional, quant
from dfssm.model.student import DFSSMState
from dfssm.model.teacher import Mamba2State
from dfssm.opset import OPS
from dfssm.opset.cases import Case
from dfssm.opset.schema import STATE_DTYPES

STORED = {dtype: name for name, dtype in STATE_DTYPES.items()}


def run(case: Case, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs of the op as the student computes them."""
    t = {name: torch.from_numpy(value) for name, value in inputs.items()}
    a = case.attributes
    for name in ("x", "z"):
        if a.get(f"{name}_start", -1) >= 0:
            t[name] = t[name][..., a[f"{name}_start"] :][..., : case.sizes["C"]]
    match case.op:
        case "BinaryScaffoldMatMul":
            outputs = [quant.binary_scaffold_matmul(signs=quant.unpack_bits(t.pop("bits")), **t)]
        case "Int8MatMul":
            outputs = [quant.int8_matmul(**t)]
        case "CausalConv1dStep":
            outputs = functional.causal_conv1d(**t, activation=a.get("activation", "silu"))
        case "RMSNorm":
            outputs = [functional.rms_norm(**t, eps=a.get("eps", 1e-5))]
        case "GatedRMSNorm":
            outputs = [functional.gated_rms_norm(**t, eps=a.get("eps", 1e-5), groups=a.get("groups", 1))]
        case "SelectiveScanStep":
            scale = t.pop("state_scale", None)
            t["state"] = DFSSMState([], [t["state"]], None if scale is None else [scale]).widen().ssm[0]
            limit = a.get("dt_min", 0.0), a.get("dt_max", np.inf)
            y, h = functional.selective_scan_step(**t, ngroups=a.get("ngroups", 1), dt_limit=limit)
            new = DFSSMState.narrow(Mamba2State([], [h]), STORED[case.state_dtype])
            outputs = [y, new.ssm[0], *(new.ssm_scale or [])]
    return [output.numpy() for output in outputs]


@pytest.mark.parametrize("op", OPS)
def test_torch(op):
    cases = [case for case in extremes.cases(op) if not case.attributes.get("layout")]
    check_each(cases, lambda case: extremes.check(case, lambda inputs: run(case, inputs)))


def test_the_gradient_of_a_half_passes_where_nothing_saturates():
    x = torch.tensor([1.0, -65504.0, 65505.0, -1e9], requires_grad=True)
    half = quant.half(x)
    assert half.dtype == torch.float16
    half.float().sum().backward()
    assert half.tolist() == [1, -65504, 65504, -65504] and x.grad.tolist() == [1, 1, 0, 0]
