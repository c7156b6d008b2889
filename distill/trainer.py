"""The training loop: micro-batches, schedule, log, checkpoints, resume; one process or many, the same steps."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dfssm.base import memory
from dfssm.base.errors import DfssmError

from .checkpoint import Checkpoints
from .data import Source
from .distributed import Ranks
from .log import Log, Sink
from .progress import TrainingProgress
from .stopping import Stopping

BETAS = 0.9, 0.95
MAX_NORM = 1.0  # of the gradient


class NotFinite(DfssmError):
    """The loss or the gradient of a step is no number. No parameter has changed by it."""


@dataclass(frozen=True)
class Schedule:
    """`steps` of `batch` windows of `tokens` tokens, over all ranks; `micro_batch` windows at a time on a rank.

    `seconds`: of training, after which the run ends before all steps are taken; it then goes by the clock. `keep`:
    checkpoints that stay, the newest.
    """

    steps: int
    batch: int = 8
    micro_batch: int = 8
    tokens: int = 256
    seed: int = 0
    log_every: int = 10
    save_every: int = 200
    evaluate_every: int = 200
    keep: int = 2
    seconds: float | None = None

    def parts(self, ranks: Ranks) -> int:
        """Micro-batches of a step on one rank. DfssmError if they do not come out even."""
        if self.batch % (ranks.world * self.micro_batch):
            raise DfssmError(
                f"batch is {self.batch} windows; give a multiple of ranks x micro-batch = "
                f"{ranks.world} x {self.micro_batch}"
            )
        return self.batch // (ranks.world * self.micro_batch)


@dataclass
class Trainer:
    """Minimises `model(ids)["loss"]` over the windows of `source`.

    `rates(progress)` gives each parameter group its learning rate by name, `before(progress)` sets what else changes
    along the run (progress: between 0 and 1, of the middle of a step). `held_out()` has the figures of text that is not
    trained on; `watched()` what else a line of the log has. `ends()` is the step at which the run ends, where that is
    found on the way; at most the schedule's. Log lines go to log.jsonl in `folder`, checkpoints to checkpoints/.

    `level`: between which points of the run nothing depends on its length. The checkpoint of the second one is kept:
    a run of more steps goes on from there. `best_by`: of which figure of held_out() the least is the best: the
    checkpoint of that step is kept, too.
    """

    model: nn.Module
    groups: dict[str, list[nn.Parameter]]
    rates: Callable[[float], dict[str, float]]
    source: Source
    schedule: Schedule
    ranks: Ranks
    folder: Path
    before: Callable[[float], dict[str, float]] = lambda progress: {}
    held_out: Callable[[], dict[str, Any]] | None = None
    best_by: str = ""
    watched: Callable[[], dict[str, float]] = dict
    level: tuple[float, float] | None = None
    ends: Callable[[], int] | None = None
    factors: Mapping[nn.Parameter, float] = field(default_factory=dict)  # on the learning rate; 1 for all others
    weight_decay: float = 0.0  # of matrices
    bf16: bool = False
    sinks: Sequence[Sink] = ()
    identity: dict = field(default_factory=dict)  # what a run that goes on must have in common with its checkpoint
    usual: dict = field(default_factory=dict)  # of that, what checkpoints that lack it were begun with
    kept: dict = field(default_factory=dict)  # what a checkpoint has besides

    def __post_init__(self) -> None:
        self.parts = self.schedule.parts(self.ranks)
        self.optimizer = torch.optim.AdamW(self._parameter_groups(), betas=BETAS, fused=True)
        for group in self.optimizer.param_groups:
            for p in group["params"]:  # made by the first gradient otherwise, and a checkpoint before that lacks it
                moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[p] = {"step": torch.zeros((), device=p.device)} | moments
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.ranks, self.schedule.keep)
        self.log = Log(self.folder, self.ranks.first, self.sinks)
        self.step, self.seconds, self.floor = 0, 0.0, 0.0  # no point of the run lies before the floor
        self.best: tuple[float, int] | None = None  # the figure, and the step
        self.sums: dict[str, float] = {}  # since the last line of the log, which was at:
        self.logged = 0, 0.0  # step and seconds

    @property
    def steps(self) -> int:
        """Of the run, as far as is known by now."""
        return min(self.schedule.steps, self.ends()) if self.ends else self.schedule.steps

    @property
    def progress(self) -> float:
        """From 0 to 1: of the middle of the next step, or by the clock where that is further."""
        by_steps, most = max(self.floor, (self.step + 0.5) / self.schedule.steps), self.schedule.seconds
        return by_steps if most is None else max(by_steps, min(1.0, self.seconds / most))

    @property
    def level_ends(self) -> int | None:
        """The last step after which the run may still become longer."""
        return None if self.level is None else math.floor(self.level[1] * self.schedule.steps)

    @property
    def done(self) -> bool:
        """Whether the run ends here: the same on every rank."""
        most = self.schedule.seconds
        return self.step >= self.steps or (most is not None and self.ranks.agree(self.seconds >= most))

    def resume(self) -> bool:
        """Go on from the newest checkpoint; False if there is none. DfssmError if it is of another schedule.

        A schedule of more steps goes on from the newest checkpoint in the level part; later ones are removed.
        """
        steps = self.checkpoints.steps()
        if not steps:
            return False
        saved = json.loads(self.checkpoints.own(steps[-1]))
        same = dict(self.identity)
        if self.level and saved["identity"].get("steps", 0) < same.get("steps", 0):
            begun = saved["identity"]["steps"]
            first, last = (math.floor(point * begun) for point in self.level)
            steps = [step for step in steps if first <= step <= last]
            if not steps:
                raise DfssmError(
                    f"{self.folder}: was begun with steps {begun}, and has no checkpoint of steps {first} to {last} to "
                    "become longer from; resume with the same, or choose another folder"
                )
            saved = json.loads(self.checkpoints.own(steps[-1]))
            saved["floor"] = max(saved.get("floor", 0.0), self.level[0])
            del same["steps"]
        for name, value in json.loads(json.dumps(same)).items():
            begun = saved["identity"].get(name, self.usual.get(name))
            if begun != value:
                what = f"another {name}" if isinstance(value, dict) else f"{name} {begun}, not {value}"
                raise DfssmError(
                    f"{self.folder}: was begun with {what}; resume with the same, or choose another folder"
                )
        self.checkpoints.load(steps[-1], self.model, self.optimizer)
        self.source.load_state_dict(saved["source"])
        self.step, self.seconds, self.bf16 = steps[-1], saved["seconds"], saved["bf16"]
        self.sums, self.logged, self.floor = saved["sums"], tuple(saved["logged"]), saved.get("floor", 0.0)
        best = saved.get("best")
        self.best = tuple(best) if best and best[1] in self.checkpoints.steps() else None
        self.checkpoints.drop_after(self.step)
        self.log.cut(self.step)
        return True

    def take_best(self) -> int:
        """Go back to the parameters of the best step, where one is looked for; the step that the model is of."""
        if not (self.best_by and self.best) or self.best[1] == self.step:
            return self.step
        self.checkpoints.load(self.best[1], self.model, self.optimizer)
        return self.best[1]

    def train(self) -> None:
        """Run to the end of the schedule. A loss that is not finite raises DfssmError and keeps the last checkpoint.

        SIGTERM ends the step that is taken, saves a checkpoint, and then ends what it would have ended.
        """
        schedule = self.schedule
        begin = time.perf_counter() - self.seconds
        if not self.step:
            self.log.cut(0)  # lines of a run that did not come to a checkpoint
        self.model.train()
        size = schedule.batch * schedule.tokens
        with TrainingProgress(self.step * size, self.ranks.first) as progress, Stopping() as stopping, memory.kept():
            while not self.done:
                rates, extra = self.rates(self.progress), self.before(self.progress)
                found = self.update(rates)
                self.seconds = time.perf_counter() - begin
                for name, value in found.items():
                    self.sums[name] = self.sums.get(name, 0.0) + value
                done, stops = self.done, self.ranks.agree(stopping.asked)
                if self.step % schedule.log_every == 0 or done:
                    steps, seconds = self.step - self.logged[0], self.seconds - self.logged[1]
                    means = {name: total / steps for name, total in self.sums.items()}
                    of_line = {"lr": max(rates.values()), "tok_s": steps * size / seconds} | extra | self.watched()
                    self.log.write(self._position() | means | of_line)
                    self.sums, self.logged = {}, (self.step, self.seconds)
                if self.held_out and (self.step % schedule.evaluate_every == 0 or done):
                    self._evaluate(self.held_out)
                also = {step for step in (self.level_ends, self.best and self.best[1]) if step}
                if self.step % schedule.save_every == 0 or self.step in also or done or stops:
                    self.checkpoints.save(self.step, self.model, self.optimizer, json.dumps(self._own()), also)
                # A run that goes by the clock is as long as it will be at this speed.
                last = self.steps if schedule.seconds is None else round(self.step / self.progress)
                progress.update(self.step * size, min(self.steps, last) * size, self.log.shown)
                if stops and not done:
                    stopping.end()
                begin = time.perf_counter() - self.seconds  # measuring and saving are not training

    def update(self, rates: dict[str, float]) -> dict[str, float]:
        """Take a step with these learning rates; the values of its batch, the same on every rank. NotFinite if one of
        them is not.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["name"]] * group.get("factor", 1.0)
        found = self._step()
        self.step += 1
        return found

    def _step(self) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        for part in range(self.parts):
            ids = torch.from_numpy(self.source.take(self.schedule.micro_batch)).to(self.ranks.device)
            if isinstance(self.model, FSDPModule):  # ranks sum their gradients once, in the last backward pass
                self.model.set_requires_gradient_sync(part == self.parts - 1)
            with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.bf16):
                values = self.model(ids)
            (values["loss"] / self.parts).backward()
            for name, value in values.items():
                totals[name] = totals.get(name, 0.0) + value.detach().double() / self.parts
        norms = self._norms()
        totals |= {name: norm.double() for name, norm in norms.items()}
        nn.utils.clip_grads_with_norm_(self.model.parameters(), MAX_NORM, norms["grad_norm"])
        means = self.ranks.mean(torch.stack(list(totals.values()))).tolist()
        found = dict(zip(totals, means, strict=True))
        if not all(map(math.isfinite, found.values())):
            raise NotFinite(
                f"step {self.step + 1}: the loss is {found['loss']}, the gradient {found['grad_norm']}; lower --lr "
                "and begin anew, or resume from the checkpoint before"
            )
        self.optimizer.step()
        return found

    def _norms(self) -> dict[str, Tensor]:
        """Of the gradients of each group that has any, and of all."""
        found = {}
        for name, parameters in self.groups.items():
            if gradients := [p.grad for p in parameters if p.grad is not None]:
                norm = nn.utils.get_total_norm(gradients)
                found[f"grad_norm_{name}"] = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return found | {"grad_norm": torch.stack(list(found.values())).norm()}

    def _evaluate(self, held_out: Callable[[], dict[str, Any]]) -> None:
        self.model.eval()
        found = held_out()
        self.model.train()
        figure = found.get(self.best_by, math.nan)
        if math.isfinite(figure) and (self.best is None or figure < self.best[0]):
            self.best = figure, self.step
        self.log.write(self._position() | found)

    def _position(self) -> dict[str, float]:
        tokens = self.step * self.schedule.batch * self.schedule.tokens
        return {"step": self.step, "tokens": tokens, "seconds": round(self.seconds, 3)}

    def _own(self) -> dict[str, Any]:
        """What a checkpoint holds besides parameters and moments: values of this rank."""
        names = ("seconds", "bf16", "sums", "logged", "floor", "best", "identity")
        return self.kept | {"source": self.source.state_dict()} | {name: getattr(self, name) for name in names}

    def _parameter_groups(self) -> list[dict]:
        """Matrices may decay; vectors (norms, scales, A, D, biases) never do. Parameters of other rates are apart."""
        groups: dict[tuple, dict] = {}
        for name, parameters in self.groups.items():
            for p in parameters:
                # By parameter, not by factor: a run that goes on has the same groups before it knows their factors.
                own = {"factor": self.factors[p]} if p in self.factors else {}
                new = {"params": [], "weight_decay": self.weight_decay * (p.ndim > 1), "name": name} | own
                groups.setdefault((name, p.ndim > 1, p if own else None), new)["params"].append(p)
        return list(groups.values())


def fast_bf16(device: torch.device, size: int = 512, margin: float = 1.3) -> bool:
    """Whether products are faster in bf16. On a CPU one is timed: without bf16 units it is emulated and slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(4 * size, size, dtype=dtype)
        times = []
        for _ in range(6):
            begin = time.perf_counter()
            a @ a.T
            times.append(time.perf_counter() - begin)
        return min(times)

    return seconds(torch.bfloat16) * margin < seconds(torch.float32)
