"""The config.json of Mamba-2 checkpoints: transformers' and mamba_ssm's are read, transformers' is written.

Strict: an option that this project has no arithmetic for is a DfssmError that names it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dfssm.base import paths
from dfssm.base.errors import DfssmError
from dfssm.base.reading import read_text

from .config import Mamba2Config

_NO_LIMIT = (0.0, math.inf)

# The ssm_cfg of mamba_ssm's Mamba2, in three parts: what a configuration keeps; what is refused unless it has
# one of these values, the first the default; and what initialises or picks a kernel but is not the function.
_SSM_KEPT = {"layer", "d_state", "headdim", "expand", "ngroups", "d_conv", "dt_limit", "conv_bias", "d_ssm"}
_SSM_ONLY = {
    "bias": (False,),
    "rmsnorm": (True,),
    "norm_before_gate": (False,),
    "D_has_hdim": (False,),
    "activation": ("swish", "silu"),
}
_SSM_IGNORED = {"A_init_range", "dt_min", "dt_max", "dt_init_floor", "conv_init"}
_SSM_IGNORED |= {"chunk_size", "use_mem_eff_path", "sequence_parallel"}

# Ours -> transformers' names of what both write as whole numbers, and its default.
_SIZES: dict[str, tuple[str, int | None]] = {
    "vocab_size": ("vocab_size", None),
    "d_model": ("hidden_size", None),
    "n_layer": ("num_hidden_layers", None),
    "d_state": ("state_size", 128),
    "headdim": ("head_dim", 64),
    "expand": ("expand", 2),
    "ngroups": ("n_groups", 8),
    "d_conv": ("conv_kernel", 4),
}


def read_config(path: Path) -> tuple[Mamba2Config, bool]:
    """The Mamba2Config of a config.json of either layout, and whether its convolutions have a bias."""
    options = _Options(str(path), read_json(path))
    if "ssm_cfg" in options.values:
        parse = _from_mamba_ssm
    elif options.values.get("model_type") == "mamba2":
        parse = _from_transformers
    else:
        found = options.values.get("model_type")
        raise DfssmError(f"{path}: model_type is {found!r}; it must be 'mamba2', or have ssm_cfg (mamba_ssm)")
    fields, conv_bias = parse(options)
    try:
        return Mamba2Config(**fields), conv_bias
    except DfssmError as error:
        raise DfssmError(f"{path}: {error}") from None


def hf_config(config: Mamba2Config, dtype: str) -> dict[str, Any]:
    """The config.json of transformers' Mamba2ForCausalLM; `dtype` is the name of the weights' type."""
    values = {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "torch_dtype": dtype,
        **{theirs: getattr(config, ours) for ours, (theirs, _) in _SIZES.items()},
        "num_heads": config.nheads,
        "norm_groups": config.norm_groups,
        "chunk_size": config.chunk_size,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": None,
    }
    # The default is left out, since versions differ in how they write infinity.
    return values if config.dt_limit == _NO_LIMIT else values | {"time_step_limit": list(config.dt_limit)}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint; DfssmError if it is missing or is none."""
    try:
        # Editors of Windows put a byte order mark in front.
        values = json.loads(read_text(paths.file(path, "the file of that name of a checkpoint"), "utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DfssmError(f"{path}: is not JSON ({error}); copy the checkpoint again") from None
    if not isinstance(values, dict):
        raise DfssmError(f"{path}: is not a JSON object; copy the checkpoint again")
    return values


class _Options:
    """A JSON object whose every failed look-up names the key and the file."""

    def __init__(self, source: str, values: dict[str, Any]):
        self.source, self.values = source, values

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name, default)
        if value is None:
            raise DfssmError(f"{self.source}: {name} is missing; copy the checkpoint's own config.json")
        if type(value) is float and value.is_integer():
            value = int(value)  # as other languages write it
        if type(value) is not int:
            raise DfssmError(f"{self.source}: {name} is {value!r}; it must be an integer")
        return value

    def only(self, name: str, *allowed: Any) -> Any:
        """The value of `name`, which must be among `allowed`; the first of them is the default."""
        value = self.values.get(name, allowed[0])
        if value not in allowed:
            choice = " or ".join(map(repr, allowed))
            raise DfssmError(f"{self.source}: {name} is {value!r}, which is not supported; it must be {choice}")
        return value

    def dt_limit(self, name: str) -> Any:
        """Null is no limit. transformers 5 writes infinity as {"__float__": "Infinity"}; JSON has none."""
        bounds = self.values.get(name)
        if type(bounds) is not list:
            return _NO_LIMIT if bounds is None else bounds
        infinity = {"__float__": "Infinity"}
        found = [math.inf if bound == infinity else bound for bound in bounds]
        return [0.0, *found[1:]] if found[:1] == [None] else found


def _from_transformers(options: _Options) -> tuple[dict[str, Any], bool]:
    # Not looked at: norm_before_gate, which says true in converted checkpoints (Codestral Mamba) trained with
    # the gate first, and which transformers never read; residual_in_fp32, since all is fp32 here.
    options.only("use_bias", False)
    options.only("hidden_act", "silu", "swish")
    options.only("rms_norm", True)
    options.only("quantization_config", None)
    sizes = {ours: options.integer(*theirs) for ours, theirs in _SIZES.items()}
    heads, inner = options.integer("num_heads"), sizes["expand"] * sizes["d_model"]
    if heads * sizes["headdim"] != inner:
        found = f"num_heads * head_dim is {heads * sizes['headdim']} and expand * hidden_size {inner}"
        raise DfssmError(f"{options.source}: {found}; they must be equal")
    fields = sizes | {
        "norm_eps": options.values.get("layer_norm_epsilon", 1e-5),
        "tie_embeddings": options.only("tie_word_embeddings", False, True),
        "dt_limit": options.dt_limit("time_step_limit"),
        # One rms a group, as mamba_ssm trains, and as transformers does since it mended its one rms over all
        # groups. A model that was trained with the latter says so by a key of ours: "norm_groups": 1.
        "norm_groups": options.integer("norm_groups", sizes["ngroups"]),
        "bos_token_id": options.values.get("bos_token_id"),
        "eos_token_id": options.values.get("eos_token_id"),
    }
    return fields, options.only("use_conv_bias", True, False)


def _from_mamba_ssm(options: _Options) -> tuple[dict[str, Any], bool]:
    options.only("d_intermediate", 0)  # an MLP in every layer
    options.only("attn_layer_idx", [], None)
    options.only("rms_norm", True)
    if not isinstance(options.values["ssm_cfg"], dict):
        raise DfssmError(f"{options.source}: ssm_cfg is not a JSON object; copy the checkpoint's own config.json")
    ssm = _Options(f"{options.source}: ssm_cfg", options.values["ssm_cfg"])
    layer = ssm.values.get("layer", "Mamba1")  # mamba_ssm's default
    if layer != "Mamba2":
        raise DfssmError(f"{ssm.source}: layer is {layer!r}, which is not supported; it must be 'Mamba2'")
    for name, allowed in _SSM_ONLY.items():
        ssm.only(name, *allowed)
    d_model, expand, groups = options.integer("d_model"), ssm.integer("expand", 2), ssm.integer("ngroups", 1)
    ssm.only("d_ssm", None, expand * d_model)  # fewer SSM channels would make the others an MLP
    unknown = set(ssm.values) - _SSM_KEPT - set(_SSM_ONLY) - _SSM_IGNORED
    if unknown:
        raise DfssmError(f"{ssm.source}: {min(unknown)} is not an option of Mamba-2 that is supported")
    vocab, multiple = options.integer("vocab_size"), options.integer("pad_vocab_size_multiple", 8)
    fields = {
        "vocab_size": vocab + -vocab % max(multiple, 1),
        "d_model": d_model,
        "n_layer": options.integer("n_layer"),
        "d_state": ssm.integer("d_state", 128),
        "headdim": ssm.integer("headdim", 64),
        "expand": expand,
        "ngroups": groups,
        "d_conv": ssm.integer("d_conv", 4),
        "tie_embeddings": options.only("tie_embeddings", True, False),
        "dt_limit": ssm.dt_limit("dt_limit"),
        "norm_groups": groups,
    }
    return fields, ssm.only("conv_bias", True, False)
