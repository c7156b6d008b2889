"""The Mamba-2 language model: the teacher, and the block structure that the DF-SSM student shares.

Parameter names are those of the student's checkpoint, so that inherited parts are named alike in both.
The projections and the token tables are made by injected factories; the teacher's are float.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfssm.base.errors import DfssmError
from dfssm.base.tokens import token_rows
from dfssm.opset.hidden import Hidden, Patch, hidden_of_rows

from .config import Mamba2Config
from .functional import causal_conv1d, gated_rms_norm, rms_norm, selective_scan_step, ssd_chunked

LinearFactory = Callable[[int, int], nn.Module]  # (in, out) -> module mapping [..., in] to [..., out]
EmbeddingFactory = Callable[[int, int], "TokenTable"]  # (vocab, d_model) -> module
Tap = Callable[[int, Tensor], Tensor]
"""Called with a layer, 0 for the embedding, and the residual stream after it [B,T,D]: what the next one gets."""


@dataclasses.dataclass
class Mamba2State:
    """What a model remembers: per layer the convolution's last tokens and the SSM state."""

    conv: list[Tensor]  # n_layer x [B, conv_dim, d_conv - 1], newest token last
    ssm: list[Tensor]  # n_layer x [B, nheads, d_state, headdim]

    @classmethod
    def zeros(
        cls,
        config: Mamba2Config,
        batch: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The state before the first token."""
        shapes = [(batch, *shape) for _, shape in config.states().values()]
        return cls(*([torch.zeros(s, device=device, dtype=dtype) for _ in range(config.n_layer)] for s in shapes))

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The state of `function` of each tensor."""
        parts = (getattr(self, field.name) for field in dataclasses.fields(self))
        return type(self)(*(part and list(map(function, part)) for part in parts))

    def detach(self) -> Self:
        """The same values cut off from the graph: truncated back-propagation through time."""
        return self.map(Tensor.detach)

    def widen(self) -> Mamba2State:
        """With the SSM state in the dtype of the arithmetic, as it is here."""
        return self


class RMSNorm(nn.Module):
    """functional.rms_norm with its weight: [..., channels] to the same."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """functional.gated_rms_norm with its weight: two [..., channels] to one."""

    def __init__(self, channels: int, eps: float, groups: int):
        super().__init__()
        self.eps, self.groups = eps, groups
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return gated_rms_norm(y, z, self.weight, self.eps, self.groups)


def initial(init: str, shape: tuple[int, ...], d_conv: int, generator: torch.Generator | None = None) -> Tensor:
    """Initial values of a weight that stays float, by its `init` in the table: those of mamba_ssm, f32[shape].

    A uniform in [1, 16], step size log-uniform in [0.001, 0.1], the convolution as nn.Conv1d with one input channel a
    group; all else is 1.
    """

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator)

    if init == "conv":
        bound = 1 / math.sqrt(d_conv)
        return uniform(-bound, bound)
    if init == "A_log":
        return uniform(1.0, 16.0).log()
    if init == "dt_bias":
        step = uniform(math.log(1e-3), math.log(0.1)).exp()
        return step + torch.log(-torch.expm1(-step))  # inverse of softplus
    return torch.ones(shape)


class CausalConv1d(nn.Module):
    """functional.causal_conv1d, with SiLU, and its parameters: [B,T,channels] and a state to the same."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(initial("conv", (channels, width), width))
        self.bias = nn.Parameter(initial("conv", (channels,), width))

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv1d(x, state, self.weight, self.bias)


class SelectiveScan(nn.Module):
    """The SSM of one layer: the recurrence for a single token, the chunked form for more."""

    round_state: Callable[[Tensor], Tensor] | None = None  # of ssd_chunked, for training
    fused: Callable[..., tuple[Tensor, Tensor]] | None = None  # in its place, for training: fused_scan.Scan

    def __init__(self, config: Mamba2Config):
        super().__init__()
        dt_bias, A_log, D = (initial(init, (config.nheads,), config.d_conv) for init in ("dt_bias", "A_log", "ones"))
        self.A_log, self.D, self.dt_bias = nn.Parameter(A_log), nn.Parameter(D), nn.Parameter(dt_bias)
        self.ngroups, self.dt_limit, self.chunk_size = config.ngroups, config.dt_limit, config.chunk_size

    def forward(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        inputs = x, dt, B, C, self.A_log, self.D, self.dt_bias, state
        groups, limit = self.ngroups, self.dt_limit
        # A recurrence compounds the rounding of half types.
        with torch.autocast(x.device.type, enabled=False):
            if x.shape[1] == 1:
                return selective_scan_step(*inputs, ngroups=groups, dt_limit=limit)
            size, round_state = self.chunk_size, self.round_state
            if self.fused and round_state is None:
                return self.fused(*inputs, ngroups=groups, dt_limit=limit, chunk_size=size)
            return ssd_chunked(*inputs, ngroups=groups, dt_limit=limit, chunk_size=size, round_state=round_state)


@dataclasses.dataclass(frozen=True)
class FixedHead:
    """A head with its weight rounded once. inputs(hidden)[...,D] times weight[V,D] transposed is project(hidden)[...,V]
    but for the order of rounding, and has its gradients.
    """

    project: Callable[[Tensor], Tensor]
    inputs: Callable[[Tensor], Tensor]
    weight: Tensor


class TokenTable(nn.Module):
    """Called with ids i64[...] it gives [...,D]; it is also, transposed, a head: tied models use one for both."""

    weight: Tensor

    def project(self, hidden: Tensor) -> Tensor:
        """hidden[..., D] -> logits[..., V]."""
        return F.linear(hidden, self.weight)

    def fixed(self) -> FixedHead:
        """This table as a head for many products in a row."""
        return FixedHead(self.project, lambda hidden: hidden, self.weight)


class Embedding(TokenTable, nn.Embedding):
    """The teacher's, in float."""


def _linear(in_features: int, out_features: int) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias=False)


class Mamba2Block(nn.Module):
    """One layer: hidden + out_proj(gated_norm(scan(conv(in_proj(norm(hidden)))), z))."""

    def __init__(self, config: Mamba2Config, linear: LinearFactory = _linear):
        super().__init__()
        state = config.ngroups * config.d_state
        self.in_proj_split = (config.d_inner, config.conv_dim, config.nheads)  # z | x, B, C | dt
        self.conv_split = (config.d_inner, state, state)  # x | B | C
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.in_proj = linear(config.d_model, config.d_in_proj)
        self.conv = CausalConv1d(config.conv_dim, config.d_conv)
        self.scan = SelectiveScan(config)
        self.gated_norm = GatedRMSNorm(config.d_inner, config.norm_eps, config.norm_groups)
        self.out_proj = linear(config.d_inner, config.d_model)

    def forward(self, hidden: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden[B,T,D] and the layer's states -> hidden[B,T,D] and the new states."""
        mixed, conv_state, ssm_state = self.mix(self.in_proj(self.norm(hidden)), conv_state, ssm_state)
        return hidden + self.out_proj(mixed), conv_state, ssm_state

    def mix(self, projected: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What lies between the projections: the output of in_proj [B,T,d_in_proj] -> the input of out_proj."""
        z, xBC, dt = projected.split(self.in_proj_split, dim=-1)
        xBC, conv_state = self.conv(xBC, conv_state)
        x, B, C = xBC.split(self.conv_split, dim=-1)
        y, ssm_state = self.scan(x, dt, B, C, ssm_state)
        return self.gated_norm(y, z), conv_state, ssm_state


class Mamba2LM(nn.Module):
    """Mamba-2 language model, initialised as mamba_ssm does from torch's global generator.

    `linear` and `embedding` make the projections and the token tables. A tied model has no lm_head: its embedding
    projects.
    """

    def __init__(self, config: Mamba2Config, linear: LinearFactory = _linear, embedding: EmbeddingFactory = Embedding):
        super().__init__()
        self.config = config
        self.embedding = embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Mamba2Block(config, linear) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else embedding(config.vocab_size, config.d_model)
        self._init_float_weights()

    @torch.no_grad()
    def _init_float_weights(self) -> None:
        """What torch's own defaults leave to do; modules of other kinds initialise themselves."""
        if isinstance(self.embedding, nn.Embedding):
            nn.init.normal_(self.embedding.weight, std=0.02)
        if isinstance(self.lm_head, nn.Embedding):
            nn.init.kaiming_uniform_(self.lm_head.weight, a=math.sqrt(5))
        for layer in self.layers:
            if isinstance(layer.out_proj, nn.Linear):  # GPT-2's scaling: the residual stream sums n_layer of them
                layer.out_proj.weight.div_(math.sqrt(self.config.n_layer))

    @property
    def head(self) -> TokenTable:
        return self.embedding if self.lm_head is None else self.lm_head

    def new_state(self, batch: int) -> Mamba2State:
        """The zero state for `batch` sequences, on the model's device."""
        weight = self.norm_f.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return Mamba2State.zeros(self.config, batch, weight.device, dtype)

    def hidden_states(
        self, input_ids: Tensor, state: Mamba2State | None = None, tap: Tap = lambda layer, hidden: hidden
    ) -> tuple[Tensor, Mamba2State]:
        """input_ids i64[B,T] -> the last layer's output [B,T,D] before norm_f, and the new state."""
        self._check(input_ids, state)
        state = self.new_state(input_ids.shape[0]) if state is None else state
        hidden, new = tap(0, self.embedding(input_ids)), Mamba2State([], [])
        for i, (layer, conv, ssm) in enumerate(zip(self.layers, state.conv, state.ssm, strict=True), 1):
            hidden, conv, ssm = layer(hidden, conv, ssm)
            hidden = tap(i, hidden)
            new.conv.append(conv)
            new.ssm.append(ssm)
        return hidden, new

    def hidden(
        self, ids: Any, layers: Sequence[int] | None = None, last: bool = True, patch: Patch | None = None
    ) -> Hidden:
        """The residual stream of prompts, in NumPy: arguments, result and errors are those of `Engine.hidden`."""
        rows, c = token_rows(ids, self.config.vocab_size), self.config
        return hidden_of_rows(self._tapped, rows, c.n_layer, c.d_model, layers, last, patch)

    @torch.inference_mode()
    def _tapped(self, ids: np.ndarray, layers: list[int], last: bool, patch: Patch) -> tuple[np.ndarray, np.ndarray]:
        """As `dfssm.opset.hidden.Run`."""
        device = self.norm_f.weight.device
        shown: dict[int, np.ndarray] = {}

        def tap(layer: int, hidden: Tensor) -> Tensor:
            if layer in patch:
                ours = torch.from_numpy(patch[layer]).to(hidden)
                hidden = torch.cat([hidden[:, :-1], ours[:, None]], dim=1)
            if layer in layers:
                shown[layer] = (hidden[:, -1] if last else hidden).float().cpu().numpy()
            return hidden

        if not layers and self.config.n_layer in patch:  # no block is asked, only the head
            hidden = torch.from_numpy(patch[self.config.n_layer]).to(self.norm_f.weight)[:, None]
        else:
            hidden, _ = self.hidden_states(torch.from_numpy(ids).to(device), tap=tap)
        logits = self.head.project(self.norm_f(hidden[:, -1])).float().cpu().numpy()
        return np.stack([shown[i] for i in layers]) if layers else np.empty((0, len(ids)), np.float32), logits

    def forward(
        self, input_ids: Tensor, state: Mamba2State | None = None, logits_to_keep: int = 0
    ) -> tuple[Tensor, Mamba2State]:
        """input_ids i64[B,T] -> logits[B,T,V] (the last `logits_to_keep` tokens; 0 = all) and the new state.

        `state` (None = zeros) continues an earlier call and is not changed. A bad shape raises DfssmError.
        """
        hidden, state = self.hidden_states(input_ids, state)
        return self.head.project(self.norm_f(hidden[:, -logits_to_keep:])), state

    def step(self, token_ids: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        """One token a sequence, token_ids i64[B] -> logits[B,V] and the new state."""
        logits, state = self.forward(token_ids[:, None], state)
        return logits[:, 0], state

    def _check(self, input_ids: Tensor, state: Mamba2State | None) -> None:
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            shape = list(input_ids.shape)
            raise DfssmError(f"input_ids has shape {shape}; it must be [batch, tokens] with at least one token")
        if state is not None and state.ssm[0].shape[0] != input_ids.shape[0]:
            batch = state.ssm[0].shape[0]
            raise DfssmError(f"the state holds {batch} sequences and input_ids {input_ids.shape[0]}; they must agree")
