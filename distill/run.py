"""One distillation, from the teacher's folder to model.pt, in three stages: open, prepare, train.

Each takes what the one before gave, and can be left at that: `open` writes nothing and says what does not fit; after
`prepare` tokens and stored logits lie on the disk, for this run or others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from dfssm.base.errors import DfssmError
from dfssm.base.files import alone, write_file
from dfssm.base.paths import STUDENT
from dfssm.base.reading import read_file
from dfssm.model import fused_scan
from dfssm.model.hf_import import load_teacher
from dfssm.model.student import DFSSMLM, load_student
from dfssm.model.teacher import Mamba2LM
from dfssm.model.text import text_files
from dfssm.targets import chat
from dfssm.targets.bundle import TOKENIZER
from dfssm.targets.text import encode, end_tokens

from . import PREFIX
from .checkpoint import Checkpoints
from .data import Source, Windows, open_files, open_tokenizer
from .distributed import Ranks
from .held_out import Measured, cut_windows, figures
from .log import Sink, open_sinks
from .objective import Distillation
from .recipe import Recipe
from .report import write_report
from .samples import samples
from .sharding import shard
from .stream import StreamedWindows
from .student import Flips, begin, blank, data_free, finish, first_signs, move_to, other_forms, rate_factors, trainable
from .topk import TopK, precompute
from .trainer import Schedule, Trainer, fast_bf16

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Job:
    """What a distillation works on. Set apart: the share `held_out` of each file, the first documents of a stream;
    of these at most `held_out_tokens` are measured.

    `top_k`: distil from the teacher's so many likeliest tokens, which are computed before; 0 from all of them.
    """

    teacher: Path
    data: Sequence[str]
    output: Path
    recipe: Recipe
    schedule: Schedule
    held_out: float = 0.02
    held_out_documents: int = 1000
    held_out_tokens: int = 2**17
    init_from: Path | None = None  # a model.pt, to go on training its student
    tokenizer: Path | None = None
    recompute: bool = False
    compiled: bool = False
    top_k: int = 0
    best: bool = False  # of all steps that are measured, the student of least held-out divergence; else of the last
    samples: Sequence[str] = ()  # texts to continue at each measurement
    tensorboard: bool = False
    wandb: str | None = None


@dataclasses.dataclass(frozen=True)
class _Run:
    job: Job
    ranks: Ranks
    resume: bool
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class Opened(_Run):
    """A job that fits together: the teacher in fp32, its tokenizer and the token that ends a document, and the data."""

    teacher: Mamba2LM
    end: int
    stream: StreamedWindows | None  # files otherwise


@dataclasses.dataclass(frozen=True)
class Prepared(_Run):
    """What is trained on what: the windows of this rank, the student, and what it learns from. `measured` has the
    held-out text and what teacher and data-free conversion are worth on it; `identity` is what makes two runs the same.
    """

    source: Source
    student: DFSSMLM
    teacher: Mamba2LM | TopK
    bf16: bool
    measured: Measured
    first_signs: dict[str, Tensor]
    identity: dict
    sinks: list[Sink]


def distill(job: Job, ranks: Ranks, resume: bool = False, say: Callable[[str], None] = lambda line: None) -> dict:
    """Run `job`; returns what result.json holds. `say` gets lines for people to read.

    Raises DfssmError before any training if something does not fit: teacher, tokenizer, data, output.
    """
    opened = open(job, ranks, resume)
    with alone(job.output) if ranks.first else contextlib.nullcontext():
        return train(prepare(opened), say)


def open(job: Job, ranks: Ranks, resume: bool = False) -> Opened:
    """Load the teacher and its tokenizer, look for the data and for an earlier run. Writes nothing."""
    job.schedule.parts(ranks)
    if job.recipe.budget and job.recipe.init != "calibrated":
        raise DfssmError(f"budget is {job.recipe.budget:g} MB, which needs --init calibrated, not {job.recipe.init}")
    streams = [name for name in job.data if name.startswith(PREFIX)]
    if job.top_k and job.recipe.hidden:
        raise DfssmError(
            f"hidden is {job.recipe.hidden}, but with --top-k no teacher is there to compare with; leave one"
        )
    if job.top_k and job.recipe.temperature != 1:
        raise DfssmError(
            f"temperature is {job.recipe.temperature}, but --top-k stores the probabilities at 1; leave one out"
        )
    if job.top_k and streams:
        raise DfssmError("--top-k: the windows of a stream are not known before; leave it out, or give --data files")
    if job.compiled and ranks.device.type == "cpu" and not shutil.which(compiler := os.environ.get("CXX", "g++")):
        raise DfssmError(f"--compile: there is no C++ compiler {compiler}; install it, set CXX, or leave out --compile")
    if job.best and not (job.held_out_documents if streams else job.held_out):
        raise DfssmError("--best: no text is held out to tell it by; give --held-out, or leave it out")
    if streams and len(job.data) > 1:
        raise DfssmError(f"{streams[0]}: a stream is the only --data of a run; leave out the others")

    teacher = load_teacher(job.teacher).requires_grad_(False).eval()
    vocab = teacher.config.vocab_size
    tokenizer, ends = open_tokenizer(_tokenizer_file(job), teacher.config)
    end = ends[0]
    teacher.config = dataclasses.replace(teacher.config, eos_token_id=ends)  # which the student takes over

    for text in job.samples:
        if not encode(text, tokenizer):
            raise DfssmError(f"sample {text!r} has no tokens; give a text")
    begun = bool(Checkpoints(job.output / "checkpoints", ranks).steps())
    if begun and not resume:
        raise DfssmError(f"{job.output}: holds a run already; go on with --resume, or choose another folder")
    if resume and not begun:
        raise DfssmError(f"{job.output}: has no checkpoint to resume from; leave out --resume to begin")

    stream = None
    if streams:
        place = job.schedule.seed, ranks.rank, ranks.world
        stream = StreamedWindows(streams[0], tokenizer, end, vocab, job.schedule.tokens, *place, job.held_out_documents)
    else:
        text_files(job.data)
    return Opened(job, ranks, resume, tokenizer, teacher, end, stream)


def prepare(opened: Opened) -> Prepared:
    """Tokenise the text, measure what is compared with, make the student, and run the teacher where it runs before."""
    job, ranks, schedule = opened.job, opened.ranks, opened.job.schedule
    source: Source
    if opened.stream:
        source, held_out, text = opened.stream, opened.stream.held_out, None
    else:
        source, found = open_files(
            [Path(name) for name in job.data],
            job.output / "tokens",
            ranks,
            tokens=schedule.tokens,
            seed=schedule.seed,
            tokenizer=opened.tokenizer,
            end=opened.end,
            vocab_size=opened.teacher.config.vocab_size,
            held_out=job.held_out,
        )
        held_out, text = found.held_out, {"sha256": hashlib.sha256(found.train.data).hexdigest()}

    sinks = open_sinks(job.output, job.tensorboard, job.wandb) if ranks.first else []
    teacher = opened.teacher.to(ranks.device)
    saved = _saved(job, ranks) if opened.resume else {}
    if saved:
        student = blank(teacher, job.recipe, ranks, **saved["shape"])
    else:
        student = begin(teacher, job.recipe, source, schedule.seed, ranks, job.init_from)
    # Of the teacher's weights only the vectors are looked at.
    vectors = b"".join(p.numpy(force=True).tobytes() for p in teacher.parameters() if p.ndim == 1)
    windows = cut_windows(held_out, schedule.tokens, job.held_out_tokens)
    measured = _measured(windows, teacher, hashlib.sha256(vectors + windows.tobytes()).hexdigest(), job, ranks, saved)

    # What must be the same for a run to be resumed.
    identity = dataclasses.asdict(job.recipe) | {
        # The rest of the schedule changes no number, or follows from the number of ranks.
        **{name: getattr(schedule, name) for name in ("steps", "batch", "tokens", "seed")},
        "top_k": job.top_k,
        "init_from": job.init_from and {"sha256": hashlib.sha256(read_file(job.init_from)).hexdigest()},
        "teacher": {"sha256": hashlib.sha256(vectors).hexdigest()},
        "data": text or list(job.data),
    }
    if ranks.device.type == "cuda":
        teacher = teacher.bfloat16()
    bf16 = ranks.agree(fast_bf16(ranks.device))
    by: Mamba2LM | TopK = teacher
    if job.top_k and isinstance(source, Windows):
        count, size = schedule.steps * schedule.batch, schedule.micro_batch
        by = precompute(teacher, source, count, job.top_k, job.output / "topk", size, bf16, ranks)
    signs = first_signs(teacher, student.config.planes)
    # Not `opened` itself: with its teacher, which may be done with, gigabytes would stay in memory.
    start = job, ranks, opened.resume, opened.tokenizer
    return Prepared(*start, source, student, by, bf16, measured, signs, identity, sinks)


def _saved(job: Job, ranks: Ranks) -> dict:
    """What the newest checkpoint has besides parameters and moments."""
    checkpoints = Checkpoints(job.output / "checkpoints", ranks)
    found: dict = json.loads(checkpoints.own(checkpoints.steps()[-1]))
    return found


def _measured(windows: np.ndarray, teacher: Mamba2LM, of: str, job: Job, ranks: Ranks, saved: dict) -> Measured:
    """What teacher and data-free conversion are worth on `windows`, or what `saved`, a checkpoint's, has of that. `of`:
    a hash of both.
    """
    measured = Measured(windows, ranks, None if job.top_k else teacher)  # which would stay in memory
    measured.of = f"{of}, rank {job.recipe.rank}, planes {job.recipe.planes}, top_k {job.top_k}"
    if measured.take(saved.get("measured", {})):
        return measured
    measured.add("teacher", teacher)
    measured.add("data_free", data_free(teacher, job.recipe))
    return measured


def trainer_of(prepared: Prepared) -> Trainer:
    """A trainer of the pair of student and teacher, which is its model. It stands at the first step."""
    job, ranks, measured = prepared.job, prepared.ranks, prepared.measured
    recipe, windows = job.recipe, measured.windows
    model = Distillation(
        prepared.student,
        prepared.teacher,
        recipe.hidden,
        recipe.cross_entropy,
        job.recompute,
        compiled=job.compiled,
        temperature=recipe.temperature,
    )
    shard(model, ranks)
    groups = trainable(model.student)  # after sharding, which replaces the parameters
    return Trainer(
        model,
        groups,
        recipe.rates,
        prepared.source,
        job.schedule,
        ranks,
        job.output,
        functools.partial(move_to, student=model.student, recipe=recipe),
        functools.partial(_looked_at, prepared, model) if len(windows) or job.samples else None,
        ("held_out_kl" if measured.teacher else "held_out") if job.best else "",
        Flips(model.student, prepared.first_signs),
        recipe.level if not job.top_k else None,  # whose logits are of so many windows as the run was to have
        factors=rate_factors(groups, recipe),
        bf16=prepared.bf16,
        sinks=prepared.sinks,
        identity=prepared.identity,
        usual=dataclasses.asdict(Recipe()),
        kept={
            "measured": measured.state(),
            "shape": {name: getattr(prepared.student.config, name) for name in ("rank", "planes")},
        },
    )


def train(prepared: Prepared, say: Callable[[str], None] = lambda line: None) -> dict:
    """Train the student, going on from the newest checkpoint where that was asked for; write model.pt, measure what was
    written and what its parts cost, and report. Returns what result.json holds.
    """
    job, ranks, measured = prepared.job, prepared.ranks, prepared.measured
    recipe, windows, trainer = job.recipe, measured.windows, trainer_of(prepared)
    if prepared.resume:
        trainer.resume()
    if ranks.first:
        write_file(job.output / TOKENIZER, prepared.tokenizer.to_str(), parents=True)
        for path in chat.beside(_tokenizer_file(job)):
            write_file(job.output / path.name, read_file(path))
        found = ", ".join(f"{name} {value:.2f}" for name, value in measured.perplexity.items()) or "none"
        trained = sum(p.numel() for parameters in trainer.groups.values() for p in parameters)
        say(f"{trained:,} trainable parameters, {windows[:, 1:].size:,} held-out tokens; perplexity: {found}")
    with fused_scan.lent(trainer.model, ranks.device):
        trainer.train()

    file, step, model = job.output / STUDENT, trainer.take_best(), trainer.model
    assert isinstance(model, Distillation)
    student = finish(model, recipe, ranks, file)
    measured.add("student", load_student(file).to(ranks.device))
    for name, form in other_forms(student):
        measured.add(name, form)
    result = {
        "recipe": dataclasses.asdict(recipe),
        "schedule": dataclasses.asdict(job.schedule),
        "tokens": trainer.step * job.schedule.batch * job.schedule.tokens,
        "step": step,
        "held_out_tokens": windows[:, 1:].size,
        "seconds": trainer.seconds,
        "perplexity": measured.perplexity,
        "kl": measured.kl,
        "same_top": measured.same_top,
        "model": STUDENT,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    if ranks.first:
        write_file(job.output / "result.json", json.dumps(result, indent=2) + "\n")
        write_report(job.output)
    ranks.barrier()
    return result


def _looked_at(prepared: Prepared, model: Distillation) -> dict:
    """What the log has of the student from time to time: figures of the held-out text, and samples."""
    job, ranks, measured = prepared.job, prepared.ranks, prepared.measured
    found: dict = figures(model.logits, measured.teacher, measured.windows, ranks) if len(measured.windows) else {}
    if job.samples:
        ends = end_tokens(prepared.student.config.eos_token_id, prepared.tokenizer)
        found["samples"] = samples(model.logits, job.samples, prepared.tokenizer, ends, ranks.device)
    return found


def _tokenizer_file(job: Job) -> Path:
    return job.tokenizer or job.teacher / TOKENIZER
