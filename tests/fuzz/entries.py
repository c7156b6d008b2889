"""What is fuzzed: every reader of a file that comes from elsewhere.

An entry reads a file of given bytes. It may return, or raise a DfssmError of one line; anything else is a finding, and
so is a reader that takes more memory than four times the file and 64 MB, or more than seconds.
"""

import dataclasses
import functools
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from dfssm.base.errors import DfssmError

from . import mutate

HERE = Path(__file__).parent
SECONDS = 5.0
BUNDLE = ("model.onnx", "model.onnx.data", "libdfssm_ort_cpu.so", "model.engine")  # beside the manifest; each is "x"
SPARE = 64 << 20


class OutOfBounds(AssertionError):
    """A reader took more time or memory than it may."""


class Entry(NamedTuple):
    """`seeds` gives valid files; `read` reads the file at a path that ends in `file`; `runs` in `make test`."""

    file: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], object]
    mutation: mutate.Mutation
    runs: int = 300
    torch: bool = False


def check(name: str, data: bytes) -> bool:
    """Whether the entry reads `data`; False: it refuses it as it should. Raises what is a finding."""
    entry = ENTRIES[name]
    path = _folder(name) / entry.file
    path.write_bytes(data)
    with _bounds(len(data)):
        try:
            entry.read(path)
        except DfssmError as error:
            lines = str(error).splitlines()
            assert len(lines) == 1, f"an error of {len(lines)} lines"
            return False
    return True


def seeds(name: str) -> list[bytes]:
    """Valid files, made by the project's own writers, and the inputs of mended findings."""
    return ENTRIES[name].seeds() + [path.read_bytes() for path in sorted((HERE / "seeds" / name).glob("*"))]


@functools.cache
def _folder(name: str) -> Path:
    """One a process, kept: what lies beside the file is made once. In memory where there is such a place."""
    shared = Path("/dev/shm")
    kept = tempfile.TemporaryDirectory(prefix="dfssm-fuzz-", dir=shared if os.access(shared, os.W_OK) else None)
    _kept.append(kept)
    folder = Path(kept.name)
    if name == "manifest":
        for file in BUNDLE:
            (folder / file).write_bytes(b"x")
    if name in ("teacher_config", "teacher_index"):  # beside an index model.safetensors would be taken
        weights = "model.safetensors" if name == "teacher_config" else "shard.safetensors"
        (folder / weights).write_bytes(_teacher()["model.safetensors"])
    if name in ("teacher_weights", "teacher_pickle", "teacher_index"):
        (folder / "config.json").write_bytes(_teacher()["config.json"])
    return folder


_kept: list[tempfile.TemporaryDirectory] = []


def clean() -> None:
    """For who ends the process without Python's own end."""
    for folder in _kept:
        folder.cleanup()


@contextmanager
def _bounds(size: int) -> Iterator[None]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    memory, start = _memory("VmRSS"), time.monotonic()
    yield
    seconds, taken = time.monotonic() - start, _memory("VmHWM") - memory
    if seconds > SECONDS:
        raise OutOfBounds(f"{seconds:.1f} s for {size} bytes")
    if taken > 4 * size + SPARE:
        raise OutOfBounds(f"{taken} bytes of memory for a file of {size}")


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:", 1)[1].split(None, 1)[0]) * 1024


# ---- readers; imported when called, so that no entry waits for what another one uses ----


def _manifest(path: Path) -> None:
    from dfssm.targets.bundle import open_bundle

    open_bundle(path.parent)


def _graph(path: Path) -> None:
    import numpy as np

    from dfssm.targets.initializers import externals

    try:
        for weight in externals(path.read_bytes()):
            weight.of(np.zeros(1 << 20, np.uint8))
    except ValueError as error:
        raise DfssmError(str(error)) from None


def _state(path: Path) -> None:
    from dfssm.runtime.state import State

    State.load(path)


def _golden(path: Path) -> None:
    from dfssm.verify.golden import Golden

    Golden.from_bytes(path.read_bytes(), path, 3)


def _student(path: Path) -> None:
    from dfssm.model.checkpoint import load_student_tensors

    load_student_tensors(path)


def _teacher_folder(path: Path) -> None:
    from dfssm.model.hf_import import load_teacher

    load_teacher(path.parent)


