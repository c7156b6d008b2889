"""A model of one matrix for the training loop, its text, and how such a run is looked at and ended: tests/distill."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfssm.distill.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
VOCAB, TOKENS = 11, 6
IDS = np.random.default_rng(0).integers(VOCAB, size=2000, dtype=np.uint32)


class Bigrams(nn.Module):
    """The next token from the one before: an embedding that is frozen, a matrix and a bias that train."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCAB, 16).requires_grad_(False)
        self.head = nn.Linear(16, VOCAB)
        self.modes = []

    def logits(self, ids):
        self.modes.append(self.training)
        return self.head(self.table(ids)), None

    def forward(self, ids):
        logits = self.logits(ids[:, :-1])[0]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        return {"loss": loss, "kl": loss / 2}


def rates(progress):
    return {"matrix": 0.1 * (1 - progress), "bias": 0.02}


def log(trainer):
    return [json.loads(line) for line in trainer.log.path.read_text().splitlines()]


class Stop(Exception):
    pass


def stop_at(t, step):
    """End `t` like a crash once it has taken `step` steps."""
    take = t.source.take

    def stopping(count):
        if t.step == step:
            raise Stop
        return take(count)

    t.source.take = stopping
    with pytest.raises(Stop):
        t.train()


def but_times(t):
    return [{k: v for k, v in line.items() if k not in ("seconds", "tok_s")} for line in log(t)]
