"""What of a student is trained, what ships of it, and what each of its roundings costs."""

import dataclasses

import numpy as np
import pytest
import torch

from dfssm.distill.density import densify
from dfssm.distill.recipe import RECIPES
from dfssm.distill.student import other_forms, rate_factors, shipped, trainable
from dfssm.model.checkpoint import check_tensors
from dfssm.model.config import DFSSMConfig
from dfssm.model.student import DFSSMLM, from_tensors

CONFIG = {"vocab_size": 50, "d_model": 32, "n_layer": 2, "d_state": 8, "headdim": 8, "rank": 3}
IDS = torch.arange(40).view(2, 20)


def student(**options) -> DFSSMLM:
    torch.manual_seed(0)
    return DFSSMLM(DFSSMConfig(**CONFIG | options)).eval()


def int8(a: np.ndarray) -> np.ndarray:
    """The values of the int8 codes of rows, in fp64."""
    largest = np.abs(a).max(-1, keepdims=True)
    return np.rint(a / np.where(largest, largest, 1) * 127) * largest / 127


@pytest.mark.parametrize("tie", [True, False])
def test_every_parameter_is_in_one_group(tie):
    model = student(tie_embeddings=tie)
    groups = trainable(model)
    assert sorted(map(id, sum(groups.values(), []))) == sorted(map(id, model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    kinds = {group: {names[id(p)].split(".")[-1] for p in found} for group, found in groups.items()}
    assert kinds["scaffold"] == {"latent", "scale"} and kinds["low_rank"] == {"down", "up"}
    assert kinds["float"] == {"weight", "bias", "A_log", "D", "dt_bias"}


def test_relative_rates_are_those_of_the_float_tensors_by_their_sizes():
    model = student()
    with torch.no_grad():
        model.layers[0].conv.bias.zero_()
    groups = trainable(model)
    assert rate_factors(groups, RECIPES["binary"]) == {}
    found = rate_factors(groups, dataclasses.replace(RECIPES["binary"], float_rates="relative"))
    assert found.keys() == set(groups["float"])
    for p, factor in found.items():
        size = np.sqrt(np.mean(p.detach().numpy().astype(np.float64) ** 2))
        assert factor == pytest.approx(max(size, 1e-3), rel=1e-5)
    assert found[model.layers[0].conv.bias] == 1e-3


@pytest.mark.parametrize("planes", [1, 2])
def test_what_ships_of_levels_is_as_published(planes):
    """The sign of each latent, and a row's scale the mean size of its 17 levels."""
    model = student(planes=planes)
    densify(model, hard="levels")
    tensors, ours = shipped(model, RECIPES["paper"]), model.export_tensors()
    check_tensors("", model.config, tensors)
    assert tensors.keys() == ours.keys()
    for i in range(2):
        for name in ("in_proj", "out_proj"):
            path = f"layers.{i}.{name}"
            module = getattr(model.layers[i], name)
            latent, scale = module.latent.detach().numpy(), module.scale.detach().numpy()
            sizes = np.abs(np.rint(np.clip(latent, -1, 1) * 8) / 8).mean(-1)
            np.testing.assert_allclose(tensors.pop(f"{path}.scale"), scale * sizes, rtol=1e-6)
            bits = np.packbits(latent > 0, axis=-1, bitorder="little")
            np.testing.assert_array_equal(tensors.pop(f"{path}.bits"), bits)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in tensors.items())


class TestOtherForms:
    @pytest.mark.parametrize("tie", [True, False])
    def test_each_is_softer_in_one_part_and_all_is_restored(self, tie):
        model = student(tie_embeddings=tie)
        layers = densify(model)
        classes = {name: type(module) for name, module in model.named_modules()}
        with torch.no_grad():
            ours = model(IDS)[0]
            found = {name: form(IDS)[0] for name, form in other_forms(model)}
            assert torch.equal(model(IDS)[0], ours)
        assert list(found) == ["float_low_rank", "float_embedding"]
        assert all(0 < (other - ours).abs().max() < 0.5 * ours.abs().max() for other in found.values())
        assert all(layer.ships and vars(layer)["low_rank"] == "int8" for layer in layers)
        assert {name: type(module) for name, module in model.named_modules()} == classes

    def test_a_float_low_rank(self):
        model = student(n_layer=1)
        layers = densify(model)
        next(forms := other_forms(model))
        module, x = layers[0], torch.randn(5, 32)
        latent, scale = module.latent.detach().numpy(), module.scale.detach().numpy()
        weight = scale[:, None] * np.where(latent > 0, 1, -1) + (module.up @ module.down).detach().numpy()
        np.testing.assert_allclose(module(x).detach(), int8(x.numpy()) @ weight.T, rtol=1e-5, atol=1e-5)
        list(forms)

    def test_a_float_embedding(self):
        model = student()
        densify(model)
        for name, form in other_forms(model):
            if name == "float_embedding":
                table, hidden = form.embedding.weight.detach(), torch.randn(5, 32)
                assert torch.equal(form.embedding(IDS), table[IDS])
                expected = int8(hidden.numpy()) @ table.numpy().T
                np.testing.assert_allclose(form.embedding.project(hidden).detach(), expected, rtol=1e-5, atol=1e-5)

    def test_what_does_not_ship_is_measured_as_it_was_trained(self):
        model = student()
        densify(model, hard="levels")
        found = list(other_forms(model))
        assert found == [("as_trained", model)]

    def test_the_packed_form_is_the_first(self):
        """What all are compared with: the student in training is what ships, bit for bit."""
        model = student()
        densify(model)
        packed = from_tensors(model.config, model.export_tensors())
        with torch.no_grad():
            assert torch.equal(model(IDS)[0], packed(IDS)[0])
