"""Target `ort-cpu`: ONNX Runtime with our op library, bits as the kernels of one instruction set stream them.

Built for AVX-512 VNNI, AVX2, and Arm with the dot product; any other CPU runs the scalar kernels: right, and slow.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfssm.base import DfssmError
from dfssm.opset import DOMAIN, VERSION
from dfssm.opset.layouts import LAYOUT_ROW16, LAYOUT_ROW64, Layout
from dfssm.opset.layouts import LAYOUTS as ALL_LAYOUTS
from dfssm.opset.ops import IN_PLACE_OF, MODULES
from dfssm.opset.packing import to_layout, up_to_layout

from .bundle import DATA, MODEL
from .cpu_library import CpuLibrary
from .files import Files
from .library import locate
from .session import create_session, one_line, session_options
from .target import Option, Probe, Progress, Tensors

if TYPE_CHECKING:
    import onnxruntime

NAME = "ort-cpu"
SUMMARY = "ONNX Runtime with our CPU kernels"

_LAYOUT_OF = {
    "x86_64": {
        "avx512vbmi": LAYOUT_ROW16,
        "avx512vnni": LAYOUT_ROW16,
        "avxvnni": LAYOUT_ROW64,
        "avx2": LAYOUT_ROW64,
        "scalar": LAYOUT_ROW16,
    },
    "aarch64": {"i8mm": LAYOUT_ROW64, "dotprod": LAYOUT_ROW64, "scalar": LAYOUT_ROW16},
}
"""Of machines, as `platform.machine` names them, the instruction sets that there are kernels for, the best first."""

LAYOUTS = (LAYOUT_ROW16, LAYOUT_ROW64)

# Decode is bound by bytes moved, and the state is read and written at every token: fp16 halves the largest item of the
# ledger after the scaffold (1.3B: 200 -> 100 MB a token). int8 halves it again and costs more accuracy: ask for it.
DEFAULT_STATE_DTYPE = "fp16"

VERIFY_STEPS = 8
VERIFIED_BY = (NAME,)
OPTIONS = (
    Option(
        "machine",
        "",
        "Machine that the bundle is for. For another one it is verified with this one's kernels, and has no library.",
        metavar="|".join(_LAYOUT_OF),
        default_text="this machine",
    ),
    Option(
        "isa",
        "",
        "Instruction set that the bits are laid out for. The bundle runs on every CPU, but fastest on one with it.",
        metavar="|".join(dict.fromkeys(isa for isas in _LAYOUT_OF.values() for isa in isas)),
        default_text="the machine's best",
    ),
)

IS_ENGINE = False
FILES = (MODEL, DATA)
WEIGHTS = DATA
IN_PLACE = True
DEFERRED = True
EXACT = True  # with any number of threads, too

LIBRARY = "libdfssm_ort_cpu.so"
LIBRARY_VARIABLE = "DFSSM_ORT_LIBRARY"


class _Relaid:
    """A matrix [..., M, width] in another layout, made anew when it is read: holding all would double the model."""

    def __init__(self, source: np.ndarray, relay: Callable[[np.ndarray, Layout], np.ndarray], layout: Layout):
        *lead, rows, width = source.shape
        self._source, self._relay, self._layout = source, relay, layout
        self.shape = (*lead, layout.padded(rows), width)
        self.dtype = source.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._relay(np.asarray(self._source), self._layout)


def probe(**options: Any) -> Probe:
    """The op library and the instruction set that `open_session` would use here."""
    import onnxruntime

    uses = {"onnxruntime": onnxruntime.__version__, "machine": platform.machine()}
    try:
        library = find_library()
        _register(session_options(threads=1), library)
        uses |= {"library": str(library), "isa": CpuLibrary(library).isa()}
    except DfssmError as error:
        return Probe(NAME, uses, str(error))
    return Probe(NAME, uses)


def why_not_run() -> str:
    """What is wrong with the op library."""
    return probe().why_not


def kernels(own: Path | None = None) -> str:
    """The op library, its instruction set, ONNX Runtime, and what decides on expf and log1pf: the C library, which has
    versions of them for the CPU.
    """
    import onnxruntime

    path = find_library(own)
    library, digest = CpuLibrary(path), hashlib.sha256(path.read_bytes()).hexdigest()
    parts = [f"{library.isa()} of {LIBRARY} {digest[:16]}", f"onnxruntime {onnxruntime.__version__}"]
    return ", ".join([*parts, " ".join(platform.libc_ver()), f"a CPU for {' '.join(library.isas())}"])


def find_library(own: Path | None = None) -> Path:
    """The op library, by `locate`."""
    return locate(
        LIBRARY,
        LIBRARY_VARIABLE,
        own,
        f"install dfssm with it, trust the bundle's own with --trust, or set {LIBRARY_VARIABLE} to the file",
    )


def installed_library() -> CpuLibrary | None:
    """The installed op library, to be asked what it knows of this CPU; None where there is none."""
    try:
        return CpuLibrary(find_library())
    except DfssmError:
        return None


def machine(**options: Any) -> str:
    """The one that the options name, else this one."""
    name: str = options.get("machine") or platform.machine()
    if options.get("machine") and name not in _LAYOUT_OF:
        raise DfssmError(f"--machine is {name}: give {', '.join(_LAYOUT_OF)}")
    return name


def triton_backend(**options: Any) -> str:
    """That of ONNX Runtime. DfssmError for another machine: Triton loads the op library of the repository."""
    if machine(**options) != platform.machine():
        raise DfssmError(f"--machine is {machine(**options)}: make a Triton repository on such a machine")
    return "onnxruntime"


def layout(**options: Any) -> int:
    """That of the kernels of `isa`; "": of those that run here, or the best of another machine."""
    of = machine(**options)
    known = _LAYOUT_OF.get(of, {"scalar": LAYOUT_ROW16})
    here = of == platform.machine()
    name = options.get("isa") or (CpuLibrary(find_library()).isa() if here else next(iter(known)))
    if name not in known:
        raise DfssmError(f"--isa is {name}: give {', '.join(known)} for {of}, or another --machine")
    return known[name]


def lower(tensors: Tensors, layout: int) -> Tensors:
    """`tensors` (name -> array, canonical) with each `bits` and `up` in `layout`, re-laid when it is read."""
    relays = {"bits": to_layout, "up": up_to_layout}
    lowered: dict[str, Any] = dict(tensors)
    for name, tensor in tensors.items():
        relay = relays.get(name.rpartition(".")[2])
        if relay:
            lowered[name] = _Relaid(tensor, relay, ALL_LAYOUTS[layout])
    return lowered


def build(folder: Path, progress: Progress | None = None, **options: Any) -> tuple[list[str], dict[str, Any]]:
    """Copies the op library into `folder`, so that the bundle runs where only ONNX Runtime is installed. The library of
    another machine is not here to be copied.
    """
    if machine(**options) != platform.machine():
        return [MODEL, DATA], {}
    shutil.copyfile(find_library(), folder / LIBRARY)
    return [MODEL, DATA, LIBRARY], {}


def open_session(
    folder: str | Path | Files, threads: int = 0, model: str = MODEL, own: Path | None = None, mmap: bool = True
) -> onnxruntime.InferenceSession:
    """The graph `model` of `folder` with the op library registered.

    Raises DfssmError when the library is missing, does not load or is of another version, or when ONNX Runtime refuses
    the model.
    """
    return _open(folder, session_options(threads), model, own, mmap)


def open_profiled(folder: str | Path | Files, threads: int, profile: str) -> onnxruntime.InferenceSession:
    """The step of `folder`, with ONNX Runtime's profiler; `profile` as of `session_options`. DfssmError as above."""
    return _open(folder, session_options(threads, profile))


