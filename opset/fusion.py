"""Ops that are a chain of others: `Step`s, and the op that they make, which a backend may run as one.

The chain is the whole description of a fused op: its inputs, attributes and rules are those of its steps, its reference
runs theirs, its body is nodes of theirs. What fuses nodes is checked by putting the chain in the place of the op again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .arithmetic import Array
from .schema import Attribute, Dim, Op, Rule, Tensor, Value, Within, tensor

ADD = Op(
    "Add",
    inputs=(tensor("A", "float32", "B T M"), tensor("B", "float32", "B T M")),
    outputs=(tensor("C", "float32", "B T M"),),
    domain="",
    reference=lambda A, B: A + B,
)
"""ONNX's, of two tensors of one shape."""


@dataclass(frozen=True)
class Step:
    """One op of a chain; `inputs` and `outputs` are names in the chain, in the op's order, separated by blanks.

    `symbols` renames those of the op that are called otherwise in the chain.
    """

    op: Op
    inputs: str
    outputs: str
    symbols: Mapping[str, str] = field(default_factory=dict)

    @property
    def attributes(self) -> list[str]:
        return [a.name for a in self.op.attributes]

    def tensors(self, names: str, specs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Those of the op under their names in the chain."""
        renamed = dict(zip((spec.name for spec in specs), names.split(), strict=True))
        inputs = dict(zip((spec.name for spec in self.op.inputs), self.inputs.split(), strict=True))
        return {
            renamed[spec.name]: replace(
                spec,
                name=renamed[spec.name],
                shape=tuple(self.dim(dim) for dim in spec.shape),
                over=inputs.get(spec.over or ""),
            )
            for spec in specs
        }

    def dim(self, dim: Dim) -> Dim:
        other = self.symbols.get(dim.other, dim.other) if isinstance(dim.other, str) else dim.other
        return replace(dim, symbol=self.symbols.get(dim.symbol, dim.symbol), other=other)

    def rules(self) -> list[Rule]:
        return [replace(rule, symbol=self.symbols.get(rule.symbol, rule.symbol)) for rule in self.op.requires]


@dataclass(frozen=True)
class Splice:
    """The chain's output `out`: `base` with its columns from attribute `start` on replaced by `part`."""

    out: str
    base: str
    part: str
    start: str


@dataclass(frozen=True)
class FusedOp(Op):
    """An op that is a chain of others."""

    steps: tuple[Step, ...] = ()
    splice: Splice | None = None

    def run(self, **arguments: Any) -> tuple[Array, ...]:
        """The reference: those of the steps, one after the other."""
        attributes = self.resolve({name: arguments.pop(name) for name in self.defaults if name in arguments})
        self.check(arguments, attributes)
        values: dict[str, Array] = dict(arguments)
        for step in self.steps:
            given = dict(zip((t.name for t in step.op.inputs), map(values.get, step.inputs.split()), strict=True))
            made = step.op.reference(**given, **{name: attributes[name] for name in step.attributes})
            values |= zip(step.outputs.split(), made if isinstance(made, tuple) else (made,), strict=True)
        if self.splice:
            out, part, start = values[self.splice.base].copy(), values[self.splice.part], attributes[self.splice.start]
            out[..., int(start) : int(start) + part.shape[-1]] = part
            values[self.splice.out] = out
        return tuple(values[t.name] for t in self.outputs)

    def text(self, attributes: Mapping[str, Value], state_dtype: str) -> str:
        """The body: a node for each step, and those that put its columns in place."""
        kinds = {int: "int", float: "float", str: "string"}
        lines = []
        for step in self.steps:
            name = f"{step.op.domain}.{step.op.name}" if step.op.domain else step.op.name
            given = ", ".join(f"{a.name}: {kinds[type(a.default)]} = @{a.name}" for a in step.op.attributes)
            inputs, outputs = (", ".join(names.split()) for names in (step.inputs, step.outputs))
            lines.append(f"{outputs} = {name} {f'<{given}> ' if given else ''}({inputs})")
        if splice := self.splice:
            lines.append(f"""begin_0 = Constant <value_int: int = @{splice.start}> ()
  one = Constant <value_ints = [1]> ()
  begin = Reshape (begin_0, one)
  width = Shape <start = 2, end = 3> ({splice.part})
  end = Add (begin, width)
  first = Constant <value_ints = [0]> ()
  last = Shape <start = 2, end = 3> ({splice.base})
  axis = Constant <value_ints = [2]> ()
  before = Slice ({splice.base}, first, begin, axis)
  after = Slice ({splice.base}, end, last, axis)
  {splice.out} = Concat <axis = 2> (before, {splice.part}, after)""")
        return "".join(f"\n  {line}" for line in lines) + "\n"


def fuse(name: str, steps: tuple[Step, ...], outputs: str, splice: Splice | None = None) -> FusedOp:
    """The op `name` that is this chain; what no step makes is an input."""
    made: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    attributes: dict[str, Attribute] = {}
    rules: list[Rule] = []
    for step in steps:
        inputs |= {k: v for k, v in step.tensors(step.inputs, step.op.inputs).items() if k not in made}
        made |= step.tensors(step.outputs, step.op.outputs)
        attributes |= {a.name: a for a in step.op.attributes}
        rules += [rule for rule in step.rules() if rule not in rules]
    if splice:
        made[splice.out] = replace(made[splice.base], name=splice.out)
        attributes[splice.start] = Attribute(splice.start, 0, least=0)
        width, whole = made[splice.part].shape[-1], made[splice.base].shape[-1]
        rules.append(Within(width.symbol, splice.start, whole.symbol))
    specs = [made[out] for out in outputs.split()]
    op = FusedOp(
        name,
        inputs=tuple(inputs.values()),
        outputs=tuple(replace(spec, over=spec.over if spec.over in inputs else None) for spec in specs),
        attributes=tuple(attributes.values()),
        requires=tuple(rules),
        may_be_zero="".join(step.op.may_be_zero for step in steps),
        steps=steps,
        splice=splice,
    )
    return replace(op, reference=op.run, body=op.text)
