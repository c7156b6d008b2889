"""Which rounding an int8 SSM state wants: `python bench/int8_state.py`.

Runs the recurrence in float64 beside the same recurrence with its state stored in few bits after every token, on
inputs of the size a trained Mamba-2 has, and prints the relative RMS error of y. The choice made from it is
`quantize_state_ref` in opset/reference.py: one scale a row of headdim, plain rounding.
"""

import numpy as np

HEADS, D_STATE, HEADDIM, TOKENS, WARMUP = 8, 128, 64, 300, 100


def _scale(h, axis):
    m = np.abs(h).max(axis, keepdims=True)
    return np.where(m == 0, 1, m / 127)


def _rounded(h, axis):
    scale = _scale(h, axis)
    return np.rint(h / scale) * scale


def _error_feedback(h, axis):
    """First-order sigma-delta: the rounding error of an element is added to the next one along `axis`."""
    scale = np.broadcast_to(_scale(h, 2), h.shape)
    out, carried = np.empty_like(h), 0.0
    for i in range(h.shape[axis]):
        at = (slice(None),) * axis + (i,)
        wanted = h[at] + carried
        out[at] = np.clip(np.rint(wanted / scale[at]), -127, 127) * scale[at]
        carried = wanted - out[at]
    return out


STORES = {
    "fp16": lambda h: h.astype(np.float16).astype(np.float64),
    "int8, scale a row of headdim": lambda h: _rounded(h, 2),
    "int8, scale a column of d_state": lambda h: _rounded(h, 1),
    "int8, feedback along d_state": lambda h: _error_feedback(h, 1),
    "int8, feedback along headdim": lambda h: _error_feedback(h, 2),
}


def relative_error(store, seed: int) -> float:
    """RMS error of y over the RMS of y, tokens after the warm-up, mean of the heads."""
    rng = np.random.default_rng(seed)

    def silu_normal(*shape):
        v = rng.standard_normal(shape)
        return v / (1 + np.exp(-v))

    A = -np.exp(rng.uniform(0, np.log(16), HEADS))
    dt_bias = np.log(np.expm1(np.exp(rng.uniform(np.log(1e-3), np.log(0.1), HEADS))))
    exact = stored = np.zeros((HEADS, D_STATE, HEADDIM))
    error, power = np.zeros(HEADS), np.zeros(HEADS)
    for t in range(TOKENS):
        x, B, C = silu_normal(HEADS, HEADDIM), silu_normal(D_STATE), silu_normal(D_STATE)
        delta = np.log1p(np.exp(dt_bias + rng.standard_normal(HEADS) / 2))[:, None, None]
        decay, added = np.exp(A[:, None, None] * delta), delta * B[:, None] * x[:, None]
        exact, stored = decay * exact + added, decay * stored + added
        y, y_stored = (np.einsum("n,hnp->hp", C, h) for h in (exact, stored))
        stored = store(stored)
        if t >= WARMUP:
            error += ((y - y_stored) ** 2).mean(1)
            power += (y**2).mean(1)
    return float(np.sqrt(error / power).mean())


def main() -> None:
    print("relative RMS error of y, mean of heads; 3 seeds")
    for name, store in STORES.items():
        errors = [relative_error(store, seed) for seed in range(3)]
        print(f"  {name:33s} {np.mean(errors):.2%}  ({min(errors):.2%} .. {max(errors):.2%})")


if __name__ == "__main__":
    main()
