"""Bundles against their students: `verify_bundle` raises at the first op that is off, `compare_bundle` tells of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from dfssm.base import DfssmError
from dfssm.base.files import temporary_folder, writing
from dfssm.model.student import DFSSMLM, load_student
from dfssm.opset.ops import ALL_OPS
from dfssm.opset.schema import DEFERRED, STATE_FORMS
from dfssm.opset.tolerances import Tolerance, model_tolerance, reduction
from dfssm.targets import Target, get_target
from dfssm.targets.bundle import MODEL, TAPS, open_bundle
from dfssm.targets.trust import own_library

from . import growth
from .difference import Difference, tolerance_of_op
from .engine import compare_engine
from .graph import TAPPED, Feeds, Infer, Tap, calls_of, checked, inference, link_files, run, write_tapped, zero_states
from .student import Compare, Follower

TOKENS = 64
"""Of the prefill that `verify_bundle` runs."""

SEED = 0

STEPS = 4
"""At most so many of the tokens of `compare_bundle` are read one by one: both kinds of kernels."""

Progress = Callable[[int, int], None]
Open = Callable[[str], tuple[Infer, Feeds]]
"""Opens a graph of a bundle by its file name; also gives the states of one sequence that has read nothing."""


def verify_bundle(target: Target, folder: Path, model: Path, state_dtype: str, progress: Progress) -> dict[str, Any]:
    """Compare the graph in `folder`, opened by `target`, with the student in the file `model`, op by op.

    The bundle is given TOKENS seeded random tokens as a prefill and `target.VERIFY_STEPS` more as single steps. Each
    module of the student gets what the bundle computed before it, wired as the student is, and what it makes of that is
    compared with what the bundle made. Then the graph as it ships must give the outputs of the tapped one, and fp16
    states must stay within their range over `growth.TOKENS` tokens.

    Returns the manifest's `verification` (docs/format.md). Raises DfssmError naming the op that is off. For as long as
    it takes, a file lies in `folder`.
    """
    student = load_student(model, state_dtype.removesuffix(DEFERRED))
    config = student.config
    found: dict[str, Difference] = {}

    def open_graph(name: str) -> tuple[Infer, Feeds]:
        session = target.open_session(folder, model=name)
        return inference(session), zero_states(session)

    def compare(tap: Tap, output: str, ours: np.ndarray, bundle: np.ndarray) -> None:
        if not np.isfinite(ours).all():
            raise DfssmError(f"the model's numbers are not finite, first in {tap.name}: its weights are too large")
        of_op = tap.output(output)
        name = tap.op if output == "logits" else f"{tap.op}.{of_op}"
        if name not in found:
            found[name] = Difference(tolerance_of_op(tap.op, of_op, config, state_dtype, TOKENS))
        difference = found[name]
        difference.add(bundle, ours)
        if not difference.passed:
            raise DfssmError(
                f"the bundle does not compute what the student does: {name} of {tap.node} is off by "
                f"{difference.max_rel:.3g} of its largest value, allowed is {difference.tolerance.relative:.3g} "
                f"({difference.tolerance.reason})"
            )

    with writing(folder):
        taps = write_tapped(folder / MODEL, folder)
    taps = [tap for tap in taps if tap.op != "Residual"]
    calls = [TOKENS] + [1] * target.VERIFY_STEPS
    long = growth.TOKENS if STATE_FORMS[state_dtype] == "float16" else 0  # in the others nothing saturates
    advance = _counter(progress, 2 * len(calls) + len(student.layers) + long // growth.CALL)
    try:
        other = _follow(open_graph, student, taps, lambda tap: True, calls, compare, advance)
    finally:
        (folder / TAPPED).unlink()
    if other:
        raise DfssmError(f"{MODEL} gives other {other} than its ops do one by one: run the command again to confirm")
    ids = np.random.default_rng(SEED).integers(0, config.vocab_size, (1, long))
    return {
        "passed": True,
        "tokens": TOKENS,
        "steps": target.VERIFY_STEPS,
        "seed": SEED,
        "max_abs": max(difference.max_abs for difference in found.values()),
        "max_rel": max(difference.max_rel for difference in found.values()),
        "outputs": {name: difference.figures() for name, difference in found.items()},
        "states": growth.run_long(*open_graph(MODEL), ids, advance) if long else None,
    }


def verify_taps(target: Target, folder: Path, vocab_size: int) -> None:
    """DfssmError unless the graph TAPS in `folder` gives the bits of the shipped one over TOKENS random tokens."""
    ids = np.random.default_rng(SEED).integers(0, vocab_size, (1, TOKENS))
    sessions = (target.open_session(folder, model=name) for name in (MODEL, TAPS))
    shipped, tapped = (inference(session)({"input_ids": ids} | zero_states(session)) for session in sessions)
    if other := _first_difference(shipped, tapped):
        raise DfssmError(f"{TAPS} gives other {other} than {MODEL}: run the command again to confirm")


def compare_bundle(bundle: Path, model: Path, tokens: int, progress: Progress) -> dict[str, Any]:
    """Compare `bundle` with the student in `model` over `tokens` tokens, layer by layer: as docs/json.md has it.

    A layer of the student gets the hidden state and the recurrent states that the bundle had there, so an error shows
    in the layer where it arises; within a layer errors pass on. Of an engine, which shows no values inside, logits and
    states are compared: see `engine`. Raises DfssmError when the two are not of one config.
    """
    from polygraphy.backend.onnxrt import OnnxrtRunner

    opened = open_bundle(bundle)
    manifest = opened.manifest
    target = get_target(manifest.target)
    steps = min(STEPS, tokens // 2)
    calls = [tokens - steps] + [1] * steps
    if target.IS_ENGINE:
        return compare_engine(bundle, model, calls, SEED, progress)
    own = own_library(opened, target.LIBRARY, asked=False)
    student = load_student(model, manifest.state_dtype.removesuffix(DEFERRED))
    if student.config.to_dict() != manifest.config:
        raise DfssmError(f"{bundle} was not compiled from {model}: their configs differ")
    found: dict[str, Difference] = {}

    def compare(tap: Tap, output: str, ours: np.ndarray, bundle: np.ndarray) -> None:
        of_state = output in tap.outputs[1:]
        name = output if of_state or output == "logits" else tap.name
        if name not in found:
            found[name] = Difference(*_layer_tolerances(name, student, manifest.state_dtype))
        if of_state:
            found[name].add(bundle, ours)
            return
        cuts = np.cumsum(calls[:-1], dtype=int)  # a share is one of the largest value of its call
        for pair in zip(np.split(bundle, cuts, axis=1), np.split(ours, cuts, axis=1), strict=True):
            found[name].add(*pair)

    with ExitStack() as stack:
        folder = stack.enter_context(temporary_folder("a comparison"))
        link_files(opened, folder)

        def open_graph(name: str) -> tuple[Infer, Feeds]:
            session = target.open_session(folder, model=name, own=own)
            runner = stack.enter_context(OnnxrtRunner(session, name=name))
            return checked(session, runner.infer), zero_states(session)

        taps = [tap for tap in write_tapped(folder / MODEL, folder) if tap.node.startswith("/layers.")]
        advance = _counter(progress, 2 * len(calls) + len(student.layers))
        other = _follow(open_graph, student, taps, lambda tap: tap.op == "Residual", calls, compare, advance)
    figures = {name: _all_figures(difference) for name, difference in found.items()}
    return {
        "max_abs": found["logits"].max_abs,
        "max_rel": found["logits"].max_rel,
        "tokens": tokens,
        "passed": not other and all(difference.passed for difference in found.values()),
        "identical": not other,
        "outputs": {name: figures[name] for name in ("logits", *figures) if not name.startswith("layers.")},
        "layers": {name: figures[name] for name in figures if name.startswith("layers.")},
    }


def _follow(
    open_graph: Open,
    student: DFSSMLM,
    taps: list[Tap],
    held: Callable[[Tap], bool],
    calls: list[int],
    compare: Compare,
    advance: Callable[..., None],
) -> str:
    """Run the tapped graph, the student after it, and the graph as it ships; `compare` is called for each value.

    Returns the first output in which the two graphs differ by as much as a bit, "" where none does.
    """
    ids = np.random.default_rng(SEED).integers(0, student.config.vocab_size, (1, sum(calls)))

    tapped = run(*open_graph(TAPPED), ids, calls, advance)
    for layer in student.layers:
        layer.register_forward_hook(advance)
    follower = Follower(student, tapped, calls, compare)
    logits = follower.run(taps, held, ids)
    head = Tap("/lm_head", "logits", "", ("logits",))
    compare(head, "logits", logits.numpy(), follower.tokens("logits"))
    other = ""  # call by call: the states of all calls are 0.5 GB of the 1.3B
    for call, shipped in enumerate(calls_of(*open_graph(MODEL), ids, calls)):
        other = other or _first_difference(shipped, {name: tapped[name][call] for name in shipped})
        advance()
    return other


def _first_difference(shipped: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> str:
    """The first output of `shipped` that differs by as much as a bit, "" where none does."""
    differing = (name for name in shipped if not np.array_equal(shipped[name], other[name], equal_nan=True))
    return next(differing, "")


def _counter(progress: Progress, total: int) -> Callable[..., None]:
    """Tells `progress` of each call of it."""
    done = count(1)
    return lambda *_: progress(next(done), total)


def _layer_tolerances(name: str, student: DFSSMLM, state_dtype: str) -> tuple[Tolerance, Tolerance | None]:
    """What a value may be off at worst, and typically, where a layer on equal inputs made it.

    A state has no typical error: it adds up all tokens, those with a flipped activation among them.
    """
    noise = reduction(student.config.d_inner)
    if name.endswith(".norm"):
        return noise, noise  # nothing is rounded before it
    worst = model_tolerance(1, student.config.d_model)
    if "_out." not in name:
        return worst, noise
    if name.startswith("ssm_state_out."):
        rounding = ALL_OPS["SelectiveScanStep"].tolerance({"T": 1, "state": STATE_FORMS[state_dtype]}, "new_state")
        worst = Tolerance(worst.relative + rounding.relative, f"{worst.reason}; {rounding.reason}")
    return worst, None


def _all_figures(difference: Difference) -> dict[str, Any]:
    return difference.figures() | {
        "typical_rel": difference.typical_rel,
        "typical_tolerance": difference.typical and difference.typical.relative,
        "passed": difference.passed,
    }
