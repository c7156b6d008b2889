"""Teachers, and their students as `dfssm convert` and `dfssm distill` make them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfssm.base import paths
from dfssm.base.files import write_file
from dfssm.distill.checkpoint import Checkpoints
from dfssm.distill.data import Source
from dfssm.distill.distributed import Ranks
from dfssm.distill.recipe import RECIPES
from dfssm.distill.run import Job, distill
from dfssm.distill.trainer import Schedule, Trainer
from dfssm.model.checkpoint import save_student
from dfssm.model.config import Mamba2Config
from dfssm.model.convert import convert
from dfssm.model.hf_import import load_teacher, save_teacher
from dfssm.model.teacher import Mamba2LM
from dfssm.targets.bundle import TOKENIZER

from .language import END

ALONE = Ranks(0, 1, torch.device("cpu"))
WEIGHT_DECAY = 0.1
SAVE_EVERY = 200  # steps: a row that is ended loses so many at most
HELD_OUT = 0.02  # of the students' text: `distill` reports it, the bench measures on documents of its own


@dataclass(frozen=True)
class Teacher:
    """A teacher's shape and training: `tokens` in windows of `window`, `batch` of them a step.

    `emphasis`: weight of the loss of tokens that can be known, beside the 1 of the others.
    """

    d_model: int = 64
    n_layer: int = 2
    d_state: int = 32
    headdim: int = 32
    tokens: int = 2_000_000
    window: int = 256
    batch: int = 8
    lr: float = 4e-3
    emphasis: float = 1.0

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch * self.window)

    def config(self, vocab: int, **more: Any) -> Mamba2Config:
        """Of a model of `vocab` tokens."""
        shape = {name: getattr(self, name) for name in ("d_model", "n_layer", "d_state", "headdim")}
        return Mamba2Config(vocab_size=vocab, eos_token_id=END, **shape, **more)


@dataclass(frozen=True)
class Student:
    """A student: `share` of the teacher's tokens, 0 for the data-free conversion; `batch` windows a step."""

    planes: int = 1
    rank: int = 1
    share: float = 0.0
    window: int = 256
    batch: int = 4

    @property
    def cost(self) -> float:
        """Work to make and measure it, as a share of its teacher's."""
        return 0.02 + 3 * self.share

    @property
    def name(self) -> str:
        how = f"{self.share:.0%}-by-{self.batch * self.window}" if self.share else "data-free"
        return f"{self.planes}-plane-rank-{self.rank}-{how}"

    @property
    def title(self) -> str:
        """The name for people."""
        step = self.batch * self.window
        how = f"{100 * self.share:.0f} % of the tokens, {step:,} a step" if self.share else "data-free"
        return f"{self.planes} plane{'s' * (self.planes > 1)}, rank {self.rank}, {how}"


def students_of(students: Sequence[Student], first: bool) -> list[Student]:
    """Those that are made for a seed: of all of the teacher's tokens for the `first` one only."""
    return [student for student in students if student.share < 1 or first]


def weights_of(teacher: Path) -> int:
    """How many weights the teacher in this folder has."""
    return sum(p.numel() for p in load_teacher(teacher).parameters())


def titles(students: Sequence[Student]) -> dict[str, str]:
    """The rows of a teacher and its students: name of the row -> its title."""
    return {"teacher": "teacher"} | {student.name: student.title for student in students}


class NextToken(nn.Module):
    """A language model as the trainer calls it, with ids i64[B,T+1] as `Fresh` gives them."""

    def __init__(self, model: Mamba2LM, emphasis: float):
        super().__init__()
        self.model, self.emphasis = model, emphasis

    def forward(self, marked: Tensor) -> dict[str, Tensor]:
        known = marked < 0
        ids = torch.where(known, ~marked, marked)
        weight = torch.where(known, self.emphasis, 1.0)[:, 1:].flatten()
        logits = self.model(ids[:, :-1])[0]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return {"loss": (weight * loss).sum() / weight.sum()}


def rate(progress: float) -> float:
    """Learning rate, as a share of its peak: up over 5 % of the steps, level, and down over the last 30 %."""
    return min(1.0, progress / 0.05, max(0.02, (1 - progress) / 0.3))


def train_teacher(
    setup: Teacher, config: Mamba2Config, source: Source, tokenizer: str, seed: int, folder: Path
) -> Path:
    """Train a teacher, from where an earlier run in `folder` was ended; returns its own folder.

    `source`: as `Fresh`, or a text. `tokenizer`: the tokenizer.json.
    """
    torch.manual_seed(seed)
    model = NextToken(Mamba2LM(config), setup.emphasis)
    trainer = Trainer(
        model,
        {"all": list(model.parameters())},
        lambda progress: {"all": setup.lr * rate(progress)},
        source,
        Schedule(setup.steps, setup.batch, setup.batch, setup.window, seed, log_every=50, save_every=SAVE_EVERY),
        ALONE,
        folder,
        weight_decay=WEIGHT_DECAY,
    )
    trainer.resume()
    trainer.train()
    save_teacher(model.model, folder / "teacher")
    write_file(folder / "teacher" / TOKENIZER, tokenizer)
    return folder / "teacher"


def make_student(
    teacher: Path, text: Callable[[int, Path], Sequence[str]], setup: Student, tokens: int, seed: int, folder: Path
) -> Path:
    """The student of the folder `teacher`, which learned of `tokens`: its model.pt, with its tokenizer beside it.

    `text(count, folder)`: files of at least `count` tokens; where they are not there, they are made in the folder.
    """
    if not setup.share:
        config, tensors = convert(load_teacher(teacher), setup.rank, setup.planes)
        save_student(folder / paths.STUDENT, config, tensors)
        write_file(folder / TOKENIZER, (teacher / TOKENIZER).read_bytes())
        return folder / paths.STUDENT
    steps = max(1, round(setup.share * tokens / (setup.batch * setup.window)))
    schedule = Schedule(
        steps, setup.batch, setup.batch, setup.window, seed, log_every=50, save_every=SAVE_EVERY, evaluate_every=10**9
    )
    output = folder / "student"
    once = setup.window * (steps * setup.batch + 2)  # enough for every window to be seen once
    data = text(round(once / (1 - HELD_OUT)) + setup.window, folder)
    recipe = dataclasses.replace(RECIPES["binary"], rank=setup.rank, planes=setup.planes)
    job = Job(teacher, data, output, recipe, schedule, held_out=HELD_OUT)
    distill(job, ALONE, resume=bool(Checkpoints(output / "checkpoints", ALONE).steps()))
    return output / paths.STUDENT
