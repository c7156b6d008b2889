"""Students without training: a teacher rounded to bits and a low rank, and random ones of a real shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor

from dfssm.base.errors import DfssmError, reason

from .config import DFSSMConfig, Mamba2Config, Scaffold
from .quant import quantize_rows, unpack_bits
from .student import DFSSMLM, BinaryLinear
from .teacher import Mamba2LM, initial
from .tensors import FLOAT, PARTS, ROWS, SCAFFOLD, weights

_TINY = torch.finfo(torch.float32).tiny
_NEAR = 1e-3  # least size of a latent


def binarize(weight: Tensor, planes: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """weight[M,K] -> latents [P,M,K], scales [P,M], and the residual weight - sum of scale * sign(latent).

    Each plane is the best sign matrix with a scale a row for what the planes before it leave: scale = row
    mean |w|. A latent is in units of its scale.
    """
    latents, scales, residual = [], [], weight.float()
    for _ in range(planes):
        scale = residual.abs().mean(-1, keepdim=True)
        latents.append(residual / scale.clamp_min(_TINY))
        scales.append(scale[:, 0])
        residual = residual - scale * torch.where(residual > 0, 1.0, -1.0)
    return torch.stack(latents), torch.stack(scales), residual


def low_rank(residual: Tensor, rank: int, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best rank-R approximation up[M,R] @ down[R,K] of residual[M,K] (Eckart-Young); repeatable.

    With `sizes` [K], the root mean square of each input, it is the best for the product with such inputs rather
    than for the matrix. The singular values go to `down`, whose int8 rows have a scale each; a row of `up` shares one
    scale over all ranks.
    """
    if not rank:
        return residual.new_zeros(len(residual), 0), residual.new_zeros(0, residual.shape[1])
    if sizes is not None:
        sizes = sizes.clamp_min(1e-6 * sizes.max())  # an input that never fires must not be divided by
        up, down = low_rank(residual * sizes, rank)
        return up, down / sizes
    if rank * 8 < min(residual.shape):  # a few leading directions of a large matrix: randomised
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(residual, q=min(rank + 16, *residual.shape), niter=4)
    else:
        u, s, vh = torch.linalg.svd(residual, full_matrices=False)
        v = vh.T
    pad = max(0, rank - len(s))  # a rank above that of the matrix: zeros
    u, s, v = (torch.nn.functional.pad(t, (0, pad)) for t in (u, s, v))
    return u[:, :rank].contiguous(), (s[:rank, None] * v[:, :rank].T).contiguous()


def binary_linear_from(weight: Tensor, rank: int, planes: int, sizes: Tensor | None = None) -> BinaryLinear:
    """A trainable projection that starts at the approximation of weight[M,K] without data but `sizes`, see low_rank."""
    with torch.device("meta"):
        linear = BinaryLinear(weight.shape[1], weight.shape[0], rank, planes)
    latent, scale, residual = binarize(weight.detach(), planes)
    try:
        up, down = low_rank(residual, rank, sizes)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined] # of sums that fp32 does not hold
        most = f"a projection has weights up to {weight.abs().max():.3g}"
        raise DfssmError(
            f"{most}, too large to convert ({reason(error)}): copy or train the checkpoint again"
        ) from None
    if planes == 1:
        latent, scale = latent[0], scale[0]
    linear.load_state_dict({"latent": latent, "scale": scale, "down": down, "up": up}, assign=True)
    return linear.requires_grad_(True)


def trainable_from(weight: Tensor, tensors: dict[str, Tensor]) -> BinaryLinear:
    """A trainable projection that starts at a packed one, of which these are the `tensors` by name.

    A latent has the sign that the bit has, and the size of what the larger planes leave of weight[M,K], in units of its
    scale: what weighs little is near to flipping.
    """
    signs, scale = unpack_bits(tensors["bits"]), tensors["scale"]
    down, up = (tensors[part] * tensors[f"{part}_scale"][:, None] for part in ("down", "up"))
    planes = list(zip(signs, scale, strict=True)) if signs.ndim == 3 else [(signs, scale)]
    rest, latents = weight.detach().float() - up @ down, []
    for sign, size in planes:
        latents.append(sign * (rest / size[:, None].clamp_min(_TINY)).abs().clamp_min(_NEAR))
        rest = rest - size[:, None] * sign
    latent = torch.stack(latents).view(signs.shape)
    with torch.device("meta"):
        linear = BinaryLinear(weight.shape[1], weight.shape[0], len(down), len(planes))
    values = {"latent": latent, "scale": scale.clone(), "down": down, "up": up}
    linear.load_state_dict(values, assign=True)
    return linear.requires_grad_(True)


