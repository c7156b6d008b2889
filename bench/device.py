"""How fast a TensorRT bundle decodes on the GPU here, by batch size, beside what the GPU's memory would allow and what
`bench/gpu.py` predicts.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

import numpy as np

from dfssm.model.ledger import sizes, weight_bytes_of_step
from dfssm.runtime import Engine
from dfssm.runtime.tensorrt import TensorRTBackend
from dfssm.targets import cuda

from . import gpu
from .series import tokens_a_second

BATCHES = (1, 8, 32, 128)

# Copies that are queued before one waits for them, so that the wait weighs little; and probes of a median.
COPIES, REPEATS = 8, 5

# Names that the driver gives to the GPUs of the prediction. Others of a similar name have other memory or clocks.
DRIVER_NAMES = {
    "A100 40GB": r"A100.*40GB",
    "L4": r"L4",
    "H100 SXM": r"H100 80GB HBM3",
    "H200": r"H200",
    "RTX 4090": r"RTX 4090",
    "RTX 5090": r"RTX 5090",
    "Orin AGX": r"Orin",
}


class CopyBandwidth:
    """What copying `size` bytes, at least 64 MB, within device memory gives, in GB/s, both directions counted.

    `bench.Bandwidth` for a device: there is one probe, as reads alone would take a kernel of our own.
    """

    patterns = ["copy"]

    def __init__(self, device, size: int):
        self._device, self._size = device, max(size, 1 << 26)
        self._addresses = [device.allocate(self._size) for _ in range(2)]
        self.read()  # the first copy is slower

    def read(self) -> np.ndarray:
        seconds = []
        for _ in range(REPEATS):
            self._device.synchronize()
            start = time.perf_counter()
            for _ in range(COPIES):
                self._device.copy(*self._addresses, self._size)
            self._device.synchronize()
            seconds.append(time.perf_counter() - start)
        return np.array([2 * COPIES * self._size / float(np.median(seconds)) / 1e9])

    read_write = read

    def close(self) -> None:
        while self._addresses:
            self._device.free(self._addresses.pop())


def first_gpu() -> str:
    """Name of the GPU that bundles run on."""
    gpus, _ = cuda.devices()
    return gpus[0].name if gpus else "unknown GPU"


def bench_batches(
    engine: Engine,
    backend: TensorRTBackend,
    batches: Sequence[int],
    tokens: int,
    rounds: int,
    progress: Callable[[int, int], None],
) -> list[dict]:
    """For each of `batches` that the engine takes: the step alone, whose logits stay on the device, and its floor."""
    batches = [batch for batch in batches if batch <= backend.max_batch]
    with backend.cuda.device():
        probe = CopyBandwidth(backend.cuda, weight_bytes_of_step(engine.config, engine.manifest.layout))
        results = []
        for batch in batches:
            results.append(_bench(engine, probe, batch, tokens, rounds))
            progress(len(results), len(batches))
        probe.close()
    return results


def _bench(engine: Engine, probe: CopyBandwidth, batch: int, tokens: int, rounds: int) -> dict:
    state = engine.new_state(batch)
    ids = np.random.default_rng(1).integers(0, engine.vocab_size, (8, batch))
    for row in ids:  # warm, and recorded
        engine.step(row, state)
    moved = weight_bytes_of_step(engine.config, engine.manifest.layout) + 2 * state.nbytes
    rates, floors = np.empty(rounds), np.empty(rounds)
    for index in range(rounds):
        floors[index] = batch * probe.read()[0] * 1e9 / moved
        start = time.perf_counter()
        for step in range(tokens):
            state.pool.compute(ids[step % len(ids)].reshape(-1, 1))
        rates[index] = batch * tokens / (time.perf_counter() - start)
    return {
        "batch": batch,
        **tokens_a_second(rates),
        "floor_tok_s": float(np.median(floors)),
        "floor_share": float(np.median(rates / floors)),
        "predicted_tok_s": predicted(first_gpu(), engine.config, engine.manifest.state_dtype, batch),
        "recorded": state.pool.recorded,
    }


def predicted(name: str, config: dict, state_dtype: str, batch: int) -> float | None:
    """Tokens a second as in docs/gpu.md; None for a GPU or a shape that it has no figure for."""
    shape = (config["d_model"], config["n_layer"], config["vocab_size"], config["planes"], *sizes(config))
    if shape != (2048, 48, 50288, 1, 4096, 64, 4352, 8512):
        return None
    for device in gpu.GPUS:
        if re.search(rf"\b{DRIVER_NAMES[device.name]}$", name):
            return batch / gpu.step(device, batch, state_dtype)
    return None
