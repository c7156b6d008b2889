"""The kernels that a token is chosen by, on the host emulation, against NumPy: the same tokens in the same order, and
the same weight of all.
"""

import numpy as np
import pytest
from plugins_trt import adapter
from plugins_trt.emulated import EmulationError

from dfssm.base import DfssmError
from dfssm.runtime.cuda import MOST_LARGEST, Cuda
from dfssm.runtime.sampling import divisor, largest, total_weight

KINDS = {
    "plain": lambda rng, shape: rng.standard_normal(shape),
    "close": lambda rng, shape: 1 + rng.integers(0, 50, shape) * 2.0**-23,
    "ties": lambda rng, shape: rng.integers(-2, 3, shape),
    "zeros": lambda rng, shape: rng.choice([0.0, -0.0], shape),
    "equal": lambda rng, shape: np.full(shape, -3.5),
    "tiny": lambda rng, shape: rng.standard_normal(shape) * 1e-42,
    "not finite": lambda rng, shape: rng.choice([np.nan, np.inf, -np.inf, -1, 1], shape),
    "negative NaN": lambda rng, shape: np.copysign(rng.choice([np.nan, 2.0], shape), -1),
    "largest": lambda rng, shape: rng.choice([3.4028235e38, -3.4028235e38], shape),
}


def run(kernels, logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    rows, vocab = logits.shape
    tokens, values = kernels.new("tokens", (rows, count), np.int64), kernels.new("values", (rows, count))
    kernels.call("dfssm_trt_largest", kernels.put("logits", logits), tokens, values, rows, vocab, count)
    return tokens, values


@pytest.mark.parametrize("kind", KINDS)
def test_equals_numpy(kernels, kind):
    rng = np.random.default_rng(0)
    for rows, vocab, counts in ((1, 1, [1]), (2, 5, [1, 2, 5]), (3, 1030, [1, 50]), (1, 2500, [1, 1000])):
        logits = KINDS[kind](rng, (rows, vocab)).astype(np.float32)
        for count in counts:
            tokens, values = run(kernels, logits, count)
            for row, found, their in zip(logits, tokens, values, strict=True):
                expected, logits_of = largest(row, count)
                assert found.tolist() == expected.tolist(), (rows, vocab, count)
                assert their.tobytes() == logits_of.tobytes()


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("kind", KINDS)
def test_total_weight_equals_numpy(kernels, kind):
    """To the last bit, for any temperature: the choice depends on it."""
    rng = np.random.default_rng(3)
    temperatures = (0.0, 1e-6, 0.3, 0.8, 1.0, 1.7, 100.0)
    for vocab in (1, 31, 1025, 2500):
        logits = (10 * KINDS[kind](rng, (len(temperatures), vocab))).astype(np.float32)
        totals, divisors = kernels.new("totals", len(temperatures), np.int64), np.array([*map(divisor, temperatures)])
        given = kernels.put("logits", logits), kernels.put("divisors", divisors), totals
        kernels.call("dfssm_trt_total_weight", *given, len(temperatures), vocab)
        assert totals.tolist() == [total_weight(*row) for row in zip(logits, temperatures, strict=True)]


def test_how_many_there_may_be(kernels):
    logits = np.random.default_rng(1).standard_normal((1, MOST_LARGEST + 1)).astype(np.float32)
    tokens, _ = run(kernels, logits, MOST_LARGEST)
    assert tokens[0].tolist() == np.argsort(-logits[0], kind="stable")[:-1].tolist()
    for count in (0, MOST_LARGEST + 1):
        with pytest.raises(EmulationError):
            run(kernels, logits, count)
    with pytest.raises(EmulationError):
        run(kernels, logits[:, :5], 6)


def test_the_runtime_calls_it(monkeypatch):
    """By its name in the library, through ctypes; an error of the launch is one of CUDA."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    if reason := adapter.missing():
        pytest.skip(reason)
    monkeypatch.setattr(Cuda, "_call", lambda self, name, *arguments: 1)
    cuda = Cuda(adapter.plugin_library())
    assert cuda._runtime is runtime and cuda.most_largest == MOST_LARGEST and cuda.weighs
    logits = np.random.default_rng(2).standard_normal((3, 300)).astype(np.float32)
    tokens, values = np.zeros((3, 7), np.int64), np.zeros((3, 7), np.float32)
    cuda.largest(logits.ctypes.data, 3, 300, 7, tokens.ctypes.data, values.ctypes.data)
    for row, found, their in zip(logits, tokens, values, strict=True):
        expected, logits_of = largest(row, 7)
        assert found.tolist() == expected.tolist() and their.tolist() == logits_of.tolist()
    with pytest.raises(DfssmError, match="CUDA says InvalidValue .dfssm_largest"):
        cuda.largest(logits.ctypes.data, 3, 300, 301, tokens.ctypes.data, values.ctypes.data)
    totals = np.zeros(3, np.int64)
    divisors = np.array([0.5, 1, 2], np.float32)
    cuda.total_weight(logits.ctypes.data, 3, 300, divisors.ctypes.data, totals.ctypes.data)
    assert totals.tolist() == [total_weight(*row) for row in zip(logits, divisors.tolist(), strict=True)]
