"""The fused ops of the plugin library: cases, and what they are fused of."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
from plugins_trt.lowered import PLUGIN, model_of

from dfssm.opset.cases import Case
from dfssm.opset.reference import REFERENCES, quantize_activations_ref
from dfssm.opset.tolerances import Tolerance, reduction
from dfssm.targets.trt_plugins import FUSED

ACTIVATIONS = {"NormScaffoldConv": ("x",), "GatedNormScaffoldAdd": ("y", "z", "residual")}
SCAFFOLD = ("bits", "scale", "down", "down_scale", "up", "up_scale")

TIE = 1e-4
"""How near a tie of the quantisation, in steps, the float noise of a norm may move an activation across it: 127 times
some 5e-7."""


@dataclass(frozen=True)
class FusedCase:
    """One set of inputs: sizes B T K M R, and C W of the convolution."""

    op: str
    sizes: dict
    attributes: dict = field(default_factory=dict)

    @property
    def id(self) -> str:
        return "-".join([self.op, *(f"{k}{v}" for k, v in {**self.sizes, **self.attributes}.items())])

    @property
    def outputs(self) -> list[str]:
        return [tensor.name for tensor in FUSED[self.op].outputs]

    def inputs(self) -> dict[str, np.ndarray]:
        """The inputs by name, in the order of the plugin; `bits` as bytes. Columns of z that are not read are NaN."""
        B, T, K, M, R = (self.sizes[name] for name in "BTKMR")
        planes = {"planes": self.attributes.get("planes", 1)}
        product = Case("BinaryScaffoldMatMul", dict(B=B, T=T, K=K, M=M, R=R), planes).inputs()
        weights = {name: product[name] for name in SCAFFOLD}
        if self.op == "NormScaffoldConv":
            norm = Case("RMSNorm", dict(B=B, T=T, C=K)).inputs()
            conv = Case("CausalConv1dStep", dict(B=B, T=1, C=self.sizes["C"], W=self.sizes["W"])).inputs()
            parts = dict(state=conv["state"], conv_weight=conv["weight"], conv_bias=conv["bias"])
            return dict(x=norm["x"], norm_weight=norm["weight"], **weights, **parts)
        start = {name: self.attributes[name] for name in ("z_start",) if name in self.attributes}
        norm = Case("GatedRMSNorm", dict(B=B, T=T, C=K), start).inputs()
        residual = Case("RMSNorm", dict(B=B, T=T, C=M)).inputs()["x"]
        return dict(y=norm["y"], z=norm["z"], norm_weight=norm["weight"], **weights, residual=residual)

    def chain(self, inputs: dict, run: Callable) -> tuple[np.ndarray, ...]:
        """The ops one after another: `run(op, inputs, **attributes)` returns a tuple."""
        given = dict(self.attributes)
        norm = {name: given.pop(name) for name in ("eps", "groups", "z_start") if name in given}
        planes = {"planes": given.pop("planes", 1)}
        weights = {name: inputs[name] for name in SCAFFOLD}
        if self.op == "NormScaffoldConv":
            (x,) = run("RMSNorm", dict(x=inputs["x"], weight=inputs["norm_weight"]), **norm)
            (y,) = run("BinaryScaffoldMatMul", dict(x=x, **weights), **planes)
            start = given.setdefault("x_start", 0)
            parts = dict(state=inputs["state"], weight=inputs["conv_weight"], bias=inputs["conv_bias"])
            channels, state = run("CausalConv1dStep", dict(x=y, **parts), **given)
            y = y.copy()
            y[..., start : start + channels.shape[-1]] = channels
            return y, state
        (x,) = run("GatedRMSNorm", dict(y=inputs["y"], z=inputs["z"], weight=inputs["norm_weight"]), **norm)
        (y,) = run("BinaryScaffoldMatMul", dict(x=x, **weights), **planes)
        return (inputs["residual"] + y,)

    def expected(self, inputs: dict, rounding: float = 0.0) -> dict[str, tuple[np.ndarray, Tolerance]]:
        """What opset's references make of `inputs`, and how far off a kernel may be, by the names of the outputs.

        Where activations lie on a tie of int8 the product may be a step off for each; the convolution passes that on.
        `rounding`: of what is stored, relative.
        """
        quantised = []

        def reference(op, inputs, **attributes):
            if op == "BinaryScaffoldMatMul":
                quantised.append(inputs["x"])
            made = REFERENCES[op](**inputs, **attributes)
            return made if isinstance(made, tuple) else (made,)

        outputs = self.chain(inputs, reference)
        (x,) = quantised
        _, s = quantize_activations_ref(x)
        steps = x / np.where(s, s, 1)
        ties = (np.abs(steps - np.floor(steps) - 0.5) < TIE).sum(-1, keepdims=True)
        low_rank = np.abs(inputs["up"].astype(float)) @ (
            inputs["down_scale"] * np.abs(inputs["down"]).max(1, initial=0)
        )
        of_one = np.atleast_2d(inputs["scale"]).sum(0) + inputs["up_scale"] * low_rank
        flips = float((ties * s * of_one).max())
        if "conv_weight" in inputs:
            flips *= 1 + 1.1 * float(np.abs(inputs["conv_weight"]).sum(1).max())  # silu has slopes up to 1.1
        reason = f"fp32 sums in another order, {ties.sum()} activations on a tie"
        found = {}
        for name, output in zip(self.outputs, outputs, strict=True):
            bound = reduction(self.sizes["K"]).relative + 2 * rounding + flips / (float(np.abs(output).max()) or 1.0)
            found[name] = output, Tolerance(bound, reason)
        return found

    def check(self, actual, inputs: dict, rounding: float = 0.0) -> None:
        """AssertionError unless `actual` is what `expected` says."""
        for a, (name, (e, tolerance)) in zip(actual, self.expected(inputs, rounding).items(), strict=True):
            assert a.dtype == e.dtype
            tolerance.check(a, e, name)


def lowered_inputs(case: FusedCase) -> dict[str, np.ndarray]:
    """The inputs as TensorRT's parser sees them: bits in int32 words."""
    inputs = case.inputs()
    return inputs | {"bits": inputs["bits"].view(np.int32)}


