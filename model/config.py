"""Configurations of Mamba-2 (teacher) and DF-SSM (student), strictly validated, and the published presets."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, Self

from dfssm.base.endings import end_ids
from dfssm.base.errors import DfssmError
from dfssm.opset.sizes import Sizes


@dataclasses.dataclass(frozen=True)
class Mamba2Config(Sizes):
    """Shape and arithmetic of a Mamba-2 language model, in elements. An invalid value raises DfssmError."""

    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    dt_limit: tuple[float, float] = (0.0, math.inf)  # clamp of softplus(dt + dt_bias)
    norm_groups: int = 1  # groups of the gated norm: 1 in transformers, ngroups in mamba_ssm
    chunk_size: int = 64  # tokens a chunk of the sequence form: speed and memory only, not the result
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None  # each ends a text, the first separates documents

    def __post_init__(self) -> None:
        self._require_int("d_conv", 2, 4)
        for name in (*(field.name for field in dataclasses.fields(Sizes)), "norm_groups", "chunk_size"):
            self._require_int(name, 1)
        if self.bos_token_id is not None:
            self._require_int("bos_token_id", 0, self.vocab_size - 1)
        # One id is a number, as ever in these files; only several are a list.
        ids = end_ids(self.eos_token_id, self.vocab_size)
        object.__setattr__(self, "eos_token_id", ids if len(ids) > 1 else ids[0] if ids else None)
        if type(self.tie_embeddings) is not bool:
            raise DfssmError(f"config: tie_embeddings is {self.tie_embeddings!r}; it must be true or false")
        if not _is_real(self.norm_eps) or not 0.0 < self.norm_eps < 1.0:
            raise DfssmError(f"config: norm_eps is {self.norm_eps!r}; it must be a number between 0 and 1")
        object.__setattr__(self, "dt_limit", _parse_dt_limit(self.dt_limit))
        self._require_divides("headdim", self.headdim, "d_inner (expand * d_model)", self.d_inner)
        self._require_divides("ngroups", self.ngroups, "the number of heads", self.nheads)
        self._require_divides("norm_groups", self.norm_groups, "d_inner (expand * d_model)", self.d_inner)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; an infinite dt_limit is null, since JSON has no infinity."""
        values = dataclasses.asdict(self)
        values["dt_limit"] = [None if math.isinf(bound) else bound for bound in self.dt_limit]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """The inverse of to_dict. An unknown or missing key raises DfssmError that names it."""
        if not isinstance(values, dict):
            raise DfssmError(f"config: expected a mapping of names to values, found {type(values).__name__}")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = [name for name in values if name not in fields]
        if unknown:
            raise DfssmError(f"config: unknown key {unknown[0]!r}; {cls.__name__} has {', '.join(fields)}")
        required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
        missing = [name for name in required if name not in values]
        if missing:
            raise DfssmError(f"config: {missing[0]!r} is missing; it has no default, so it must be given")
        return cls(**values)

    def _require_int(self, name: str, low: int, high: int | None = None) -> None:
        self._check_int(name, getattr(self, name), low, high)

    @staticmethod
    def _check_int(name: str, value: Any, low: int, high: int | None = None) -> None:
        if type(value) is not int or value < low or (high is not None and value > high):
            bounds = f">= {low}" if high is None else f"{low}..{high}"
            raise DfssmError(f"config: {name} is {value!r}; it must be an integer {bounds}")

    @staticmethod
    def _require_divides(name: str, divisor: int, whole_name: str, whole: int) -> None:
        if whole % divisor:
            raise DfssmError(f"config: {name} is {divisor}; it must divide {whole_name}, which is {whole}")


PROJECTIONS = ("in_proj", "out_proj")  # of a layer


class Scaffold(NamedTuple):
    """What a projection is made of."""

    rank: int
    planes: int


