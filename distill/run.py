"""One distillation from the teacher's folder to model.pt: data, start, training, and what came of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tqdm import tqdm

from dfssm.model.checkpoint import atomic_write, save_student
from dfssm.model.convert import convert, student_from_teacher
from dfssm.model.hf_import import load_teacher
from dfssm.model.quant import dequantized
from dfssm.model.student import DFSSMLM, from_tensors, load_student
from dfssm.model.teacher import Mamba2LM
from dfssm.model.text import END_OF_TEXT
from dfssm.opset import paths
from dfssm.opset.errors import DfssmError

from . import PREFIX
from .checkpoint import Checkpoints
from .data import Windows, open_tokens, tokenize
from .density import DensityLinear, densify, other_forms, set_attributes, sign_export, trainable, zero_low_rank
from .distributed import Ranks, shard
from .held_out import Measured, cut_windows, held_out_loss
from .objective import Distillation
from .recipe import Recipe
from .report import write_report
from .sinks import open_sinks
from .stream import StreamedWindows
from .topk import TopK, write_topk
from .trainer import Schedule, Source, Trainer, fast_bf16

TOKENIZER = "tokenizer.json"
MODEL, CHECKPOINTS = "model.pt", "checkpoints"
CALIBRATION = 16  # windows over which the sizes of activations are measured


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
    tokenizer: Path | None = None
    recompute: bool = False
    compiled: bool = False
    top_k: int = 0
    tensorboard: bool = False
    wandb: str | None = None

    def identity(self, teacher: Mamba2LM, train: np.ndarray | None) -> dict:
        """What must be the same for a run to be resumed. Of the teacher's weights only the vectors are looked at."""
        vectors = b"".join(p.numpy(force=True).tobytes() for p in teacher.parameters() if p.ndim == 1)
        schedule = ("steps", "batch", "tokens", "seed")  # the rest changes no number, or follows from that of ranks
        return (
            dataclasses.asdict(self.recipe)
            | {name: getattr(self.schedule, name) for name in schedule}
            | {
                "top_k": self.top_k,
                "teacher": {"sha256": hashlib.sha256(vectors).hexdigest()},
                "data": list(self.data) if train is None else {"sha256": hashlib.sha256(train).hexdigest()},
            }
        )


