"""Files of safetensors: the same contents are the same bytes."""

import json
from typing import BinaryIO


def order(file: BinaryIO) -> None:
    """Order the header of the safetensors file `file` by its keys: the library writes metadata in a random order.

    Only the order changes, so the header keeps its length. Raises ValueError where it would not.
    """
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    if len(ordered) != size:
        raise ValueError(f"a safetensors header of {size} bytes became {len(ordered)}")
    file.seek(8)
    file.write(ordered)
