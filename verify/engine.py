"""An engine against its student. It shows no values inside its layers, so what is compared is what it has: the logits
of all tokens and the states, of each call from the states that the engine stored before it.

Within a call the layers of the student go on from each other's values, and two right backends drift apart there
(`student`). How far is measured: the student runs a second time, with the float noise that goldens allow for.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfssm.base import DfssmError
from dfssm.model.student import DFSSMLM, load_student
from dfssm.opset.tolerances import drift_tolerance, rms_error
from dfssm.runtime import Engine

from .graph import NOISE, Tap, Values
from .student import Follower

Seen = dict[str, list[np.ndarray]]  # name -> the student's values, call by call; states widened


def compare_engine(
    bundle: Path, model: Path, calls: list[int], seed: int, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Compare the engine of `bundle` with the student in the file `model`, over `calls` of so many tokens each, the
    long ones in pieces of which the engine gives all logits.

    Returns what `compare_bundle` does; DfssmError as that, and where the engine cannot run here.
    """
    engine = Engine.load(bundle)
    state_dtype, most = engine.manifest.state_dtype, engine.backend.max_logits
    pieces = [min(most, tokens - start) for tokens in calls for start in range(0, tokens, most)]
    student = load_student(model, state_dtype)
    if student.config.to_dict() != engine.config:
        raise DfssmError(f"{bundle} was not compiled from {model}: their configs differ")
    done, total = count(1), len(pieces) + 2 * student.config.n_layer

    def advance(*_: object) -> None:
        progress(next(done), total)

    ids = np.random.default_rng(seed).integers(0, engine.vocab_size, (1, sum(pieces)))
    values = _run(engine, ids, pieces, advance)
    found = {name: _Found() for name in ("logits", *_states(student))}
    plain = _follow(student, values, pieces, ids, advance)
    for name, ours in plain.of_student.items():
        for one, other in zip(plain.of_engine[name], ours, strict=True):
            found[name].add(one, other)
    noisy = _follow(_disturbed(load_student(model, state_dtype)), values, pieces, ids, advance)
    for name, ours in plain.of_student.items():
        found[name].drift = max(map(rms_error, noisy.of_student[name], ours))
    c = student.config
    outputs = {}
    for name, of in found.items():
        layers = c.n_layer if name == "logits" else int(name.rpartition(".")[2]) + 1
        tolerance = drift_tolerance(layers, c.d_model, of.drift)
        limit = {"tolerance": tolerance.relative, "typical_rel": None, "typical_tolerance": None}
        outputs[name] = of.figures() | limit | {"passed": of.rms_rel <= tolerance.relative}
    return {
        "max_abs": outputs["logits"]["max_abs"],
        "max_rel": outputs["logits"]["max_rel"],
        "tokens": sum(pieces),
        "passed": all(output["passed"] for output in outputs.values()),
        "identical": None,
        "outputs": outputs,
        "layers": {},
    }


class _Found:
    """The worst of all calls."""

    def __init__(self) -> None:
        self.max_abs = self.max_rel = self.rms_rel = self.drift = 0.0

    def add(self, engine: np.ndarray, student: np.ndarray) -> None:
        error = float(np.abs(engine - student).max())
        error = error if np.isfinite(error) else float("inf")
        self.max_abs = max(self.max_abs, error)
        self.max_rel = max(self.max_rel, error / (float(np.abs(student).max()) or 1.0))
        self.rms_rel = max(self.rms_rel, rms_error(engine, student))

    def figures(self) -> dict[str, float]:
        return {"max_abs": self.max_abs, "max_rel": self.max_rel, "rms_rel": self.rms_rel}


class _Run:
    """What a student made of the calls of an engine, beside what the engine made."""

    def __init__(self) -> None:
        self.of_student: Seen = {}
        self.of_engine: Seen = {}

    def add(self, name: str, student: np.ndarray, engine: np.ndarray) -> None:
        self.of_student.setdefault(name, []).append(student)
        self.of_engine.setdefault(name, []).append(engine)


def _run(engine: Engine, ids: np.ndarray, calls: list[int], advance: Callable[..., None]) -> Values:
    """Logits of all tokens, and the states, after each call."""
    state, values = engine.new_state(), Values()
    for piece in np.split(ids, np.cumsum(calls)[:-1], axis=1):
        values.setdefault("logits", []).append(engine.logits(piece, state))
        for name, tensor in state.tensors.items():
            values.setdefault(name.replace(".", "_out."), []).append(tensor.copy())
        advance()
    return values


def _follow(student: DFSSMLM, values: Values, calls: list[int], ids: np.ndarray, advance: Callable[..., None]) -> _Run:
    """Run `student` over `ids`, each call from the states of the engine's call before."""
    run = _Run()
    for layer in student.layers:
        layer.register_forward_hook(advance)
    follower = Follower(student, values, calls, lambda tap, output, ours, engine: run.add(output, ours, engine))
    logits = follower.run(_taps(student, values), lambda tap: False, ids).numpy()
    for ours, engine in zip(np.split(logits, np.cumsum(calls)[:-1], axis=1), values["logits"], strict=True):
        run.add("logits", ours, engine)
    return run


def _taps(student: DFSSMLM, values: Values) -> list[Tap]:
    """The nodes that make the states; of their other outputs an engine shows nothing."""
    taps = []
    for layer in range(student.config.n_layer):
        for op, part, kinds in (("CausalConv1dStep", "conv", ["conv_state"]),
                                ("SelectiveScanStep", "scan", ["ssm_state", "ssm_scale"])):  # fmt: skip
            states = [f"{kind}_out.{layer}" for kind in kinds]
            node = f"/layers.{layer}/{part}"
            outputs = (f"{node}/y", *(name for name in states if name in values))
            taps.append(Tap(node, op, f"layers.{layer}.{part}", outputs))
    return taps


def _states(student: DFSSMLM) -> list[str]:
    kinds = ("conv_state_out", "ssm_state_out")
    return [f"{kind}.{layer}" for layer in range(student.config.n_layer) for kind in kinds]


def _disturbed(student: DFSSMLM) -> DFSSMLM:
    """With what float sums in another order do, as `graph.write_disturbed` does it."""
    rng = np.random.default_rng(0)
    for module in (student.embedding, *student.layers):
        signs = rng.choice([-1, 1], student.config.d_model)
        factors = torch.from_numpy((1 + NOISE * signs).astype(np.float32))

        def hook(module: nn.Module, inputs: Any, output: Any, factors: Tensor = factors) -> Any:
            return (output[0] * factors, *output[1:]) if isinstance(output, tuple) else output * factors

        module.register_forward_hook(hook)
    return student
