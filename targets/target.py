"""What a target of `dfcompile` is: an interface that one module a target has, its capabilities included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from dfssm.base.extras import Needs

if TYPE_CHECKING:
    import numpy as np
    from onnxruntime import InferenceSession

    from .bundle import Manifest
    from .files import Files

Progress = Callable[[int, int], None]
"""Called with how many steps are done, and of how many."""

Tensors = Mapping[str, "np.ndarray"]
"""A model's tensors by their names in model.pt; an array may be made only when it is read."""


@dataclass(frozen=True)
class Option:
    """An option that one target has, and so a flag of `dfcompile`. Its type is that of `default`; None: a path.

    `default_text`: what the help says of the default where that is not the value.
    """

    name: str  # "max_batch" for --max-batch
    default: str | int | bool | None
    help: str
    metavar: str | None = None
    default_text: str = ""

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"


@dataclass(frozen=True)
class Probe:
    """What this machine has for a target: `uses` maps parts to what would be used; `why_not` is "" if it is usable.
    `needs`: the packages that building takes besides those of the compiler.
    """

    target: str
    uses: dict[str, str] = field(default_factory=dict)
    why_not: str = ""
    needs: Needs = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        return not self.why_not


class Target(Protocol):
    """A module of this folder, as `get_target` gives it. Importing one takes the standard library and NumPy only: the
    runtime opens bundles through these modules, and help texts come from them.
    """

    NAME: str
    SUMMARY: str  # for the help of --target
    LAYOUTS: tuple[int, ...]  # that the scaffold's bits may have, see `dfssm.opset.layouts`
    DEFAULT_STATE_DTYPE: str  # a --state-dtype
    OPTIONS: tuple[Option, ...]
    VERIFY_STEPS: int  # one-token steps that the verification runs, besides prefill
    VERIFIED_BY: tuple[str, ...]
    """Names of targets: the first one usable here runs the graph when it is verified. One whose bundles run on any
    machine names itself."""
    IS_ENGINE: bool
    """Whether bundles hold an engine (then it is an `EngineTarget`) in the place of the step graph."""
    FILES: tuple[str, ...]  # that every bundle has
    WEIGHTS: str  # the one of them whose hash tells one model from another
    DEFERRED: bool  # the state may be a deferred one
    IN_PLACE: bool  # a state may be written where it is read
    EXACT: bool  # runs give the same bits wherever `kernels` says the same
    LIBRARY: str  # the native library that runs bundles, which they hold a copy of; "" for none

    def probe(self, **options: Any) -> Probe:
        """What this machine has to build with these options, what would be used, why not."""

    def why_not_run(self) -> str:
        """What this machine lacks to run bundles; "" if nothing."""

    def kernels(self, own: Path | None = None) -> str:
        """What runs bundles here, as far as their numbers depend on it; `own` as of `open_session`."""

    def machine(self, **options: Any) -> str | None:
        """The architecture that bundles built with these options run on, as `platform.machine` names it; None: any."""

    def triton_backend(self, **options: Any) -> str:
        """Name of Triton's backend that runs what is built with these options. DfssmError where none does."""

    def layout(self, **options: Any) -> int:
        """The one of LAYOUTS that these options ask for. Raises DfssmError for options that cannot be met."""

    def lower(self, tensors: Tensors, layout: int) -> Tensors:
        """The model's tensors as this target stores them, with bits in `layout`, each made when it is read."""

    def build(self, folder: Path, progress: Progress | None = None, **options: Any) -> tuple[list[str], dict[str, Any]]:
        """Makes what the bundle is to be of a folder that holds `model.onnx`: names of the bundle's files, and the
        manifest's `engine`, {} without one. Raises DfssmError for options that cannot be met, or when building fails.
        """

    def open_session(
        self,
        folder: str | Path | Files,
        threads: int = 0,
        model: str = ...,
        own: Path | None = None,
        mmap: bool = True,
    ) -> InferenceSession:
        """The graph `model` of a built folder; `model` may name another graph over the same weights. `own`: the copy of
        the library in the bundle, where it may run in the place of the installed one (`trust.own_library`). `mmap`:
        map the weights, else read them into memory. Raises DfssmError when it does not open, or when bundles of this
        target have none.
        """


class EngineTarget(Target, Protocol):
    """A target whose bundles hold an engine for a device."""

    def check(self, folder: Path, manifest: Manifest, own: Path | None = None) -> None:
        """Raises DfssmError naming what this machine lacks to run the bundle."""

    def open_engine(
        self, folder: str | Path | Files, manifest: Manifest, own: Path | None = None, trust: bool = False
    ) -> Any:
        """The bundle's engine, after `check`; `own` as above. Raises DfssmError when it may not run (see `trust`), or
        when its library refuses it.
        """

    def plugin_library(self, engine: dict[str, Any], own: Path | None = None) -> Path | None:
        """The library that `open_engine` loads, of the manifest's `engine`; None where it needs none."""


def has_engine(target: Target) -> TypeGuard[EngineTarget]:
    """Whether bundles of `target` hold an engine; else they hold the step graph."""
    return target.IS_ENGINE
