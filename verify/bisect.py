"""Where two backends part: the target's kernels against the ops' own definition, the function bodies in the graph.

Two runs of their own would drift apart (`student`). So the bodies get what the kernels made of everything before them,
in a graph that is cut after each op, and what they make of that is compared op by op: one run tells of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dfssm.base import DfssmError
from dfssm.base.files import temporary_folder
from dfssm.model.config import DFSSMConfig
from dfssm.targets import get_target
from dfssm.targets.bundle import MODEL, open_bundle
from dfssm.targets.trust import own_library

from .difference import Difference, tolerance_of_op, widened
from .graph import (
    HELD,
    TAPPED,
    Tap,
    calls_of,
    held,
    inference,
    link_files,
    write_held,
    write_tapped,
    zero_states,
)

CALLS = (32, 1)
"""Tokens of each call: both kinds of kernels."""

SEED = 0

REFERENCE = "onnx"
"""The target that runs every op by its body."""


def bisect(path: Path, threads: int, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """The first op of the bundle that its kernels compute otherwise than its definition: as docs/json.md has it."""
    reference = get_target(REFERENCE)
    with open_bundle(path) as bundle, temporary_folder("bisecting") as folder:
        manifest = bundle.manifest
        target, config = get_target(manifest.target), DFSSMConfig.from_dict(manifest.config)
        if target.IS_ENGINE:
            raise DfssmError(f"{path} holds an engine, which shows no ops: `dfssm verify` names the layer")
        if target is reference:
            raise DfssmError(f"{path} runs by the ops' definitions: there is nothing to compare them with")
        link_files(bundle, folder)
        taps = write_tapped(folder / MODEL, folder)
        write_held(folder / MODEL, folder, taps)
        session = target.open_session(folder, threads, TAPPED, own_library(bundle, target.LIBRARY, asked=False))
        states = zero_states(session)
        bodies = reference.open_session(folder, threads, HELD)
    wanted = [value.name for value in bodies.get_inputs()]
    ids = np.random.default_rng(SEED).integers(0, config.vocab_size, (1, sum(CALLS)))
    worst: dict[str, Difference] = {}
    first, end = None, 0
    for call, ours in enumerate(calls_of(inference(session), states, ids, list(CALLS))):
        piece, end = ids[:, end : end + CALLS[call]], end + CALLS[call]
        known = {held(name): value for name, value in ours.items()} | states | {"input_ids": piece}
        theirs = inference(bodies)({name: known[name] for name in wanted})
        states = {name: ours[name.replace(".", "_out.")] for name in states}
        for tap, name, kind in _values([*taps, Tap("/lm_head", "logits", "", ("logits",))]):
            output = kind.rpartition(".")[2]
            tolerance = tolerance_of_op(tap.op, output, config, manifest.state_dtype, piece.shape[1])
            difference = Difference(tolerance)
            difference.add(widened(ours, name), widened(theirs, name))
            if first is None and not difference.passed:
                where = {"token": end, "node": tap.node, "output": name}
                first = where | difference.figures() | {"reason": tolerance.reason}
            if kind not in worst or worst[kind].max_rel < difference.max_rel:
                worst[kind] = difference
        progress(call + 1, len(CALLS))
    outputs = {kind: difference.figures() for kind, difference in worst.items()}
    return {"passed": first is None, "tokens": end, "first": first, "outputs": outputs}


def _values(taps: list[Tap]) -> Iterator[tuple[Tap, str, str]]:
    """What is compared, in the graph's order: a tap, one of its outputs, and the kind of that, as in the manifest."""
    for tap in taps:
        for name in tap.outputs:
            if not name.startswith("ssm_scale_out."):  # a part of its state
                yield tap, name, name if name == "logits" else f"{tap.op}.{tap.output(name)}"
