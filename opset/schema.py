"""What an op is: `Op`, of named tensors and attributes, and the check of a call against it. Standard library only.

An op is one module of `opset/ops/`. Everything else about it comes from there: the references check their arguments
with `Op.check`, the ONNX bodies take their signatures from it, and `header.py` makes the C++ of both plugin trees and
the bindings, which check the same things in the same words.

Shapes are written as in the docs, one token a dimension: `B` binds a symbol to the size of the first tensor that has
it, `H * P`, `K / 8`, `W - 1` and `W + 15` are checked once every symbol is bound, and `Mp` is M in whole tiles of the
layout (layouts.py). Attributes may be used as symbols; a leading dimension named by an attribute of value 1 is not
there.

Some inputs may be a range of columns of a wider tensor, so that a product's output need not be split. The attribute
that `Tensor.start` names says where the range begins: -1, the default, is the tensor itself, exactly as wide as its
shape says; with start >= 0 the op reads the columns [start, start + width) of a tensor with at least so many. The last
dimension of such a tensor binds no symbol.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from dfssm.base.errors import DfssmError

from .layouts import LAYOUT_CANONICAL, LAYOUT_ROW16, LAYOUTS

if TYPE_CHECKING:
    import numpy as np

    from .tolerances import Tolerance

__all__ = ["DOMAIN", "LAYOUT_CANONICAL", "LAYOUT_ROW16", "STATE_DTYPES", "VERSION", "Attribute", "Op", "Tensor"]

DOMAIN = "ai.dfssm"
VERSION = 1

STATE_DTYPES = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
"""`--state-dtype` name -> NumPy dtype name of the stored SSM state, which every call updates."""

DEFERRED = "-deferred"
STATE_FORMS = STATE_DTYPES | {name + DEFERRED: dtype for name, dtype in STATE_DTYPES.items()}
"""All `--state-dtype`s: those, and those of a stored state that is updated a block of tokens at a time."""

BLOCK = 8
"""Tokens by which a deferred state is updated."""

SLOTS = 2 * BLOCK
"""Pending tokens that a deferred state has room for."""

TINY = 1e-30
"""A row of activations or of int8 state whose largest magnitude is below this counts as zero."""

HALF_MAX = 65504.0
"""The largest fp16: where a state stored as fp16 saturates."""

Value = int | float | str
Sizes = dict[str, int]
"""Symbol -> size; attributes of whole numbers among them."""

Row = tuple[dict[str, Any], dict[str, Value], str]
"""One case of an op: the sizes its tensors are drawn with, the node's attributes, and the kind of numbers."""


