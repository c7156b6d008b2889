"""NaN, infinities and the ends of fp32 through the CUDA kernels on the host emulation."""

import extremes
import numpy as np
import pytest
from each import check_each
from plugins_trt.fused import CASES

from dfssm.opset import OPS


@pytest.mark.parametrize("op", OPS)
def test_kernels(kernels, op):
    def check(case):
        extremes.check(case, lambda inputs: kernels.run(op, inputs, **case.attributes))

    check_each([case for case in extremes.cases(op) if not case.attributes.get("layout")], check)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_fused_is_the_chain(kernels, case):
    """Bit for bit, also where a number is extreme. Of many tokens, at 0.1 s a run, each input has a third of the
    extremes, another third than its neighbour.
    """
    plain = case.inputs()
    rng = np.random.default_rng(len(case.id))
    every = 3 if plain["y" if "y" in plain else "x"].size > 2000 else 1
    for number, (name, value) in enumerate(plain.items()):
        if value.dtype != np.float32 or not value.size:
            continue
        at = rng.choice(np.flatnonzero(np.isfinite(value)))
        for extreme in extremes.EXTREMES[number % every :: every]:
            inputs = plain | {name: value.copy()}
            inputs[name].reshape(-1)[at] = extreme
            fused = kernels.run(case.op, inputs, **case.attributes)
            for a, b in zip(fused, case.chain(inputs, kernels.run), strict=True):
                np.testing.assert_array_equal(a, b, err_msg=f"{name}[{at}] = {extreme}")
