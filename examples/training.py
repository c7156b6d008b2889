"""The optimisation loop of the examples: AdamW, cosine schedule, progress bar, checkpoints, resume."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import Corpus, windows
from torch import nn
from tqdm import tqdm

from dfssm.model.checkpoint import atomic_write
from dfssm.opset.errors import DfssmError


@dataclass(frozen=True)
class Schedule:
    """``lr`` rises over ``warmup`` steps and falls along a cosine to a twentieth of itself at ``steps``."""

    steps: int
    batch: int = 16  # windows a step
    tokens: int = 256  # tokens a window
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.1  # matrices only
    save_every: int = 200
    seed: int = 0

    def rate(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def bf16_is_faster(size: int = 512, margin: float = 1.3) -> bool:
    """Time one matmul in both types: without bf16 units (AMX, AVX512-BF16) bf16 is emulated and slower."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(4 * size, size, dtype=dtype)
        times = []
        for _ in range(6):
            begin = time.perf_counter()
            a @ a.T
            times.append(time.perf_counter() - begin)
        return min(times)

    return seconds(torch.bfloat16) * margin < seconds(torch.float32)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay matrices; leave vectors (norms, scales, A, D, biases) alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def train(
    model: nn.Module,
    loss: Callable[[torch.Tensor], torch.Tensor],
    corpus: Corpus,
    schedule: Schedule,
    checkpoint: Path,
    resume: bool = False,
) -> dict[str, float]:
    """Minimise ``loss(ids i64[batch, tokens + 1])`` over ``schedule.steps`` random windows of the corpus.

    Saves ``checkpoint`` every ``save_every`` steps and at the end; ``resume`` goes on from it (same windows,
    same rates, as if never interrupted). Returns {"steps", "tokens", "loss", "seconds"}.
    """
    generator = torch.Generator().manual_seed(schedule.seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, schedule.weight_decay), lr=schedule.lr, betas=(0.9, 0.95))
    first, seconds = 0, 0.0
    if resume:
        if not checkpoint.is_file():
            raise DfssmError(f"{checkpoint}: nothing to resume from; leave out --resume to begin")
        saved = torch.load(checkpoint, weights_only=True)
        if saved["schedule"] != vars(schedule):
            raise DfssmError(f"{checkpoint}: begun with {saved['schedule']}; resume with the same options")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        first, seconds = saved["step"], saved["seconds"]
    average = float("nan")
    begin = time.perf_counter() - seconds
    batches = windows(corpus, schedule.batch, schedule.tokens, generator)
    model.train()
    bar = tqdm(
        total=schedule.steps * schedule.batch * schedule.tokens,
        unit="tok",
        unit_scale=True,
        initial=first * schedule.batch * schedule.tokens,
        mininterval=1.0,
        dynamic_ncols=True,
    )
    for step in range(first, schedule.steps):
        ids = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        optimizer.zero_grad(set_to_none=True)
        value = loss(ids)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        current = value.item()
        if not math.isfinite(current):
            raise DfssmError(f"step {step}: the loss is {current}; lower --lr and resume from {checkpoint}")
        average = current if math.isnan(average) else 0.95 * average + 0.05 * current
        bar.update(ids.numel() - len(ids))
        bar.set_postfix(loss=f"{average:.3f}", lr=f"{schedule.rate(step):.1e}", refresh=False)
        if (step + 1) % schedule.save_every == 0 or step + 1 == schedule.steps:
            seconds = time.perf_counter() - begin
            progress = {
                "schedule": vars(schedule),
                "step": step + 1,
                "seconds": seconds,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(),
            }
            atomic_write(checkpoint, lambda path, value=progress: torch.save(value, path))
    bar.close()
    return {
        "steps": schedule.steps,
        "tokens": schedule.steps * schedule.batch * schedule.tokens,
        "loss": average,
        "seconds": seconds,
    }
