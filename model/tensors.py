"""The table of the weights: of each its name and shape, its name in published checkpoints, how it begins, what of it a
student holds, and as what that is counted.

Import, conversion, checkpoints, random students, the ledger and the plan of a training follow it. The modules that
compute with these weights have parameters of the same names (`teacher`, `student`). Standard library only.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

from .config import DFSSMConfig, Mamba2Config, Scaffold

ROLES = ("scaffold", "low rank", "head", "embedding", "convolution", "scan", "norms")

FLOAT, ROWS, SCAFFOLD = "float", "rows", "scaffold"
"""Forms of a weight in a student: as it is; int8 with a scale a row; signs with a scale a row, and an int8 low rank."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight of the teacher; names inside a layer begin after `layers.{i}.` and `backbone.layers.{i}.`.

    `dims` are attributes of Mamba2Config, or numbers; `source` is the name in checkpoints of transformers, where the
    tensor may have other dims, and `alias` that of mamba_ssm, where it differs. `init`: see `teacher.initial`.
    """

    name: str
    dims: tuple[str, ...]
    role: str
    init: str
    source: str
    form: str = FLOAT
    source_dims: tuple[str | int, ...] = ()
    alias: str = ""

    def shape(self, config: Mamba2Config) -> tuple[int, ...]:
        return tuple(getattr(config, dim) for dim in self.dims)

    def source_shape(self, config: Mamba2Config) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else getattr(config, d) for d in self.source_dims or self.dims)

    @property
    def path(self) -> str:
        """Of the module that holds it."""
        return self.name.removesuffix(".weight")

    def part(self, name: str) -> str:
        """The name in model.pt of what a student holds of it, see PARTS."""
        return self.name.removesuffix("weight") + name if name else self.name

    def in_layer(self, i: int) -> Weight:
        """The weight of layer i, by its full names."""
        return dataclasses.replace(self, name=f"layers.{i}.{self.name}", source=f"backbone.layers.{i}.{self.source}")


_D, _INNER, _HEADS = ("d_model",), ("d_inner",), ("nheads",)
_TABLE = ("vocab_size", "d_model")

EMBEDDING = Weight(
    "embedding.weight", _TABLE, "embedding", "embedding", "backbone.embeddings.weight", ROWS,
    alias="backbone.embedding.weight",
)  # fmt: skip
LAYER = (
    Weight("norm.weight", _D, "norms", "ones", "norm.weight"),
    Weight("in_proj.weight", ("d_in_proj", "d_model"), "scaffold", "linear", "mixer.in_proj.weight", SCAFFOLD),
    Weight("conv.weight", ("conv_dim", "d_conv"), "convolution", "conv", "mixer.conv1d.weight",
           source_dims=("conv_dim", 1, "d_conv")),
    Weight("conv.bias", ("conv_dim",), "convolution", "conv", "mixer.conv1d.bias"),
    Weight("scan.A_log", _HEADS, "scan", "A_log", "mixer.A_log"),
    Weight("scan.D", _HEADS, "scan", "ones", "mixer.D"),
    Weight("scan.dt_bias", _HEADS, "scan", "dt_bias", "mixer.dt_bias"),
    Weight("gated_norm.weight", _INNER, "norms", "ones", "mixer.norm.weight"),
    Weight("out_proj.weight", ("d_model", "d_inner"), "scaffold", "residual", "mixer.out_proj.weight", SCAFFOLD),
)  # fmt: skip
NORM = Weight("norm_f.weight", _D, "norms", "ones", "backbone.norm_f.weight")
HEAD = Weight("lm_head.weight", _TABLE, "head", "embedding", "lm_head.weight", ROWS)  # of an untied model


def weights(config: Mamba2Config) -> list[Weight]:
    """Every weight of a teacher of this configuration, by its full name, in the order of model.pt."""
    layers = [weight.in_layer(i) for i in range(config.n_layer) for weight in LAYER]
    return [EMBEDDING, *layers, NORM, *(() if config.tie_embeddings else (HEAD,))]


class Part(NamedTuple):
    """One of the tensors that a student holds of a weight: dtype, by torch's and NumPy's name; shape, from that of the
    weight, a projection's from its Scaffold too; and role, where that is not the weight's."""

    dtype: str
    shape: Callable[..., tuple[int, ...]]
    role: str = ""


def _planes(scaffold: Scaffold) -> tuple[int, ...]:
    """The leading axis of what there is of each plane; none where there is one."""
    return (scaffold.planes,) if scaffold.planes > 1 else ()


PARTS: dict[str, dict[str, Part]] = {
    FLOAT: {"": Part("float32", lambda *shape: shape)},
    ROWS: {"weight": Part("int8", lambda m, k: (m, k)), "scale": Part("float32", lambda m, k: (m,))},
    SCAFFOLD: {  # the tensors of BinaryScaffoldMatMul, in the order of its inputs
        "bits": Part("uint8", lambda m, k, of: (*_planes(of), m, k // 8)),
        "scale": Part("float32", lambda m, k, of: (*_planes(of), m)),
        "down": Part("int8", lambda m, k, of: (of.rank, k), "low rank"),
        "down_scale": Part("float32", lambda m, k, of: (of.rank,), "low rank"),
        "up": Part("int8", lambda m, k, of: (m, of.rank), "low rank"),
        "up_scale": Part("float32", lambda m, k, of: (m,), "low rank"),
    },
}


class Tensor(NamedTuple):
    """A tensor of model.pt."""

    shape: tuple[int, ...]
    dtype: str
    role: str


def student_tensors(config: DFSSMConfig) -> dict[str, Tensor]:
    """Every tensor of a student of this configuration by its name, in the order of model.pt."""
    found = {}
    for weight in weights(config):
        sizes = [*weight.shape(config), *([config.scaffold(weight.path)] if weight.form == SCAFFOLD else [])]
        for name, part in PARTS[weight.form].items():
            found[weight.part(name)] = Tensor(part.shape(*sizes), part.dtype, part.role or weight.role)
    return found


_ROLES = {
    weight.part(n): p.role or weight.role
    for weight in (EMBEDDING, *LAYER, NORM, HEAD)
    for n, p in PARTS[weight.form].items()
}


def role(tensor: str) -> str:
    """As what a tensor of model.pt is counted, one of ROLES. KeyError for a name that is not of that format."""
    found = _ROLES.get(re.sub(r"^layers\.\d+\.", "", tensor))
    if found is None:
        raise KeyError(tensor)
    return found