def _tokenizer(path: Path) -> None:
    from dfssm.targets.text import parse

    try:
        tokenizer = parse(path.read_bytes())
    except ValueError as error:
        raise DfssmError(str(error)) from None
    tokenizer.decode(tokenizer.encode("Once upon a time 1 é\U0001f600").ids)


def _documents(path: Path) -> None:
    from dfssm.model.text import documents

    for text in documents(path):
        assert text and text == text.strip()
        text.encode()


def _op(path: Path) -> None:
    from . import ort_ops

    if not ort_ops.run(path.read_bytes()):
        raise DfssmError("the op refuses it")


# ---- seeds ----


def _shape(**changes):
    """The smallest student there is."""
    from dfssm.model.config import DFSSMConfig

    sizes = dict(vocab_size=2, d_model=32, n_layer=1, d_state=1, headdim=32, expand=1, d_conv=2, rank=0)
    return DFSSMConfig(**sizes | changes)


def _made(file: str, write: Callable[[Path], object]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / file)
        return (Path(folder) / file).read_bytes()


def _manifests() -> list[bytes]:
    from dfssm.targets.bundle import Manifest

    digest = hashlib.sha256(b"x").digest()
    entry = {"sha256": digest.hex(), "chunks_sha256": hashlib.sha256(digest).hexdigest(), "bytes": 1}
    files = {file: dict(entry) for file in BUNDLE}
    engine_file = files.pop("model.engine")
    engine = {"builder": "tensorrt", "version": "10.0", "sm": [86]}
    config = _shape().to_dict()
    manifests = [
        Manifest(
            "ort-cpu", config, "fp16", 1, files, {"dfssm": "0"}, {"passed": None}, {}, platform.machine(), "0" * 64
        ),
        Manifest("trt", config, "int8", 0, {"model.engine": engine_file}, engine=engine),
    ]
    texts = [manifest.to_json() for manifest in manifests]
    version_1 = json.loads(texts[0]) | {"version": 1, "files": {}}
    for name, entry in files.items():
        version_1["files"][name] = {"sha256": entry["sha256"], "bytes": entry["bytes"]}
    for key in ("machine", "model_sha256", "manifest_sha256"):
        del version_1[key]
    return [text.encode() for text in (*texts, json.dumps(version_1))]


def _graphs() -> list[bytes]:
    import numpy as np
    import onnx

    weights = [onnx.numpy_helper.from_array(np.zeros((4, 8), dtype), dtype) for dtype in ("int8", "float32")]
    for weight in weights:
        onnx.external_data_helper.set_external_data(weight, "model.onnx.data", offset=4096)
        weight.ClearField("raw_data")
    inline = onnx.numpy_helper.from_array(np.zeros(3, np.float32), "c")
    graph = onnx.helper.make_graph([], "g", [], [], [*weights, inline])
    return [onnx.helper.make_model(graph).SerializeToString()]


def _states() -> list[bytes]:
    import numpy as np

    from dfssm.runtime.state import State

    layout = {"conv_state.0": (np.dtype(np.float32), (2, 3)), "ssm_state.0": (np.dtype(np.int8), (1, 2, 2))}
    return [_made("s", State.zeros("0" * 64, layout, 3, 2).save)]


def _goldens() -> list[bytes]:
    import numpy as np

    from dfssm.verify.golden import SUMS, Golden

    rows = {"digests": np.zeros((2, 3, SUMS), np.float32), "hashes": np.zeros((2, 3, 8), np.uint8)}
    rows |= {"drift": np.zeros(3, np.float32), "logits": np.zeros((2, 3), np.float32)}
    names = ("conv_state.0", "ssm_state.0", "logits")
    return [Golden(names, np.array([0, 2, 1]), np.array([1, 2]), kernels="k", **rows).to_bytes()]


def _students(file: str, torch_seed: int = 0) -> list[bytes]:
    from dfssm.model.checkpoint import save_student
    from dfssm.model.convert import init_student

    student = init_student(_shape(), torch_seed, 0, 1)
    return [_made(file, lambda path: save_student(path, *student))]


