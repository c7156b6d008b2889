"""Schemas of the `ai.dfssm` ops, version 1: names, dtypes, shapes, attributes. Standard library only.

This table is the single source of what an op takes: the NumPy references check their arguments against it, the ONNX
function bodies take their signatures from it, and `header.py` turns it into the C++ header both plugin trees include.

Shapes are written as in the docs, one token a dimension: a bare symbol (`B`) is bound by the first tensor that has it,
an expression (`K//8`) is checked once every symbol is bound. Attributes may be used as symbols.

Some inputs may be a range of columns of a wider tensor, so that a product's output need not be split. The attribute
that `Tensor.start` names says where the range begins: -1, the default, is the tensor itself, exactly as wide as its
shape says; with start >= 0 the op reads the columns [start, start + width) of a tensor with at least so many. The last
dimension of such a tensor binds no symbol.
"""

from dataclasses import dataclass

from .errors import DfssmError

DOMAIN = "ai.dfssm"
VERSION = 1

STATE_DTYPES = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
"""`--state-dtype` name -> NumPy dtype name of the stored SSM state."""

LAYOUT_CANONICAL, LAYOUT_ROW16 = 0, 1
"""Values of the attribute `layout` of BinaryScaffoldMatMul; `packing.py` defines both."""


@dataclass(frozen=True)
class Tensor:
    """One input or output: allowed dtypes (NumPy names), symbolic shape, and the attribute with its first column."""

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[str, ...]
    optional: bool = False
    start: str | None = None


@dataclass(frozen=True)
class Attribute:
    """One attribute with its default; `choices` lists the legal values where they are few, `least` bounds a number."""

    name: str
    default: int | float | str
    choices: tuple = ()
    least: int | None = None


