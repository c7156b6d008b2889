"""The passes of dfcompile, in order: load, lower, export, write, build, verify, golden, taps, emit, finish."""

import platform
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dfssm.base import DfssmError, paths
from dfssm.base.extras import require
from dfssm.base.files import is_part, new_folder, writing
from dfssm.base.hashing import sha256
from dfssm.base.paths import GOLDEN, MANIFEST
from dfssm.base.reading import open_file, read_file
from dfssm.export import PACKAGES as OF_EXPORT
from dfssm.model import PACKAGES as OF_MODEL
from dfssm.opset.schema import DEFERRED, STATE_FORMS
from dfssm.targets import TARGETS, Target, get_target, trust
from dfssm.targets.bundle import MODEL, TAPS, TOKENIZER, Manifest, file_entry
from dfssm.targets.chat import FILES as CHAT_FILES
from dfssm.targets.chat import ChatTemplate, beside
from dfssm.targets.text import load_tokenizer

from . import triton

PACKAGES = (OF_MODEL, OF_EXPORT)
"""What compiling takes, besides what its target needs; see `dfssm.base.extras`."""

TOOLS = ("dfssm", "numpy", "onnx", "onnx-ir", "onnxruntime", "torch")


@dataclass(frozen=True)
class Request:
    """What to compile. `output`, `state_dtype` and `tokenizer` left None take their defaults; see docs/format.md.

    `options` are those of the target alone, by name; left out, they take the target's defaults. `emit`: one of
    `triton.FORMS`. `taps`: a second graph over the same weights that shows the hidden states.
    """

    model: str | Path
    target: str
    output: str | Path | None = None
    state_dtype: str | None = None
    tokenizer: str | Path | None = None
    verify: bool = True
    force: bool = False
    emit: str = triton.BUNDLE
    taps: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PassRecord:
    """One pass: its wall time, and the most memory the process, or a child of it, had held by its end."""

    name: str
    seconds: float
    peak_rss_bytes: int


Progress = Callable[[str, int, int], None]
"""Called as the work goes on: name of the pass, steps done, steps in all."""


@dataclass
class Job:
    """The state that the passes hand on. Each pass reads what earlier ones left and fills in its own part."""

    request: Request
    model: Path
    target: Target
    state_dtype: str
    layout: int
    tokenizer: Path | None
    stage: Path
    progress: Progress
    model_sha256: str = ""
    config: Any = None  # DFSSMConfig
    tensors: dict[str, Any] = field(default_factory=dict)  # name -> array, canonical
    lowered: Mapping[str, Any] = field(default_factory=dict)  # name -> array, in the target's layout
    graph: Any = None  # onnx_ir.Model
    files: list[str] = field(default_factory=list)
    engine: dict = field(default_factory=dict)  # what the target says of the engine it built
    verification: dict = field(default_factory=lambda: {"passed": None})
    manifest: Manifest | None = None

    @cached_property
    def runner(self) -> Target:
        """What runs the step graph here."""
        return next(target for target in map(get_target, self.target.VERIFIED_BY) if target.probe().usable)


@dataclass(frozen=True)
class Report:
    """What came of it. `to_dict` is what `dfcompile --json` prints."""

    output: Path
    manifest: Manifest
    passes: list[PassRecord]

    @property
    def bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.manifest.files.values())

    def to_dict(self) -> dict:
        return {
            "output": str(self.output),
            "target": self.manifest.target,
            "state_dtype": self.manifest.state_dtype,
            "layout": self.manifest.layout,
            "machine": self.manifest.machine,
            "config": self.manifest.config,
            "files": self.manifest.files,
            "bytes": self.bytes,
            "verification": self.manifest.verification,
            "engine": self.manifest.engine,
            "passes": [vars(record) for record in self.passes],
            "seconds": sum(record.seconds for record in self.passes),
            "peak_rss_bytes": self.passes[-1].peak_rss_bytes,
        }


