"""Options of `--target trt`, and what they come to on this machine: which builder, for which GPUs, why."""

from dataclasses import dataclass, field, fields
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dfssm.base import DfssmError, paths

from . import cuda
from .target import Option
from .trt_build import MODULES, Profile, known_sms

LOWERINGS = ("plugin", "native")
ACTIVATIONS = ("fp32", "fp16")
BUILDERS = ("auto", *MODULES)
PACKAGES = {
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
}
"""The distributions in which a builder's module may come."""

PROMPT = 4096
"""Tokens of one call, all rows together: as many keep a GPU busy, and what lies between the layers grows with them. Of
the 1.3B 291 MB; the rows of --max-batch 128 with 512 tokens each would take 4.7 GB.
"""

SHIPPED = "tensorrt-rtx"
"""The builder that dfssm[trt] holds."""


def _option(default: str | int | bool | None, help: str, **texts: str) -> Any:
    """A field of `Options`, with what makes an `Option` of it."""
    return field(default=default, metadata={"default": default, "help": help, **texts})


@dataclass(frozen=True)
class Options:
    """What a user may choose; docs/trt.md says what each means. `sm` is a list as in "86,89"."""

    builder: str = _option("auto", "auto, tensorrt (needs a GPU) or tensorrt-rtx (needs none).", metavar="NAME")
    sm: str = _option(
        "", "compute capabilities to build for, as 86,89.", metavar="LIST", default_text="this GPU's, else all"
    )
    max_batch: int = _option(1, "largest batch.", metavar="N")
    max_tokens: int = _option(512, "largest number of tokens per call.", metavar="N")
    # 13 MB a row of a vocabulary of 50,288.
    max_logits: int = _option(64, "largest number of tokens per call whose logits are given; 1: the last.", metavar="N")
    lowering: str = _option(
        "plugin", "plugin (our kernels) or native (no plugins, one token per call).", metavar="NAME"
    )
    activations: str = _option(
        "fp32", "fp32 or fp16, between the plugins; logits and states do not change.", metavar="DTYPE"
    )
    timing_cache: str | Path | None = _option(None, "file of kernel timings to read and write.", metavar="FILE")
    version_compatible: bool = _option(False, "the engine also runs in later versions of TensorRT.")
    hardware_compatible: bool = _option(False, "the engine also runs on other GPUs from Ampere on (tensorrt).")
    embed_plugins: bool = _option(False, "put the plugin library into the engine.")
    strip_weights: bool = _option(False, "leave the weights out of the engine; it is refitted where it runs.")


OPTIONS = tuple(Option(field.name, **field.metadata) for field in fields(Options))


@dataclass(frozen=True)
class Plan:
    """The options resolved: `builder` is one, not auto; `why` says why; `sm` are the GPUs the engine is to run on."""

    options: Options
    builder: str
    why: str
    sm: tuple[int, ...]
    profiles: tuple[Profile, ...]


def installed() -> dict[str, str]:
    """The builders that can be imported here -> their version."""
    return {name: version for name in MODULES if (version := _version(name))}


def _version(builder: str) -> str:
    if not find_spec(MODULES[builder]):
        return ""
    for package in PACKAGES[builder]:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def remedy(builder: str) -> str:
    """The command that installs a builder."""
    return "pip install 'dfssm[trt]'" if builder == SHIPPED else f"pip install {PACKAGES[builder][0]}"


def resolve(options: Options) -> Plan:
    """What `options` come to here. Raises DfssmError for those that cannot be met, before anything is built."""
    if options.builder not in BUILDERS:
        raise DfssmError(f"unknown builder '{options.builder}': choose one of {', '.join(BUILDERS)}")
    if options.lowering not in LOWERINGS:
        raise DfssmError(f"unknown lowering '{options.lowering}': choose one of {', '.join(LOWERINGS)}")
    if options.activations not in ACTIVATIONS:
        raise DfssmError(f"unknown activations '{options.activations}': choose one of {', '.join(ACTIVATIONS)}")
    if options.activations != "fp32" and options.lowering == "native":
        raise DfssmError("--activations fp16: a native engine computes in fp32; leave one of both out")
    for name in ("max_batch", "max_tokens", "max_logits"):
        if getattr(options, name) < 1:
            raise DfssmError(f"--{name.replace('_', '-')} is {getattr(options, name)}: give 1 or more")
    gpus, no_gpu = cuda.devices()
    builder, why = _builder(options.builder, no_gpu)
    _check_flags(options, builder, no_gpu)
    return Plan(options, builder, why, _capabilities(options, builder, gpus), _profiles(options))