def distill(job: Job, ranks: Ranks, resume: bool = False, say: Callable[[str], None] = lambda line: None) -> dict:
    """Run `job`; returns what result.json holds, on the first rank. `say` gets lines for people to read.

    Raises DfssmError before any training if something does not fit: teacher, tokenizer, data, output.
    """
    torch.manual_seed(job.schedule.seed)
    job.schedule.parts(ranks)
    if job.top_k and job.recipe.hidden:
        raise DfssmError(
            f"hidden is {job.recipe.hidden}, but with --top-k no teacher is there to compare with; leave one"
        )
    teacher = load_teacher(job.teacher).requires_grad_(False).eval()
    tokenizer, end = _load_tokenizer(job.tokenizer or job.teacher / TOKENIZER, teacher)
    begun = bool(Checkpoints(job.output / CHECKPOINTS, ranks).steps())
    if begun and not resume:
        raise DfssmError(f"{job.output}: holds a run already; go on with --resume, or choose another folder")
    if resume and not begun:
        raise DfssmError(f"{job.output}: has no checkpoint to resume from; leave out --resume to begin")
    sinks = open_sinks(job.output, job.tensorboard, job.wandb) if ranks.first else []
    source, held_out = _open_data(job, tokenizer, end, teacher.config.vocab_size, ranks)
    windows = cut_windows(held_out, job.schedule.tokens, job.held_out_tokens)

    recipe = job.recipe
    teacher = teacher.to(ranks.device)
    sizes = _activation_sizes(teacher, source, ranks) if recipe.init == "activations" else None
    student = student_from_teacher(teacher, recipe.rank, recipe.planes, sizes)
    layers = prepare(student, recipe)
    if recipe.init == "zero":
        zero_low_rank(layers)
    measured = Measured(windows, ranks, None if job.top_k else teacher)  # which would stay in memory
    measured.add("teacher", teacher)
    measured.add("data_free", from_tensors(*convert(teacher, recipe.rank, recipe.planes)).to(ranks.device))
    identity = job.identity(teacher, source.ids if isinstance(source, Windows) else None)
    if ranks.device.type == "cuda":
        teacher = teacher.bfloat16()
    bf16 = ranks.agree(fast_bf16(ranks.device))
    if job.top_k:
        teacher = _stored(teacher, source, job, bf16, ranks)
    model = Distillation(student, teacher, recipe.hidden, recipe.cross_entropy, job.recompute)
    if job.compiled:
        for layer in [*(model.teacher.layers if model.teacher else ()), *student.layers]:
            layer.compile()
    shard(model, ranks)
    groups = trainable(student)  # after sharding, which replaces the parameters

    def before(progress: float) -> dict[str, float]:
        blend = recipe.blend(progress)
        share = blend if blend == 1.0 else torch.tensor(blend)
        set_attributes(layers, blend=share, low_rank=recipe.low_rank(progress))
        return {"blend": blend}

    trainer = Trainer(
        model,
        groups,
        recipe.rates,
        source,
        job.schedule,
        ranks,
        job.output,
        before,
        (lambda: held_out_loss(model.logits, windows, ranks)) if len(windows) else None,
        bf16=bf16,
        identity=identity,
    )
    trainer.log.sinks += sinks
    if resume:
        trainer.resume()
    if ranks.first:
        atomic_write(job.output / TOKENIZER, lambda path: path.write_text(tokenizer.to_str()))
        found = ", ".join(f"{name} {value:.2f}" for name, value in measured.perplexity.items())
        trained = sum(p.numel() for parameters in groups.values() for p in parameters)
        say(f"{trained:,} parameters train, {windows[:, 1:].size:,} held-out tokens; {found}")
    trainer.train()
    return _finish(job, ranks, model, trainer, measured)


def prepare(student: DFSSMLM, recipe: Recipe) -> list[DensityLinear]:
    """Give a student's layers the arithmetic of a recipe; returns its projections."""
    layers = densify(
        student,
        hard=recipe.hard,
        soft="levels" if recipe.anneal == "levels" else "continuous",
        float_activations=recipe.activations == "float",
        window=recipe.ste_window,
    )
    if recipe.state_dtype == "int8":
        for block in student.layers:
            block.scan.round_state = dequantized
    return layers


def _load_tokenizer(file: Path, teacher: Mamba2LM) -> tuple[Tokenizer, int]:
    """The tokenizer and the token that ends a document."""
    paths.file(file, "the teacher's own with --tokenizer", TOKENIZER)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no type of its own
        raise DfssmError(f"{file}: is no tokenizer.json ({error}); give the teacher's own with --tokenizer") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end = teacher.config.eos_token_id
    end = tokenizer.token_to_id(END_OF_TEXT) if end is None else end
    if end is None or end >= teacher.config.vocab_size:
        raise DfssmError(f"{file}: has no {END_OF_TEXT} among the teacher's {teacher.config.vocab_size} tokens")
    return tokenizer, end


def _open_data(job: Job, tokenizer: Tokenizer, end: int, vocab: int, ranks: Ranks) -> tuple[Source, np.ndarray]:
    """The training windows of this rank and the held-out tokens."""
    tokens, seed = job.schedule.tokens, job.schedule.seed
    streams = [name for name in job.data if name.startswith(PREFIX)]
    if streams:
        if len(job.data) > 1:
            raise DfssmError(f"{streams[0]}: a stream is the only --data of a run; leave out the others")
        place = ranks.rank, ranks.world
        source = StreamedWindows(streams[0], tokenizer, end, vocab, tokens, seed, *place, job.held_out_documents)
        return source, source.held_out
    folder = job.output / "tokens"
    if ranks.first:
        tokenize([Path(name) for name in job.data], tokenizer, end, vocab, job.held_out, folder)
    ranks.barrier()
    found = open_tokens(folder)
    return Windows(found.train, tokens, seed, ranks.rank, ranks.world), found.held_out


