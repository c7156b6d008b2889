"""mamba_ssm's scan in place of ours: a stand-in of its signature and its meaning, as that package documents them."""

import math
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from dfssm.model import fused_scan
from dfssm.model.config import Mamba2Config
from dfssm.model.functional import ssd_chunked
from dfssm.model.teacher import Mamba2LM

CPU = torch.device("cpu")


def combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False,
):  # fmt: skip
    """x [b,l,h,p], dt [b,l,h], A [h], B and C [b,l,g,n], D and dt_bias [h], states [b,h,p,n]: token by token."""
    assert z is None and seq_idx is None and cu_seqlens is None and chunk_size & (chunk_size - 1) == 0
    dt = dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    heads, ys, state = len(A), [], initial_states
    for t in range(x.shape[1]):
        b, c = (m[:, t].repeat_interleave(heads // m.shape[2], dim=1) for m in (B, C))
        state = state * (dt[:, t] * A).exp()[..., None, None]
        state = state + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], b)
        ys.append(torch.einsum("bhpn,bhn->bhp", state, c) + D[:, None] * x[:, t])
    y = torch.stack(ys, 1)
    return (y, state) if return_final_states else y


def test_adapted_it_is_ours_with_its_gradients():
    # Both sum in fp32, in other orders: 1e-6 a sum, some hundred of them in a gradient.
    assert fused_scan.difference(fused_scan.adapted(combined), CPU) < 1e-4


@pytest.mark.parametrize(
    "wrong",
    [
        lambda *given, **named: combined(*given, **named | {"D": torch.zeros_like(named["D"])}),
        lambda *given, **named: combined(*given, **named | {"dt_softplus": False}),
        lambda *given, **named: combined(*given, **named | {"initial_states": 0 * named["initial_states"]}),
        lambda x, dt, A, B, C, *given, **named: combined(x, dt, A, C, B, *given, **named),
        lambda x, *given, **named: combined(x.detach(), *given, **named),
    ],
    ids=["D", "softplus", "state", "B and C", "gradient"],
)
def test_one_that_means_something_else_is_seen(wrong):
    assert not fused_scan.difference(fused_scan.adapted(wrong), CPU) <= fused_scan.CLOSE


def test_step_limits_and_one_group():
    generator = torch.Generator().manual_seed(1)
    x, dt, B, C = (torch.randn(1, 9, size, generator=generator) for size in (8, 2, 3, 3))
    heads = [torch.randn(2, generator=generator) for _ in range(3)]
    inputs = (x, dt, B, C, *heads, torch.randn(1, 2, 3, 4, generator=generator))
    limits = {"ngroups": 1, "dt_limit": (0.3, 0.9), "chunk_size": 4}
    for found, expected in zip(
        fused_scan.adapted(combined)(*inputs, **limits), ssd_chunked(*inputs, **limits), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_it_is_for_a_gpu_with_the_package(monkeypatch):
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.ssd_combined"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = sys.modules["mamba_ssm.ops.triton.ssd_combined"]
    monkeypatch.setattr(fused_scan, "difference", lambda scan, device: found)
    gpu = torch.device("cuda", 0)
    assert fused_scan.find(gpu) is None  # of a version without that name
    module.mamba_chunk_scan_combined = combined
    found = 1e-3
    assert fused_scan.find(CPU) is None and fused_scan.find(gpu) is not None
    found = math.nan
    with pytest.warns(RuntimeWarning, match="mamba_ssm's scan is nan% off ours on cuda:0: ours is used"):
        assert fused_scan.find(gpu) is None


def test_a_model_has_it_while_it_is_lent(monkeypatch):
    config = Mamba2Config(vocab_size=16, d_model=16, n_layer=2, d_state=4, headdim=8, expand=2, chunk_size=8)
    model, ids = Mamba2LM(config), torch.arange(12)[None]
    ours = model(ids)[0]
    called = []

    def kernel(*given, **named):
        called.append(named["initial_states"].shape)
        return combined(*given, **named)

    monkeypatch.setattr(fused_scan, "find", lambda device: fused_scan.adapted(kernel))
    with fused_scan.lent(model, CPU):
        theirs = model(ids)[0]
    assert called == [(1, 4, 8, 4)] * 2  # of both layers: [B,H,P,N]
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(ids)[0], ours) and len(called) == 2
