"""Times on the device, each beside the floor that a copy of the same run sets: bytes that a call must move, at the rate
of a copy. Nothing is timed before a check of what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from statistics import median
from time import perf_counter
from typing import Any

import torch

from .graph import PLUGINS, Session, Weights

Record = dict[str, Any]

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PROMPTS = ((1, 64), (1, 128), (1, 256), (1, 512), (1, 1024), (1, 2048), (8, 512), (32, 512))
PRODUCTS = ((8512, 2048), (2048, 4096), (50288, 2048))
"""(M, K) of the 1.3B's three products: in_proj, out_proj and the head."""

COPIED = 1 << 30
"""Bytes of the copy: many times any cache."""

ROOM = 2 << 30
"""Bytes left free: activations of a prompt, torch's own."""


def seconds_of(work: Callable[[], object], device: str, least: float = 0.05) -> float:
    """The median of five runs of `work`, queued back to back for at least `least` seconds each."""
    count, took = 1, _elapsed(work, 1, device)
    took = _elapsed(work, 1, device)  # the first one may have loaded code
    while took < least / 2:
        count *= 2
        took = _elapsed(work, count, device)
    return median(_elapsed(work, count, device) for _ in range(5)) / count


def _elapsed(work: Callable[[], object], count: int, device: str) -> float:
    if device != "cuda":
        start = perf_counter()
        for _ in range(count):
            work()
        return perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(count):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def copy_bandwidth(device: str, size: int = COPIED) -> float:
    """Bytes a second of a copy from device memory to device memory, read and written."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    took = seconds_of(lambda: target.copy_(source), device)
    assert torch.equal(source, target)
    return 2 * size / took


def fits(size: int, device: str) -> bool:
    return device != "cuda" or size + ROOM < torch.cuda.mem_get_info()[0]


def measure(
    weights: Weights, calls: Iterable[tuple[int, int]], bandwidth: float, least: float = 0.05
) -> Iterator[Record]:
    """One record for each (rows, tokens): microseconds of a call's plugins in one CUDA graph, in all and by op."""
    device = weights.library.device
    for rows, tokens in calls:
        record: Record = {"rows": rows, "tokens": tokens}
        kinds = weights.graph["states"].values()
        states = rows * sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in kinds)
        if not fits(states, device):
            yield record | {"skipped": f"states of {states / 2**30:.1f} GiB"}
            continue
        session = Session(weights, rows, tokens)
        session.ids.random_(0, weights.of["embedding.weight"].shape[0])
        record |= {"wrong": replay_differs(session)}
        took = seconds_of(session.capture(PLUGINS).replay, device, least)
        floor = session.bytes() / bandwidth
        record |= {"us": took * 1e6, "tok_s": rows * tokens / took, "floor_us": floor * 1e6, "of_floor": floor / took}
        for op in sorted({node["op"] for node in weights.graph["nodes"] if node["plugin"]}):
            record[op] = seconds_of(session.capture(op).replay, device, least / 2) * 1e6
        yield record
        del session
        if device == "cuda":
            torch.cuda.empty_cache()


def replay_differs(session: Session) -> str:
    """What is wrong with a recorded call, from states of zeros, beside a queued one; "" if nothing."""

    def from_zeros(call: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
        for state in session.states.values():
            state.zero_()
        logits = call().clone()
        return {"logits": logits} | {name: state.double().sum() for name, state in session.states.items()}

    queued = from_zeros(session.run)
    replayed = from_zeros(session.capture().replay)
    if not queued["logits"].isfinite().all():
        return "logits are not finite"
    others = [name for name, value in queued.items() if not torch.equal(value, replayed[name])]
    return f"the replay has other {', '.join(others)}" if others else ""


def int8_products(device: str, tokens: Iterable[int]) -> Iterator[Record]:
    """torch's own int8 product at the sizes of the model's: whole bytes for weights, no scales, no quantisation."""
    for rows, columns in PRODUCTS:
        w = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device)
        for n in tokens:
            x = torch.randint(-127, 128, (n, columns), dtype=torch.int8, device=device)
            record: Record = {"tokens": n, "M": rows, "K": columns}
            try:
                y = torch._int_mm(x, w.t())
            except RuntimeError as error:  # it takes more than 16 tokens only, and multiples of 8
                yield record | {"skipped": str(error).splitlines()[0]}
                continue
            some = slice(0, min(rows, 64))
            assert torch.equal(y[:, some].cpu(), (x.cpu().int() @ w[some].cpu().int().t())), "torch._int_mm is wrong"
            took = seconds_of(lambda x=x, w=w: torch._int_mm(x, w.t()), device)
            yield record | {"us": took * 1e6, "tera_ops": 2 * n * rows * columns / took / 1e12}
