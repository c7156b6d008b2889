"""What libdfssm_trt.so has plugins for: the ops of `dfssm.opset`, and those fused of them (pass `fuse`). And what a
build of it says of itself.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from dfssm.base import DfssmError
from dfssm.opset.ops import FUSED, OPS
from dfssm.opset.schema import Op

__all__ = ["FUSED", "PLUGINS", "Build", "build_of"]

PLUGINS: dict[str, Op] = OPS | FUSED
"""Every plugin's name -> its schema. In TensorRT `bits` are int32 words, see the pass `words`."""

TEGRA = (87, 110)
"""Orin and Thor run no code of the cards of their generation, nor those theirs."""

_BUILD = re.compile(rb"dfssm_trt version=([0-9a-f]{16}) sm=([0-9,]+)(?: cuda=([0-9.]+))?\0")


@dataclass(frozen=True)
class Build:
    """A plugin library: `version` of its plugins, which is the build's; `sm`, the compute capabilities that it has code
    for, ascending. It has PTX for the last. `cuda`: the runtime in it; "" of earlier builds, which do not say.
    """

    version: str
    sm: tuple[int, ...]
    cuda: str = ""

    def runs_on(self, sm: int) -> bool:
        """Whether a GPU finds code in it: its own, that of an older one of its generation, or PTX."""
        older = (other for other in self.sm if other // 10 == sm // 10 and other < sm)
        return sm in self.sm or sm > self.sm[-1] or sm not in TEGRA and not set(older) <= set(TEGRA)

    def __str__(self) -> str:
        return f"build {self.version} for SM {', '.join(map(str, self.sm))}"


def build_of(library: Path) -> Build:
    """What the file says; nothing of it is run. DfssmError where it does not."""
    try:
        found = _BUILD.search(library.read_bytes())
    except OSError as error:
        raise DfssmError(f"cannot read {library}: {error.strerror or error}") from None
    if not found:
        raise DfssmError(
            f"{library} is no libdfssm_trt.so, or that of an older dfssm: install the dfssm-trt of this one"
        )
    return Build(found[1].decode(), tuple(map(int, found[2].split(b","))), (found[3] or b"").decode())