def node_model(case: FusedCase, inputs: dict[str, np.ndarray] | None = None, **attributes) -> onnx.ModelProto:
    """As lowered.node_model."""
    inputs = inputs or lowered_inputs(case)
    first = next(iter(inputs.values()))
    made = {name: inputs["state"] if name == "new_state" else first for name in case.outputs}
    return model_of(case.op, inputs, FUSED[case.op].resolve(case.attributes) | PLUGIN | attributes, made)


def _cases():
    sizes = "B T K M R C W".split()
    for row, attributes in (
        ((1, 1, 32, 40, 3, 8, 4), {"x_start": 16}),
        ((1, 1, 96, 17, 0, 17, 2), {}),
        ((2, 1, 544, 41, 16, 16, 4), {"x_start": 7}),
        ((1, 1, 2048, 66, 16, 33, 4), {"x_start": 30}),  # one token: tiles of 64 rows
        ((1, 1, 4096, 64, 64, 50, 3), {"x_start": 14, "activation": "none"}),  # as much as its launch takes
        ((1, 1, 4128, 20, 2, 8, 4), {"x_start": 5}),
        ((1, 1, 128, 33, 65, 20, 4), {"x_start": 2}),
        ((1, 1, 512, 33, 5, 9, 3), {"planes": 2}),
        ((8, 1, 512, 33, 5, 9, 3), {"x_start": 24, "eps": 1e-3}),
        ((9, 1, 160, 49, 2, 30, 4), {"x_start": 1, "activation": "none"}),
        ((16, 1, 64, 35, 4, 3, 3), {"x_start": 15}),
        ((17, 1, 128, 50, 3, 20, 4), {"x_start": 16}),
        ((66, 1, 96, 33, 1, 16, 4), {"x_start": 8}),
        ((66, 1, 128, 70, 3, 40, 4), {"x_start": 9}),  # tiles of 64 sequences
        ((3, 1, 96, 40, 4, 24, 4), {"x_start": 8, "planes": 2}),
        ((1, 2, 32, 40, 3, 8, 4), {"x_start": 16}),
        ((1, 8, 96, 17, 0, 16, 2), {"x_start": 1}),
        ((1, 9, 544, 20, 16, 20, 3), {}),
        ((2, 8, 64, 41, 2, 9, 4), {"x_start": 32, "activation": "none"}),
        ((1, 17, 160, 36, 3, 12, 4), {"x_start": 12}),
        ((2, 33, 96, 34, 5, 8, 4), {"x_start": 26, "planes": 2}),  # 29 of 32 tokens are a block's own
        ((1, 58, 96, 33, 1, 31, 4), {"x_start": 1}),
        ((11, 3, 96, 20, 2, 17, 4), {"x_start": 2}),  # ten sequences a block, less than W - 1 tokens each
        ((9, 2, 96, 33, 2, 30, 4), {"x_start": 3}),
        ((1, 65, 128, 70, 3, 40, 4), {"x_start": 4}),  # 61 of 64 tokens
        ((2, 122, 128, 66, 0, 20, 4), {"x_start": 40}),
        ((1, 124, 128, 40, 2, 40, 3), {}),
        ((2, 64, 128, 33, 1, 33, 2), {}),
        ((5, 20, 128, 33, 2, 20, 4), {"x_start": 13}),  # three sequences a block
        ((40, 2, 128, 66, 2, 50, 4), {"x_start": 16, "activation": "none"}),
    ):
        yield FusedCase("NormScaffoldConv", dict(zip(sizes, row, strict=True)), attributes)
    for row, attributes in (
        ((1, 1, 32, 1, 3), {}),
        ((1, 1, 96, 17, 0), {"z_start": 5}),
        ((1, 1, 2048, 17, 16), {"groups": 2}),  # one token, in one launch
        ((1, 1, 4096, 16, 64), {"z_start": 0, "groups": 8}),
        ((1, 1, 3584, 15, 7), {}),
        ((1, 1, 4128, 20, 2), {}),
        ((1, 1, 128, 33, 65), {}),
        ((1, 1, 512, 33, 5), {"planes": 2}),
        ((1, 2, 544, 33, 16), {"groups": 4}),
        ((8, 1, 512, 20, 5), {"z_start": 0, "eps": 1e-3}),
        ((3, 3, 160, 15, 2), {"groups": 5, "z_start": 8}),
        ((1, 16, 64, 31, 4), {"planes": 2}),
        ((1, 17, 96, 16, 3), {"z_start": 3, "groups": 3}),
        ((1, 66, 128, 70, 3), {"groups": 2}),
        ((2, 33, 96, 33, 1), {"planes": 2, "z_start": 2}),
    ):
        yield FusedCase("GatedNormScaffoldAdd", dict(zip(sizes, row, strict=False)), attributes)


CASES = list(_cases())
