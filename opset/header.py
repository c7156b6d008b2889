"""Write the C++ header of the ops: `python opset/header.py OUT.h`. Standard library only; run by CMake.

It is bind.h, which checks a call as `Op.check` does, and behind it the ops as data: an op's struct has its `Input`s,
its `Attributes` with their defaults and bounds, its `Sizes` by symbol, and `bind(inputs, attributes)` from one to the
other. `DFSSM_OPS(X)`, `DFSSM_DEFERRED_OPS(X)` and `DFSSM_FUSED_OPS(X)` are X(op) for each op of a table of opset/ops/.
"""

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from unittest.mock import MagicMock

if not __package__:  # run as a script by the build, before dfssm is installed
    # Of a checkout, where dfssm/ is beside this folder, and of a source distribution, where it is around it.
    sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])
    sys.modules.update({name: MagicMock() for name in ("numpy", "numpy.typing")})  # schemas ask nothing of it
    __package__ = "dfssm.opset"

from .layouts import LAYOUTS  # noqa: E402 - the package that these are relative to is known now
from .ops import ALL_OPS, DEFERRED_OPS, FUSED, OPS  # noqa: E402
from .schema import (  # noqa: E402
    BLOCK,
    DOMAIN,
    HALF_MAX,
    TINY,
    VERSION,
    Attribute,
    Between,
    Dim,
    Multiple,
    Op,
    Tensor,
    Value,
    Within,
)

_TYPES = {int: "int64_t", float: "float", str: "std::string"}
_DTYPES = {name.lower()[1:]: name for name in ("kFloat32", "kFloat16", "kBFloat16", "kInt8", "kUInt8")}


def _literal(value: Value) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, float):
        return "HUGE_VALF" if math.isinf(value) else f"{value!r}f"
    return f"{value}"


class _Struct:
    """The text of one op."""

    def __init__(self, op: Op):
        self.op = op
        self.integers = [a.name for a in op.attributes if isinstance(a.default, int)]
        self.symbols = [*op.symbols, *self.integers]
        self.names = [t.name for t in op.inputs]

    def symbol(self, name: str | int | None) -> int:
        return self.symbols.index(name) if isinstance(name, str) else -1

    def dim(self, dim: Dim) -> str:
        operation = {"pad": "'p'", "": "0"}.get(dim.operator, f"'{dim.operator}'")
        number = dim.other if isinstance(dim.other, int) else 0
        return f'{{"{dim}", {self.symbol(dim.symbol)}, {operation}, {self.symbol(dim.other)}, {number}}}'

    def index(self, name: str | None) -> int:
        return self.names.index(name) if name else -1

    def tensor(self, tensor: Tensor) -> str:
        dtypes = " | ".join(_DTYPES[dtype] for dtype in tensor.dtypes)
        dims = ", ".join(map(self.dim, tensor.shape))
        return (
            f'{{"{tensor.name}", {dtypes}, "{" or ".join(tensor.dtypes)}", {len(tensor.shape)}, {{{dims}}},'
            f" {self.symbol(tensor.start)}, {self.index(tensor.scale_of)}, {self.index(tensor.over)}}}"
        )

    def rule(self, rule: Multiple | Between | Within) -> str:
        match rule:
            case Multiple(symbol, of):
                fields = (
                    f"'m', {self.symbol(symbol)}, {self.symbol(of)}, {of if isinstance(of, int) else 0}, 0, \"\", -1"
                )
            case Between(symbol, least, most, reason):
                fields = f"'b', {self.symbol(symbol)}, -1, {least}, {most}, \"{reason}\", -1"
            case Within(symbol, start, of):
                fields = f"'w', {self.symbol(symbol)}, {self.symbol(start)}, 0, 0, \"\", {self.symbol(of)}"
        return f"{{{fields}}}"

    def checks(self, a: Attribute) -> list[str]:
        name, value = f'"{a.name}"', a.name
        lines = []
        if a.choices:
            choices = ", ".join(map(_literal, a.choices))
            lines.append(f"check_choice<{_TYPES[type(a.default)]}>({name}, {value}, {{{choices}}});")
        if a.least is not None:
            lines.append(f"check_least({name}, {value}, {a.least});")
        if a.at_most:
            lines.append(f'check_at_most({name}, {value}, "{a.at_most}", {a.at_most});')
        return lines

    def array(self, kind: str, name: str, items: list[str]) -> list[str]:
        """A constant array, of one item where there would be none."""
        return [f"  static constexpr {kind} {name}[] = {{", *(f"      {item}," for item in items or ["{}"]), "  };"]

    def render(self) -> list[str]:
        op = self.op
        required, required_out = (sum(not t.optional for t in ts) for ts in (op.inputs, op.outputs))
        sizes = [f"s[{i}]" for i in range(len(op.symbols))]
        zero = sum(1 << self.symbol(symbol) for symbol in op.may_be_zero)
        return [
            "",
            f"struct {op.name} {{",
            f'  static constexpr char kName[] = "{op.name}";',
            f"  enum Input : size_t {{ {', '.join(f'k_{name}' for name in self.names)}, kInputs }};",
            f"  static constexpr size_t kRequiredInputs = {required};",
            f"  static constexpr size_t kOutputs = {len(op.outputs)}, kRequiredOutputs = {required_out};",
            "  struct Attributes {",
            *(f"    {_TYPES[type(a.default)]} {a.name} = {_literal(a.default)};" for a in op.attributes),
            "    template <class Visitor>",
            f"    void visit({'Visitor&& visitor' if op.attributes else 'Visitor&&'}) {{",
            *(f'      visitor("{a.name}", {a.name});' for a in op.attributes),
            "    }",
            "    void check() const {",
            *(f"      {line}" for a in op.attributes for line in self.checks(a)),
            "    }",
            "  };",
            "  struct Sizes {",
            f"    int64_t {', '.join(op.symbols)};",
            "  };",
            *self.array("const char*", "kAttributes", [f'"{a.name}"' for a in op.attributes]),
            *self.array("const char*", "kSymbols", [f'"{symbol}"' for symbol in self.symbols]),
            *self.array("TensorSpec", "kInputSpecs", list(map(self.tensor, op.inputs))),
            *self.array("TensorSpec", "kOutputSpecs", list(map(self.tensor, op.outputs))),
            *self.array("Rule", "kRules", list(map(self.rule, op.requires))),
            f"  static constexpr Op kOp = {{kName, kInputSpecs, kInputs, {required}, kOutputSpecs, kOutputs,",
            f"      {required_out}, kAttributes, {len(op.attributes)}, kSymbols, {len(op.symbols)},",
            f"      {len(self.symbols)}, {zero}, kRules, {len(op.requires)}}};",
            f"  static Sizes bind(const Tensor* inputs, const Attributes&{' a' if self.integers else ''}) {{",
            f"    int64_t s[] = {{{', '.join(['0'] * len(op.symbols) + [f'a.{name}' for name in self.integers])}}};",
            "    opset::bind(kOp, inputs, s);",
            f"    return {{{', '.join(sizes)}}};",
            "  }",
            "};",
        ]


