"""Whether code that comes with a bundle may run: decided here, once.

A bundle may hold two kinds of code: a copy of our native library, and a TensorRT engine, which is code for the GPU and,
with plugins embedded, for the CPU. A stranger's bundle runs neither, unless the caller trusts it: `Engine.load(...,
trust=True)`, `--trust`, or DFSSM_TRUST=1 in the environment. Without that the installed library runs the bundle, and an
engine is opened only if this user's own dfcompile has made it (`record`).

The sha256 of a manifest shows damage, not who made a bundle: it is no ground for trust.
"""

import contextlib
import os
from pathlib import Path

from dfssm.opset import DfssmError

from .bundle import Bundle

VARIABLE = "DFSSM_TRUST"


def trusted(asked: bool) -> bool:
    """Whether the code of a bundle may run: the caller `asked` for it, or the environment does."""
    return asked or os.environ.get(VARIABLE) == "1"


def own_library(bundle: Bundle, library: str, asked: bool) -> Path | None:
    """The bundle's own copy of `library` if it is trusted and the manifest lists it; None: the installed one."""
    return bundle.folder / library if library in bundle.manifest.files and trusted(asked) else None


def require_engine(engine: Path, sha256: str, asked: bool) -> None:
    """Raises DfssmError for the engine in that file, of that sha256, if it is not trusted and not this user's own."""
    if trusted(asked):
        return
    with contextlib.suppress(OSError):
        if sha256 in _records().read_text().split():
            return
    raise DfssmError(
        f"{engine} is a program, and no dfcompile of yours made it: if you trust who did, open it with --trust "
        "(Engine.load(..., trust=True)), or compile the model here"
    )


def record(sha256: str) -> None:
    """Remember the engine of that sha256 as made by this user. Where it cannot be remembered, `--trust` is needed."""
    path = _records()
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{sha256}\n")


def _records() -> Path:
    """One sha256 a line, in the user's folder for state (XDG base directories)."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(base) / "dfssm" / "engines"
