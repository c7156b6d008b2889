"""Density-field weights by hand, their gradients against finite differences, and that they end at what ships."""

import numpy as np
import pytest
import torch

from dfssm.distill.density import (
    DensityLinear,
    densify,
    levels,
    set_attributes,
    zero_low_rank,
)
from dfssm.model.config import DFSSMConfig
from dfssm.model.quant import sign
from dfssm.model.student import DFSSMLM, BinaryLinear, PackedBinaryLinear
from dfssm.model.teacher import Mamba2LM

CONFIG = {"vocab_size": 50, "d_model": 32, "n_layer": 2, "d_state": 8, "headdim": 8, "rank": 3}
IDS = torch.arange(40).view(2, 20)


def student(**options) -> DFSSMLM:
    torch.manual_seed(0)
    return DFSSMLM(DFSSMConfig(**CONFIG | options)).eval()


def linear(planes=1, rank=3, **attributes) -> DensityLinear:
    """A projection of 32 inputs and 10 outputs, with latents on both sides of every threshold."""
    module = DensityLinear(32, 10, rank, planes)
    torch.manual_seed(0)
    with torch.no_grad():
        module.latent.normal_()
        module.scale.uniform_(0.5, 1.5)
    set_attributes([module], **attributes)
    return module


def int8(a: np.ndarray) -> np.ndarray:
    """The values of the int8 codes of rows, in fp64."""
    largest = np.abs(a).max(-1, keepdims=True)
    return np.rint(a / np.where(largest, largest, 1) * 127) * largest / 127


class TestLevels:
    def test_are_seventeen_eighths_apart_ties_to_even(self):
        w = torch.tensor([-3.0, -1.0, -0.97, -0.5, -0.0625, 0.0, 0.0624, 0.0626, 0.1875, 0.9, 1.0, 2.0])
        expected = [-1, -1, -1, -0.5, 0, 0, 0, 0.125, 0.25, 0.875, 1, 1]
        assert levels(w).tolist() == expected
        assert len(levels(torch.linspace(-1.2, 1.2, 4001)).unique()) == 17

    def test_gradient_is_that_of_the_linear_clamp(self):
        check(levels, lambda w: np.clip(w, -1, 1))


@pytest.mark.parametrize("window", [0.5, 1.5])
def test_the_gradient_of_a_sign_is_that_of_a_clamp_at_the_window(window):
    check(lambda w: sign(w, window), lambda w: np.clip(w, -window, window))


def check(function, surrogate, step=1e-4):
    """The gradient of `function` is the central difference of `surrogate`, which has kinks far from these points."""
    w = torch.tensor([-2.3, -1.4, -1.1, -0.9, -0.4, -0.06, 0.01, 0.3, 0.7, 0.95, 1.2, 1.45, 1.8], requires_grad=True)
    weights = torch.randn(len(w))
    (function(w) * weights).sum().backward()
    at = w.detach().double().numpy()
    expected = weights.numpy() * (surrogate(at + step) - surrogate(at - step)) / (2 * step)
    np.testing.assert_allclose(w.grad, expected, rtol=1e-6, atol=1e-9)


class Surrogate:
    """DensityLinear in fp64 NumPy. Every quantiser is its surrogate plus what it added at the point given at first."""

    def __init__(self, module: DensityLinear, x: torch.Tensor):
        self.m, self.offsets = module, {}
        self.leaves = {name: p.detach().double().numpy() for name, p in module.named_parameters()}
        self.leaves["x"] = x.detach().double().numpy()
        self(self.leaves)  # fixes the offsets

    def quantised(self, name, value, quantiser, surrogate):
        soft = surrogate(value)
        return soft + self.offsets.setdefault(name, quantiser(value) - soft)

    def __call__(self, leaves):
        m, latent, window = self.m, leaves["latent"], self.m.window

        def passes(w):
            return np.clip(w, -m.clamp_window, m.clamp_window)

        def clamped(name, half=0):
            values = np.clip(latent, -1, 1)
            return self.quantised(name, latent, lambda w: np.rint(values * half) / half if half else values, passes)

        half = (m.levels - 1) // 2

        def same(value):
            return value

        if m.hard == "sign":
            hard = self.quantised(
                "sign", latent, lambda w: np.where(w > 0, 1.0, -1.0), lambda w: np.clip(w, -window, window)
            )
        else:
            hard = clamped("hard", half)
        soft = clamped("soft", half if m.soft == "levels" else 0)
        planes = leaves["scale"][..., None] * ((1 - m.blend) * soft + m.blend * hard)
        weight = planes.sum(0) if planes.ndim == 3 else planes
        if m.low_rank == "float":
            weight = weight + leaves["up"] @ leaves["down"]
        if m.low_rank == "int8":
            up, down = (self.quantised(name, leaves[name], int8, same) for name in ("up", "down"))
            weight = weight + up @ down
        x = leaves["x"] if m.float_activations else self.quantised("x", leaves["x"], int8, same)
        return x @ weight.T


