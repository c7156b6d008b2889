"""Rank and planes of each projection for a size in bytes, by what each choice costs on a little text.

The cost of a choice is the KL divergence from the teacher, in nats a token, of a teacher in which that projection alone
is rounded so. It is measured for one plane, and taken to be proportional to the squared error of the projection's
products, which is computed for every choice. Costs are taken to add up, and the choice makes their sum small.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dfssm.base.errors import DfssmError

from .calibrate import PIECE, require_finite
from .config import PROJECTIONS, DFSSMConfig, Mamba2Config, Scaffold
from .convert import low_rank
from .ledger import model_bytes, scaffold_bytes
from .quant import dequantized
from .rounding import combined, damped, round_matrix
from .teacher import Mamba2LM, Mamba2State

PLANES = (1, 2, 3, 4)
RANKS = (0, 2, 4, 8, 16, 32)
_TINY = torch.finfo(torch.float32).tiny
SAMPLE = 4096  # tokens on which the divergence is measured, or one window


class Choices(NamedTuple):
    """What may become of a projection: the cost and the bytes of each choice; `kl`: measured, of one plane."""

    cost: dict[Scaffold, float]
    size: dict[Scaffold, int]
    kl: float


def choose(
    teacher: Mamba2LM, windows: Tensor, budget: float, progress: Callable[[int, int], None] = lambda done, of: None
) -> tuple[DFSSMConfig, dict[str, float]]:
    """Configuration of a student with at most `budget` bytes of weights, chosen on the text windows i64[n,T].

    Returns with it the divergence that one plane costs, by projection. `progress` gets the layers done, and of how
    many. DfssmError where even the smallest student is larger.
    """
    _room(teacher.config, budget)
    found = measure(teacher, windows, progress)
    return spend(teacher.config, budget, found), {path: choices.kl for path, choices in found.items()}


def spend(teacher: Mamba2Config, budget: float, found: Mapping[str, Choices]) -> DFSSMConfig:
    """Configuration of a student with at most `budget` bytes of weights, by what `measure` found."""
    rank, planes = zip(*allocate(list(found.values()), _room(teacher, budget)), strict=True)
    return DFSSMConfig.from_teacher(teacher, rank, planes)


def _room(teacher: Mamba2Config, budget: float) -> float:
    """Bytes that the smallest student leaves of a budget. DfssmError where it is larger."""
    least = DFSSMConfig.from_teacher(teacher, min(RANKS), min(PLANES))
    room = budget - sum(model_bytes(least.to_dict()).values())
    if room < 0:
        small = f"the smallest student of this teacher has {(budget - room) / 1e6:.3f} MB of weights"
        raise DfssmError(f"the budget is {budget / 1e6:g} MB, but {small}: give at least as much")
    return room


@torch.no_grad()
def measure(
    teacher: Mamba2LM, windows: Tensor, progress: Callable[[int, int], None] = lambda done, of: None
) -> dict[str, Choices]:
    """The choices for each projection of `teacher`, by its path."""
    count = len(windows)
    hidden, some = teacher.embedding(windows).float(), max(1, min(count, SAMPLE // windows.shape[1]))
    batch = max(1, PIECE // windows.shape[1])
    state, head = Mamba2State.zeros(teacher.config, batch, windows.device), copy.deepcopy(teacher.head).float()

    def run(layer: torch.nn.Module, hidden: Tensor) -> None:
        """Take hidden[b,T,D] through a layer, in place."""
        for part in hidden.split(batch):
            part.copy_(layer(part, state.conv[0][: len(part)], state.ssm[0][: len(part)])[0])

    def finish(hidden: Tensor, first: int) -> Tensor:
        """hidden[b,T,D] before a layer -> after the last one and the norm."""
        for layer in teacher.layers[first:]:
            run(copy.deepcopy(layer).float(), hidden)
        return teacher.norm_f(hidden)

    def divergence(found: Tensor) -> float:
        """Of the logits of found[b,T,D], window by window: logits of a large vocabulary are large."""
        total = 0.0
        for ours, theirs in zip(found, wanted, strict=True):
            got, asked = (head.project(one).log_softmax(-1) for one in (ours, theirs))
            total += float(F.kl_div(got, asked, log_target=True, reduction="sum"))
        return total / wanted[..., 0].numel()

    sample = hidden[torch.arange(some) * count // some]
    wanted, choices = finish(sample.clone(), 0), {}
    for i, layer in enumerate(teacher.layers):
        progress(i, len(teacher.layers))
        wide = copy.deepcopy(layer).float()
        watched = {name: _watch(wide.get_submodule(name)) for name in PROJECTIONS}
        run(wide, hidden)
        for _, hook in watched.values():  # before the layer is run for something else
            hook.remove()
        for name, (moment, _) in watched.items():
            path, parameter = f"layers.{i}.{name}", wide.get_parameter(f"{name}.weight")
            weight = parameter.clone()
            require_finite(path, weight.square().sum() * moment.trace().float())  # bounds what rounding sums
            error, rounded = errors(weight, moment)
            parameter.copy_(rounded)
            tried = sample.clone()
            run(wide, tried)
            kl = divergence(finish(tried, i + 1))
            parameter.copy_(weight)
            share, (m, k) = kl / max(error[Scaffold(0, 1)], _TINY), weight.shape
            cost = {choice: share * one for choice, one in error.items()}
            choices[path] = Choices(cost, {choice: scaffold_bytes(m, k, choice) for choice in cost}, kl)
        run(wide, sample)
    progress(len(teacher.layers), len(teacher.layers))
    return choices


def errors(weight: Tensor, moment: Tensor) -> tuple[dict[Scaffold, float], Tensor]:
    """Squared error of the products of weight[M,K] with inputs of a second moment[K,K], rounded in every way; and
    what one plane makes of it.
    """
    root = torch.linalg.cholesky(damped(moment)).float()
    found, first = {}, weight
    for planes in PLANES:
        rounded = round_matrix(weight, moment, planes, rounds=1)
        matrix = combined(rounded.signs, rounded.scale)
        if planes == 1:
            first = matrix
        rest = (weight - matrix) @ root
        whole = float(rest.square().sum())
        held = low_rank(rest, min(max(RANKS), *weight.shape))[1].square().sum(1).cumsum(0)  # by so many ranks
        for rank in (r for r in RANKS if r <= len(held)):
            found[Scaffold(rank, planes)] = whole - (float(held[rank - 1]) if rank else 0.0)
    return found, first


def allocate(choices: Sequence[Choices], room: float) -> list[Scaffold]:
    """One choice for each projection, so that they have at most `room` bytes more than the smallest.

    Steps along the lower convex hull of bytes and cost, those that save most a byte first, as far as they fit: the
    least sum of costs for its own bytes, unless a step was left out for not fitting.
    """
    steps, now = [], []
    for i, (cost, size, _) in enumerate(choices):
        hull: list[Scaffold] = []
        for choice in sorted(cost, key=lambda c: (size[c], cost[c])):
            if hull and cost[choice] >= cost[hull[-1]]:
                continue
            while len(hull) > 1 and _saves(choices[i], hull[-2], hull[-1]) <= _saves(choices[i], hull[-1], choice):
                hull.pop()
            hull.append(choice)
        now.append(hull[0])
        steps += [(_saves(choices[i], a, b), i, a, b) for a, b in itertools.pairwise(hull)]
    for _, i, before, after in sorted(steps, key=lambda step: -step[0]):
        more = choices[i].size[after] - choices[i].size[before]
        if now[i] == before and more <= room:
            now[i], room = after, room - more
    return now


def _saves(choices: Choices, a: Scaffold, b: Scaffold) -> float:
    """Cost a byte from a to b."""
    return (choices.cost[a] - choices.cost[b]) / (choices.size[b] - choices.size[a])


def _watch(projection: torch.nn.Module) -> tuple[Tensor, torch.utils.hooks.RemovableHandle]:
    """The second moment f64[K,K] of the int8 inputs of a projection[M,K] from now on, and the hook that sums it."""
    weight = projection.get_parameter("weight")
    moment = weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)

    def add(_: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        x = dequantized(inputs[0]).flatten(0, -2)
        moment.add_(x.T @ x)

    return moment, projection.register_forward_pre_hook(add)
