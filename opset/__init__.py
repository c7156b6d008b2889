"""The one arithmetic of dfssm: the `ai.dfssm` ops with their schemas, references, ONNX bodies, cases and tolerances.

Imports nothing of ours but base/. An op is one module of `ops/`. `schema` and `layouts` need only the standard library,
`functions` needs onnx, the rest NumPy. `header` makes the C++ of the schemas.
"""

from typing import TYPE_CHECKING

from .schema import DOMAIN, VERSION

if TYPE_CHECKING:
    from .ops import OPS

__all__ = ["DOMAIN", "OPS", "VERSION"]


def __getattr__(name: str) -> object:
    """OPS is imported when it is first asked for: most commands need a name of this package, not NumPy."""
    if name != "OPS":
        raise AttributeError(f"module '{__name__}' has no attribute {name!r}")
    from .ops import OPS

    return OPS