FORMS = {
    "continuous": {"blend": 0.0},
    "half-sign": {"blend": 0.5},
    "levels-to-sign": {"soft": "levels", "blend": 0.25},
    "levels": {"hard": "levels", "blend": 1.0},
    "half-levels": {"hard": "levels", "blend": 0.5, "low_rank": "none"},
    "published-1": {
        "hard": "levels",
        "blend": 0.75,
        "low_rank": "none",
        "float_activations": True,
        "clamp_window": 9.0,
    },
    "257-levels": {"hard": "levels", "levels": 257, "blend": 0.5},
    "published-2": {"hard": "levels", "low_rank": "float", "float_activations": True},
    "ships": {},
    "ships-window": {"window": 0.5},
    "ships-float-low-rank": {"low_rank": "float"},
}


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_are_those_of_the_surrogate(form, planes):
    module, x = linear(planes, **FORMS[form]), torch.randn(2, 3, 32, requires_grad=True)
    surrogate = Surrogate(module, x)
    y = module(x)
    # int8 codes on a tie aside, which random numbers do not hit, only fp32 sums differ.
    np.testing.assert_allclose(y.detach(), surrogate(surrogate.leaves), rtol=1e-5, atol=2e-5)

    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    rng, step = np.random.default_rng(0), 1e-5
    for name, leaf in {"x": x, **dict(module.named_parameters())}.items():
        if leaf.grad is None:
            assert module.low_rank == "none" and name in ("up", "down")
            continue
        for _ in range(12):
            place = tuple(rng.integers(leaf.shape))
            sides = []
            for direction in (step, -step):
                moved = surrogate.leaves | {name: surrogate.leaves[name].copy()}
                moved[name][place] += direction
                sides.append((surrogate(moved) * weights.double().numpy()).sum())
            expected = (sides[0] - sides[1]) / (2 * step)
            assert leaf.grad[place].item() == pytest.approx(expected, rel=1e-3, abs=1e-3), (name, place)


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_the_scaffold_blends_linearly(blend):
    module = linear(low_rank="none", float_activations=True, blend=blend)
    latent, scale = module.latent.detach().numpy(), module.scale.detach().numpy()
    weight = scale[:, None] * ((1 - blend) * np.clip(latent, -1, 1) + blend * np.where(latent > 0, 1, -1))
    np.testing.assert_allclose(module(torch.eye(32)).detach().T, weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("rank", [0, 3])
class TestShips:
    def test_it_is_binary_linear_bit_for_bit_gradients_too(self, planes, rank):
        module, found = linear(planes, rank), []
        assert module.ships
        for kind in (DensityLinear, BinaryLinear):
            module.__class__ = kind
            x = torch.linspace(-2, 3, 5 * 32).view(5, 32).requires_grad_()
            y = module(x)
            y.square().sum().backward()
            found.append([y, x.grad, *(p.grad for p in module.parameters())])
            module.zero_grad()
        assert all(map(torch.equal, *found))

    def test_it_is_its_packed_export_bit_for_bit(self, planes, rank):
        module = linear(planes, rank)
        packed = PackedBinaryLinear(32, 10, rank, planes)
        packed.load_state_dict(module.export_tensors())
        x = torch.randn(7, 32)
        assert torch.equal(module(x), packed(x))

    def test_the_soft_arithmetic_comes_out_there(self, planes, rank):
        module, x = linear(planes, rank), torch.randn(7, 32)
        shipped = module(x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DensityLinear, "ships", False)
            torch.testing.assert_close(module(x), shipped, rtol=1e-5, atol=2e-5)  # fp32 sums in another order


@pytest.mark.parametrize("attributes", [{"blend": 0.9}, {"hard": "levels"}, {"low_rank": "float"}])
def test_what_is_softer_does_not_ship(attributes):
    module, x = linear(**attributes), torch.randn(7, 32)
    assert not module.ships
    assert (module(x) - linear()(x)).abs().max() > 1e-3


@pytest.mark.parametrize("low_rank", ["int8", "float", "none"])
def test_a_low_rank_of_no_rows_is_none(low_rank):
    attributes = {"hard": "levels", "blend": 0.5}
    x = torch.randn(7, 32)
    expected = linear(rank=3, low_rank="none", **attributes)(x)
    assert torch.equal(linear(rank=0, low_rank=low_rank, **attributes)(x), expected)


class TestZeroLowRank:
    def test_it_adds_next_to_nothing_at_first(self):
        module, x = linear(), torch.randn(7, 32)
        zero_low_rank([module])
        assert module.down.std().item() == pytest.approx(32**-0.5, rel=0.2)
        # An fp32 sum of 32 terms of about 1 is off by as much.
        torch.testing.assert_close(module(x), linear(rank=0)(x), rtol=0, atol=2e-5)

    @pytest.mark.parametrize("form", [form for form in FORMS if FORMS[form].get("low_rank") != "none"])
    def test_it_learns_from_there(self, form):
        module, x = linear(**FORMS[form]), torch.randn(64, 32)
        zero_low_rank([module])
        target = x @ torch.randn(32, 1) @ torch.randn(1, 10) + module(x).detach()
        module.requires_grad_(False)
        optimizer = torch.optim.Adam([module.up.requires_grad_(), module.down.requires_grad_()], lr=0.02)
        losses = []
        for _ in range(100):
            optimizer.zero_grad()
            loss = (module(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 10

    def test_without_rank(self):
        zero_low_rank([linear(rank=0)])


class TestDensify:
    def test_projections_change_their_arithmetic_and_keep_their_parameters(self):
        model = student()
        before = dict(model.named_parameters())
        layers = densify(model, hard="levels", blend=0.25)
        assert len(layers) == 4 and all(type(m) is DensityLinear for m in layers)
        assert {(m.hard, m.blend) for m in layers} == {("levels", 0.25)}
        after = dict(model.named_parameters())
        assert before.keys() == after.keys() and all(before[name] is after[name] for name in after)

    def test_an_attribute_that_there_is_not(self):
        with pytest.raises(AttributeError, match="blnd"):
            densify(student(), blnd=1.0)


@pytest.mark.parametrize(
    "attributes", [{}, {"soft": "levels"}, {"hard": "levels", "low_rank": "none", "float_activations": True}]
)
def test_a_layer_compiles_as_one_program_for_all_of_a_run(attributes):
    model = student()
    layers, programs = densify(model, **attributes), []
    state = Mamba2LM.new_state(model, 2)
    hidden = torch.randn(2, 9, model.config.d_model)

    def backend(graph, inputs):
        programs.append(graph)
        return graph

    layer = model.layers[0]
    compiled = torch.compile(layer, backend=backend, fullgraph=True)  # an error where it would break in two
    for blend in (0.1, 0.2, 0.3):
        set_attributes(layers, blend=torch.tensor(blend))
        outputs = []
        for call in (layer, compiled):
            layer.zero_grad()
            y = call(hidden, state.conv[0], state.ssm[0])[0]
            y.square().sum().backward()
            outputs.append([y] + [p.grad for p in layer.parameters() if p.grad is not None])
        for ours, expected in zip(*reversed(outputs), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert len(programs) == 1
    set_attributes(layers, blend=1.0)
    compiled(hidden, state.conv[0], state.ssm[0])[0].sum().backward()
    assert len(programs) == 2
