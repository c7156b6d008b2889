"""A learning-rate range test (Smith, arXiv 1506.01186): a few steps at rates that rise, and the loss at each."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dfssm.base import chart, memory
from dfssm.base.chart import Axis, Chart, Series, figure, label
from dfssm.base.errors import DfssmError
from dfssm.base.files import alone, temporary_folder, write_file
from dfssm.base.page import document, tiles

from .distributed import Ranks
from .progress import TrainingProgress
from .run import Job, open, prepare, trainer_of
from .trainer import NotFinite

LEAST, MOST = 1e-5, 1.0  # the rates
REACH = 2  # steps on either side over which a loss is smoothed: with earlier ones alone the least would come too late
WORSE = 4.0  # times the least loss: the test ends there
BELOW = 2  # times smaller than the rate of the least loss is the one suggested; docs/distill.md
PAGE, NUMBERS = "rates.html", "rates.json"


def range_test(job: Job, ranks: Ranks, steps: int) -> dict[str, Any]:
    """Take up to `steps` steps of `job` from its start, at rates from LEAST to MOST, and write PAGE and NUMBERS.

    A rate is the scaffold's; those of the other groups are in proportion, as the recipe has them. Nothing else is left
    in the job's folder. Returns what NUMBERS holds: `rates`, `loss` and `smoothed` by step, `least`, the rate at which
    the smoothed loss is least, and `suggested`. DfssmError as `run.open` and `run.prepare`, on several ranks, and where
    the first steps have no loss.
    """
    if ranks.world > 1:
        raise DfssmError(f"--range-test runs on one device, not on {ranks.world}: leave out torchrun")
    with alone(job.output), temporary_folder("--range-test") as folder:
        found = _taken(job, ranks, steps, folder)
        if not found["loss"]:
            raise DfssmError(f"--range-test: the loss is no number from the first step on, at a rate of {LEAST:g}")
        write_file(job.output / NUMBERS, json.dumps(found, indent=2) + "\n")
        write_file(job.output / PAGE, page(found))
    return found


def _taken(job: Job, ranks: Ranks, steps: int, folder: Path) -> dict[str, Any]:
    schedule = dataclasses.replace(job.schedule, steps=steps)
    nothing: dict[str, Any] = {"held_out": 0.0, "held_out_documents": 0, "best": False, "samples": ()}
    nothing |= {"tensorboard": False, "wandb": None}
    trainer = trainer_of(prepare(open(dataclasses.replace(job, output=folder, schedule=schedule, **nothing), ranks)))
    trainer.before(0.0)
    trainer.model.train()
    rates: list[float] = []
    losses: list[float] = []
    size = schedule.batch * schedule.tokens
    with TrainingProgress(0, ranks.first) as progress, memory.kept():
        for step in range(steps):
            rate = LEAST * (MOST / LEAST) ** (step / max(1, steps - 1))
            try:
                losses.append(trainer.update(job.recipe.at(rate))["loss"])
            except NotFinite:
                break
            rates.append(rate)
            values = smoothed(losses)
            progress.update((step + 1) * size, steps * size, {"rate": label(rate), "loss": f"{values[-1]:.3f}"})
            if values[-1] > WORSE * min(values):
                break
    return summary(rates, losses)


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of each loss and up to REACH on either side."""
    parts = (losses[max(0, i - REACH) : i + REACH + 1] for i in range(len(losses)))
    return [sum(part) / len(part) for part in parts]


def summary(rates: Sequence[float], losses: Sequence[float]) -> dict[str, Any]:
    """What NUMBERS holds of these steps."""
    values = smoothed(losses)
    least = rates[values.index(min(values))] if values else math.nan
    return {
        "rates": list(rates),
        "loss": list(losses),
        "smoothed": values,
        "least": least,
        "suggested": float(f"{least / BELOW:.2g}"),
    }


def page(found: dict[str, Any]) -> str:
    """The report of a range test."""
    rates, title = found["rates"], "Learning-rate range test"
    names = {"loss": "of a step", "smoothed": "smoothed"}
    lines = [Series(name, list(zip(rates, found[key], strict=True))) for key, name in names.items()]
    loss = Chart("Loss", "nats per token", lines, across="learning rate", at="{}")
    figures = {
        "suggested --lr": label(found["suggested"]),
        "rate of the least smoothed loss": label(found["least"]),
        "steps": str(len(rates)),
    }
    body = [f"<h1>{title}</h1>", tiles(figures), figure(loss, "rates", Axis.powers(rates))]
    return document(title, body, chart.STYLE)
