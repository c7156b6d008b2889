"""A student from a teacher and a little text, without training: layer after layer, on the student's own activations.

Each projection is rounded by `rounding` for the inputs that it meets in the student. What is rounded is not the
teacher's weight but the one that, from these inputs, comes nearest to what the teacher computes from its own: so each
layer makes good the errors before it, as far as a linear map can. All of it is least squares in closed form. In memory
are the hidden states of both models, and the weights and statistics of one layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dfssm.base import memory
from dfssm.base.errors import DfssmError

from .config import DFSSMConfig
from .convert import packed
from .quant import dequantized, quantize
from .rounding import Rounded, damped, round_matrix
from .teacher import Mamba2Block, Mamba2LM, Mamba2State

PIECE = 4096  # tokens that pass through a layer at a time

FEWEST = 4
"""Tokens for each input of the widest projection. With 1 and 2 of them the demo's teacher, 1 plane, got worse than
without text: 10.1 and 4.8 times its perplexity, 3.8 without; with 4 it is 2.9, with 16 2.2.
"""


@torch.no_grad()
@memory.kept()
def calibrate(
    teacher: Mamba2LM,
    windows: Tensor,
    rank: int | tuple[int, ...] = 16,
    planes: int | tuple[int, ...] = 1,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[DFSSMConfig, dict[str, Tensor], dict[str, float]]:
    """Student of `teacher` whose projections are rounded on the text windows i64[n,T], each read from a zero state.

    Returns the configuration and the tensors of model.pt, as `convert` does, and of each projection the error of its
    products on this text, as a share of theirs. `progress` gets the layers done, and of how many. DfssmError where the
    teacher's numbers are not finite on it, and for a text that is too short to be better than none.
    """
    config = DFSSMConfig.from_teacher(teacher.config, rank, planes)
    least = FEWEST * max(config.d_model, config.d_inner)
    if windows.numel() < least:
        raise DfssmError(
            f"the text to calibrate on has {windows.numel():,} tokens, too few for projections of this width: give at"
            f" least {least:,}, or convert without text"
        )
    ours = dequantized(teacher.embedding(windows))
    theirs = teacher.embedding(windows).float()
    batch = max(1, PIECE // windows.shape[1])
    state = Mamba2State.zeros(config, batch, windows.device)
    found: dict[str, dict[str, Tensor]] = {}
    errors: dict[str, float] = {}
    for i, (layer, *zero) in enumerate(zip(teacher.layers, state.conv, state.ssm, strict=True)):
        progress(i, config.n_layer)
        path, wide = f"layers.{i}", copy.deepcopy(layer).float()  # whatever the teacher is kept in
        assert isinstance(wide, Mamba2Block)
        pair = _round_layer(path, wide, ours.split(batch), theirs.split(batch), zero, config)
        for name, rounded in zip(("in_proj", "out_proj"), pair, strict=True):
            found[f"{path}.{name}"], errors[f"{path}.{name}"] = rounded.export_tensors(), rounded.error
    progress(config.n_layer, config.n_layer)
    return config, packed(teacher, config, lambda path, _: found[path]), errors


def require_finite(path: str, sums: Tensor) -> None:
    """DfssmError where `sums`, over the inputs or outputs of the projection `path`, are not finite."""
    if not sums.isfinite().all():
        found = f"the teacher cannot be converted: its numbers in {path} are not finite on this text"
        raise DfssmError(f"{found}: copy or train the checkpoint again")


def _round_layer(
    path: str,
    layer: Mamba2Block,
    given: Sequence[Tensor],
    wanted: Sequence[Tensor],
    zero: Sequence[Tensor],
    config: DFSSMConfig,
) -> tuple[Rounded, Rounded]:
    """in_proj and out_proj of a layer. Takes through it the hidden states [b,T,D] of the student, `given`, and of the
    teacher, `wanted`, in place; `zero`: the states that they begin with.
    """
    moments = Moments(f"{path}.in_proj", layer.get_parameter("in_proj.weight"))
    for ours, theirs in zip(given, wanted, strict=True):
        moments.add(dequantized(layer.norm(ours)), layer.in_proj(layer.norm(theirs)))
    into = moments.round(config)

    matrix, moments, inputs = into.matrix(), Moments(f"{path}.out_proj", layer.get_parameter("out_proj.weight")), []
    for ours, theirs in zip(given, wanted, strict=True):
        states = [state[: len(ours)] for state in zero]
        theirs += layer.out_proj(layer.mix(layer.in_proj(layer.norm(theirs)), *states)[0])
        codes, size = quantize(layer.mix(F.linear(dequantized(layer.norm(ours)), matrix), *states)[0])
        moments.add(codes * size, theirs - ours)  # the student's hidden state is to be the teacher's
        inputs.append((codes.to(torch.int8), size))
    out = moments.round(config)

    matrix = out.matrix()
    for ours, (codes, size) in zip(given, inputs, strict=True):
        ours += F.linear(codes * size, matrix)
    return into, out


class Moments:
    """Sums of x^T x and y^T x: x are the inputs of a projection in the student, y the outputs that they are to give."""

    def __init__(self, path: str, weight: Tensor):
        self.path, self.weight = path, weight.double()
        size = weight.shape[1]
        self.second = self.weight.new_zeros(size, size)
        self.cross = torch.zeros_like(self.weight)

    def add(self, x: Tensor, y: Tensor) -> None:
        """x[...,K], y[...,M]."""
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        self.second += x.T @ x
        self.cross += y.T @ x

    def best(self) -> Tensor:
        """The matrix f32[M,K] that gives y from x with least squares, drawn to the teacher's where x says little."""
        missing = self.cross - self.weight @ self.second
        require_finite(self.path, missing)
        return (self.weight + torch.linalg.solve(damped(self.second), missing, left=False)).float()

    def round(self, config: DFSSMConfig) -> Rounded:
        """The best matrix, rounded to what `config` makes of it."""
        rank, planes = config.scaffold(self.path)
        return round_matrix(self.best(), self.second, planes, rank)