def _stored(teacher: Mamba2LM, source: Source, job: Job, bf16: bool, ranks: Ranks) -> TopK:
    """The teacher's likeliest tokens in every window of the run, in topk/ of the output."""
    if not isinstance(source, Windows):
        raise DfssmError("--top-k: the windows of a stream are not known before; leave it out, or give --data files")
    schedule, folder = job.schedule, job.output / "topk"
    windows = schedule.steps * schedule.batch
    total, show = windows * schedule.tokens // ranks.world, None if ranks.first else True
    with tqdm(total=total, desc="teacher", unit="tok", unit_scale=True, mininterval=1.0, disable=show) as bar:
        place = ranks.rank, ranks.world
        write_topk(teacher, source, windows, job.top_k, folder, schedule.micro_batch, bf16, *place, bar.update)
    ranks.barrier()
    return TopK(folder)


@torch.no_grad()
def _activation_sizes(teacher: Mamba2LM, source: Source, ranks: Ranks) -> dict[str, Tensor]:
    """Root mean square of each input of the teacher's projections, over a few windows; the same on every rank."""
    sums: dict[str, Tensor] = {}

    def add(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            found = inputs[0].double().square().mean((0, 1))
            sums[name] = sums.get(name, 0.0) + found / -(-CALIBRATION // ranks.world)

        return hook

    hooks = [
        module.register_forward_pre_hook(add(name))
        for name, module in teacher.named_modules()
        if name.endswith(("in_proj", "out_proj"))
    ]
    state = source.state_dict()
    for _ in range(-(-CALIBRATION // ranks.world)):
        teacher(torch.from_numpy(source.take(1)).to(ranks.device)[:, :-1])
    source.load_state_dict(state)  # training begins at the first window
    for hook in hooks:
        hook.remove()
    return {name: ranks.mean(total).sqrt().float() for name, total in sums.items()}


def _finish(job: Job, ranks: Ranks, model: Distillation, trainer: Trainer, measured: Measured) -> dict:
    """Write model.pt, measure what was written and what its parts cost, and report."""
    student, file = _gathered(model, ranks).eval(), job.output / MODEL
    layers = prepare(student, job.recipe)
    set_attributes(layers, blend=1.0, low_rank=job.recipe.low_rank(1.0))
    if ranks.first:
        published = job.recipe.hard == "levels"
        save_student(file, student.config, sign_export(student) if published else student.export_tensors())
    ranks.barrier()
    measured.add("student", load_student(file).to(ranks.device))
    for name, form in other_forms(student, layers):
        measured.add(name, form)
    result = {
        "recipe": dataclasses.asdict(job.recipe),
        "schedule": dataclasses.asdict(job.schedule),
        "tokens": job.schedule.steps * job.schedule.batch * job.schedule.tokens,
        "held_out_tokens": measured.windows[:, 1:].size,
        "seconds": trainer.seconds,
        "perplexity": measured.perplexity,
        "kl": measured.kl,
        "model": MODEL,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    if ranks.first:
        atomic_write(job.output / "result.json", lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))
        write_report(job.output)
    ranks.barrier()
    return result


def _gathered(model: Distillation, ranks: Ranks) -> DFSSMLM:
    """The student whole, on every rank."""
    if ranks.world == 1:
        return model.student
    options = StateDictOptions(full_state_dict=True)
    prefix = "student."
    tensors = get_model_state_dict(model, options=options)
    tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    student = DFSSMLM(model.student.config).to(ranks.device)
    student.load_state_dict(tensors)
    return student