def student_from_teacher(
    teacher: Mamba2LM,
    rank: int | tuple[int, ...] = 16,
    planes: int | tuple[int, ...] = 1,
    sizes: dict[str, Tensor] | None = None,
    tensors: dict[str, Tensor] | None = None,
) -> DFSSMLM:
    """A trainable student that starts at the data-free conversion of `teacher`; float parts are copies.

    `sizes`: of the inputs of each projection, by its name (layers.0.in_proj), see low_rank. `tensors`: of model.pt, as
    whose projections it starts instead.
    """
    config = DFSSMConfig.from_teacher(teacher.config, rank, planes)
    student = DFSSMLM(config).to(teacher.norm_f.weight.device)
    shared = dict(teacher.state_dict())
    for weight in weights(config):
        if weight.form == SCAFFOLD:
            value = shared.pop(weight.name)
            if tensors:
                parts = {name: tensors[weight.part(name)] for name in PARTS[SCAFFOLD]}
                linear = trainable_from(value, parts)
            else:
                linear = binary_linear_from(value, *config.scaffold(weight.path), sizes[weight.path] if sizes else None)
            student.set_submodule(weight.path, linear)
    student.load_state_dict(student.state_dict() | shared)
    return student


@torch.no_grad()
def convert(
    teacher: Mamba2LM, rank: int | tuple[int, ...] = 16, planes: int | tuple[int, ...] = 1
) -> tuple[DFSSMConfig, dict[str, Tensor]]:
    """Data-free student of `teacher`: sign, row mean |w|, rank-R SVD of the residual, int8 rows.

    Returns the configuration and the tensors of model.pt; one projection is held in fp32 at a time.
    """
    config = DFSSMConfig.from_teacher(teacher.config, rank, planes)
    return config, packed(
        teacher, config, lambda path, value: binary_linear_from(value, *config.scaffold(path)).export_tensors()
    )


@torch.no_grad()
def packed(
    teacher: Mamba2LM, config: DFSSMConfig, projection: Callable[[str, Tensor], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of model.pt: those that `projection` makes of each projection's path and weight[M,K], the token
    tables as int8 rows, all else as the teacher has it.
    """
    floats = teacher.state_dict()
    tensors: dict[str, Tensor] = {}
    for weight in weights(config):
        value = floats[weight.name]
        if weight.form == SCAFFOLD:
            made = projection(weight.path, value)
            tensors |= {weight.part(name): tensor for name, tensor in made.items()}
        elif weight.form == ROWS:
            q, scale = quantize_rows(value)
            tensors |= {weight.name: q.to(torch.int8), weight.part("scale"): scale.clone()}
        else:
            tensors[weight.name] = value.float().clone()
    return tensors


def init_student(
    shape: Mamba2Config, seed: int = 0, rank: int = 16, planes: int = 1
) -> tuple[DFSSMConfig, dict[str, Tensor]]:
    """A packed random student of the shape of `shape`; a DFSSMConfig brings its own rank and planes.

    Same seed, same tensors. Scales keep every layer's activations near unit variance and the logits' standard
    deviation near 2, so that numbers are those of a real model though the text is not. Returns configuration
    and tensors.
    """
    config = shape if isinstance(shape, DFSSMConfig) else DFSSMConfig.from_teacher(shape, rank, planes)
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=g)

    def codes(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, generator=g)

    code_std = 127 / math.sqrt(3)  # of the uniform codes

    def rows(vocab: int, width: int) -> dict[str, Tensor]:
        std = 2 / math.sqrt(width)
        return {"weight": codes(vocab, width), "scale": uniform(0.8, 1.2, vocab) * (std / code_std)}

    def scaffold(m: int, k: int, of: Scaffold, gain: float) -> dict[str, Tensor]:
        rank, planes = of
        lead = (planes,) if planes > 1 else ()
        std = gain / math.sqrt(k)  # of a weight
        correction = 0.3 * gain / math.sqrt(max(rank, 1)) / code_std
        return {
            "bits": torch.randint(0, 256, (*lead, m, k // 8), dtype=torch.uint8, generator=g),
            "scale": uniform(0.5, 1.5, *lead, m) * (std / math.sqrt(planes)),
            "down": codes(rank, k),
            "down_scale": uniform(0.5, 1.5, rank) * (1 / math.sqrt(k) / code_std),
            "up": codes(m, rank),
            "up_scale": uniform(0.5, 1.5, m) * (correction if rank else 0.0),
        }

    tensors: dict[str, Tensor] = {}
    for _, layer in groupby(weights(config), lambda weight: weight.name.split(".")[:2]):
        # A layer's dt_bias is drawn first: it was when the seeds got their students.
        for weight in sorted(layer, key=lambda weight: weight.init != "dt_bias"):
            size = weight.shape(config)
            if weight.form == FLOAT:
                value = initial(weight.init, size, config.d_conv, g)
                # fp16 numbers, as in the published checkpoints
                tensors[weight.name] = value.half().float() if weight.role == "convolution" else value
                continue
            if weight.form == ROWS:
                found = rows(*size)
            else:
                gain = 1 / math.sqrt(config.n_layer) if weight.init == "residual" else 1.0
                m, k = size
                found = scaffold(m, k, config.scaffold(weight.path), gain)
            tensors |= {weight.part(name): tensor for name, tensor in found.items()}
    return config, tensors