class Array(Protocol):
    """What `Op.check` asks of a tensor: NumPy's, PyTorch's by way of NumPy, ONNX's."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> object: ...


@dataclass(frozen=True)
class Dim:
    """One dimension: a symbol, or what `operator` makes of it and another one or a number."""

    symbol: str
    operator: str = ""
    other: str | int = 0

    @classmethod
    def parse(cls, text: str) -> Dim:
        if text == "Mp":
            return cls("M", "pad", "layout")
        match = re.fullmatch(r"(\w+)(?: ([*/+-]) (\w+))?", text)
        assert match, f"'{text}' is no dimension"
        symbol, operator, other = match.groups()
        return cls(symbol, operator or "", int(other) if (other or "").isdigit() else other or 0)

    def __str__(self) -> str:
        if self.operator == "pad":
            return f"{self.symbol}p"
        return f"{self.symbol} {self.operator} {self.other}" if self.operator else self.symbol

    @property
    def factors(self) -> list[str]:
        """The symbols whose product it is."""
        return [self.symbol, str(self.other)] if self.operator == "*" else [self.symbol]

    def size(self, sizes: Mapping[str, int]) -> int | None:
        """The size that follows from `sizes`; None where a symbol is not among them."""
        size, other = sizes.get(self.symbol), sizes.get(self.other) if isinstance(self.other, str) else self.other
        if size is None or other is None:
            return None
        match self.operator:
            case "*":
                return size * other
            case "/":
                return size // other
            case "-":
                return size - other
            case "+":
                return size + other
            case "pad":
                return LAYOUTS[other].padded(size)
        return size

    def show(self, sizes: Mapping[str, int]) -> str:
        """As messages have it: `H=4`, `H * P = 32`, or `H * P` where a symbol is unknown."""
        size, equals = self.size(sizes), " = " if " " in str(self) else "="
        return str(self) if size is None else f"{self}{equals}{size}"


@dataclass(frozen=True)
class Tensor:
    """One input or output: allowed dtypes (NumPy names) and symbolic shape.

    `start`: the attribute with the first column read of it. `scale_of`: it is the scales of that input, there if and
    only if that is int8. `over`: the input that this output may overwrite, and whose dtype it has.
    """

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[Dim, ...]
    start: str | None = None
    scale_of: str | None = None
    over: str | None = None

    @property
    def optional(self) -> bool:
        return self.scale_of is not None


@dataclass(frozen=True)
class Attribute:
    """One attribute with its default, whose type is the attribute's.

    `choices` lists the legal values where they are few, `least` bounds a number, `at_most` names the attribute that
    bounds it from above.
    """

    name: str
    default: Value
    choices: tuple[Value, ...] = ()
    least: int | None = None
    at_most: str | None = None

    def check(self, op: str, value: object) -> None:
        """DfssmError unless `value` is of the right type and a legal one."""
        kinds: dict[type, str] = {int: "an integer", float: "a float", str: "a string"}
        wanted = type(self.default)
        if not isinstance(value, int | float if wanted is float else wanted):
            got = kinds.get(type(value), f"of type {type(value).__name__}")
            raise DfssmError(f"{op}: attribute '{self.name}' is {got}, expected {kinds[wanted]}")
        if self.choices and value not in self.choices:
            expected = " or ".join(map(repr, self.choices))
            raise DfssmError(f"{op}: attribute '{self.name}' is {value!r}, expected {expected}")
        if self.least is not None and isinstance(value, int | float) and not self.least <= value < math.inf:
            shown = f"{value}, expected at least" if wanted is int else f"{value:g}, expected a number >="
            raise DfssmError(f"{op}: attribute '{self.name}' is {shown} {self.least}")


@dataclass(frozen=True)
class Multiple:
    """A size must be a multiple of a number or of an attribute."""

    symbol: str
    of: str | int

    def holds(self, sizes: Sizes) -> bool:
        return sizes[self.symbol] % (sizes[self.of] if isinstance(self.of, str) else self.of) == 0

    def expected(self, sizes: Sizes) -> str:
        return f"a multiple of {f'{self.of}={sizes[self.of]}' if isinstance(self.of, str) else self.of}"


@dataclass(frozen=True)
class Between:
    """A size must be in [least, most]; `reason` says why."""

    symbol: str
    least: int
    most: int
    reason: str = ""

    def holds(self, sizes: Sizes) -> bool:
        return self.least <= sizes[self.symbol] <= self.most

    def expected(self, sizes: Sizes) -> str:
        return f"{self.least} to {self.most}{self.reason and f': {self.reason}'}"


@dataclass(frozen=True)
class Within:
    """A size must fit behind an attribute, the first of so many columns, within another size."""

    symbol: str
    start: str
    of: str

    def holds(self, sizes: Sizes) -> bool:
        return sizes[self.start] + sizes[self.symbol] <= sizes[self.of]

    def expected(self, sizes: Sizes) -> str:
        return f"{self.start}={sizes[self.start]} + {self.symbol} <= {self.of}={sizes[self.of]}"


Rule = Multiple | Between | Within

EXACT_SUMS = Between("K", 1, 131072, "int32 sums of more products could overflow")
"""Of int8 products: 127 * 128 * K < 2^31."""


@dataclass(frozen=True)
class Op:
    """One op: its schema, and the functions that are the rest of its contract.

    reference: the arithmetic in NumPy, called with inputs and attributes by name; returns the outputs, one alone or a
        tuple. body: the text of the function in standard ONNX ops, for attributes and the dtype of the state.
    draw: the inputs of a case, from a generator, its attributes, its kind and its sizes. cases: their table.
    tolerance: how far two backends may be apart, for sizes (symbols, attributes and `state`, a dtype) and an output.
    may_be_zero: symbols that may be 0; all others are at least 1.
    """

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attributes: tuple[Attribute, ...] = ()
    requires: tuple[Rule, ...] = ()
    may_be_zero: str = ""
    domain: str = DOMAIN
    reference: Callable[..., Any] = NotImplemented
    body: Callable[[Mapping[str, Value], str], str] = NotImplemented
    draw: Callable[..., dict[str, np.ndarray[Any, Any]]] = NotImplemented
    cases: Callable[[], Iterable[Row]] = NotImplemented
    tolerance: Callable[[Mapping[str, Any], str], Tolerance] = NotImplemented

    @property
    def defaults(self) -> dict[str, Value]:
        return {a.name: a.default for a in self.attributes}

    @property
    def symbols(self) -> tuple[str, ...]:
        """The sizes that a call binds, in the order of the inputs."""
        bare = [d.symbol for t in self.inputs for d in (t.shape[:-1] if t.start else t.shape) if not d.operator]
        return tuple(dict.fromkeys(symbol for symbol in bare if symbol not in self.defaults))

    def resolve(self, attributes: Mapping[str, Value]) -> dict[str, Value]:
        """Defaults overlaid with `attributes`; an unknown name or an illegal value is a DfssmError."""
        resolved = self.defaults | dict(attributes)
        for name in attributes:
            if name not in self.defaults:
                known = ", ".join(self.defaults) or "none"
                raise DfssmError(f"{self.name}: unknown attribute '{name}'; known: {known}")
        for attribute in self.attributes:
            attribute.check(self.name, resolved[attribute.name])
            value, bound = resolved[attribute.name], resolved.get(attribute.at_most or "")
            if isinstance(value, int | float) and isinstance(bound, int | float) and not value <= bound:
                raise DfssmError(
                    f"{self.name}: attribute '{attribute.name}' is {value:g},"
                    f" expected at most '{attribute.at_most}' = {bound:g}"
                )
        return resolved

    def check(
        self, tensors: Mapping[str, Array | None], attributes: Mapping[str, Value] | None = None
    ) -> dict[str, int]:
        """Check dtypes and shapes of `tensors` (name -> anything with .shape and .dtype, None where absent).

        Returns the bound symbols and the attributes that are whole numbers (`{"B": 1, "T": 7, "K": 256, ...}`). Raises
        DfssmError naming op, input, expected and got.
        """
        attributes = self.resolve(attributes or {})
        sizes: Sizes = {k: v for k, v in attributes.items() if isinstance(v, int)}
        present: list[tuple[Tensor, tuple[Dim, ...], tuple[int, ...]]] = []
        for spec in self.inputs:
            value, shape = tensors.get(spec.name), spec.shape
            if attributes.get(shape[0].symbol) == 1:
                shape = shape[1:]
            if value is None and not spec.optional:
                raise DfssmError(f"{self.name}: input '{spec.name}' is missing")
            if spec.scale_of:
                self._check_scale(spec, value, tensors.get(spec.scale_of))
            if value is None:
                continue
            if str(value.dtype) not in spec.dtypes:
                expected = " or ".join(spec.dtypes)
                raise DfssmError(f"{self.name}: input '{spec.name}' has dtype {value.dtype}, expected {expected}")
            if len(value.shape) != len(shape):
                raise self._shape_error(spec, shape, value.shape, sizes)
            present.append((spec, shape, tuple(value.shape)))
        unbound = dict(sizes)
        for spec, shape, got in present:
            for dim, size in zip(shape[:-1] if in_wider(spec, attributes) else shape, got, strict=False):
                if dim.operator or dim.symbol in attributes:
                    continue
                sizes.setdefault(dim.symbol, size)
                if size < 1 and dim.symbol not in self.may_be_zero:
                    raise self._shape_error(spec, shape, got, unbound, ", every dimension at least 1")
        for rule in self.requires:
            if not rule.holds(sizes):
                name, symbol = self.holder(rule.symbol), rule.symbol
                raise DfssmError(
                    f"{self.name}: input '{name}' has {symbol}={sizes[symbol]}, expected {rule.expected(sizes)}"
                )
        for spec, shape, got in present:
            *lead, width = (dim.size(sizes) for dim in shape)
            start = sizes[spec.start] if spec.start and in_wider(spec, attributes) else None
            fits = width == got[-1] if start is None else start + (width or 0) <= got[-1]
            if not fits or tuple(lead) != got[:-1]:
                raise self._shape_error(spec, shape, got, sizes)
        return sizes

    def holder(self, symbol: str) -> str:
        """The first input with a dimension of that name."""
        return next(t.name for t in self.inputs if Dim(symbol) in t.shape)

    def _check_scale(self, spec: Tensor, scale: Array | None, of: Array | None) -> None:
        int8 = of is not None and str(of.dtype) == "int8"
        if int8 != (scale is not None):
            got, shape = "missing" if int8 else "present", ", ".join(map(str, spec.shape))
            expected = f"[{shape}] for '{spec.scale_of}' of int8" if int8 else f"none: '{spec.scale_of}' is not int8"
            raise DfssmError(f"{self.name}: input '{spec.name}' is {got}, expected {expected}")

    def _shape_error(
        self, spec: Tensor, shape: tuple[Dim, ...], got: Iterable[int], sizes: Sizes, rule: str = ""
    ) -> DfssmError:
        expected = [dim.show(sizes) for dim in shape]
        if spec.start and in_wider(spec, sizes):
            expected[-1] = f">= {spec.start}={sizes[spec.start]} + {expected[-1]}"
        return DfssmError(
            f"{self.name}: input '{spec.name}' has shape {list(got)}, expected [{', '.join(expected)}]{rule}"
        )


def in_wider(spec: Tensor, attributes: Mapping[str, Value]) -> bool:
    """Whether an op with these attributes reads `spec` as a range of columns of a wider tensor."""
    start = attributes[spec.start] if spec.start else -1
    return isinstance(start, int) and start >= 0


def tensor(name: str, dtypes: str, shape: str, **more: str | None) -> Tensor:
    """`tensor("x", "float32", "B T H * P")`: dtypes separated by bars, dimensions by blanks."""
    tokens = re.findall(r"\w+(?: [*/+-] \w+)?", shape)
    return Tensor(name, tuple(dtypes.split("|")), tuple(map(Dim.parse, tokens)), **more)


def columns(name: str, shape: str) -> Tensor:
    """All of a float32 tensor, or a range of its columns from the attribute `<name>_start` on."""
    return tensor(name, "float32", shape, start=f"{name}_start")


def starts(*names: str) -> tuple[Attribute, ...]:
    """The attributes of these `columns`."""
    return tuple(Attribute(f"{name}_start", -1, least=-1) for name in names)
