"""Reading and writing model.pt and .safetensors: format "dfssm", versions 1 and 2, strict and without running any
code.

A file is a format name, a version, the configuration and the tensors of the packed student in canonical
layout. The configuration says which tensors there are, of which shape and dtype; anything else is an error
that names the tensor. An fp32 tensor whose values all are fp16 numbers, as those of the published fp16
checkpoints, lies in the file as fp16: that loses nothing, and is fp32 again when it is read.

Version 2 is for projections that differ in rank or planes. All others are of version 1, which older releases read.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dfssm.base import paths, tensorfile
from dfssm.base.errors import DfssmError, reason
from dfssm.base.files import write_file
from dfssm.base.hashing import on_threads, pieces
from dfssm.base.reading import open_file

from .config import DFSSMConfig
from .tensors import student_tensors

FORMAT, VERSIONS = "dfssm", (1, 2)


def tensor_specs(config: DFSSMConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of every tensor of a student of this configuration, in the order of the file."""
    return {name: (t.shape, getattr(torch, t.dtype)) for name, t in student_tensors(config).items()}


def check_tensors(source: str, config: DFSSMConfig, tensors: dict[str, Tensor]) -> None:
    """Raise DfssmError unless `tensors` are exactly those of `config`, finite where they are floats."""
    if config.n_layer > len(tensors):  # before a list of a million layers is made
        found = f"has {len(tensors)} tensors, too few for the {config.n_layer} layers of its configuration"
        raise DfssmError(f"{source}: {found}; export or convert the student again")
    specs = tensor_specs(config)
    for name in specs:
        if name not in tensors:
            raise DfssmError(f"{source}: tensor {name} is missing; export or convert the student again")
    for name, tensor in tensors.items():
        if name not in specs:
            raise DfssmError(f"{source}: tensor {name} does not belong to its configuration; export it again")
        shape, dtype = specs[name]
        if not is_plain(tensor):
            raise DfssmError(f"{source}: {name} is a {type(tensor).__name__}; expected a tensor of {dtype}, dense")
        if tuple(tensor.shape) != shape:
            found = f"has shape {list(tensor.shape)}"
            raise DfssmError(f"{source}: tensor {name} {found}; its configuration asks {list(shape)}")
        if tensor.dtype != dtype:
            raise DfssmError(f"{source}: {name} is {tensor.dtype}; its format asks {dtype}")
        if dtype.is_floating_point and not tensor.isfinite().all():
            raise DfssmError(f"{source}: {name} holds NaN or infinity; make the student again")


def is_plain(value: Any) -> bool:
    """Whether it is a tensor with all its numbers in memory or in a file: neither sparse, nested nor of device meta."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided
    return dense and not (value.is_nested or value.is_meta)


def save_student(path: str | Path, config: DFSSMConfig, tensors: dict[str, Tensor]) -> None:
    """Write a packed student; the suffix .safetensors chooses that format, any other torch's.

    Atomic: an interrupted or failed call leaves what was at `path`. Wrong tensors raise DfssmError and write
    nothing.
    """
    path = Path(path)
    check_tensors(str(path), config, tensors)
    # In the order of the file, and each its own storage: a view would drag its whole base along.
    tensors = {name: _narrow(tensors[name].detach().cpu()).contiguous() for name in tensor_specs(config)}
    tensors = {
        name: t.clone() if t.untyped_storage().nbytes() != t.numel() * t.itemsize else t for name, t in tensors.items()
    }
    version = VERSIONS[0 if config.alike else 1]
    header = {"format": FORMAT, "version": version, "config": config.to_dict()}
    if path.suffix == ".safetensors":
        metadata = {"format": FORMAT, "version": str(version), "config": json.dumps(config.to_dict())}

        def write(draft: Path) -> None:
            save_file(tensors, draft, metadata)
            with draft.open("r+b") as file:
                tensorfile.order(file)
    else:

        def write(draft: Path) -> None:
            with draft.open("wb") as file:  # given a path, torch would write the temporary name into the file
                torch.save(header | {"tensors": tensors}, file)

    write_file(path, write)


def load_student_tensors(path: str | Path) -> tuple[DFSSMConfig, dict[str, Tensor]]:
    """Read a student, memory-mapped: bytes are fetched from the file when used. The suffix is the format.

    Raises DfssmError if the file is missing, is no student, is truncated, has another version, or if a tensor
    is missing, unexpected or has the wrong shape or dtype.
    """
    path = paths.student(path)
    header, tensors = _read(path)
    if header.get("format") != FORMAT or not isinstance(tensors, dict):
        raise DfssmError(f"{path}: is not a DF-SSM student; make one with dfssm convert or init")
    if type(header.get("version")) is not int or header["version"] not in VERSIONS:  # a tensor has no truth
        raise DfssmError(
            f"{path}: format version is {header.get('version')!r}, this dfssm reads {VERSIONS[0]} to {VERSIONS[-1]}; "
            "export the student again with this version"
        )
    try:
        config = DFSSMConfig.from_dict(header.get("config"))
    except DfssmError as error:
        raise DfssmError(f"{path}: {error}") from None
    tensors = {name: _widen(tensor) for name, tensor in tensors.items()}
    check_tensors(str(path), config, tensors)
    return config, tensors


def _narrow(tensor: Tensor) -> Tensor:
    """fp32 as fp16 where that is exact."""
    if tensor.dtype != torch.float32:
        return tensor
    half = tensor.half()
    return half if torch.equal(half.float(), tensor) else tensor


def _widen(value: Any) -> Any:
    """A tensor as its numbers alone, fp16 as fp32; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().float() if value.dtype == torch.float16 else value.detach()


