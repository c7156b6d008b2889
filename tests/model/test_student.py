"""The student: its two forms against each other, and both against a student written in NumPy."""

import numpy as np
import pytest
import student_ref
import torch

from dfssm.base import DfssmError
from dfssm.model.convert import init_student
from dfssm.model.quant import pack_bits, quantize
from dfssm.model.student import DFSSMLM, BinaryLinear, PackedBinaryLinear, from_tensors
from dfssm.model.teacher import Mamba2State

DTYPES = ("fp32", "fp16", "int8")


def trained(name: str) -> DFSSMLM:
    torch.manual_seed(0)
    return DFSSMLM(student_ref.config(name)).eval()


def ids(config, batch=2, tokens=9):
    return torch.randint(config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", student_ref.CONFIGS)
@torch.no_grad()
def test_packed_form_computes_what_the_trained_form_does(name):
    model = trained(name)
    packed = model.to_packed()
    x = ids(model.config)
    for a, b in zip(model(x), packed(x), strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)
        else:
            assert all(map(torch.equal, a.conv + a.ssm, b.conv + b.ssm))


@pytest.mark.parametrize("planes, rank", [(1, 0), (1, 3), (2, 3)])
@torch.no_grad()
def test_packed_projection_holds_the_integers_of_the_trained_one(planes, rank):
    torch.manual_seed(0)
    linear = BinaryLinear(64, 21, rank, planes)
    tensors = linear.export_tensors()
    assert torch.equal(tensors["bits"], pack_bits(linear.latent))
    for name in ("down", "up") if rank else ():
        q, scale = quantize(getattr(linear, name))
        assert torch.equal(tensors[name].float(), q)
        assert torch.equal(tensors[f"{name}_scale"], scale[:, 0])
    packed = PackedBinaryLinear(64, 21, rank, planes)
    packed.load_state_dict(tensors)
    x = torch.randn(3, 5, 64)
    assert torch.equal(packed(x), linear(x))


@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("name", student_ref.CONFIGS)
def test_student_is_the_numpy_student(name, state_dtype):
    """Two calls, of several tokens and of one: teacher-forced logits and the states after each."""
    config, tensors = init_student(student_ref.config(name), seed=3)
    model = from_tensors(config, tensors, state_dtype)
    arrays = {key: value.numpy() for key, value in tensors.items()}
    states, state = student_ref.zero_states(config, 2, state_dtype), None
    tokens = ids(config)
    # A last-bit difference of a float may move an activation across a rounding tie, a step of 1/127 of its
    # token's largest, and a stored state likewise; what follows then differs by a few such steps of one
    # channel.
    tolerance = {"fp32": 0.02, "fp16": 0.02, "int8": 0.05}[state_dtype]
    for part in (tokens[:, :8], tokens[:, 8:]):
        expected, states = student_ref.step(config, arrays, part.numpy(), states)
        logits, state = model(part, state)
        assert np.abs(logits.numpy() - expected).max() <= tolerance * np.abs(expected).max()
        for i in range(config.n_layer):
            assert state.ssm[i].numpy().dtype == states[f"ssm_state.{i}"].dtype
            actual, reference = state.ssm[i].float(), states[f"ssm_state.{i}"].astype(np.float32)
            if state_dtype == "int8":
                actual = actual * state.ssm_scale[i][..., None]
                reference = reference * states[f"ssm_scale.{i}"][..., None]
            assert np.abs(actual.numpy() - reference).max() <= tolerance * np.abs(reference).max()
            conv = states[f"conv_state.{i}"]
            assert np.abs(state.conv[i].numpy() - conv).max() <= tolerance * np.abs(conv).max()


@torch.no_grad()
def test_narrow_states_lose_little_and_something():
    config, tensors = init_student(student_ref.config("plain"), seed=3)
    logits = {}
    for dtype in DTYPES:
        model, state = from_tensors(config, tensors, dtype), None
        for token in ids(config, tokens=16).split(1, dim=1):
            logits[dtype], state = model(token, state)
    size = logits["fp32"].abs().max()
    assert 0 < (logits["fp16"] - logits["fp32"]).abs().max() < 0.1 * size
    assert 0 < (logits["int8"] - logits["fp32"]).abs().max() < 0.3 * size


def test_unknown_state_dtype_is_named():
    with pytest.raises(DfssmError, match="bf16.*fp32, fp16, int8"):
        DFSSMLM(student_ref.config("plain"), state_dtype="bf16")


@pytest.mark.parametrize("name", ["plain", "untied", "planes2", "rank0"])
def test_every_parameter_of_the_trained_form_gets_a_gradient(name):
    model = trained(name)
    model(ids(model.config))[0].square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert not parameter.numel() or parameter.grad.abs().sum() > 0, parameter_name


def test_training_lowers_the_loss():
    model = trained("plain").train()
    x = ids(model.config, batch=4, tokens=17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        logits, _ = model(x[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@torch.no_grad()
def test_a_student_takes_the_state_of_a_teacher():
    """In fp32, which both keep."""
    model = trained(next(iter(student_ref.CONFIGS))).to_packed()
    x = ids(model.config)
    assert torch.equal(model(x, Mamba2State.zeros(model.config, len(x)))[0], model(x)[0])
