"""The proof in a bundle's manifest: what was written, run in ONNX Runtime, against the student it was made from.

Compared op by op, the student fed with what the bundle computed. Comparing only the logits of two free runs proves
little in a deep quantised model: activations are rounded to int8, a last-bit difference moves one of them across a
tie, and that moves others downstream. A random 1.3B student whose embedding is disturbed by 1e-7 has logits 15 % (rms)
off its own after 48 layers, as far as any backend is off another. Op by op nothing adds up: equal inputs give equal
codes, sums of integers are exact, and what remains are float sums in another order (`op_tolerance`, about 1e-6).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx  # noqa: TID253 (this module is imported by the pass that runs it)
import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from dfssm.model.student import DFSSMLM, DFSSMState, load_student
from dfssm.model.teacher import Mamba2State
from dfssm.opset import DOMAIN, DfssmError
from dfssm.opset.schema import STATE_DTYPES
from dfssm.opset.tolerances import Tolerance, op_tolerance, reduction
from dfssm.targets.bundle import MODEL

TOKENS = 64
SEED = 0

WATCHED = f"watched.{MODEL}"
"""The bundle's graph with the output of every op among its outputs, beside it while it is verified."""

NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}

Progress = Callable[[int, int], None]


def verify_bundle(target: ModuleType, folder: Path, model: Path, state_dtype: str, progress: Progress) -> dict:
    """Compare the graph in `folder`, opened by `target`, with the student in the file `model`.

    The bundle is given TOKENS seeded random tokens as a prefill and `target.VERIFY_STEPS` more as single steps. The
    student then goes over all of them once: each of its modules gets what the bundle computed before it, wired as the
    student is, and what it makes of that is compared with what the bundle made. Last, the graph as it ships must give
    the logits of the watched one.

    Returns the manifest's `verification` (docs/format.md). Raises DfssmError naming the op that is off.
    """
    student = load_student(model, state_dtype)
    calls = [TOKENS] + [1] * target.VERIFY_STEPS
    ids = np.random.default_rng(SEED).integers(0, student.config.vocab_size, (1, sum(calls)))
    total = 2 * len(calls) + len(student.layers)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    graph = _write_watched(folder)
    try:
        watched = _run(target.open_session(folder, model=WATCHED), ids, calls, advance)
    finally:
        (folder / WATCHED).unlink()
    comparison = _Comparison(student, graph, watched, calls, state_dtype)
    comparison.run(ids, advance)
    shipped = _run(target.open_session(folder), ids, calls, advance)
    if not all(map(np.array_equal, shipped["logits"], watched["logits"])):
        raise DfssmError(f"{MODEL} gives other logits than its ops do one by one: run the command again to confirm")
    return {
        "passed": True,
        "tokens": TOKENS,
        "steps": target.VERIFY_STEPS,
        "seed": SEED,
        "max_abs": max(error["max_abs"] for error in comparison.errors.values()),
        "max_rel": max(error["max_rel"] for error in comparison.errors.values()),
        "outputs": comparison.errors,
    }


