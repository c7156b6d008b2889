"""The peer llama.cpp, through llama-cpp-python: a Mamba-2 model of the same shape in GGUF, of random weights.

Names and metadata are those of llama.cpp's own conversion. The projections are of the kind in question; the embedding,
which is the head too, is Q8_0, as many bits as ours. Norms, convolution and scan are fp32, as there.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dfssm.base.child import python
from dfssm.base.errors import DfssmError
from dfssm.model.config import DFSSMConfig

from .peer import Peer

KINDS: dict[str, dict[int, float]] = {
    "TQ2_0": {64: 1.1},
    "Q2_K": {80: 16.0, 82: 24.0},
    "Q1_0": {0: 1.0},
    "Q4_0": {0: 4.6},
}
"""Kind -> where in a block its fp16 scales are -> what to divide them by, so that products have their input's size."""

_CHUNK = 512  # tokens that llama.cpp reads at once, its default


def build(config: dict[str, Any], path: Path, kind: str) -> Path:
    """Write the model of `config` (keys of a manifest) with projections of `kind`. DfssmError where they have no whole
    blocks.
    """
    import gguf

    c, rng = DFSSMConfig.from_dict(config), np.random.default_rng(0)
    made: dict[tuple, np.ndarray] = {}
    writer = gguf.GGUFWriter(path, "mamba2")

    def random_blocks(kind: str, rows: int, columns: int, scales: dict[int, float]) -> np.ndarray:
        values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        if columns % values:
            raise DfssmError(f"llama.cpp {kind} has blocks of {values} weights: a row of {columns} has no whole ones")
        if (kind, rows, columns) not in made:  # one for all layers: each has its own bytes in the file
            blocks = np.frombuffer(rng.bytes(rows * columns // values * size), np.uint8).reshape(-1, size).copy()
            for at, by in scales.items():
                scale = np.array([1 / (by * math.sqrt(columns))], np.float16)
                blocks[:, at : at + 2] = scale.view(np.uint8)
            made[kind, rows, columns] = blocks.reshape(rows, -1)
        return made[kind, rows, columns]

    def linear(name: str, kind: str, rows: int, columns: int, scales: dict[int, float]) -> None:
        blocks = random_blocks(kind, rows, columns, scales)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType[kind])

    def floats(name: str, *shape: int, fill: float = 1.0, noise: float = 0.0) -> None:
        writer.add_tensor(name, (fill + noise * rng.standard_normal(shape)).astype(np.float32))

    writer.add_context_length(1 << 20)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(c.n_layer)
    writer.add_ssm_conv_kernel(c.d_conv)
    writer.add_ssm_inner_size(c.d_inner)
    writer.add_ssm_state_size(c.d_state)
    writer.add_ssm_time_step_rank(c.nheads)
    writer.add_ssm_group_count(c.ngroups)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("none")
    linear("token_embd", "Q8_0", c.vocab_size, c.d_model, {0: 73.0})
    floats("output_norm.weight", c.d_model)
    for i in range(c.n_layer):
        layer = f"blk.{i}"
        floats(f"{layer}.attn_norm.weight", c.d_model)
        linear(f"{layer}.ssm_in", kind, c.d_in_proj, c.d_model, KINDS[kind])
        floats(f"{layer}.ssm_conv1d.weight", c.conv_dim, c.d_conv, fill=0, noise=1 / math.sqrt(c.d_conv))
        floats(f"{layer}.ssm_conv1d.bias", c.conv_dim, fill=0)
        floats(f"{layer}.ssm_dt.bias", c.nheads, fill=math.log(math.expm1(0.01)))
        floats(f"{layer}.ssm_a", c.nheads, 1, fill=-4)
        floats(f"{layer}.ssm_d", c.nheads, 1)
        floats(f"{layer}.ssm_norm.weight", c.ngroups, c.d_inner // c.ngroups)
        linear(f"{layer}.ssm_out", kind, c.d_model, c.d_inner, KINDS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def open_peer(config: dict[str, Any], folder: Path, threads: int, kind: str) -> Peer:
    """Build the peer of `kind` and open it in a process of its own; its state is fp32, the only type it has."""
    folder.mkdir(parents=True, exist_ok=True)
    path = build(config, folder / f"{kind}.gguf", kind)
    command = python("-m", __name__, str(path), str(config["vocab_size"]), str(threads))
    # Left alone, the threads of OpenMP may share a core for seconds, at a tenth of the speed.
    bound = os.environ | {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=bound)

    def ask(what: str, tokens: int) -> float:
        assert process.stdin and process.stdout
        try:
            print(what, tokens, file=process.stdin, flush=True)
            return float(process.stdout.readline())
        except (BrokenPipeError, ValueError):  # no line, no number
            raise DfssmError(f"llama.cpp ended while it ran the {kind} model that dfssm wrote for it") from None

    version = importlib.metadata.version("llama-cpp-python")
    return Peer(
        partial(ask, "decode"),
        partial(ask, "prefill"),
        f"llama-cpp-python {version}, {path.stat().st_size / 1e6:.0f} MB, embedding and head Q8_0",
        process.kill,
    )


def serve(path: str, vocab_size: int, threads: int) -> None:
    """Open the model in `path`; answer lines `decode N` and `prefill N` with the seconds that they took."""
    import llama_cpp as api

    quiet = api.llama_log_callback(lambda *_: None)  # a name, as llama.cpp holds only its address
    api.llama_log_set(quiet, None)
    model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
    settings = api.llama_context_default_params()
    settings.n_ctx, settings.n_batch = 1 << 16, _CHUNK
    settings.n_threads = settings.n_threads_batch = threads
    context = api.llama_init_from_model(model, settings)
    ids = (ctypes.c_int32 * _CHUNK)()

    def read(count: int) -> np.ndarray:
        """Read the first `count` of `ids`; the logits f32[V] after them, in llama.cpp's memory."""
        assert api.llama_decode(context, api.llama_batch_get_one(ids, count)) == 0, "llama.cpp cannot decode"
        return np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), (vocab_size,))

    def decode(tokens: int) -> np.ndarray:
        for _ in range(tokens):
            logits = read(1)
            ids[0] = int(logits.argmax())
        return logits

    def prefill(tokens: int) -> np.ndarray:
        ids[:] = np.random.default_rng(1).integers(0, vocab_size, _CHUNK).tolist()
        for start in range(0, tokens, _CHUNK):
            logits = read(min(_CHUNK, tokens - start))
        return logits

    for line in sys.stdin:
        what, tokens = line.split()
        api.llama_memory_clear(api.llama_get_memory(context), True)
        start = time.perf_counter()
        logits = {"decode": decode, "prefill": prefill}[what](int(tokens))
        seconds = time.perf_counter() - start
        assert np.isfinite(logits).all() and np.ptp(logits) > 0, "llama.cpp computed no logits"
        print(seconds, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
