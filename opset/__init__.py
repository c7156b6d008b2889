"""The one arithmetic of dfssm: schemas, packing, references and ONNX bodies of the `ai.dfssm` ops.

Leaf package: imports nothing of ours. `schema`, `errors`, `extras` and `paths` need only the standard library (the C++
build generates its header from the first), `packing`, `reference` and `cases` need NumPy, `functions` needs onnx.
"""

from .errors import DfssmError
from .schema import DOMAIN, OPS, VERSION

__all__ = ["DOMAIN", "OPS", "VERSION", "DfssmError"]
