"""The command line that both training examples share."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import click
import torch
from training import Schedule

from dfssm.opset.errors import DfssmError


@dataclass(frozen=True)
class Run:
    """The shared options, as they were given."""

    data: tuple[Path, ...]
    output: Path
    resume: bool
    steps: int
    batch: int
    tokens: int
    lr: float
    held_out: float
    save_every: int
    seed: int
    threads: int
    compiled: bool

    @property
    def checkpoint(self) -> Path:
        return self.output / "training.pt"

    def begin(self) -> None:
        """Threads, seed and the output folder."""
        torch.set_num_threads(self.threads)
        torch.manual_seed(self.seed)
        self.output.mkdir(parents=True, exist_ok=True)

    def schedule(self, **more) -> Schedule:
        shared = ("steps", "batch", "tokens", "lr", "save_every", "seed")
        options = {name: getattr(self, name) for name in shared}
        return Schedule(**options, warmup=min(100, self.steps // 10 + 1), **more)


def run_options(output: str, steps: int, seed: int) -> Callable:
    """Decorator: the shared options with these defaults, handed to the command as its first argument, a `Run`."""
    options = [
        click.option(
            "--data",
            type=click.Path(path_type=Path),
            multiple=True,
            required=True,
            help="A text file, or a folder of *.txt; may be repeated. <|endoftext|> separates documents.",
        ),
        click.option("-o", "--output", type=click.Path(path_type=Path), default=output, show_default=True),
        click.option("--resume", is_flag=True, help="Go on from OUTPUT/training.pt."),
        click.option("--steps", default=steps, show_default=True),
        click.option("--batch", default=8, show_default=True, help="Windows a step."),
        click.option("--tokens", default=256, show_default=True, help="Tokens a window."),
        click.option("--lr", default=2e-3, show_default=True),
        click.option("--held-out", default=0.02, show_default=True, help="Last share of each file, for perplexity."),
        click.option("--save-every", default=200, show_default=True, help="Steps between checkpoints."),
        click.option("--seed", default=seed, show_default=True),
        click.option("--threads", default=os.cpu_count(), show_default=True),
        click.option(
            "--compile/--no-compile",
            "compiled",
            default=False,
            show_default=True,
            help="torch.compile the blocks: minutes to begin, then about 1.4x faster.",
        ),
    ]

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def with_run(**arguments):
            run = Run(**{field.name: arguments.pop(field.name) for field in fields(Run)})
            return command(run, **arguments)

        for option in reversed(options):
            with_run = option(with_run)
        return with_run

    return decorate


def main(command: click.Command) -> None:
    """Run `command`; what the user can mend is one line and exit code 1."""
    try:
        command()
    except DfssmError as error:
        raise SystemExit(f"error: {error}") from None
