"""The log of a run: log.jsonl, and TensorBoard and Weights & Biases, each where it is installed and wanted."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dfssm.base.errors import DfssmError, reason
from dfssm.base.extras import require
from dfssm.base.files import append, write_file
from dfssm.base.reading import open_text

Sink = Callable[[int, dict[str, float]], None]
"""Takes a step and the numbers of the line written after it."""

_POSITION = ("step", "tokens", "seconds")  # of a line, besides what was measured


class Log:
    """log.jsonl in a folder, and the sinks that get its lines too. Of several ranks the first one `writes`."""

    def __init__(self, folder: Path, writes: bool, sinks: Sequence[Sink] = ()):
        self.path, self.writes, self.sinks = folder / "log.jsonl", writes, sinks
        self.shown: dict[str, str] = {}  # beside the progress bar

    def write(self, line: dict[str, Any]) -> None:
        self.shown |= {name: f"{line[name]:.3f}" for name in ("loss", "perplexity") if name in line}
        if not self.writes:
            return
        try:
            append(self.path, json.dumps(line) + "\n")
        except OSError as error:
            raise DfssmError(f"{self.path}: cannot be written ({reason(error)}); mend that, then --resume") from None
        numbers = {name: value for name, value in line.items() if not isinstance(value, list)}
        for sink in self.sinks:
            sink(line["step"], numbers)

    def cut(self, step: int) -> None:
        """Drop the lines after `step`, and a last one that was cut short: the run goes on from there."""
        if not (self.writes and self.path.is_file()):
            return
        kept = []
        for line in open_text(self.path, errors="replace"):
            with contextlib.suppress(ValueError, LookupError, TypeError):  # of a disk that failed, too
                if json.loads(line)["step"] <= step:
                    kept.append(line.rstrip("\n") + "\n")
        write_file(self.path, "".join(kept))


def open_sinks(folder: Path, tensorboard: bool = False, wandb: str | None = None) -> list[Sink]:
    """The sinks asked for; a run that is resumed goes on in them as in log.jsonl.

    `tensorboard`: event files in tensorboard/ of `folder`. `wandb`: the project of a run named as `folder`, whose id is
    kept in it. Raises DfssmError if a library is not installed, or W&B does not begin the run.
    """
    sinks: list[Sink] = []
    if tensorboard:
        sinks.append(_tensorboard(folder / "tensorboard"))
    if wandb:
        sinks.append(_wandb(folder, wandb))
    return sinks


def _tensorboard(folder: Path) -> Sink:
    require({"": ["tensorboard"]})
    from torch.utils.tensorboard import SummaryWriter

    writer = None

    def sink(step: int, line: dict[str, float]) -> None:
        nonlocal writer
        if writer is None:  # only now it is known from which step on earlier events are of steps that are taken again
            writer = SummaryWriter(str(folder), purge_step=step)
        for name, value in line.items():
            if name not in _POSITION:
                writer.add_scalar(name, value, step)
        writer.flush()  # a run may be killed at any time

    return sink


def _wandb(folder: Path, project: str) -> Sink:
    require({"": ["wandb"]})
    import wandb

    kept = folder / "wandb.id"
    if not kept.is_file():
        write_file(kept, secrets.token_hex(4), parents=True)
    try:
        run = wandb.init(project=project, name=folder.name, id=kept.read_text(), resume="allow", dir=str(folder))
    except wandb.Error as error:
        raise DfssmError(
            f"the W&B project {project}: no run begins ({reason(error)}); see to it, or leave out W&B"
        ) from None

    def sink(step: int, line: dict[str, float]) -> None:
        # Steps that are taken again after a resume, W&B passes over: they are the same.
        run.log({name: value for name, value in line.items() if name != "step"}, step=step)

    return sink
