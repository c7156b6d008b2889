"""A small teacher and a text to calibrate on."""

import pytest
import torch

from dfssm.model.config import Mamba2Config
from dfssm.model.teacher import Mamba2LM


@pytest.fixture(scope="module")
def config():
    return Mamba2Config(vocab_size=64, d_model=64, n_layer=2, d_state=8, headdim=16)


@pytest.fixture(scope="module")
def teacher(config):
    torch.manual_seed(0)
    model = Mamba2LM(config).eval().requires_grad_(False)
    model.embedding.weight.mul_(20)  # logits far from uniform
    return model


@pytest.fixture(scope="module")
def windows():
    return torch.randint(64, (24, 40), generator=torch.Generator().manual_seed(1))
