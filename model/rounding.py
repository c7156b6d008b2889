"""A matrix rounded to what ships of it, so that its products with the inputs that it will see change least.

Signs with a scale a row and plane, and an int8 low rank, chosen together for the squared error of the products,
tr((W - Q) H (W - Q)^T), with the second moment H = sum x^T x of the inputs x. Letters in shapes: M rows, K columns, P
planes, R the rank.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from .convert import binarize, low_rank
from .quant import dequantized
from .student import export_projection

DAMPING = 0.01  # added to the diagonal of H, as a share of its mean: directions seldom seen stay bounded
ROUNDS = 4  # of signs, scales and low rank in turn
_LLOYD = 8  # iterations for the first scales of several planes
_BLOCK = 64  # columns whose errors reach all later ones in one product


@dataclasses.dataclass(frozen=True)
class Rounded:
    """Q = sum over planes of scale * signs, + up @ down: signs f32[P,M,K] of +-1, scale f32[P,M] that fall from plane
    to plane, down f32[R,K] and up f32[M,R], of which every row is int8 codes times a scale. `error`: of the products,
    as a share of theirs.
    """

    signs: Tensor
    scale: Tensor
    down: Tensor
    up: Tensor
    error: float

    def matrix(self) -> Tensor:
        return combined(self.signs, self.scale) + self.up @ self.down

    def export_tensors(self) -> dict[str, Tensor]:
        """The tensors of the packed form, by name."""
        lead = slice(None) if len(self.signs) > 1 else 0
        return export_projection(self.signs[lead], self.scale[lead], self.down, self.up)


def round_matrix(weight: Tensor, moment: Tensor, planes: int = 1, rank: int = 0, rounds: int = ROUNDS) -> Rounded:
    """Round weight[M,K] for inputs of the second moment moment[K,K].

    Columns are rounded one after the other, and those that follow make good the error (GPTQ, arXiv 2210.17323). Then,
    in turn: scales and low rank in closed form for these signs, and a pass of coordinate descent over all columns for
    these scales. The best of the `rounds` is kept. Deterministic.
    """
    moment = damped(moment)
    order = moment.diagonal().argsort(descending=True, stable=True)  # what weighs most first, while errors are small
    weight, moment = weight.float()[:, order], moment[order][:, order]
    root = torch.linalg.cholesky(moment)
    later = torch.linalg.cholesky(torch.cholesky_inverse(root), upper=True).float()
    root, moment = root.float(), moment.float()
    sizes, energy = moment.diagonal(), _energy(weight, moment).clamp_min(torch.finfo(torch.float32).tiny)

    up, down = weight.new_zeros(len(weight), 0), weight.new_zeros(0, weight.shape[1])
    levels, codes, best = Levels(_first_scales(weight, sizes, planes)), None, None
    for _ in range(rounds):
        target = (weight - up @ down).T.contiguous()
        if codes is None:
            codes = round_columns(target, -later / later.diagonal()[:, None], levels)
        else:
            now = levels.values(codes)
            codes = round_columns(now + moment @ (target - now) / sizes[:, None], moment / sizes, levels, now)
        signs = levels.signs(codes)
        products = signs @ moment
        scale = fit_scales(signs, products, weight - up @ down)
        if rank:
            up, down = fit_low_rank(weight - combined(signs, scale), moment, root, rank)
            scale = fit_scales(signs, products, weight - up @ down)
        levels = Levels(scale)
        error = float(_energy(weight - combined(signs, scale) - up @ down, moment) / energy)
        if best is None or error < best.error:
            best = Rounded(signs, scale, down, up, error)
    assert best is not None
    back = order.argsort()
    signs = torch.where(best.scale[..., None] < 0, -best.signs, best.signs)[..., back]
    scale, largest = best.scale.abs().sort(stable=True, dim=0, descending=True)
    signs = signs.gather(0, largest[..., None].expand_as(signs))
    return dataclasses.replace(best, signs=signs, scale=scale, down=best.down[:, back])


def damped(moment: Tensor) -> Tensor:
    """moment[K,K] in fp64 with DAMPING on its diagonal; the identity in place of zeros."""
    moment = moment.double()
    mean = moment.diagonal().mean()
    return moment + (DAMPING * mean if mean > 0 else 1.0) * torch.eye(
        len(moment), dtype=torch.float64, device=moment.device
    )


class Levels:
    """The 2^P values that P planes give a weight, row by row, for scale[P,M]. A code u8 is a choice of signs."""

    def __init__(self, scale: Tensor):
        choices = list(itertools.product((-1.0, 1.0), repeat=len(scale)))
        self.choices = torch.tensor(choices, device=scale.device)  # 2^P,P
        self.of_code = scale.T @ self.choices.T  # M,2^P
        self.sorted, self.codes = self.of_code.sort(-1)
        self.between = ((self.sorted[:, 1:] + self.sorted[:, :-1]) / 2).contiguous()

    def nearest(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest levels of wanted[M,k], and their codes; the lower one of two."""
        place = torch.searchsorted(self.between, wanted.contiguous())
        return self.sorted.gather(1, place), self.codes.gather(1, place).to(torch.uint8)

    def values(self, codes: Tensor) -> Tensor:
        """codes u8[K,M] -> their levels f32[K,M]."""
        return self.of_code.gather(1, codes.T.long()).T.contiguous()

    def signs(self, codes: Tensor) -> Tensor:
        """codes u8[K,M] -> signs f32[P,M,K]."""
        return self.choices[codes.T.int()].permute(2, 0, 1).contiguous()