def _each(macro: str, ops: Iterable[str]) -> str:
    return f"#define {macro}(X) {' '.join(f'X({name})' for name in ops)}"


def render() -> str:
    """The header's text."""
    everything = [*ALL_OPS.values(), *FUSED.values()]
    rows = ", ".join(str(LAYOUTS[layout].rows) for layout in range(len(LAYOUTS)))
    lines = [
        "// Generated by opset/header.py from opset/ops/; do not edit.",
        Path(__file__).with_name("bind.h").read_text(),
        _each("DFSSM_OPS", OPS),
        _each("DFSSM_DEFERRED_OPS", DEFERRED_OPS),
        _each("DFSSM_FUSED_OPS", FUSED),
        "",
        "namespace dfssm::opset {",
        f'inline constexpr char kDomain[] = "{DOMAIN}";',
        f"inline constexpr int kVersion = {VERSION};",
        f"inline constexpr float kTiny = {_literal(TINY)}, kHalfMax = {_literal(HALF_MAX)};",
        f"inline constexpr int64_t kBlock = {BLOCK};",
        f"inline constexpr size_t kMaxInputs = {max(len(op.inputs) for op in everything)};",
        f"inline constexpr size_t kMaxOutputs = {max(len(op.outputs) for op in everything)};",
        "",
        "// The scaffold's layouts, by value: rows of a tile.",
        *(f"inline constexpr int k{layout.name.title()} = {value};" for value, layout in LAYOUTS.items()),
        f"inline constexpr int64_t kTileRows[] = {{{rows}}};",
        "inline int64_t padded(int64_t rows, int64_t layout) {",
        "  return (rows + kTileRows[layout] - 1) / kTileRows[layout] * kTileRows[layout];",
        "}",
        *(line for op in everything for line in _Struct(op).render()),
    ]
    return "\n".join([*lines, "", "}  // namespace dfssm::opset", ""])


def main() -> None:
    out = Path(sys.argv[1])
    text = render()
    if not out.exists() or out.read_text() != text:  # keep the time stamp, and so the build, when nothing changed
        out.write_text(text)


if __name__ == "__main__":
    main()