def read_tensors(path: Path, remedy: str) -> tuple[Any, dict[str, str]]:
    """What a file of safetensors or torch.save holds, and the metadata of the former: tensors that are memory-mapped.

    No code is run. Raises DfssmError with `remedy` for a file that cannot be read.
    """
    try:
        with open_file(path) as file:
            # The libraries open it by this name: what was checked, and whatever bytes its own name has.
            name = f"/proc/self/fd/{file.fileno()}"
            if path.suffix == ".safetensors":
                with safe_open(name, framework="pt") as content:
                    return {key: content.get_tensor(key) for key in content.keys()}, content.metadata() or {}  # noqa: SIM118
            # Files from before torch 1.6 are not zip archives and cannot be mapped.
            if mapped := zipfile.is_zipfile(file):
                _check_records(file)
            else:
                with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
                    _check_pickle(content)
            with warnings.catch_warnings():  # of what is old, or read in vain: the user cannot change that
                warnings.simplefilter("ignore")
                content = torch.load(name, map_location="cpu", weights_only=True, mmap=mapped)
            _check_sizes(content, os.fstat(file.fileno()).st_size)
            return content, {}
    except pickle.UnpicklingError:
        raise DfssmError(f"{path}: holds more than tensors, which is never loaded; use safetensors") from None
    except Exception as error:  # the unpickler raises whatever the damaged bytes make it stumble over
        raise DfssmError(f"{path}: cannot be read ({reason(error)}); {remedy}") from None


def _check_sizes(content: Any, size: int) -> None:
    """ValueError where the tensors of a file are far larger than it: views may repeat one number without end."""
    tables = [content, *content.values()] if isinstance(content, dict) else []
    values = [value for table in tables if isinstance(table, dict) for value in table.values()]
    held = sum(value.numel() * value.itemsize for value in values if isinstance(value, Tensor))
    if held > 2 * size:  # a tied head is there twice
        raise ValueError(f"its tensors have {held:,} bytes, the file {size:,}")


def _check_records(file: BinaryIO) -> None:
    """Compare the records of torch's archive with their CRC32s, at which a reader that maps them does not look."""
    with zipfile.ZipFile(file) as archive:
        records = sorted(archive.infolist(), key=lambda record: -record.file_size)
        # As torch writes them: one after the other, as they are. Then their sizes are bounded by that of the file.
        stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
        if not stored or sum(record.file_size for record in records) > os.fstat(file.fileno()).st_size:
            raise zipfile.BadZipFile("its records are not stored as they are")
        handle = file.fileno()

        def check(record: zipfile.ZipInfo) -> None:
            name, extra = struct.unpack("<HH", os.pread(handle, 4, record.header_offset + 26))
            start = record.header_offset + 30 + name + extra  # behind the local header
            found = 0
            for piece in pieces(handle, start, start + record.file_size):
                found = zlib.crc32(piece, found)
            if found != record.CRC:
                raise zipfile.BadZipFile(f"the CRC32 of {record.filename} differs")

        on_threads(check, records)
        for record in records:
            if record.filename.endswith(".pkl"):
                _check_pickle(archive.read(record))


def _check_pickle(content: bytes | mmap) -> None:
    """ValueError for a bytearray, which no tensor needs: of the globals that torch lets a pickle call, the one that
    takes memory by its argument alone.
    """
    if content.find(b"\nbytearray\n") >= 0:
        raise ValueError("it holds a bytearray")


def _read(path: Path) -> tuple[dict, Any]:
    """Header and tensors of a student's file, as far as it is one."""
    if path.suffix == ".safetensors":
        tensors, metadata = read_tensors(path, "copy or export it again")
        try:
            version, config = int(metadata.get("version", 0)), json.loads(metadata.get("config", "null"))
        except (ValueError, RecursionError):
            raise DfssmError(f"{path}: its metadata cannot be read; export the student again") from None
        return {"format": metadata.get("format"), "version": version, "config": config}, tensors
    with open_file(path) as file:
        if file.read(2) != b"PK":  # torch.save writes a zip archive
            return {}, None
    content = read_tensors(path, "copy or export it again")[0]
    return (content, content.get("tensors", {})) if isinstance(content, dict) else ({}, None)
