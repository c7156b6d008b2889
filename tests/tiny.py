"""A DF-SSM student small enough for any test, its tokenizer, and bundles of it. NumPy only."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dfssm.export.graph import build_step_graph
from dfssm.export.writer import write_model
from dfssm.model.config import DFSSMConfig
from dfssm.targets import get_target
from dfssm.targets.bundle import TAPS, Manifest, file_entry
from dfssm.verify.graph import write_taps

MERGES = [
    ("h", "e"),
    ("l", "l"),
    ("he", "ll"),
    ("hell", "o"),
    ("Ġ", "w"),
    ("o", "r"),
    ("Ġw", "or"),
    ("Ã", "©"),
]

CONFIG = DFSSMConfig(
    vocab_size=256 + len(MERGES) + 1, d_model=64, n_layer=2, d_state=16, headdim=8, expand=2, ngroups=2,
    rank=4, eos_token_id=256 + len(MERGES), bos_token_id=256 + len(MERGES),
)  # fmt: skip


def tensors(config: DFSSMConfig = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of a student in the canonical layout, named as in model.pt, of a lively size."""
    rng = np.random.default_rng(seed)
    c = config

    def normal(*shape: int, size: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape) * size).astype(np.float32)

    def int8(*shape: int) -> np.ndarray:
        return rng.integers(-127, 128, shape, np.int8)

    named = {
        "embedding.weight": int8(c.vocab_size, c.d_model),
        "norm_f.weight": np.ones(c.d_model, np.float32),
    }
    named["embedding.scale"] = np.full(c.vocab_size, 1 / 200, np.float32)
    if not c.tie_embeddings:
        named |= {
            "lm_head.weight": int8(c.vocab_size, c.d_model),
            "lm_head.scale": named["embedding.scale"].copy(),
        }
    for i in range(c.n_layer):
        layer = {
            "norm.weight": 1 + normal(c.d_model, size=0.1),
            "gated_norm.weight": 1 + normal(c.d_inner, size=0.1),
            "conv.weight": normal(c.conv_dim, c.d_conv, size=0.5),
            "conv.bias": normal(c.conv_dim, size=0.1),
            "scan.A_log": np.log(rng.uniform(1, 16, c.nheads)).astype(np.float32),
            "scan.D": np.ones(c.nheads, np.float32),
            "scan.dt_bias": normal(c.nheads) - 3,
        }
        for name, rows, columns in (("in_proj", c.d_in_proj, c.d_model), ("out_proj", c.d_model, c.d_inner)):
            rank, planes = c.scaffold(f"layers.{i}.{name}")
            lead = () if planes == 1 else (planes,)
            layer |= {
                f"{name}.bits": rng.integers(0, 256, (*lead, rows, columns // 8), np.uint8),
                f"{name}.scale": rng.uniform(0.5, 1.5, (*lead, rows)).astype(np.float32) / np.float32(columns**0.5),
                f"{name}.down": int8(rank, columns),
                f"{name}.down_scale": np.full(rank, 1 / (70 * columns**0.5), np.float32),
                f"{name}.up": int8(rows, rank),
                f"{name}.up_scale": np.full(rows, 1 / 300, np.float32),
            }
        named |= {f"layers.{i}.{key}": value for key, value in layer.items()}
    return named


def not_a_number(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    """An `edit` of `write_bundle`: one number of the tensor `name` is NaN."""

    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[name].reshape(-1)[3] = np.nan

    return edit


def write_tokenizer(path: Path) -> None:
    """A byte-level BPE tokenizer with a few merges; a character outside ASCII is mostly several tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in MERGES:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.save(str(path))


def byte_level_alphabet() -> set[str]:
    """The characters that a byte-level vocabulary writes bytes with."""
    from tokenizers import pre_tokenizers

    return set(pre_tokenizers.ByteLevel.alphabet())


def byte_fallback_tokenizer() -> Any:
    """A tokenizer as Llama's and Mistral's, of the ids of CONFIG: a character that is no piece is bytes <0x..>."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "<unk>", "▁", "h", "e", "▁h", "▁he"]
    model = models.BPE(
        {piece: index for index, piece in enumerate(pieces)},
        [("▁", "h"), ("▁h", "e")],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def write_bundle(
    folder: Path,
    config: DFSSMConfig = CONFIG,
    target: str = "ort-cpu",
    state_dtype: str = "fp32",
    seed: int = 0,
    tokenizer: bool = True,
    edit: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
    options: Mapping[str, str] = MappingProxyType({}),
    taps: bool = False,
) -> Path:
    """A bundle of the tiny student, made of the same parts as dfcompile's; `edit` changes its tensors before; `options`
    choose the layout; `taps`: as dfcompile --taps.
    """
    folder.mkdir(parents=True)
    module = get_target(target)
    named = tensors(config, seed)
    edit(named)
    layout = module.layout(**options)
    graph = build_step_graph(config, module.lower(named, layout), state_dtype=state_dtype, layout=layout)
    write_model(graph, folder / "model.onnx")
    names, engine = module.build(folder)
    if taps:
        write_taps(folder / "model.onnx", folder)
        names.append(TAPS)
    if tokenizer:
        write_tokenizer(folder / "tokenizer.json")
        names.append("tokenizer.json")
    files = {name: file_entry(folder / name) for name in names}
    manifest = Manifest(
        target, json.loads(json.dumps(config.to_dict())), state_dtype, layout, files, engine=engine,
        machine=module.machine(), model_sha256="0" * 64,
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder
