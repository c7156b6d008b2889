"""dfssm: compiles 1-bit Mamba-2 language models for ONNX Runtime and TensorRT, and runs them.

The links beside this file are the list of its parts: each is a folder of the repository's top level.
"""

import os

TYPE_CHECKING = False  # to type checkers that of typing, which takes long to import: see cli/entry.py

# ONNX Runtime 1.32 writes an identity of the machine below HOME and reports to its makers; nothing here asks for that.
# It looks when it is imported. Who wants it sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from importlib.metadata import version

    from dfssm.base.errors import DfssmError
    from dfssm.runtime import Engine

    __version__ = version("dfssm")

__all__ = ["DfssmError", "Engine", "__version__"]


def __getattr__(name: str) -> object:
    """What is named here is imported when it is first asked for: `import dfssm` costs nothing."""
    if name == "__version__":
        from importlib.metadata import version

        value: object = version("dfssm")
    elif name == "DfssmError":
        from dfssm.base.errors import DfssmError as value
    elif name == "Engine":
        from dfssm.runtime import Engine as value
    else:
        raise AttributeError(f"module 'dfssm' has no attribute {name!r}")
    globals()[name] = value
    return value