def round_columns(wanted: Tensor, passed: Tensor, levels: Levels, now: Tensor | None = None) -> Tensor:
    """Round the columns wanted[K,M] of a matrix in order; returns codes u8[K,M]. `wanted` is used up.

    The step that rounding column j is, from now[j] or else from what was wanted, changes what is wanted of each later
    column k by -passed[j,k] times the step.
    """
    codes = torch.empty_like(wanted, dtype=torch.uint8)
    for begin in range(0, len(wanted), _BLOCK):
        end = min(begin + _BLOCK, len(wanted))
        steps = torch.empty_like(wanted[begin:end])
        for j in range(begin, end):
            value, code = levels.nearest(wanted[j, :, None])
            codes[j] = code[:, 0]
            torch.sub(value[:, 0], wanted[j] if now is None else now[j], out=steps[j - begin])
            wanted[j + 1 : end].addr_(passed[j, j + 1 : end], steps[j - begin], alpha=-1)
        wanted[end:].addmm_(passed[begin:end, end:].T, steps, alpha=-1)
    return codes


def fit_scales(signs: Tensor, products: Tensor, weight: Tensor) -> Tensor:
    """The scale[P,M] with which signs[P,M,K] are nearest to weight[M,K], row by row: least squares under a moment H,
    given products = signs H.
    """
    normal = torch.einsum("pmk,qmk->mpq", products, signs)
    wanted = torch.einsum("pmk,mk->mp", products, weight)
    # Two planes of a row may have the same signs; one of them is then superfluous.
    ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(len(signs), device=signs.device)
    return torch.linalg.solve(normal + ridge, wanted[..., None])[..., 0].T.contiguous()


def fit_low_rank(residual: Tensor, moment: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The rank-R up[M,R] @ down[R,K] nearest to residual[M,K] under moment = root root^T; rows as int8 gives them.

    `up` is fitted to the rounded `down`.
    """
    _, down = low_rank(residual @ root, rank)
    down = dequantized(torch.linalg.solve_triangular(root, down, upper=False, left=False))
    through = moment @ down.T
    up = residual @ through @ torch.linalg.pinv(down @ through, hermitian=True)
    return dequantized(up), down


def combined(signs: Tensor, scale: Tensor) -> Tensor:
    """The matrix [M,K] of planes signs[P,M,K] with scale[P,M]."""
    return (scale[..., None] * signs).sum(0)


def _first_scales(weight: Tensor, sizes: Tensor, planes: int) -> Tensor:
    """scale[P,M] for rounding to the nearest level, with sizes[K] the weight of each column: Lloyd's iteration."""
    scale = binarize(weight, planes)[1]
    for _ in range(_LLOYD if planes > 1 else 0):
        levels = Levels(scale)
        signs = levels.signs(levels.nearest(weight)[1].T)
        scale = fit_scales(signs, signs * sizes, weight)
    return scale


def _energy(weight: Tensor, moment: Tensor) -> Tensor:
    """sum |x weight^T|^2 over the inputs of a second moment."""
    return ((weight @ moment) * weight).sum()