@functools.cache
def _teacher() -> dict[str, bytes]:
    """The files of the smallest teacher; its weights in both formats."""
    import torch

    from dfssm.model.config import Mamba2Config
    from dfssm.model.hf_import import save_teacher
    from dfssm.model.teacher import Mamba2LM

    shape = {field.name: getattr(_shape(), field.name) for field in dataclasses.fields(Mamba2Config)}
    model = Mamba2LM(Mamba2Config(**shape))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_teacher(model, folder)
        from safetensors.torch import load_file

        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def _teacher_configs() -> list[bytes]:
    ssm = {"layer": "Mamba2", "d_state": 1, "headdim": 32, "expand": 1, "d_conv": 2}
    of_mamba_ssm = {"d_model": 32, "n_layer": 1, "vocab_size": 2, "ssm_cfg": ssm, "pad_vocab_size_multiple": 1}
    return [_teacher()["config.json"], json.dumps(of_mamba_ssm).encode()]


def _teacher_indexes() -> list[bytes]:
    return [json.dumps({"metadata": {}, "weight_map": {"a": "shard.safetensors"}}).encode()]


def _tokenizers() -> list[bytes]:
    """Byte-level BPE, and the kinds of Llama (byte fallback) and of words, with what they may hold beside it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    merged = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "Ġ": 3}, [("a", "b")], unk_token="a"))
    merged.pre_tokenizer, merged.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    merged.add_special_tokens([AddedToken("<|end|>", special=True)])
    fallback = {f"<0x{byte:02X}>": byte for byte in range(4)} | {"▁": 4, "a": 5}
    llama = Tokenizer(models.BPE(fallback, [], byte_fallback=True, fuse_unk=True))
    llama.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    llama.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Split(" ", "removed")
    words.post_processor = processors.TemplateProcessing("[UNK] $A", None, [("[UNK]", 0)])
    words.enable_padding(length=4)
    words.enable_truncation(8)
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False))
    unigram.decoder, unigram.pre_tokenizer = decoders.Metaspace(), pre_tokenizers.Metaspace()
    return [tokenizer.to_str().encode() for tokenizer in (merged, llama, words, unigram)]


def _texts() -> list[bytes]:
    return ["one\n<|endoftext|>two é\n".encode(), b"\xef\xbb\xbf a \r\n b", "x".encode("utf-16")]


def _lines() -> list[bytes]:
    return [b'{"text": "one"}\n\n{"text": "\\ud83d\\ude00", "id": 1}\r\n{"text": " \\n"}', b'\xef\xbb\xbf{"text": "a"}']


def _parquets() -> list[bytes]:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["one", None, "two é"]})
    return [_made("a.parquet", lambda path: pyarrow.parquet.write_table(table.take([0, 2]), path))]


ENTRIES: dict[str, Entry] = {
    "manifest": Entry("manifest.json", _manifests, _manifest, mutate.manifest),
    "graph": Entry("model.onnx", _graphs, _graph, mutate.any_bytes),
    "state": Entry("a.state", _states, _state, mutate.safetensors),
    "golden": Entry("golden.safetensors", _goldens, _golden, mutate.safetensors),
    "text": Entry("a.txt", _texts, _documents, mutate.any_bytes),
    "json_lines": Entry("a.jsonl", _lines, _documents, mutate.json_lines),
    "parquet": Entry("a.parquet", _parquets, _documents, mutate.any_bytes),
    "tokenizer": Entry("tokenizer.json", _tokenizers, _tokenizer, mutate.json_file),
    "student_safetensors": Entry(
        "model.safetensors", lambda: _students("model.safetensors"), _student, mutate.safetensors, 200, True
    ),
    "student_pt": Entry("model.pt", lambda: _students("model.pt"), _student, mutate.torch_zip, 100, True),
    "teacher_config": Entry("config.json", _teacher_configs, _teacher_folder, mutate.json_file, 200, True),
    "teacher_index": Entry(
        "model.safetensors.index.json", _teacher_indexes, _teacher_folder, mutate.json_file, 200, True
    ),
    "teacher_weights": Entry(
        "model.safetensors", lambda: [_teacher()["model.safetensors"]], _teacher_folder, mutate.safetensors, 200, True
    ),
    "teacher_pickle": Entry(
        "pytorch_model.bin", lambda: [_teacher()["pytorch_model.bin"]], _teacher_folder, mutate.torch_zip, 100, True
    ),
    "ort_ops": Entry(
        "seed",
        lambda: [*(bytes([number]) for number in range(64)), bytes.fromhex("0b3396df")],  # the last: 0 / 0 by a norm
        _op,
        mutate.any_bytes,
    ),
}
