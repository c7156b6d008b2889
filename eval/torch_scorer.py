"""Teacher and student in PyTorch, as `Scorer`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from dfssm.base.errors import DfssmError, reason
from dfssm.model.hf_import import load_teacher
from dfssm.model.student import load_student
from dfssm.model.teacher import Mamba2State
from dfssm.targets.text import require_ends

_PIECE = 256
"""Tokens of one run of which the last one's logits are wanted: activations do not grow with the text."""


class TorchScorer:
    """`kind` "teacher" (a checkpoint folder) or "student" (fp32 states), on a torch device."""

    max_batch = 1 << 16

    def __init__(self, kind: str, path: Path, tokenizer: Tokenizer, device: str | None = None):
        try:
            self.device = torch.device(device or "cpu")
            torch.zeros(1, device=self.device).item()  # which a device without memory, "meta", does not have
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise DfssmError(
                f"device {device!r} cannot be used ({reason(error)}): leave it out to run on the CPU"
            ) from None
        self.kind = kind
        self.model = (load_teacher if kind == "teacher" else load_student)(path).to(self.device).eval()
        self.vocab_size = self.model.config.vocab_size
        self.tokenizer = tokenizer
        self.ends = require_ends(self.model.config.eos_token_id, tokenizer)
        self.end = self.ends[0]
        self.begin = self.model.config.bos_token_id

    def new_state(self, batch: int) -> Mamba2State:
        return self.model.new_state(batch)

    def select(self, state: Mamba2State, rows: Sequence[int]) -> Mamba2State:
        index = torch.tensor(rows, device=self.device)
        return state.map(lambda tensor: tensor[index])

    def read(self, ids: np.ndarray, state: Mamba2State) -> tuple[np.ndarray, Mamba2State]:
        for start in range(0, ids.shape[1], _PIECE):
            logits, state = self._run(ids[:, start : start + _PIECE], state, 1)
        return logits[:, 0], state

    def logits(self, ids: np.ndarray, state: Mamba2State) -> tuple[np.ndarray, Mamba2State]:
        return self._run(ids, state, 0)

    @torch.inference_mode()
    def _run(self, ids: np.ndarray, state: Mamba2State, keep: int) -> tuple[np.ndarray, Mamba2State]:
        """Raises DfssmError, which names the first module of which a number is not finite, where a logit is not."""
        given = torch.as_tensor(ids, device=self.device)
        logits, new = self.model(given, state, logits_to_keep=keep)
        array = logits.float().cpu().numpy()
        if not math.isfinite(array.max()):  # NaN, where there is one
            for name, module in self.model.named_modules():
                if name and not isinstance(module, torch.nn.ModuleList):
                    module.register_forward_hook(partial(_require_finite, name))
            self.model(given, state, logits_to_keep=keep)
            _require_finite("the logits", None, None, logits)
        return array, new


def _require_finite(name: str, module: object, inputs: object, output: object) -> None:
    value = output[0] if isinstance(output, tuple) else output
    if isinstance(value, torch.Tensor) and not value.isfinite().all():
        raise DfssmError(
            f"the model's numbers are not finite, first in {name}: "
            "its weights are too large or damaged, restore or make them again"
        )
