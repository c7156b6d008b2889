"""The DF-SSM student: the teacher's blocks with 1-bit projections, an int8 low rank and an int8 embedding.

Two forms, one arithmetic (`quant`): the trained form holds real-valued latents and quantises them in every
forward pass; the packed form holds what model.pt holds and unpacks one projection at a time.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfssm.base.errors import DfssmError
from dfssm.opset.schema import STATE_DTYPES

from .checkpoint import load_student_tensors
from .config import DFSSMConfig, Scaffold
from .quant import (
    binary_scaffold_matmul,
    dequantized,
    half,
    int8_matmul,
    pack_bits,
    quantize_rows,
    quantize_state,
    trained_int8_matmul,
    trained_scaffold_matmul,
    unpack_bits,
)
from .teacher import FixedHead, Mamba2LM, Mamba2State, Tap, TokenTable
from .tensors import FLOAT, PARTS, SCAFFOLD, weights


class BinaryLinear(nn.Module):
    """A projection in training: latents whose sign is the scaffold, a scale a row, latents of the low rank.

    Shapes as in `quant.binary_scaffold_matmul`: latent and scale gain a leading axis when planes > 1. Latents
    are in units of their row's scale: every weight is then as far from flipping, for one learning rate,
    whatever its row's size.
    """

    window = 1.5  # of the straight-through sign

    def __init__(self, in_features: int, out_features: int, rank: int, planes: int = 1):
        super().__init__()
        lead = (planes,) if planes > 1 else ()
        self.latent = nn.Parameter(torch.randn(*lead, out_features, in_features))
        self.scale = nn.Parameter(torch.full((*lead, out_features), in_features**-0.5))
        self.down = nn.Parameter(torch.randn(rank, in_features) * in_features**-0.5)
        # Not zero, as low-rank adapters begin: a row of zeros has no scale, and would pass no gradient.
        self.up = nn.Parameter(torch.randn(out_features, rank) * in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return trained_scaffold_matmul(x, self.latent, self.scale, self.down, self.up, self.window)

    @torch.no_grad()
    def export_tensors(self) -> dict[str, Tensor]:
        """The tensors of the packed form, by name."""
        return export_projection(self.latent, self.scale, self.down, self.up)


class PackedBinaryLinear(nn.Module):
    """A projection as model.pt holds it, in tensors of these names (PARTS); unpacked for the length of a call."""

    def __init__(self, in_features: int, out_features: int, rank: int, planes: int = 1):
        super().__init__()
        for name, part in PARTS[SCAFFOLD].items():
            shape = part.shape(out_features, in_features, Scaffold(rank, planes))
            self.register_buffer(name, torch.empty(shape, dtype=getattr(torch, part.dtype)))

    def forward(self, x: Tensor) -> Tensor:
        bits, *others = self.buffers()
        return binary_scaffold_matmul(x, unpack_bits(bits), *others)


class Int8Embedding(TokenTable):
    """A token table in training, int8 a row in every forward pass."""

    def __init__(self, vocab_size: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, d_model) * 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        # Not self.weight[ids]: its gradient is summed on the CPU by atomic adds of several threads, in another order in
        # every run (test_the_table_has_one_gradient).
        return dequantized(F.embedding(ids, self.weight))

    def project(self, hidden: Tensor) -> Tensor:
        return trained_int8_matmul(hidden, self.weight)

    def fixed(self) -> FixedHead:
        q, scale = quantize_rows(self.weight)
        return FixedHead(lambda hidden: int8_matmul(hidden, q, scale), dequantized, q * scale[:, None])

    @torch.no_grad()
    def export_tensors(self) -> dict[str, Tensor]:
        """The tensors of the packed form, by name."""
        codes = _export_rows("weight", self.weight)
        return {"weight": codes["weight"], "scale": codes["weight_scale"]}


class PackedInt8Embedding(TokenTable):
    """A token table as model.pt holds it."""

    scale: Tensor

    def __init__(self, vocab_size: int, d_model: int):
        super().__init__()
        self.register_buffer("weight", torch.empty(vocab_size, d_model, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(vocab_size))

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids].float() * self.scale[ids, None]

    def project(self, hidden: Tensor) -> Tensor:
        return int8_matmul(hidden, self.weight, self.scale)


@dataclasses.dataclass
class DFSSMState(Mamba2State):
    """Mamba2State with ssm stored as fp32, fp16 or int8, the last with ssm_scale: n_layer x f32[B,H,N]."""

    ssm_scale: list[Tensor] | None = None

    @classmethod
    def narrow(cls, state: Mamba2State, state_dtype: str) -> Self:
        """Round an fp32 SSM state to its storage, as SelectiveScanStep does at the end of a call."""
        if state_dtype == "int8":
            codes, scales = zip(*map(quantize_state, state.ssm), strict=True)
            return cls(state.conv, list(codes), list(scales))
        return cls(state.conv, [half(t) if state_dtype == "fp16" else t for t in state.ssm])

    def widen(self) -> Mamba2State:
        """The stored SSM state as fp32."""
        ssm = [t.float() for t in self.ssm]
        if self.ssm_scale is not None:
            ssm = [t * s[..., None] for t, s in zip(ssm, self.ssm_scale, strict=True)]
        return Mamba2State(self.conv, ssm)


class DFSSMLM(Mamba2LM):
    """The student: `packed` chooses the form, `state_dtype` (fp32, fp16, int8) how the state is kept.

    Called as Mamba2LM is, with DFSSMState for the state; the SSM state is rounded at the end of a call.
    """

    config: DFSSMConfig

    def __init__(self, config: DFSSMConfig, packed: bool = False, state_dtype: str = "fp32"):
        if state_dtype not in STATE_DTYPES:
            known = ", ".join(STATE_DTYPES)
            raise DfssmError(f"state dtype {state_dtype!r} is not known; choose one of {known}")
        linear = PackedBinaryLinear if packed else BinaryLinear
        scaffolds = iter(config.scaffolds)  # projections are made in this order
        super().__init__(
            config,
            linear=lambda k, m: linear(k, m, *next(scaffolds)),
            embedding=PackedInt8Embedding if packed else Int8Embedding,
        )
        self.packed, self.state_dtype = packed, state_dtype

    def new_state(self, batch: int) -> DFSSMState:
        return DFSSMState.narrow(super().new_state(batch), self.state_dtype)

    def hidden_states(
        self, input_ids: Tensor, state: Mamba2State | None = None, tap: Tap = lambda layer, hidden: hidden
    ) -> tuple[Tensor, DFSSMState]:
        state = self.new_state(input_ids.shape[0]) if state is None else state
        hidden, new = super().hidden_states(input_ids, state.widen(), tap)
        return hidden, DFSSMState.narrow(new, self.state_dtype)

    @torch.no_grad()
    def export_tensors(self) -> dict[str, Tensor]:
        """The tensors of model.pt, by name: what a packed student holds, and what a trained one rounds to."""
        if self.packed:
            return dict(self.state_dict())
        tensors: dict[str, Tensor] = {}
        for prefix, module in self.named_modules():
            if isinstance(module, BinaryLinear | Int8Embedding):
                tensors |= {f"{prefix}.{name}": tensor for name, tensor in module.export_tensors().items()}
        floats = self.state_dict()
        kept = [weight.name for weight in weights(self.config) if weight.form == FLOAT]
        return tensors | {name: floats[name].detach().float().clone() for name in kept}

    def to_packed(self) -> DFSSMLM:
        """The packed form of this student."""
        return from_tensors(self.config, self.export_tensors(), self.state_dtype)


def from_tensors(config: DFSSMConfig, tensors: dict[str, Tensor], state_dtype: str = "fp32") -> DFSSMLM:
    """A packed student that uses `tensors` (names, shapes and dtypes of model.pt) without copying them."""
    with torch.device("meta"):
        model = DFSSMLM(config, packed=True, state_dtype=state_dtype)
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False).eval()


def load_student(path: str | Path, state_dtype: str = "fp32") -> DFSSMLM:
    """Read a model.pt or .safetensors into a packed student; DfssmError as `load_student_tensors`."""
    return from_tensors(*load_student_tensors(path), state_dtype)


def export_projection(latent: Tensor, scale: Tensor, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """The tensors of model.pt, by name (PARTS), of latents as a BinaryLinear has them."""
    return {
        "bits": pack_bits(latent),
        "scale": scale.detach().float().clone(),
        **_export_rows("down", down),
        **_export_rows("up", up),
    }


def _export_rows(name: str, weight: Tensor) -> dict[str, Tensor]:
    """int8 codes and row scales of a latent."""
    q, scale = quantize_rows(weight)
    return {name: q.to(torch.int8), f"{name}_scale": scale.clone()}
