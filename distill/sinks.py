"""Where the lines of log.jsonl go besides: TensorBoard and Weights & Biases, each where it is installed and wanted."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

from dfssm.opset.errors import DfssmError
from dfssm.opset.extras import require
from dfssm.opset.files import write_file

Sink = Callable[[int, dict[str, float]], None]
"""Takes a step and the line written after it; see trainer.Log."""

_POSITION = ("step", "tokens", "seconds")  # of a line, besides what was measured


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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DfssmError(f"the W&B project {project}: no run begins ({reason}); see to it, or leave out W&B") from None

    def sink(step: int, line: dict[str, float]) -> None:
        # Steps that are taken again after a resume, W&B passes over: they are the same.
        run.log({name: value for name, value in line.items() if name != "step"}, step=step)

    return sink