def _builder(wanted: str, no_gpu: str) -> tuple[str, str]:
    found = installed()
    if wanted == "auto":
        # `tensorrt` times kernels on the GPU it finds, and runs on more kinds of them; it builds on none but that.
        if "tensorrt" in found and not no_gpu:
            return "tensorrt", "it is installed, and there is a GPU to build on"
        if "tensorrt-rtx" in found:
            return "tensorrt-rtx", f"{no_gpu}, and it needs none" if no_gpu else "tensorrt is not installed"
        wanted = "tensorrt-rtx" if no_gpu else "tensorrt"
    if wanted not in found:
        raise DfssmError(f"builder {wanted} is not installed (no module {MODULES[wanted]}): {remedy(wanted)}")
    if wanted == "tensorrt" and no_gpu:
        raise DfssmError(f"builder tensorrt needs a GPU, and {no_gpu}: use --builder tensorrt-rtx, or build elsewhere")
    return wanted, "--builder"


def _check_flags(options: Options, builder: str, no_gpu: str) -> None:
    if options.embed_plugins and options.lowering == "native":
        raise DfssmError("--embed-plugins: a native engine has no plugins; leave one of both out")
    if options.embed_plugins and not options.version_compatible:
        raise DfssmError("--embed-plugins works in version-compatible engines only: add --version-compatible")
    if builder != "tensorrt-rtx":
        if options.timing_cache is not None:
            paths.output_file(options.timing_cache)
        return
    if options.timing_cache is not None:
        raise DfssmError("--timing-cache: tensorrt-rtx times nothing when it builds; leave it out")
    if options.hardware_compatible:
        raise DfssmError("--hardware-compatible is for builder tensorrt: tensorrt-rtx takes several GPUs, --sm 86,89")
    if options.strip_weights and no_gpu:
        raise DfssmError(f"--strip-weights: tensorrt-rtx needs a GPU for that, and {no_gpu}; leave it out")


def _capabilities(options: Options, builder: str, gpus: list[cuda.Device]) -> tuple[int, ...]:
    """The GPUs asked for, else the one that is here, else all that the builder knows."""
    text = options.sm
    try:
        wanted = tuple(dict.fromkeys(int(number) for number in text.split(",") if number.strip()))
    except ValueError:
        raise DfssmError(f"--sm is '{text}': give compute capabilities as in 86,89 (8.6 and 8.9)") from None
    here = tuple(dict.fromkeys(gpu.sm for gpu in gpus))
    if builder == "tensorrt" and wanted and wanted != here[:1]:
        raise DfssmError(f"--sm {text}: tensorrt builds for the GPU here, SM {here[0]}; use --builder tensorrt-rtx")
    if builder == "tensorrt":
        return here[:1]
    known = _known(builder)
    # An engine without plugins holds INT4, which begins with SM 80.
    known = [sm for sm in known if options.lowering == "plugin" or sm >= 80]
    if unknown := [sm for sm in wanted or here[:1] if sm not in known]:
        kind = "engine" if options.lowering == "plugin" else "native engine"
        raise DfssmError(
            f"{builder} {installed()[builder]} builds no {kind} for SM {_listed(unknown)}, only for {_listed(known)}: "
            "choose of those with --sm, or use --builder tensorrt on a machine with that GPU"
        )
    return wanted or here[:1] or tuple(known)


def _known(builder: str) -> list[int]:
    return known_sms(import_module(MODULES[builder]))


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _profiles(options: Options) -> tuple[Profile, ...]:
    """Of a step of all rows, and of prompts: see docs/trt.md."""
    step = Profile(options.max_batch, 1, 1, 1)
    if options.lowering == "native" or options.max_tokens == 1:
        return (step,)
    tokens = options.max_tokens
    rows = min(options.max_batch, max(PROMPT // tokens, 1))
    return step, Profile(rows, tokens, tokens, min(options.max_logits, tokens))
