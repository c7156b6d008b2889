"""What every part uses and that knows no model: errors, files, paths, numbers, child processes, pages.

Leaf package: imports nothing of ours. `tokens` takes NumPy, the rest the standard library only.
"""

from .errors import DfssmError

__all__ = ["DfssmError"]
