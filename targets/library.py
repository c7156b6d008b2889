"""Where a target's native library lies: the one place that knows the order."""

import os
from importlib.util import find_spec
from pathlib import Path

from dfssm.base import DfssmError


def locate(library: str, variable: str, own: Path | None, remedy: str) -> Path:
    """The file `library`: $`variable`, else `own`, the copy of a bundle that is trusted (`trust.own_library`), else the
    installed one.

    Raises DfssmError when there is none (then `remedy` says what to do), when the variable names no file, or when `own`
    is gone: no other library runs in place of the one that was chosen.
    """
    if chosen := os.environ.get(variable):
        if not Path(chosen).is_file():
            raise DfssmError(f"{variable} is {chosen}: there is no such file; unset it or name {library}")
        return Path(chosen).absolute()  # a bare name is looked for in the folders of the system
    if own:
        if not own.is_file():
            raise DfssmError(f"{own} is gone, the bundle was replaced: load it again")
        return own.absolute()
    if found := installed(library):
        return found.absolute()
    raise DfssmError(f"{library} is not installed: {remedy}")


def installed(library: str) -> Path | None:
    """Where the dfssm that runs has `library`, if it has it. Other folders named dfssm on the path may be anybody's."""
    running = find_spec("dfssm")
    folders = running and running.submodule_search_locations
    return next((file for folder in folders or () if (file := Path(folder) / library).is_file()), None)