def _open(
    folder: str | Path | Files,
    options: onnxruntime.SessionOptions,
    model: str = MODEL,
    own: Path | None = None,
    mmap: bool = True,
) -> onnxruntime.InferenceSession:
    library = find_library(own)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    _register(options, library)
    session = create_session(folder, model, options, mmap)
    _check_kernels(session, library)
    return session


def open_model(model: str | bytes, threads: int = 0) -> onnxruntime.InferenceSession:
    """Any model in a file, or serialized, with the op library registered, on the CPU. DfssmError as `open_session`."""
    import onnxruntime

    options = session_options(threads)
    _register(options, find_library())
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        name = model if isinstance(model, str) else "the model"
        raise DfssmError(f"ONNX Runtime {onnxruntime.__version__} cannot open {name}: {one_line(error)}") from error


def _check_kernels(session: onnxruntime.InferenceSession, library: Path) -> None:
    """Raises DfssmError when an op has no kernel in `library`: ONNX Runtime would run its body, 100 times slower."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return  # an older ONNX Runtime does not tell
    parts = session.get_provider_graph_assignment_info()
    kernels = {node.op_type for part in parts for node in part.get_nodes() if node.domain == DOMAIN}
    missing = sorted(op for op in MODULES["OPS"] if not {op, IN_PLACE_OF.get(op)} & kernels)
    if missing:
        raise DfssmError(
            f"{library} has no kernel for {', '.join(missing)} of {DOMAIN} version {VERSION}: it is another version; "
            f"reinstall dfssm and compile the model again, or unset {LIBRARY_VARIABLE}"
        )


def _register(options: onnxruntime.SessionOptions, library: Path) -> None:
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # ONNX Runtime's errors have no common base but Exception
        import onnxruntime

        chosen = " and ".join(name for name in (LIBRARY_VARIABLE, "DFSSM_ISA") if os.environ.get(name))
        raise DfssmError(
            f"{library} does not load into ONNX Runtime {onnxruntime.__version__} ({one_line(error)}): "
            + (
                f"unset {chosen}"
                if chosen
                else "reinstall dfssm, or compile the model again if this is a bundle's copy"
            )
        ) from error
