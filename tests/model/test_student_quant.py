"""The torch arithmetic against opset/reference.py, and the gradients of its straight-through surrogates."""

import numpy as np
import pytest
import torch

from dfssm.model import quant
from dfssm.model.student import Int8Embedding
from dfssm.opset import packing, reference
from dfssm.opset.cases import cases
from dfssm.opset.ops import ALL_OPS


def canonical(op: str):
    return [c for c in cases(op) if not c.attributes.get("layout")]


@pytest.mark.parametrize("case", canonical("BinaryScaffoldMatMul"), ids=lambda c: c.id)
def test_quantised_activations_are_those_of_the_reference(case):
    x = case.inputs()["x"]
    q, s = quant.quantize(torch.from_numpy(x))
    expected_q, expected_s = reference.quantize_activations_ref(x)
    np.testing.assert_array_equal(q.numpy(), expected_q)
    np.testing.assert_array_equal(s.numpy(), expected_s)


@pytest.mark.parametrize("case", canonical("BinaryScaffoldMatMul"), ids=lambda c: c.id)
def test_binary_scaffold_matmul_is_the_reference(case):
    inputs = case.inputs()
    expected = reference.REFERENCES[case.op](**inputs, **case.attributes)
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    signs = quant.unpack_bits(tensors.pop("bits"))
    y = quant.binary_scaffold_matmul(signs=signs, **tensors).numpy()
    ALL_OPS[case.op].tolerance(case.sizes | case.attributes, "y").check(y, expected)
    if not case.sizes["R"]:  # then nothing is left that could be added in another order
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("case", cases("Int8MatMul"), ids=lambda c: c.id)
def test_int8_matmul_is_the_reference(case):
    inputs = case.inputs()
    expected = reference.REFERENCES[case.op](**inputs)
    y = quant.int8_matmul(*(torch.from_numpy(inputs[name]) for name in ("x", "w", "w_scale")))
    np.testing.assert_array_equal(y.numpy(), expected)


def test_integer_sums_above_the_mantissa_of_fp32_are_exact():
    q = torch.full((1, 2100), 127.0)
    w = torch.full((1, 2100), 127, dtype=torch.int8)
    w[0, ::7] = 126  # an odd number of odd terms: an inexact running sum would show
    expected = np.float32(q.double() @ w.double().T)
    assert expected > 2**24
    np.testing.assert_array_equal(quant.integer_matmul(q, w).numpy(), expected)


@pytest.mark.parametrize("shape, outputs", [((17, 64), 8), ((2, 3, 5, 2104), 40), ((33, 8), 8)])
def test_the_int8_units_give_the_same_integers(shape, outputs):
    """As on a GPU; also past 2^24, where fp32 rounds."""
    generator = torch.Generator().manual_seed(0)
    q, w = (torch.randint(100, 128, size, generator=generator) for size in (shape, (outputs, shape[-1])))
    found = quant.int8_units_matmul(q.float(), w.to(torch.int8))
    assert torch.equal(found, (q.double() @ w.double().T).float())
    assert torch.equal(found, quant.integer_matmul(q.float(), w.float()))


def test_sizes_that_the_int8_units_do_not_take():
    assert quant.suits_int8_units(17, 8, 16)
    for sizes in ((16, 8, 16), (17, 9, 16), (17, 8, 12), (17, 8, 0), (17, 8, 1 << 18)):
        assert not quant.suits_int8_units(*sizes)


