"""Whether code that comes with a bundle may run: decided here, once.

A bundle may hold two kinds of code: a copy of our native library, and a TensorRT engine, which is code for the GPU and,
with plugins embedded, for the CPU. A stranger's bundle runs neither, unless the caller trusts it: `Engine.load(...,
trust=True)`, `--trust`, or DFSSM_TRUST=1 in the environment. Without that the installed library runs the bundle, and an
engine is opened only if this user's own dfcompile has made it (`record`).

The sha256 of a manifest shows damage, not who made a bundle: it is no ground for trust.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

from dfssm.base import DfssmError
from dfssm.base.files import append
from dfssm.base.reading import read_file

from .bundle import Bundle, Manifest

VARIABLE = "DFSSM_TRUST"

ENGINES = "engines"
"""The record of engines that this user's dfcompile has made."""

VERIFIED = "verified"
"""The record of bundles whose goldens came out right, each with what ran them: see `run_of`."""

# A folder that may not be written, and a user without a home.
_NO_PLACE = contextlib.suppress(OSError, RuntimeError)


def trusted(asked: bool) -> bool:
    """Whether the code of a bundle may run: the caller `asked` for it, or the environment does."""
    return asked or os.environ.get(VARIABLE) == "1"


def own_library(bundle: Bundle, library: str, asked: bool) -> Path | None:
    """The bundle's own copy of `library` if it is trusted and the manifest lists it; None: the installed one."""
    if library not in bundle.manifest.files or not trusted(asked):
        return None
    return bundle.by_path(library, lambda path: path)


def require_engine(engine: Path, sha256: str, asked: bool) -> None:
    """Raises DfssmError for the engine in that file, of that sha256, if it is not trusted and not this user's own."""
    if trusted(asked):
        return
    if recorded(sha256, ENGINES):
        return
    raise DfssmError(
        f"{engine} is a program, and no dfcompile of yours made it: if you trust who did, open it with --trust "
        "(Engine.load(..., trust=True)), or compile the model here"
    )


def run_of(manifest: Manifest, kernels: str) -> str:
    """What is recorded as VERIFIED: a sha256 of the bundle's files and of the target's `kernels` here."""
    return hashlib.sha256(json.dumps([manifest.files, kernels], sort_keys=True).encode()).hexdigest()


def record(sha256: str, kind: str) -> None:
    """Remember a file of that sha256 as one that this user has made, or tried; not where there is no place for it."""
    with _NO_PLACE:
        path = _records(kind)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        append(path, f"{sha256}\n")


def forget(sha256: str, kind: str) -> None:
    """As if `record` had not been called."""
    with _NO_PLACE:
        lines = read_file(_records(kind)).splitlines(keepends=True)
        _records(kind).write_bytes(b"".join(line for line in lines if line.strip() != sha256.encode()))


def recorded(sha256: str, kind: str) -> bool:
    """Whether `record` has been called so."""
    with _NO_PLACE:
        path = _records(kind)
        return sha256.encode() in read_file(path).split()
    return False


def _records(kind: str) -> Path:
    """One sha256 a line, in the user's folder for state (XDG base directories)."""
    base = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".local/state") / "dfssm" / kind
