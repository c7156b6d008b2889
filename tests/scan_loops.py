"""The recurrence of a selective scan in plain float64 loops, which share no code with the references."""

import math

import numpy as np


def scan_loops(x, dt, B, C, A_log, D, dt_bias, state, state_scale=None, ngroups=1, dt_min=0.0, dt_max=math.inf):
    """Float64, element by element; the state is returned unrounded."""
    batch, heads, d_state, headdim = state.shape
    h = state.astype(np.float64)
    if state_scale is not None:
        h = h * state_scale[..., None].astype(np.float64)
    y = np.zeros(x.shape)
    for b in range(batch):
        for t in range(x.shape[1]):
            for head in range(heads):
                raw = float(dt[b, t, head]) + float(dt_bias[head])
                delta = min(
                    max(raw + math.log1p(math.exp(-raw)) if raw > 0 else math.log1p(math.exp(raw)), dt_min), dt_max
                )
                decay = math.exp(-math.exp(float(A_log[head])) * delta)
                group = head // (heads // ngroups)
                for p in range(headdim):
                    x_p = float(x[b, t, head * headdim + p])
                    total = float(D[head]) * x_p
                    for n in range(d_state):
                        h[b, head, n, p] = decay * h[b, head, n, p] + delta * float(B[b, t, group * d_state + n]) * x_p
                        total += float(C[b, t, group * d_state + n]) * h[b, head, n, p]
                    y[b, t, head * headdim + p] = total
    return y, h
