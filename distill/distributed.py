"""The ranks of a run: one process alone, or those that torchrun started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dfssm.base.errors import DfssmError


@dataclass(frozen=True)
class Ranks:
    """This process among `world`, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def agree(self, choice: bool) -> bool:
        """What the first rank chooses."""
        if self.world == 1:
            return choice
        value = torch.tensor(int(choice), device=self.device)
        dist.broadcast(value, 0)
        return bool(value)

    def share(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The first rank's tensors, in place."""
        if self.world > 1:
            for tensor in tensors.values():
                dist.broadcast(tensor, 0)
        return tensors

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def ranks(device: str | None = None) -> Iterator[Ranks]:
    """Join the process group that torchrun describes in the environment; alone without one.

    `device`: cpu or cuda; None takes a GPU where there is one. NCCL joins GPUs, gloo CPUs.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise DfssmError(f"device {kind!r} is not known; choose cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise DfssmError("device cuda: torch sees no GPU here; leave out --device, or install a torch with CUDA")
    world = int(os.environ.get("WORLD_SIZE", 1))
    where = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(where)
    if world == 1:
        yield Ranks(0, 1, where)
        return
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), world, where)
    finally:
        dist.destroy_process_group()