@dataclasses.dataclass(frozen=True)
class DFSSMConfig(Mamba2Config):
    """A Mamba2Config whose projections are binary scaffolds with an int8 low-rank correction.

    `rank` and `planes` are those of all projections, or of each: in_proj and out_proj of layer 0, of layer 1, and so
    on. Equal ones become a single number.
    """

    rank: int | tuple[int, ...] = 16  # of the correction; 0 = none
    planes: int | tuple[int, ...] = 1  # binary planes of the scaffold

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("rank", 0), ("planes", 1)):
            value, count = getattr(self, name), self.n_layer * len(PROJECTIONS)
            if not isinstance(value, list | tuple):
                self._require_int(name, least)
                continue
            if len(value) != count:
                what = f"config: {name} has {len(value)} numbers"
                raise DfssmError(f"{what}; give one, or one for each of the {count} projections")
            for i, number in enumerate(value):
                self._check_int(f"{name}[{i}]", number, least)
            object.__setattr__(self, name, tuple(value) if len(set(value)) > 1 else value[0])
        # A packed row is whole 32-bit words: BinaryScaffoldMatMul needs K % 32 == 0.
        for name in ("d_model", "d_inner"):
            if getattr(self, name) % 32:
                raise DfssmError(f"config: {name} is {getattr(self, name)}; a binary scaffold needs a multiple of 32")

    @classmethod
    def from_teacher(
        cls, teacher: Mamba2Config, rank: int | tuple[int, ...] = 16, planes: int | tuple[int, ...] = 1
    ) -> Self:
        """The student's configuration with the teacher's shape."""
        shared = {field.name: getattr(teacher, field.name) for field in dataclasses.fields(Mamba2Config)}
        return cls(**shared, rank=rank, planes=planes)

    @property
    def alike(self) -> bool:
        """Whether all projections have the same rank and as many planes."""
        return isinstance(self.rank, int) and isinstance(self.planes, int)

    @property
    def scaffolds(self) -> list[Scaffold]:
        """Of each projection, in the order of the model."""
        count = self.n_layer * len(PROJECTIONS)
        each = ([value] * count if isinstance(value, int) else value for value in (self.rank, self.planes))
        return list(map(Scaffold._make, zip(*each, strict=True)))

    def scaffold(self, path: str) -> Scaffold:
        """Of the projection `path`, layers.0.in_proj for example."""
        _, layer, name = path.split(".")
        at = int(layer) * len(PROJECTIONS) + PROJECTIONS.index(name)
        rank, planes = (value if isinstance(value, int) else value[at] for value in (self.rank, self.planes))
        return Scaffold(rank, planes)


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parse_dt_limit(value: Any) -> tuple[float, float]:
    bounds = tuple(value) if isinstance(value, list | tuple) else ()
    if len(bounds) == 2 and bounds[1] is None:
        bounds = (bounds[0], math.inf)
    if len(bounds) != 2 or not all(map(_is_real, bounds)) or not 0.0 <= bounds[0] < bounds[1]:
        raise DfssmError(
            f"config: dt_limit is {value!r}; it must be [low, high] with 0 <= low < high (null = no limit)"
        )
    try:
        return float(bounds[0]), float(bounds[1])
    except OverflowError:  # a whole number that no float holds
        raise DfssmError("config: dt_limit has a bound of over 300 digits; null means no limit") from None


# The state-spaces checkpoints: 50277 GPT-NeoX tokens, padded to a multiple of 16.
PRESETS: dict[str, Mamba2Config] = {
    name: Mamba2Config(vocab_size=50288, d_model=d_model, n_layer=n_layer, bos_token_id=0, eos_token_id=0)
    for name, d_model, n_layer in (
        ("mamba2-130m", 768, 24),
        ("mamba2-370m", 1024, 48),
        ("mamba2-780m", 1536, 48),
        ("mamba2-1.3b", 2048, 48),
        ("mamba2-2.7b", 2560, 64),
    )
}


def preset(name: str) -> Mamba2Config:
    """The configuration of a published checkpoint; an unknown name raises DfssmError with the known ones."""
    if name not in PRESETS:
        raise DfssmError(f"preset {name!r} is not known; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
