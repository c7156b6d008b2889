"""A whole DF-SSM student in the arithmetic of `dfssm.opset.reference`: NumPy, plain, the oracle of the step graph."""

import numpy as np

from dfssm.model.config import DFSSMConfig
from dfssm.opset.reference import REFERENCES

CONFIGS = {
    "plain": dict(),
    "untied": dict(tie_embeddings=False),
    "rank0": dict(rank=0),
    "planes2": dict(planes=2, rank=3),
    "mixed": dict(rank=(0, 3, 4, 1), planes=(2, 1, 1, 3)),
    "groups": dict(ngroups=2, norm_groups=2),
    # P = 24 and N = 5 are no multiples of a vector; in_proj has 206 rows: the last tile of layout 1 is partly filled.
    "odd": dict(vocab_size=53, d_model=96, headdim=24, d_state=5, expand=1, d_conv=3, rank=1, n_layer=1),
    "limits": dict(dt_limit=(0.001, 0.1), d_conv=2),
}
"""The grid: what differs from `config()`'s defaults."""


def config(name: str) -> DFSSMConfig:
    """The config called `name` in CONFIGS: tiny, so that the function bodies run in milliseconds."""
    defaults = dict(vocab_size=41, d_model=32, n_layer=2, d_state=8, headdim=16, rank=4)
    return DFSSMConfig(**defaults | CONFIGS[name])


def zero_states(c: DFSSMConfig, batch: int, state_dtype: str) -> dict[str, np.ndarray]:
    """The graph's state inputs before the first token, by name."""
    kinds = c.states(state_dtype).items()
    return {f"{kind}.{i}": np.zeros((batch, *shape), dtype) for i in range(c.n_layer) for kind, (dtype, shape) in kinds}


def step(c: DFSSMConfig, tensors: dict, ids: np.ndarray, states: dict) -> tuple[np.ndarray, dict]:
    """`ids` [B,T] and the states before them -> logits f32 [B,T,V] and the states after them."""
    op, t, new = REFERENCES, tensors, {}
    h = t["embedding.weight"][ids].astype(np.float32) * t["embedding.scale"][ids][..., None]
    for i in range(c.n_layer):

        def w(name: str, i: int = i) -> np.ndarray:
            return t[f"layers.{i}.{name}"]

        def scaffold(x: np.ndarray, name: str, w=w, i=i) -> np.ndarray:
            parts = ("bits", "scale", "down", "down_scale", "up", "up_scale")
            planes = c.scaffold(f"layers.{i}.{name}").planes
            return op["BinaryScaffoldMatMul"](x, *(w(f"{name}.{part}") for part in parts), planes=planes)

        x = op["RMSNorm"](h, w("norm.weight"), eps=c.norm_eps)
        z, xBC, dt = np.split(scaffold(x, "in_proj"), np.cumsum([c.d_inner, c.conv_dim]), axis=-1)
        deferred = f"pending_count.{i}" in states
        counts = [states[f"pending_count.{i}"]] if deferred else []
        xBC, new[f"conv_state.{i}"] = op["DeferredConv1dStep" if deferred else "CausalConv1dStep"](
            xBC, states[f"conv_state.{i}"], w("conv.weight"), w("conv.bias"), *counts, activation="silu"
        )
        x, B, C = np.split(xBC, np.cumsum([c.d_inner, c.ngroups * c.d_state]), axis=-1)
        state_names = [name for name in states if name.endswith(f".{i}") and not name.startswith("conv_state")]
        y, *new_states = op["DeferredScanStep" if deferred else "SelectiveScanStep"](
            x, dt, B, C, w("scan.A_log"), w("scan.D"), w("scan.dt_bias"), *(states[name] for name in state_names),
            ngroups=c.ngroups, dt_min=c.dt_limit[0], dt_max=c.dt_limit[1],
        )  # fmt: skip
        new |= dict(zip(state_names, new_states, strict=True))
        y = op["GatedRMSNorm"](y, z, w("gated_norm.weight"), eps=c.norm_eps, groups=c.norm_groups)
        h = h + scaffold(y, "out_proj")
    h = op["RMSNorm"](h, t["norm_f.weight"], eps=c.norm_eps)
    head = "embedding" if c.tie_embeddings else "lm_head"
    return op["Int8MatMul"](h, t[f"{head}.weight"], t[f"{head}.scale"]), new