class _Comparison:
    """One pass of the student over all tokens, held to the bundle's values at every module.

    `errors` maps an op's output ("SelectiveScanStep.y") to its worst error over the layers.
    """

    def __init__(self, student: DFSSMLM, graph: onnx.GraphProto, watched: dict, calls: list[int], state_dtype: str):
        self.student, self.watched, self.calls, self.state_dtype = student, watched, calls, state_dtype
        self.nodes = [node for node in graph.node if node.domain == DOMAIN]
        self.errors: dict[str, dict[str, float]] = {}
        c = student.config
        self.sizes = {"R": c.rank, "planes": c.planes, "W": c.d_conv, "N": c.d_state, "T": max(calls)}
        self.sizes["state"] = STATE_DTYPES[state_dtype]

    def run(self, ids: np.ndarray, advance: Callable[[], None]) -> None:
        """Raises DfssmError at the first module that is off."""
        self._hold(self.student.embedding, "Embedding", "/embed", ["/embed/mul/out"])
        for node in self.nodes:
            if node.op_type == "SelectiveScanStep":
                layer, _, name = node.name[1:].replace("/", ".").rpartition(".")
                block = self.student.get_submodule(layer)
                setattr(block, name, _CallByCall(getattr(block, name), node, self))
            if node.op_type != "Int8MatMul":  # the head is no module's forward; its logits are the student's own
                module = self.student.get_submodule(node.name[1:].replace("/", "."))
                self._hold(module, node.op_type, node.name, list(node.output))
        for layer in self.student.layers:
            layer.register_forward_hook(lambda *_: advance())
        with torch.no_grad(), _one_thread():
            logits = self.student(torch.from_numpy(ids))[0]
        self.compare("logits", "/lm_head", logits, self.tokens("logits"), op_tolerance("Int8MatMul", {}))

    def tokens(self, name: str) -> np.ndarray:
        """The value `name` [1,T,...] of all calls, end to end."""
        return np.concatenate(self.watched[name], axis=1)

    def compare(self, output: str, node: str, actual: Tensor, bundle: np.ndarray, tolerance: Tolerance) -> None:
        """Record how far `bundle` is from what the student made of the same inputs; DfssmError if that is too far."""
        expected = actual.numpy()
        relative = tolerance.error(bundle, expected)
        if not relative <= tolerance.relative:
            raise DfssmError(
                f"the bundle does not compute what the student does: {output} of {node} is off by {relative:.3g} of its"
                f" largest value, allowed is {tolerance.relative:.3g} ({tolerance.reason})"
            )
        worst = self.errors.setdefault(output, {"max_abs": 0.0, "max_rel": 0.0, "tolerance": tolerance.relative})
        worst["max_abs"] = max(worst["max_abs"], relative * (float(np.abs(expected).max()) or 1.0))
        worst["max_rel"] = max(worst["max_rel"], relative)

    def tolerance(self, op: str, output: str = "y") -> Tolerance:
        """What the op allows, with the sizes of this model."""
        if op == "Embedding":
            return reduction(1)
        channels = self.student.config.d_inner if op == "GatedRMSNorm" else self.student.config.d_model
        return op_tolerance(op, self.sizes | {"C": channels}, output)

    def _hold(self, module: nn.Module, op: str, node: str, names: list[str]) -> None:
        """Compare the module's first output, then put the bundle's value in its place; a conv's state is compared."""
        label, tolerance = names[0].rpartition("/")[2], self.tolerance(op)

        def hook(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
            value, *state = output if isinstance(output, tuple) else (output,)
            held = self.tokens(names[0])
            self.compare(f"{op}.{label}", node, value, held, tolerance)
            if op == "CausalConv1dStep":
                self.compare(f"{op}.new_state", node, *state, self.watched[names[1]][-1], tolerance)
            return (torch.from_numpy(held), *state) if state else torch.from_numpy(held)

        module.register_forward_hook(hook)


class _CallByCall(nn.Module):
    """Stands in for a student's scan: the calls that the bundle made, each starting at the state the bundle stored.

    So the student goes over all tokens at once, unpacking each projection once, and yet rounds its state where the
    bundle does; and a code of the state on the other side of a tie is one step off, not the start of another sequence.
    """

    def __init__(self, scan: nn.Module, node: onnx.NodeProto, comparison: _Comparison):
        super().__init__()
        self.scan, self.node, self.comparison = scan, node, comparison

    def forward(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        c, ys, start = self.comparison, [], 0
        tolerance = c.tolerance(self.node.op_type, "new_state")
        for call, tokens in enumerate(c.calls):
            y, state = self.scan(*(v[:, start : start + tokens] for v in (x, dt, B, C)), state)
            ys.append(y)
            start += tokens
            own = _widened(DFSSMState.narrow(Mamba2State([], [state]), c.state_dtype))
            stored = [torch.from_numpy(c.watched[name][call]) for name in self.node.output[1:]]
            state = _widened(DFSSMState([], stored[:1], stored[1:] or None))
            c.compare(f"{self.node.op_type}.new_state", self.node.name, own, state.numpy(), tolerance)
        return torch.cat(ys, dim=1), state


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


def _widened(state: DFSSMState) -> Tensor:
    """The one SSM state in `state` as the numbers it stands for: int8 codes alone would hide a scale that moved."""
    return state.widen().ssm[0]


def _write_watched(folder: Path) -> onnx.GraphProto:
    """Write the bundle's graph with the output of every op of ours, and the embedding, as further outputs."""
    model = onnx.load(folder / MODEL, load_external_data=False)
    graph = model.graph
    ours = {name for node in graph.node if node.domain == DOMAIN for name in node.output} | {"/embed/mul/out"}
    graph.output.extend(value for value in graph.value_info if value.name in ours)
    onnx.save(model, folder / WATCHED)
    return graph


def _run(session, ids: np.ndarray, calls: list[int], advance: Callable[[], None]) -> dict[str, list[np.ndarray]]:
    """`ids` [1,T] in `calls` of so many tokens each, from zero states: every output by name, a list over the calls."""
    inputs = [value for value in session.get_inputs() if value.name != "input_ids"]
    states = {value.name: np.zeros([1, *value.shape[1:]], NUMPY_TYPES[value.type]) for value in inputs}
    names = [value.name for value in session.get_outputs()]
    outputs: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for piece in np.split(ids, np.cumsum(calls)[:-1], axis=1):
        for name, value in zip(names, session.run(None, {"input_ids": piece, **states}), strict=True):
            outputs[name].append(value)
        states = {name: outputs[name.replace(".", "_out.")][-1] for name in states}  # ssm_state.3: ssm_state_out.3
        advance()
    return outputs
