"""Where a target's native library lies: the one place that knows the order."""

import os
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from dfssm.opset import DfssmError


def locate(library: str, variable: str, own: Path | None, remedy: str) -> Path:
    """The file `library`: $`variable`, else `own`, the copy of a bundle that is trusted (`trust.own_library`), else the
    installed one.

    Raises DfssmError when there is none (then `remedy` says what to do), or when the variable names no file.
    """
    if chosen := os.environ.get(variable):
        if not Path(chosen).is_file():
            raise DfssmError(f"{variable} is {chosen}: there is no such file; unset it or name {library}")
        return Path(chosen).absolute()  # a bare name is looked for in the folders of the system
    for candidate in (own, installed(library)):
        if candidate and candidate.is_file():
            return candidate.absolute()
    raise DfssmError(f"{library} is not installed: {remedy}")


def installed(library: str) -> Path | None:
    """Where the installed dfssm has `library`, if it has it. Asked of its metadata: of the folders named dfssm on the
    path, one may be anybody's.
    """
    try:
        return Path(str(distribution("dfssm").locate_file(f"dfssm/{library}")))
    except PackageNotFoundError:
        return None
