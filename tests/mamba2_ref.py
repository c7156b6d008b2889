"""Oracles of the teacher: the recurrence in plain float64 NumPy, and transformers' Mamba2ForCausalLM."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# What is varied against transformers: every value of every option, each beside several of the others.
GRID = [
    dict(ngroups=1, headdim=64, d_state=16, d_conv=4, tied=True),
    dict(ngroups=2, headdim=32, d_state=64, d_conv=3, tied=False),
    dict(ngroups=4, headdim=64, d_state=128, d_conv=2, tied=True),
    dict(ngroups=1, headdim=32, d_state=256, d_conv=3, tied=False),
    dict(ngroups=2, headdim=64, d_state=16, d_conv=2, tied=False),
    dict(ngroups=4, headdim=32, d_state=16, d_conv=4, tied=True),
    dict(ngroups=1, headdim=64, d_state=128, d_conv=2, tied=False),
    dict(ngroups=2, headdim=32, d_state=256, d_conv=4, tied=True),
    dict(ngroups=4, headdim=64, d_state=64, d_conv=3, tied=False),
]


def scan_ref(x, dt, B, C, A_log, D, dt_bias, state, ngroups=1, dt_limit=(0.0, np.inf)):
    """What model.functional.selective_scan_step computes, head by head and token by token in float64."""
    x, dt, B, C, A_log, D, dt_bias, state = (np.asarray(a, np.float64) for a in (x, dt, B, C, A_log, D, dt_bias, state))
    batch, heads, N, P = state.shape
    y, state = np.empty_like(x), state.copy()
    for b in range(batch):
        for t in range(x.shape[1]):
            for h in range(heads):
                group = slice(h // (heads // ngroups) * N, (h // (heads // ngroups) + 1) * N)
                channels = slice(h * P, (h + 1) * P)
                d = np.clip(np.logaddexp(0.0, dt[b, t, h] + dt_bias[h]), *dt_limit)
                state[b, h] = np.exp(-np.exp(A_log[h]) * d) * state[b, h]
                state[b, h] += d * np.outer(B[b, t, group], x[b, t, channels])
                y[b, t, channels] = C[b, t, group] @ state[b, h] + D[h] * x[b, t, channels]
    return y, state


def hf_model(ngroups=1, headdim=32, d_state=16, d_conv=4, tied=True, seed=0, **options):
    """A small Mamba2ForCausalLM, every weight random: the initial ones and zeros would hide mistakes."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=41, hidden_size=128, num_hidden_layers=2, expand=2, num_heads=256 // headdim,
        head_dim=headdim, n_groups=ngroups, state_size=d_state, conv_kernel=d_conv,
        tie_word_embeddings=tied, chunk_size=8, **options,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Mamba2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", ".D")):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("A_log"):
                parameter.uniform_(0.0, 2.8)
            elif name.endswith("dt_bias"):
                parameter.uniform_(-4.0, 0.0)
            elif name.endswith("conv1d.bias"):
                parameter.uniform_(-0.3, 0.3)
            elif name.endswith("embeddings.weight"):
                parameter.normal_()
    return model


def hf_norm_groups(model) -> int:
    """The groups of the gated norm in the installed transformers, by what it does; older ones took one."""
    norm, groups = model.backbone.layers[0].mixer.norm, model.config.n_groups
    gate = torch.full((1, 1, norm.weight.numel()), 2.0)
    x = torch.ones_like(gate)
    x[..., : norm.weight.numel() // groups] = 100.0
    with torch.no_grad():
        # Grouped, each group comes out with an rms of 1 whatever its size was.
        last = (norm(x, gate) / norm.weight)[0, 0, -1]
    return groups if abs(last.item() - 1.0) < 1e-3 else 1


def hf_folder(model, path: Path, **save_options) -> Path:
    """save_pretrained, with the groups that the installed version computes with written into config.json."""
    model.save_pretrained(path, **save_options)
    edit_json(path / "config.json", norm_groups=hf_norm_groups(model))
    return path


def hf_states(cache, layer: int) -> tuple[Tensor, Tensor]:
    """(conv [B,C,W], ssm [B,H,P,N]) of a layer of transformers' cache; its attributes have moved."""
    if hasattr(cache, "layers"):
        conv, ssm = cache.layers[layer].conv_states, cache.layers[layer].recurrent_states
        return (conv[0], ssm[0]) if isinstance(conv, dict) else (conv, ssm)
    return cache.conv_states[layer], cache.ssm_states[layer]


def edit_json(path: Path, **changes) -> None:
    """Set keys of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