def compile_model(request: Request, progress: Progress | None = None) -> Report:
    """Compile `request.model` into a bundle, which is there whole or, after any failure, not at all.

    Raises DfssmError for whatever the user can mend: flags and the machine are checked before the model is read.
    """
    target = get_target(request.target)
    state_dtype = request.state_dtype or target.DEFAULT_STATE_DTYPE
    if state_dtype not in STATE_FORMS:
        raise DfssmError(f"unknown state dtype '{state_dtype}': choose one of {', '.join(STATE_FORMS)}")
    if state_dtype.endswith(DEFERRED):
        kept = f"--state-dtype {state_dtype.removesuffix(DEFERRED)}"
        if not target.DEFERRED:
            raise DfssmError(f"target {request.target} has no deferred states: compile with {kept}, or for ort-cpu")
        if request.emit == triton.REPOSITORY:
            raise DfssmError(f"a model repository for Triton has no deferred states: compile with {kept}")
    if request.taps and target.IS_ENGINE:
        raise DfssmError(f"target {request.target} shows no hidden states: leave out --taps, or compile for ort-cpu")
    for name in request.options:
        if name not in {option.name for option in target.OPTIONS}:
            raise DfssmError(f"target {request.target} has no option --{name.replace('_', '-')}: leave it out")
    model = paths.student(request.model)
    tokenizer = _find_tokenizer(request, model)
    output = f"{model.stem}-{request.target}" if request.output is None else request.output
    # Resolved, so that an output that is a link is replaced where it points.
    with writing(Path(output)):
        output = paths.output_folder(output).resolve()
    place = triton.FORMS[request.emit]
    _check_output(output, request.force, place)
    probe = target.probe(**request.options)
    require(*PACKAGES, probe.needs)
    if not probe.usable:
        raise DfssmError(f"target {request.target} cannot be used here: {probe.why_not}")
    if request.emit == triton.REPOSITORY:
        target.triton_backend(**request.options)

    layout = target.layout(**request.options)
    progress = progress or (lambda name, done, total: None)

    records = []
    with new_folder(output, replace=request.force) as draft:
        stage = draft / place
        stage.mkdir(parents=True, exist_ok=True)
        job = Job(request, model, target, state_dtype, layout, tokenizer, stage, progress)
        for run in (load, lower, export, write, build, verify, golden, taps, emit, finish):
            start = time.perf_counter()
            run(job)
            records.append(PassRecord(run.__name__, time.perf_counter() - start, _peak_rss()))
    assert job.manifest  # finish made it
    if target.IS_ENGINE:
        trust.record(job.manifest.files[job.manifest.weights]["sha256"], trust.ENGINES)
    return Report(output, job.manifest, records)


def load(job: Job) -> None:
    """Read and check the model: names, shapes and dtypes. The tensors stay in the mapped file until they are used."""
    from dfssm.model.checkpoint import load_student_tensors

    with open_file(job.model) as file:
        job.model_sha256 = sha256(file)
    job.config, tensors = load_student_tensors(job.model)
    job.tensors = {name: tensor.numpy() for name, tensor in tensors.items()}
    if job.tokenizer:
        load_tokenizer(job.tokenizer, "the model's own with --tokenizer", job.config.vocab_size)
        if beside(job.tokenizer):
            ChatTemplate(job.tokenizer.parent)


def lower(job: Job) -> None:
    """Put the tensors into the layout of the target, each when it is written."""
    job.lowered = job.target.lower(job.tensors, job.layout)


def export(job: Job) -> None:
    """Build the step graph."""
    from dfssm.export.graph import build_step_graph

    job.graph = build_step_graph(job.config, job.lowered, state_dtype=job.state_dtype, layout=job.layout)


def write(job: Job) -> None:
    """Write the graph and its weights."""
    from dfssm.export.writer import write_model

    with writing(job.stage / MODEL):
        write_model(job.graph, job.stage / MODEL, partial(job.progress, "write"))


def build(job: Job) -> None:
    """Let the target make of the graph what it runs."""
    with writing(job.stage):
        job.files, job.engine = job.target.build(job.stage, partial(job.progress, "build"), **job.request.options)


def verify(job: Job) -> None:
    """Run what was written against the student it came from.

    An engine for another machine is not run: what it was built from is, and the manifest says so.
    """
    if not job.request.verify:
        return
    from dfssm.verify.bundle import verify_bundle

    found = verify_bundle(job.runner, job.stage, job.model, job.state_dtype, partial(job.progress, "verify"))
    if job.runner is not job.target:
        why_not = f"the engine runs on a GPU; the step graph that it was built from ran as target {job.runner.NAME}"
        found = {"passed": None, "why_not": why_not, "graph": found}
    job.verification = found