@dataclass(frozen=True)
class Op:
    """One op: `inputs`, `outputs` and `attributes` in order, and `requires` as (expression, reason) pairs."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attributes: tuple[Attribute, ...] = ()
    requires: tuple[tuple[str, str], ...] = ()

    @property
    def defaults(self) -> dict:
        return {a.name: a.default for a in self.attributes}

    def resolve(self, attributes: dict) -> dict:
        """Defaults overlaid with `attributes`; an unknown name or an illegal value is a DfssmError."""
        known = {a.name: a for a in self.attributes}
        for name, value in attributes.items():
            if name not in known:
                raise DfssmError(f"{self.name}: unknown attribute '{name}'; known: {', '.join(known) or 'none'}")
            if known[name].choices and value not in known[name].choices:
                raise DfssmError(f"{self.name}: attribute '{name}' is {value!r}, expected one of {known[name].choices}")
            if known[name].least is not None and value < known[name].least:
                raise DfssmError(f"{self.name}: attribute '{name}' is {value!r}, expected at least {known[name].least}")
        return self.defaults | attributes

    def check(self, tensors: dict, attributes: dict | None = None) -> dict[str, int]:
        """Check dtypes and shapes of `tensors` (name -> anything with .shape and .dtype, None where absent).

        Returns the bound symbols (`{"B": 1, "T": 7, "K": 256, ...}`). Raises DfssmError naming op, input, expected
        and got.
        """
        attributes = self.resolve(attributes or {})
        symbols = {k: v for k, v in attributes.items() if isinstance(v, int)}
        present = []
        for spec in self.inputs:
            value = tensors.get(spec.name)
            if value is None:
                if not spec.optional:
                    raise DfssmError(f"{self.name}: input '{spec.name}' is missing")
                continue
            shape = spec.shape
            if shape[0] == "planes" and attributes["planes"] == 1:
                shape = shape[1:]
            if str(value.dtype) not in spec.dtypes:
                raise DfssmError(
                    f"{self.name}: input '{spec.name}' has dtype {value.dtype}, expected {' or '.join(spec.dtypes)}"
                )
            if len(value.shape) != len(shape):
                raise self._shape_error(spec, shape, value.shape, symbols)
            present.append((spec, shape, tuple(value.shape)))
        for spec, shape, got in present:
            for token, size in zip(shape[:-1] if in_wider(spec, attributes) else shape, got, strict=False):
                if token.isidentifier():
                    symbols.setdefault(token, size)
        for spec, shape, got in present:
            *lead, width = (_evaluate(token, symbols) for token in shape)
            if in_wider(spec, attributes):
                fits = tuple(lead) == got[:-1] and attributes[spec.start] + width <= got[-1]
            else:
                fits = (*lead, width) == got
            if not fits:
                raise self._shape_error(spec, shape, got, symbols)
        for expression, reason in self.requires:
            if not _evaluate(expression, symbols):
                raise DfssmError(f"{self.name}: {reason} (got {_used(expression, symbols)})")
        return symbols

    def _shape_error(self, spec, shape, got, symbols) -> DfssmError:
        def show(token):
            if not set(_names(token)) <= set(symbols):
                return token
            return f"{token}={symbols[token]}" if token in symbols else str(_evaluate(token, symbols))

        expected = [show(token) for token in shape]
        if in_wider(spec, symbols):
            expected[-1] = f">= {show(spec.start)} + {expected[-1]}"
        return DfssmError(f"{self.name}: input '{spec.name}' has shape {list(got)}, expected [{', '.join(expected)}]")


def in_wider(spec: Tensor, attributes: dict) -> bool:
    """Whether an op with these attributes reads `spec` as a range of columns of a wider tensor."""
    return spec.start is not None and attributes[spec.start] >= 0


def _evaluate(expression: str, symbols: dict[str, int]) -> int:
    """Value of one of the constant expressions of this file over bound symbols."""
    return eval(expression, {"__builtins__": {}}, symbols)


def _used(expression: str, symbols: dict[str, int]) -> str:
    return ", ".join(f"{name}={symbols[name]}" for name in _names(expression))


def _names(expression: str) -> tuple[str, ...]:
    return compile(expression, "schema", "eval").co_names


def _f32(name: str, *shape: str) -> Tensor:
    return Tensor(name, ("float32",), shape)


def _f32_columns(name: str, *shape: str) -> Tensor:
    """All of a tensor, or a range of its columns from the attribute `<name>_start` on."""
    return Tensor(name, ("float32",), shape, start=f"{name}_start")


def _starts(*names: str) -> tuple[Attribute, ...]:
    return tuple(Attribute(f"{name}_start", -1, least=-1) for name in names)


def _i8(name: str, *shape: str) -> Tensor:
    return Tensor(name, ("int8",), shape)


# Rows as stored: layout 1 pads them to whole tiles of 16, layout 0 does not.
_ROWS = "(M + 15) // 16 * 16 if layout else M"
_STATE = ("B", "H", "N", "P")

_ALL = (
    Op(
        "BinaryScaffoldMatMul",
        inputs=(
            _f32("x", "B", "T", "K"),
            Tensor("bits", ("uint8",), ("planes", _ROWS, "K // 8")),
            _f32("scale", "planes", "M"),
            _i8("down", "R", "K"),
            _f32("down_scale", "R"),
            _i8("up", _ROWS, "R"),
            _f32("up_scale", "M"),
        ),
        outputs=(_f32("y", "B", "T", "M"),),
        attributes=(Attribute("planes", 1), Attribute("layout", 0, (LAYOUT_CANONICAL, LAYOUT_ROW16))),
        requires=(
            ("K % 32 == 0", "K must be a multiple of 32"),
            ("planes >= 1", "planes must be at least 1"),
        ),
    ),
    Op(
        "Int8MatMul",
        inputs=(_f32("x", "B", "T", "K"), _i8("w", "M", "K"), _f32("w_scale", "M")),
        outputs=(_f32("y", "B", "T", "M"),),
    ),
    Op(
        "CausalConv1dStep",
        inputs=(
            _f32_columns("x", "B", "T", "C"),
            _f32("state", "B", "C", "W - 1"),
            _f32("weight", "C", "W"),
            _f32("bias", "C"),
        ),
        outputs=(_f32("y", "B", "T", "C"), _f32("new_state", "B", "C", "W - 1")),
        attributes=(Attribute("activation", "silu", ("silu", "none")), *_starts("x")),
        requires=(("2 <= W <= 4", "the kernel width W must be 2, 3 or 4"),),
    ),
    Op(
        "SelectiveScanStep",
        inputs=(
            _f32_columns("x", "B", "T", "H * P"),
            _f32_columns("dt", "B", "T", "H"),
            _f32_columns("B", "B", "T", "ngroups * N"),
            _f32_columns("C", "B", "T", "ngroups * N"),
            _f32("A_log", "H"),
            _f32("D", "H"),
            _f32("dt_bias", "H"),
            Tensor("state", tuple(STATE_DTYPES.values()), _STATE),
            Tensor("state_scale", ("float32",), ("B", "H", "N"), optional=True),
        ),
        outputs=(
            _f32("y", "B", "T", "H * P"),
            Tensor("new_state", tuple(STATE_DTYPES.values()), _STATE),
            Tensor("new_state_scale", ("float32",), ("B", "H", "N"), optional=True),
        ),
        attributes=(
            Attribute("ngroups", 1),
            Attribute("dt_min", 0.0),
            Attribute("dt_max", float("inf")),
            *_starts("x", "dt", "B", "C"),
        ),
        requires=(("H % ngroups == 0", "the heads H must be a multiple of ngroups"),),
    ),
    Op(
        "GatedRMSNorm",
        inputs=(_f32("y", "B", "T", "C"), _f32_columns("z", "B", "T", "C"), _f32("weight", "C")),
        outputs=(_f32("out", "B", "T", "C"),),
        attributes=(Attribute("eps", 1e-5), Attribute("groups", 1), *_starts("z")),
        requires=(("C % groups == 0", "the channels C must be a multiple of groups"),),
    ),
    Op(
        "RMSNorm",
        inputs=(_f32("x", "B", "T", "C"), _f32("weight", "C")),
        outputs=(_f32("out", "B", "T", "C"),),
        attributes=(Attribute("eps", 1e-5),),
    ),
)

OPS: dict[str, Op] = {op.name: op for op in _ALL}
"""Op name -> schema, in the order of docs/ops.md."""
