"""A sequence read through the ops of a deferred state, in calls of any lengths and with tokens taken back."""

from collections.abc import Callable, Iterable

import numpy as np

from dfssm.opset.cases import Case

TOKEN_INPUTS = ("x", "dt", "B", "C")
CUTS = ([1] * 45, [8, 8, 8, 8, 8, 5], [3, 7, 1, 9, 2, 23], [45], [17, 1, 8, 1, 8, 1, 8, 1], [6, 6, 6, 6, 6, 6, 6, 3])
"""Of 45 tokens."""


def scan_case(state: str, **more: int) -> Case:
    return Case("DeferredScanStep", dict(B=2, T=45, H=2, P=5, N=7, count=0, state=state) | more, {"ngroups": 2})


def conv_case(**more: int) -> Case:
    return Case("DeferredConv1dStep", dict(B=2, T=45, C=19, W=4, count=0) | more)


def read(
    run: Callable[..., tuple], case: Case, calls: Iterable[int], take_back: int = 0
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """y of the case's tokens in such `calls` from a fresh state on, and what came of its states.

    `take_back`: each call is preceded by one of so many tokens of something else, all of which are taken back.
    """
    inputs = case.inputs()
    states = {name: value for name, value in inputs.items() if f"new_{name}" in OUTPUTS[case.op]}
    states = {name: np.zeros_like(value) for name, value in states.items()}
    states["pending_count"] = np.zeros_like(inputs["pending_count"])
    fixed = {name: value for name, value in inputs.items() if name not in TOKEN_INPUTS and name not in states}
    tokens = {name: inputs[name] for name in TOKEN_INPUTS if name in inputs}
    pieces, at = [], 0

    def call(given: dict[str, np.ndarray]) -> np.ndarray:
        count = states["pending_count"]
        y, *new = run(case.op, given | fixed | states, **case.attributes)
        names = [name.removeprefix("new_") for name in OUTPUTS[case.op][1:]]
        states.update(zip(names, new, strict=False))
        if case.op == "DeferredConv1dStep":  # the scan behind it says the new count
            length = count.astype(int) + next(iter(given.values())).shape[1]
            states["pending_count"] = (length - np.maximum(count, length - 8) // 8 * 8).astype(np.uint8)
        return y

    for length in calls:
        if take_back:
            wrong = {name: 3 - np.repeat(value[:, at : at + 1], take_back, 1) for name, value in tokens.items()}
            call(wrong)
            states["pending_count"] = states["pending_count"] - np.uint8(take_back)
        pieces.append(call({name: value[:, at : at + length].copy() for name, value in tokens.items()}))
        at += length
    return np.concatenate(pieces, axis=1), states


OUTPUTS = {
    "DeferredConv1dStep": ("y", "new_window"),
    "DeferredScanStep": (
        "y",
        "new_state",
        "new_pending_x",
        "new_pending_B",
        "new_pending_decay",
        "new_pending_count",
        "new_state_scale",
    ),
}