def golden(job: Job) -> None:
    """Write what the verified graph computes over a few tokens, to be compared where the bundle runs."""
    if not job.request.verify:
        return
    from dfssm.verify.golden import TOKENS, make_golden

    # A call rounds the states that it stores: the calls are those that an engine can make.
    most = job.engine["profiles"][-1]["max"][1] if job.target.IS_ENGINE else TOKENS
    made = make_golden(job.runner, job.stage, job.config.vocab_size, most, partial(job.progress, "golden"))
    with writing(job.stage):
        (job.stage / GOLDEN).write_bytes(made.to_bytes())
    job.files.append(GOLDEN)


def taps(job: Job) -> None:
    """Write a second graph, which shows the hidden states and can be patched."""
    if not job.request.taps:
        return
    from dfssm.verify.bundle import verify_taps
    from dfssm.verify.graph import write_taps

    with writing(job.stage):
        write_taps(job.stage / MODEL, job.stage)
    job.files.append(TAPS)
    if job.request.verify:
        verify_taps(job.runner, job.stage, job.config.vocab_size)


def emit(job: Job) -> None:
    """Write what a server needs besides the bundle."""
    if job.request.emit == triton.REPOSITORY:
        backend = job.target.triton_backend(**job.request.options)
        with writing(job.stage):
            job.files += triton.write(job.stage, backend, job.target, job.config, job.state_dtype, job.engine)


def finish(job: Job) -> None:
    """Add the tokenizer, with its chat template, and the manifest; drop what served to build."""
    with writing(job.stage / MANIFEST):
        for path in job.stage.iterdir():
            if path.name not in job.files:
                path.unlink()
        if job.tokenizer:
            for source in (job.tokenizer, *beside(job.tokenizer)):
                name = TOKENIZER if source is job.tokenizer else source.name
                (job.stage / name).write_bytes(read_file(source))
                job.files.append(name)
        job.manifest = Manifest(
            target=job.request.target,
            config=job.config.to_dict(),
            state_dtype=job.state_dtype,
            layout=job.layout,
            files={name: file_entry(job.stage / name) for name in job.files},
            tools={tool: version(tool) for tool in TOOLS} | {"python": platform.python_version()},
            verification=job.verification,
            engine=job.engine,
            machine=job.target.machine(**job.request.options),
            model_sha256=job.model_sha256,
        )
        (job.stage / MANIFEST).write_text(job.manifest.to_json(), encoding="utf-8")


def _check_output(folder: Path, force: bool, place: str) -> None:
    """Refuse an output that could not be put in place, before any slow work.

    Raises DfssmError when `folder` is occupied: without `force` by anything, with it by anything but a bundle at
    `place`, for replacing deletes.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not force:
        raise DfssmError(f"{folder} exists: choose another output with -o, or replace it with --force")
    if not (folder / place / MANIFEST).is_file():
        what = f"a bundle at {place}" if place else "a bundle"
        raise DfssmError(f"{folder} exists and is not {what}, so --force does not replace it: choose another -o")
    ours = {folder / place / name for target in map(get_target, TARGETS) for name in (*target.FILES, target.LIBRARY)}
    ours |= {folder / place / name for name in (MANIFEST, GOLDEN, TAPS, TOKENIZER, *CHAT_FILES, triton.GRAPH)}
    ours |= {(folder / place).parent / triton.CONFIG} if place else set()
    for path in sorted(folder.rglob("*")):
        # What a killed writer has left in a part (base/files.py) is as much of a bundle.
        at = path.parent.parent / path.name if is_part(path.parent.name) else path
        if at not in ours and (path.is_symlink() or not path.is_dir()):
            found = f"{folder} also holds {path.relative_to(folder)}"
            raise DfssmError(f"{found}, which --force would delete: move it away, or choose another -o")


def _find_tokenizer(request: Request, model: Path) -> Path | None:
    """The tokenizer to bundle: the one asked for, else tokenizer.json beside the model, else none."""
    if request.tokenizer is None:
        beside = model.with_name(TOKENIZER)
        return beside if beside.is_file() else None
    return paths.file(request.tokenizer, "a tokenizer.json", TOKENIZER)


def _peak_rss() -> int:
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(one).ru_maxrss for one in who) * 1024  # Linux counts it in KiB
