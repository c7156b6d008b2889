"""The one arithmetic of dfssm: the `ai.dfssm` ops with their schemas, references, ONNX bodies, cases and tolerances.

Leaf package: imports nothing of ours. An op is one module of `ops/`. `schema`, `layouts`, `errors`, `extras` and
`paths` need only the standard library, `functions` needs onnx, the rest NumPy. `header` makes the C++ of the schemas.
"""

from typing import TYPE_CHECKING

from .errors import DfssmError
from .schema import DOMAIN, VERSION

if TYPE_CHECKING:
    from .ops import OPS

__all__ = ["DOMAIN", "OPS", "VERSION", "DfssmError"]


def __getattr__(name: str) -> object:
    """OPS is imported when it is first asked for: most commands need an error or a path of this package, not NumPy."""
    if name != "OPS":
        raise AttributeError(f"module '{__name__}' has no attribute {name!r}")
    from .ops import OPS

    return OPS
