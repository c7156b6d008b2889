"""Hostile variants of valid files: of what a file says where it has a structure, else of its bytes.

A mutation is a function of the bytes and of a random number generator, so that a seed names it.
"""

import copy
import io
import json
import math
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from dfssm.targets.bundle import sealed

Mutation = Callable[[bytes, random.Random], bytes]

# Values that readers stumble over, in any place of any document.
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 255, 256, 65537, 10**7, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**18,
    -(2**63), 10**400, 0.0, -0.0, 0.5, 1e-320, 1e308, math.nan, math.inf, -math.inf, "", "a", "\0", "\n", "é\ud800",
    "../x", "/dev/zero", ".", "fp16", "ort-cpu", "onnx", "F32", "I8", "BF16", "mamba2", "Mamba2", "1", "text",
    "\x1b[31m", [], {}, [[]], [None], [0], [-1], [2**40, 2**40], [0, 2**62], {"": {}}, {"text": "a"},
    {"__float__": "Infinity"},
]  # fmt: skip

DEEP = 100_000  # brackets: far more than any parser's stack


def any_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flipped, overwritten, inserted, doubled, cut."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        other = rng.randrange(at, min(len(data), at + rng.choice((1, 4, 64))) + 1)
        match rng.randrange(5):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at:other] = rng.choice((b"\0", b"\xff", b"\n", b'"', b"[", b"9")) * (other - at)
            case 2:
                data[at:at] = data[at:other] or b"0"
            case 3:
                del data[at:other]
            case 4 if rng.random() < 0.2:
                del data[at:]
    return bytes(data)


def json_value(document: Any, rng: random.Random) -> Any:
    """One to three places of a document, anywhere in it, become hostile. The document itself is left as it is."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(document))
        if not places:
            return _hostile(rng)
        holder, key = rng.choice(places)
        match rng.randrange(6):
            case 0 | 1 | 2:
                holder[key] = _hostile(rng)
            case 3:
                del holder[key]
            case 4:  # another value of the same document
                source, name = rng.choice(places)
                holder[key] = copy.deepcopy(source[name]) if _has(source, name) else None
            case 5 if isinstance(holder, dict):
                holder[str(_hostile(rng))[:20]] = holder.pop(key)
            case 5:
                holder.insert(key, _hostile(rng))
    return document


def json_file(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return any_bytes(data, rng)
    if rng.random() < 0.01:
        return rng.choice((b"[", b'{"":')) * rng.choice((900, DEEP))
    try:
        return _dumps(json_value(json.loads(data), rng))
    except (ValueError, RecursionError):
        return any_bytes(data, rng)


def manifest(data: bytes, rng: random.Random) -> bytes:
    """Mostly with a hash of itself that is right again: else nothing but the hash would be tried."""
    mutated = json_file(data, rng)
    try:
        document = json.loads(mutated)
        if isinstance(document, dict) and rng.random() < 0.9 and document.pop("manifest_sha256", None):
            return sealed(document).encode()
    except (ValueError, RecursionError, AttributeError):
        pass
    return mutated


def json_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = json_file(lines[at], rng)
    return b"\n".join(lines)


def safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header, a JSON document behind its length, and JSON texts in its metadata; or any byte."""
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError, struct.error):
        return any_bytes(data, rng)
    if rng.random() < 0.2:
        return any_bytes(data, rng)
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if isinstance(metadata, dict) and isinstance(metadata.get("config"), str) and rng.random() < 0.4:
        metadata["config"] = json_file(metadata["config"].encode(errors="replace"), rng).decode(errors="replace")
        text = _dumps(header)
    else:
        text = json_file(_dumps(header), rng)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def torch_zip(data: bytes, rng: random.Random) -> bytes:
    """A record of a zip archive, with a checksum that is right again; or any byte."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = [(name, archive.read(name)) for name in archive.namelist()]
    except Exception:  # an earlier mutation has damaged it: what zipfile raises then is many things
        return any_bytes(data, rng)
    if rng.random() < 0.2 or not records:
        return any_bytes(data, rng)
    # Half of the time the pickle, the first one, which says what all others are.
    at = 0 if rng.random() < 0.5 else rng.randrange(len(records))
    records[at] = records[at][0], any_bytes(records[at][1], rng)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in records:
            archive.writestr(zipfile.ZipInfo(name), content)
    return made.getvalue()


def _hostile(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(HOSTILE))


def _dumps(document: Any) -> bytes:
    return json.dumps(document).encode()


def _places(document: Any):
    """Every (holder, key) of a document."""
    waiting = [document]
    while waiting:
        holder = waiting.pop()
        keys = holder if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in keys:
            yield holder, key
            waiting.append(holder[key])


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)
