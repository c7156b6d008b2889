"""The teacher: its forms agree with each other, with transformers, and start as mamba_ssm's do."""

import math

import pytest
import torch
from mamba2_ref import GRID, hf_folder, hf_model, hf_states

from dfssm.base import DfssmError
from dfssm.model.config import PRESETS, Mamba2Config
from dfssm.model.hf_import import load_teacher
from dfssm.model.teacher import Mamba2LM

CONFIG = Mamba2Config(vocab_size=50, d_model=32, n_layer=2, d_state=8, headdim=16, ngroups=2, chunk_size=8)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are slower on more threads, many times so beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def worst(found, expected) -> float:
    """The largest difference, relative to the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Mamba2LM(CONFIG)


def ids(batch, tokens, vocab=41, seed=1):
    return torch.randint(0, vocab, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", GRID, ids=lambda o: "-".join(f"{k}{v}" for k, v in o.items()))
@torch.no_grad()
def test_is_transformers_mamba2(tmp_path, options):
    reference = hf_model(**options)
    model = load_teacher(hf_folder(reference, tmp_path / "hf"))
    for layer in model.layers:
        layer.scan.chunk_size = 16
    for batch, tokens in ((1, 1), (3, 7), (1, 37), (3, 2)):
        prompt = ids(batch, tokens)
        expected = reference(prompt, use_cache=True)
        logits, state = model(prompt)
        # Observed: 5e-7, states 1.4e-6. The two sum in another order, in fp32, over two layers.
        assert worst(logits, expected.logits) < 1e-5
        for i in range(2):
            conv, ssm = hf_states(expected.cache_params, i)
            assert worst(state.conv[i], conv[..., 1:]) < 1e-5
            assert worst(state.ssm[i], ssm.mT) < 1e-5
        token = ids(batch, 1, seed=2)
        expected = reference(token, cache_params=expected.cache_params, use_cache=True)
        assert worst(model.step(token[:, 0], state)[0], expected.logits[:, 0]) < 1e-5


@pytest.mark.parametrize("dt_limit", [(0.0, 0.1), (0.02, math.inf), (0.01, 0.05)])
@torch.no_grad()
def test_dt_limit_is_that_of_transformers(tmp_path, dt_limit):
    # The sequence form only: transformers 5.23's cached step leaves the limit out.
    reference = hf_model(time_step_limit=dt_limit)
    model = load_teacher(hf_folder(reference, tmp_path / "hf"))
    assert model.config.dt_limit == dt_limit
    free = load_teacher(hf_folder(hf_model(), tmp_path / "free"))
    expected = reference(ids(2, 19), use_cache=False).logits
    assert worst(model(ids(2, 19))[0], expected) < 1e-5
    assert worst(free(ids(2, 19))[0], expected) > 1e-3


@pytest.mark.parametrize("change", [{}, {"ngroups": 1, "tie_embeddings": False}, {"norm_groups": 2, "d_conv": 2}])
@torch.no_grad()
def test_step_by_step_and_in_pieces_is_one_go(change):
    torch.manual_seed(0)
    config = Mamba2Config(**CONFIG.to_dict() | change)
    model = Mamba2LM(config).double()
    prompt = ids(3, 29, 50)
    logits, state = model(prompt)
    steps, stepped = [], model.new_state(3)
    for t in range(29):
        out, stepped = model.step(prompt[:, t], stepped)
        steps.append(out)
    torch.testing.assert_close(torch.stack(steps, dim=1), logits, rtol=1e-10, atol=1e-12)
    for pieces in ((13, 16), (1, 28), (28, 1), (2, 9, 8, 10)):
        outs, at = [], None
        for piece in prompt.split(pieces, dim=1):
            out, at = model(piece, at)
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, dim=1), logits, rtol=1e-10, atol=1e-12)
        for found in (at, stepped):
            for a, b in zip(found.conv + found.ssm, state.conv + state.ssm, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_state_is_not_changed_by_a_call(model):
    prompt = ids(2, 5, 50)
    with torch.no_grad():
        _, state = model(prompt)
        before = [t.clone() for t in state.conv + state.ssm]
        model(prompt, state)
        model.step(prompt[:, 0], state)
    assert all(torch.equal(a, b) for a, b in zip(before, state.conv + state.ssm, strict=True))


def test_logits_to_keep(model):
    logits, _ = model(ids(2, 9, 50))
    for keep in (1, 4, 9):
        torch.testing.assert_close(model(ids(2, 9, 50), logits_to_keep=keep)[0], logits[:, -keep:])


def test_gradients_reach_every_parameter_and_a_detached_state_stops_them(model):
    _, state = model(ids(2, 20, 50))
    assert state.ssm[0].requires_grad and not state.detach().ssm[0].requires_grad
    logits, _ = model(ids(2, 20, 50), state.detach())
    logits.logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_autocast_leaves_the_scan_and_the_residual_in_fp32(model):
    with torch.no_grad():
        expected, _ = model(ids(2, 20, 50))
        with torch.autocast("cpu", torch.bfloat16):
            hidden, state = model.hidden_states(ids(2, 20, 50))
            logits, _ = model(ids(2, 20, 50))
    assert hidden.dtype == state.ssm[0].dtype == torch.float32
    assert 0 < worst(logits.float(), expected) < 0.05  # bf16 has 8 bits


def test_wrong_shapes_are_named(model):
    with pytest.raises(DfssmError, match=r"input_ids has shape \[5\]"):
        model(ids(1, 5, 50)[0])
    with pytest.raises(DfssmError, match=r"input_ids has shape \[1, 0\]"):
        model(ids(1, 5, 50)[:, :0])
    with pytest.raises(DfssmError, match="the state holds 3 sequences and input_ids 2"):
        model(ids(2, 5, 50), model.new_state(3))


def test_starts_as_mamba_ssm_does():
    torch.manual_seed(0)
    model = Mamba2LM(Mamba2Config(vocab_size=500, d_model=256, n_layer=4, d_state=16, headdim=4, tie_embeddings=False))
    for layer in model.layers:
        A, step = layer.scan.A_log.exp(), torch.nn.functional.softplus(layer.scan.dt_bias)
        assert 1 <= A.min() < 2.5 and 14.5 < A.max() <= 16
        assert 0.00099 < step.min() < 0.002 and 0.05 < step.max() < 0.101
        assert 0.005 < step.median() < 0.02  # log-uniform
        assert (layer.scan.D == 1).all() and (layer.norm.weight == 1).all() and (layer.gated_norm.weight == 1).all()
        # Uniform in +-1/sqrt(inputs); out_proj, of 512 inputs, smaller by sqrt(n_layer) = 2.
        for weight, bound in (
            (layer.in_proj.weight, 1 / 16),
            (layer.conv.weight, 1 / 2),
            (layer.conv.bias, 1 / 2),
            (layer.out_proj.weight, 512**-0.5 / 2),
        ):
            assert 0.95 * bound < weight.abs().max() <= bound
    assert 0.019 < model.embedding.weight.std() < 0.021
    assert 0.95 / 16 < model.lm_head.weight.abs().max() <= 1 / 16


def test_the_presets_are_the_published_models():
    # Parameters in millions, as their cards say; the 1.3b's in_proj has 8512 rows.
    sizes = {
        "mamba2-130m": 129,
        "mamba2-370m": 368,
        "mamba2-780m": 780,
        "mamba2-1.3b": 1344,
        "mamba2-2.7b": 2703,
    }
    for name, millions in sizes.items():
        with torch.device("meta"):
            model = Mamba2LM(PRESETS[name])
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert PRESETS["mamba2-1.3b"].d_in_proj == 8512
