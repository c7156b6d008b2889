"""Checkpoints of a run: all or nothing on the disk, the last few kept, the newest found again."""

from __future__ import annotations

import contextlib
import pickle
import re
import shutil
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from dfssm.base.errors import DfssmError, reason
from dfssm.base.files import probe, sync

from .distributed import Ranks

_NAME = re.compile(r"step-(\d+)")


class Checkpoints:
    """The checkpoints of one run in `folder`, a folder each: step-000200.

    Written by torch.distributed.checkpoint, every rank its part, under a temporary name that only a complete one
    loses. The same files load at another number of ranks.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int = 2):
        self.folder, self.ranks, self.keep = folder, ranks, keep

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, rising."""
        names = [entry.name for entry in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(found[1]) for name in names if (found := _NAME.fullmatch(name)))

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, own: str, also: Collection[int] = ()
    ) -> None:
        """Save the trained parameters, the optimiser and `own`, a text of this rank's. Older ones go, but for the last
        few and those of the steps `also`.

        A full disk raises DfssmError; the checkpoints before stay.
        """
        final = self._folder(step)
        temporary = self.folder / f".step-{step:06d}.tmp"
        try:
            if self.ranks.first:
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(temporary, ignore_errors=True)
            self.ranks.barrier()
            with _quiet():
                state_dict_saver.save(
                    _state(model, optimizer) | {f"rank-{self.ranks.rank}": own}, checkpoint_id=temporary
                )
            if self.ranks.first:
                for written in (*temporary.iterdir(), temporary):
                    sync(written)
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
                sync(self.folder)
                for old in self.steps()[: -self.keep]:
                    if old not in also:
                        shutil.rmtree(self._folder(old))
        except (OSError, CheckpointException) as error:
            why = str(error).strip().splitlines()[-1]
            if isinstance(error, CheckpointException):
                try:
                    temporary.mkdir(exist_ok=True)
                    probe(temporary / "probe")
                except OSError as full:
                    why = reason(full)
            shutil.rmtree(temporary, ignore_errors=True)
            raise DfssmError(f"{final}: cannot be written ({why}); make room and go on with --resume") from None
        self.ranks.barrier()

    def own(self, step: int) -> str:
        """The text that this rank saved at `step`, or the first rank's where there were fewer. DfssmError as `load`."""
        source = self._folder(step)
        with _loading(source):
            names = FileSystemReader(source).read_metadata().state_dict_metadata
            mine = f"rank-{self.ranks.rank}"
            state = {mine if mine in names else "rank-0": ""}
            state_dict_loader.load(state, checkpoint_id=source)
        return next(iter(state.values()))

    def load(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load the checkpoint of `step` into model and optimiser. DfssmError if the files are damaged."""
        with _loading(self._folder(step)):
            state = _state(model, optimizer)
            state_dict_loader.load(state, checkpoint_id=self._folder(step))
            set_state_dict(
                model,
                optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
                options=_TRAINED,
            )

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: of a run that takes them anew."""
        if self.ranks.first:
            for later in self.steps():
                if later > step:
                    shutil.rmtree(self._folder(later))
        self.ranks.barrier()

    def _folder(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"


_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # the teacher is not in a checkpoint


@contextlib.contextmanager
def _loading(source: Path) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except (OSError, EOFError, CheckpointException, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        why = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise DfssmError(f"{source}: cannot be loaded ({why[0]}); remove it to use the one before") from None


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    parameters, moments = get_state_dict(model, optimizer, options=_TRAINED)
    return {"model": parameters, "optimizer": moments}


def _quiet() -> warnings.catch_warnings:
    """Without torch's remark that one process alone is no process group."""
    return warnings.catch_warnings(action="ignore")