def test_autocast_does_not_touch_the_forward():
    x, w = torch.randn(3, 5, 64), torch.randint(-127, 128, (33, 64), dtype=torch.int8)
    arguments = (
        x,
        quant.unpack_bits(torch.randint(0, 256, (40, 8), dtype=torch.uint8)),
        torch.rand(40),
        w[:4],
        torch.rand(4),
        torch.randint(-127, 128, (40, 4), dtype=torch.int8),
        torch.rand(40),
    )
    exact = quant.int8_matmul(x, w, torch.ones(33)), quant.binary_scaffold_matmul(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        cast = quant.int8_matmul(x, w, torch.ones(33)), quant.binary_scaffold_matmul(*arguments)
    assert all(map(torch.equal, exact, cast))


@pytest.mark.parametrize("shape", [(1, 8), (3, 64), (2, 5, 96)])
def test_packing_agrees_with_opset_both_ways(shape):
    signs = torch.where(torch.randn(shape) > 0, 1.0, -1.0)
    bits = quant.pack_bits(signs)
    np.testing.assert_array_equal(bits.numpy(), packing.pack_bits(signs.numpy()))
    np.testing.assert_array_equal(packing.unpack_bits(bits.numpy()), signs.numpy())
    assert torch.equal(quant.unpack_bits(bits), signs)


def test_rounding_passes_the_gradient_through_scale_and_all():
    x = torch.randn(4, 32, requires_grad=True)
    gradient = torch.randn(4, 32)
    q, s = quant.quantize(x)
    (q * s).backward(gradient)
    torch.testing.assert_close(x.grad, gradient, rtol=1e-6, atol=0)


def test_sign_passes_the_gradient_inside_its_window_only():
    latent = torch.tensor([-2.0, -1.4, -0.1, 0.0, 0.1, 1.4, 1.6], requires_grad=True)
    signs = quant.sign(latent, window=1.5)
    signs.backward(torch.arange(1.0, 8.0))
    assert signs.tolist() == [-1, -1, -1, -1, 1, 1, 1]  # zero packs to a 0 bit, which is -1
    assert latent.grad.tolist() == [0, 2, 3, 4, 5, 6, 0]


def rounded(t):
    """The codes of t in its forward, t itself in its backward pass."""
    q, s = quant.quantize(t.detach())
    return t + (q * s - t).detach()


def gradients(y, gradient, leaves):
    return torch.autograd.grad(y, leaves, gradient)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("rank", [0, 2])
def test_scaffold_gradients_are_those_of_the_dequantised_product(planes, rank):
    """y = x_hat W_hat with every quantiser the identity: autograd on floats gives the same gradients."""
    lead = (planes,) if planes > 1 else ()
    x, latent = torch.randn(2, 3, 64), 2 * torch.randn(*lead, 10, 64)
    leaves = [x, latent, torch.rand(*lead, 10), torch.randn(rank, 64), torch.randn(10, rank)]
    x, latent, scale, down, up = leaves = [leaf.requires_grad_() for leaf in leaves]
    gradient = torch.randn(2, 3, 10)
    actual = gradients(quant.trained_scaffold_matmul(*leaves), gradient, leaves)

    clipped = latent * (latent.abs() < 1.5)  # the gradient of a sign is that of this
    signs = clipped + (torch.where(latent > 0, 1.0, -1.0) - clipped).detach()
    weight = scale[..., None] * signs
    weight = (weight.sum(0) if planes > 1 else weight) + (rounded(up) @ rounded(down) if rank else 0.0)
    expected = torch.autograd.grad(rounded(x) @ weight.T, leaves, gradient, allow_unused=rank == 0)
    for got, want, leaf in zip(actual, expected, leaves, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(leaf) if want is None else want, rtol=1e-4, atol=1e-4)


def test_int8_gradients_are_those_of_the_dequantised_product():
    x, w = torch.randn(2, 3, 64, requires_grad=True), torch.randn(33, 64, requires_grad=True)
    gradient = torch.randn(2, 3, 33)
    actual = gradients(quant.trained_int8_matmul(x, w), gradient, [x, w])
    expected = gradients(rounded(x) @ rounded(w).T, gradient, [x, w])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("planes", [1, 2])
def test_latents_are_multiplied_as_their_export(planes):
    lead = (planes,) if planes > 1 else ()
    x, latent, scale = torch.randn(5, 64), torch.randn(*lead, 10, 64), torch.rand(*lead, 10)
    down, up = torch.randn(3, 64), torch.randn(10, 3)
    (dq, ds), (uq, us) = quant.quantize_rows(down), quant.quantize_rows(up)
    exported = quant.binary_scaffold_matmul(x, quant.sign(latent), scale, dq, ds, uq, us)
    assert torch.equal(quant.trained_scaffold_matmul(x, latent, scale, down, up), exported)
    assert torch.equal(quant.trained_int8_matmul(x, down), quant.int8_matmul(x, dq, ds))


def test_under_autocast_only_the_gradients_are_rounded():
    """To bf16, whose 8 bits make each product of two operands wrong by up to 2^-8 of its size."""
    x, w = torch.randn(64, 64, requires_grad=True), torch.randn(33, 64, requires_grad=True)
    gradient = torch.randn(64, 33)
    exact = quant.trained_int8_matmul(x, w)
    with torch.autocast("cpu", torch.bfloat16):
        cast = quant.trained_int8_matmul(x, w)
    assert torch.equal(exact, cast)
    sizes = gradient.abs() @ rounded(w).abs(), gradient.abs().T @ rounded(x).abs()
    exact, cast = (gradients(y, gradient, [x, w]) for y in (exact, cast))
    for got, want, size in zip(cast, exact, sizes, strict=True):
        assert ((got - want).abs() <= 2**-7 * size + 1e-6).all()


def test_the_table_has_one_gradient():
    """Of a token that many rows share, on several threads; resumed runs would differ from whole ones otherwise."""
    table, ids = Int8Embedding(64, 128), torch.arange(1024).view(4, 256) % 5
    upstream = torch.randn(4, 256, 128)
    expected = torch.zeros(64, 128, dtype=torch.float64).index_add_(0, ids.flatten(), upstream.flatten(0, 1).double())

    def gradient():
        return torch.autograd.grad(table(ids), table.weight, upstream)[0]

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first = gradient()
        assert all(torch.equal(gradient(), first) for _ in range(50))
    finally:
        torch.set_num_threads(before)
    # About 200 terms a sum: fp32 rounding of their running total, far from the 1e0 of a lost term.
    torch.testing.assert_close(first.double(), expected, rtol=0, atol=1e-4)


def test_without_the_setting_of_newer_torch_products_are_the_same(monkeypatch):
    """Before torch 2.9 the CPU's products have no precision to set."""
    q, w = (torch.randint(-127, 128, (5, 64), dtype=torch.int8) for _ in range(2))
    expected = q.long() @ w.long().T
    monkeypatch.delattr(type(torch.backends.mkldnn), "matmul", raising=False)
    monkeypatch.delattr(torch.backends.mkldnn, "matmul", raising=False)
    assert not hasattr(torch.backends.mkldnn, "matmul")
    assert torch.equal(quant.integer_matmul(q, w).long(), expected)
