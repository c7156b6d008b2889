"""The student's side: one pass over all tokens in which its modules get what the bundle computed before them.

Comparing only the logits of two free runs proves little in a deep quantised model: activations are rounded to int8, a
last-bit difference moves one of them across a tie, and that moves others downstream. A random 1.3B student whose
embedding is disturbed by 1e-7 has logits 15 % (rms) off its own after 48 layers, as far as any backend is off another.
With every module on the bundle's values nothing adds up: equal inputs give equal codes, sums of integers are exact, and
what remains are float sums in another order (an op's tolerance, about 1e-6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfssm.model.deferred import deferred_conv1d, deferred_scan
from dfssm.model.student import DFSSMLM, DFSSMState
from dfssm.model.teacher import Mamba2State
from dfssm.opset.ops import DEFERRED_OPS

from .difference import widened
from .graph import Tap, Values

Compare = Callable[[Tap, str, np.ndarray, np.ndarray], None]
"""Called with a tap, one of its outputs, the student's values of it and the bundle's; both f32, states widened."""


class Follower:
    """A student that follows a bundle's run: `compare` is called at every tap, and a module whose tap is in `held`
    then passes on what the bundle computed there instead of its own value.

    `values` are those of the bundle's run in `calls`; the student serves for one run.
    """

    def __init__(self, student: DFSSMLM, values: Values, calls: list[int], compare: Compare):
        self.student, self.values, self.calls, self.compare = student, values, calls, compare

    def run(self, taps: Iterable[Tap], held: Callable[[Tap], bool], ids: np.ndarray) -> Tensor:
        """`ids` i64[1,T] -> the student's logits f32[1,T,V]."""
        for tap in taps:
            module = self.student.get_submodule(tap.module)
            if len(tap.outputs) > 1:
                parent, _, name = tap.module.rpartition(".")
                stand_in = _DeferredCallByCall if tap.op in DEFERRED_OPS else _CallByCall
                setattr(self.student.get_submodule(parent), name, stand_in(module, self, tap, held(tap)))
            else:
                module.register_forward_hook(self._hook(tap, held(tap)))
        with torch.no_grad(), _one_thread():
            logits: Tensor = self.student(torch.from_numpy(ids))[0]
        return logits

    def tokens(self, name: str) -> np.ndarray:
        """The value `name` [1,T,...] of all calls, end to end."""
        return np.concatenate(self.values[name], axis=1)

    def pass_on(self, tap: Tap, value: Tensor, held: bool) -> Tensor:
        """Compare the student's `value` [1,T,...], if the bundle shows one; returns what the modules after it get."""
        if tap.outputs[0] not in self.values:
            return value
        bundle = self.tokens(tap.outputs[0])
        self.compare(tap, tap.outputs[0], value.numpy(), bundle)
        return torch.from_numpy(bundle) if held else value

    def _hook(self, tap: Tap, held: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            value, *states = output if isinstance(output, tuple) else (output,)  # a layer's output has its states
            value = self.pass_on(tap, value, held)
            return (value, *states) if states else value

        return hook


class _CallByCall(nn.Module):
    """Stands in for a convolution or a scan: the calls that the bundle made, each from the state the bundle stored.

    So the student goes over all tokens at once, unpacking each projection once, and yet rounds its state where the
    bundle does; and a code of the state on the other side of a tie is one step off, not the start of another sequence.
    """

    def __init__(self, module: nn.Module, follower: Follower, tap: Tap, held: bool):
        super().__init__()
        self.module, self.follower, self.tap, self.held = module, follower, tap, held

    def forward(self, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        *inputs, state = arguments
        follower, tap, start = self.follower, self.tap, 0
        is_scan = tap.op == "SelectiveScanStep"
        ys, states = [], []
        for call, tokens in enumerate(follower.calls):
            y, state = self.module(*(v[:, start : start + tokens] for v in inputs), state)
            ys.append(y)
            start += tokens
            own = _rounded(state, follower.student.state_dtype) if is_scan else state
            stored = [torch.from_numpy(follower.values[name][call]) for name in tap.outputs[1:]]
            state = _widened(DFSSMState([], stored[:1], stored[1:] or None))
            states.append((own.numpy(), state.numpy()))

        def compare_states() -> None:
            for pair in states:
                follower.compare(tap, tap.outputs[1], *pair)

        # What is named when both are wrong: a scan's state, from which its y follows; a convolution's y, for its state
        # is but its last inputs.
        if is_scan:
            compare_states()
        y = follower.pass_on(tap, torch.cat(ys, dim=1), self.held)
        if not is_scan:
            compare_states()
        return y, state


class _DeferredCallByCall(_CallByCall):
    """The same where the state is deferred: its states are those of the graph, one by one."""

    def forward(self, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        *inputs, unused = arguments
        follower, tap, start = self.follower, self.tap, 0
        is_scan = tap.op == "DeferredScanStep"
        layer = tap.outputs[1].rpartition(".")[2]
        names = tap.outputs[1:] if is_scan else (*tap.outputs[1:], f"pending_count_out.{layer}")
        stored = [[torch.from_numpy(value) for value in follower.values[name]] for name in names]
        state = [torch.zeros_like(values[0]) for values in stored]
        ys = []
        for call, tokens in enumerate(follower.calls):
            piece = [v[:, start : start + tokens] for v in inputs]
            start += tokens
            y, own = self._run(piece, state)
            ys.append(y)
            state = [values[call] for values in stored]
            ours, theirs = (dict(zip(tap.outputs[1:], map(Tensor.numpy, of), strict=False)) for of in (own, state))
            for name in tap.outputs[1:]:
                if not name.startswith("ssm_scale_out."):
                    follower.compare(tap, name, widened(ours, name), widened(theirs, name))
        return follower.pass_on(tap, torch.cat(ys, dim=1), self.held), unused

    def _run(self, inputs: list[Tensor], state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        m: Any = self.module
        x, *others = inputs
        if others:
            dt, B, C = others
            limits = {"ngroups": m.ngroups, "dt_limit": m.dt_limit}
            return deferred_scan(x, dt, B, C, m.A_log, m.D, m.dt_bias, state, **limits)
        window, count = state
        y, window = deferred_conv1d(x, window, m.weight, m.bias, int(count[0]))
        return y, [window]


@contextmanager
def _one_thread() -> Iterator[None]:
    """The student on one thread, 20 s of one core for 1.3B. It is many small ops: on a busy machine OpenMP's threads
    spin waiting for each other, and two of them took four times the processor time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _rounded(state: Tensor, state_dtype: str) -> Tensor:
    """What storing an SSM state leaves of it."""
    return _widened(DFSSMState.narrow(Mamba2State([], [state]), state_dtype))


def _widened(state: DFSSMState) -> Tensor:
    """The one SSM state in `state` as the numbers it stands for: int8 codes alone would hide a scale that moved."""
    return state.widen().ssm[0]
