"""What is checked before anything is timed: each op over its case table, and the demo model beside the ort-cpu bundle.

Both return (number of comparisons, what failed as lines of text).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .graph import Session, Weights
from .plugins import Library, Plugin

Findings = tuple[int, list[str]]

UNWRITTEN = 0xFF
"""Bytes of an output before the launch: NaN in every float type."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """As dfssm.opset.tolerances: the largest difference as a share of the largest expected."""
    if not expected.numel():
        return 0.0
    got, wanted = actual.double().cpu(), expected.double().cpu()
    worst = (got - wanted).abs().max().item() / (wanted.abs().max().item() or 1.0)
    return worst if worst == worst else float("inf")


def widened(states: dict[str, Tensor], name: str) -> Tensor:
    """A state as the numbers it stands for."""
    value = states[name].float()
    scale = states.get(name.replace("ssm_state", "ssm_scale")) if name.startswith("ssm_state") else None
    return value if scale is None else value * scale.unsqueeze(-1)


def run_case(library: Library, case: dict[str, Any], in_place: bool) -> dict[str, Tensor]:
    """The outputs by name; `in_place`: a new state is written over the old one."""
    inputs = {name: library.put(value) for name, value in case["inputs"].items()}
    plugin = Plugin(library, case["op"], case["id"], case["attributes"], list(inputs.values()))
    outputs = {}
    for name, (dtype, shape) in zip(case["outputs"], plugin.outputs, strict=True):
        state = inputs.get(name.removeprefix("new_")) if in_place else None
        outputs[name] = library.empty(shape, dtype) if state is None else state
        if state is None:
            outputs[name].view(torch.uint8).fill_(UNWRITTEN)
    workspace = library.empty((plugin.workspace,), torch.uint8).fill_(UNWRITTEN)
    plugin.enqueue(list(inputs.values()), list(outputs.values()), workspace)
    return {name: value.cpu() for name, value in outputs.items()}


def check_case(library: Library, case: dict[str, Any]) -> Findings:
    """In place and apart against opset's result; both the same bits."""
    apart, together = (run_case(library, case, in_place) for in_place in (False, True))
    failed = []
    for name, expected in case["outputs"].items():
        actual, bound = apart[name], case["bounds"][name]
        if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
            failed.append(f"{case['id']} {name}: {actual.dtype} {list(actual.shape)}, expected {list(expected.shape)}")
        elif not (error := relative_error(actual, expected)) <= bound:
            failed.append(f"{case['id']} {name}: relative error {error:.3g} > {bound:.3g}")
        elif not torch.equal(apart[name], together[name]):
            failed.append(f"{case['id']} {name}: in place is not apart")
    return 2 * len(apart), failed


def check_ops(library: Library, cases: Iterable[dict[str, Any]]) -> Findings:
    """Cases of plugins, or of `dfssm_largest` and `dfssm_total_weight`."""
    return _sum(check_largest(library, case) if "logits" in case else check_case(library, case) for case in cases)


def check_largest(library: Library, case: dict[str, Any]) -> Findings:
    """The same tokens in the same order, and their logits, bit for bit; or the same weight of all."""
    if "totals" in case:
        totals = library.total_weight(library.put(case["logits"]), library.put(case["divisors"])).cpu()
        wrong = f"the weight of {case['logits'].shape[1]}, {case['kind']}: {totals.tolist()}"
        return 1, [] if torch.equal(totals, case["totals"]) else [wrong]
    tokens, values = (tensor.cpu() for tensor in library.largest(library.put(case["logits"]), case["count"]))
    name = f"the {case['count']} largest of {case['logits'].shape[1]}, {case['kind']}"
    failed = [] if torch.equal(tokens, case["tokens"]) else [f"{name}: other tokens"]
    if not torch.equal(values.view(torch.int32), case["values"].view(torch.int32)):
        failed.append(f"{name}: other logits")
    return 2, failed


def check_demo(library: Library, demo: dict[str, Any]) -> Findings:
    """One state dtype: each call from the states that ort-cpu stored, calls from states that stay on the device, and
    recorded steps.
    """
    weights = Weights(library, demo["graph"])
    return _sum([check_calls(weights, demo), _carried_on(weights, demo)])


def check_calls(weights: Weights, demo: dict[str, Any]) -> Findings:
    """Nothing adds up from call to call. In one an activation on a tie of int8 may round either way; most have none."""
    failed, errors, count = [], [], 0
    sessions: dict[int, Session] = {}
    for number, call in enumerate(demo["calls"]):
        rows, tokens = call["ids"].shape
        session = sessions.setdefault(tokens, Session(weights, rows, tokens))
        session.set_states(call["states"])
        session.ids.copy_(call["ids"])
        logits = session.run()
        errors.append(relative_error(logits, call["logits"]))
        found = {"logits": errors[-1]}
        for name in session.states:
            if not name.startswith("ssm_scale"):
                found[name] = relative_error(widened(session.states, name), widened(call["new_states"], name))
        failed += [
            f"call {number} of {tokens} tokens, {name}: relative error {error:.3g} > {demo['bound']:.3g}"
            for name, error in found.items()
            if not error <= demo["bound"]
        ]
        count += len(found)
    if not median(errors) < demo["median"]:
        failed.append(f"logits of {len(errors)} calls: median relative error {median(errors):.3g} >= {demo['median']}")
    return count + 1, failed


def _carried_on(weights: Weights, demo: dict[str, Any]) -> Findings:
    """A prompt and steps from states that stay on the device, beside ort-cpu's; and, with the same bits, these steps
    replayed from a CUDA graph.
    """
    ids = [call["ids"] for call in demo["carried"]]
    rows, tokens = ids[0].shape
    prompt = Session(weights, rows, tokens)
    step = Session(weights, rows, 1, prompt.states)

    def made(session: Session, ids: Tensor, call: Callable[[], Tensor]) -> Tensor:
        session.ids.copy_(ids)
        return call().clone()

    def copied() -> dict[str, Tensor]:
        return {name: value.clone() for name, value in step.states.items()}

    logits = [made(prompt, ids[0], prompt.run)]
    start = copied()
    logits += [made(step, one, step.run) for one in ids[1:]]
    end = copied()
    failed = []
    for number, (ours, call) in enumerate(zip(logits, demo["carried"], strict=True)):
        if not (error := relative_error(ours, call["logits"])) <= demo["bound"]:
            failed.append(f"call {number} of {rows} rows: logits' relative error {error:.3g} > {demo['bound']:.3g}")
    recorded = step.capture()
    step.set_states(start)
    replayed = [made(step, one, recorded.replay) for one in ids[1:]]
    if not all(map(torch.equal, replayed, logits[1:])):
        failed.append(f"{rows} rows: logits replayed from a CUDA graph are others")
    failed += [
        f"{rows} rows: {name} of the replay is another" for name in end if not torch.equal(step.states[name], end[name])
    ]
    return len(logits) + len(replayed) + len(end), failed


def _sum(findings: Iterable[Findings]) -> Findings:
    count, failed = 0, []
    for number, lines in findings:
        count += number
        failed += lines
    return count, failed
