"""Matrices rounded for their inputs, against least squares in fp64 and against trying everything."""

import itertools

import numpy as np
import pytest
import torch

from dfssm.model.convert import binarize
from dfssm.model.quant import pack_bits, quantize_rows
from dfssm.model.rounding import Levels, damped, fit_low_rank, fit_scales, round_matrix


def correlated(k, tokens=400, seed=0):
    """The second moment of inputs that depend on each other, of very unequal sizes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=g) @ torch.randn(k, k, generator=g) * torch.logspace(-1, 1, k)
    return (x.T @ x).double()


def weight(m, k, seed=1):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed))


def energy(matrix, moment):
    return float(((matrix.double() @ moment) * matrix.double()).sum())


def data_free(w, planes):
    return w - binarize(w, planes)[2]


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
@pytest.mark.parametrize("m, k", [(40, 96), (3, 65), (1, 32)])  # 65: a block of columns and one more
def test_products_with_such_inputs_are_nearer_than_without_data(m, k, planes):
    w, moment = weight(m, k), correlated(k)
    found = round_matrix(w, moment, planes)
    assert energy(w - found.matrix(), moment) < 0.8 * energy(w - data_free(w, planes), moment)
    assert found.signs.shape == (planes, m, k) and found.scale.shape == (planes, m)
    assert found.signs.abs().eq(1).all() and found.scale.ge(0).all()
    assert found.scale.diff(dim=0).le(0).all()


def test_without_correlation_it_is_sign_and_row_mean():
    w = weight(7, 64)
    found = round_matrix(w, 3.0 * torch.eye(64))
    assert torch.equal(found.signs[0], torch.where(w > 0, 1.0, -1.0))
    torch.testing.assert_close(found.scale[0], w.abs().mean(-1))


def test_the_error_is_that_of_the_products():
    w, moment = weight(9, 64), correlated(64)
    found = round_matrix(w, moment, 2, 3)
    moment = damped(moment)
    assert found.error == pytest.approx(energy(w - found.matrix(), moment) / energy(w, moment), rel=1e-3)


@pytest.mark.parametrize("planes", [1, 2, 4])
def test_scales_are_least_squares(planes):
    w, moment = weight(6, 64), correlated(64)
    signs = torch.where(torch.randn(planes, 6, 64, generator=torch.Generator().manual_seed(2)) > 0, 1.0, -1.0)
    scale = fit_scales(signs, signs @ moment.float(), w)
    root = np.linalg.cholesky(moment.numpy())  # |v root|^2 = v moment v^T
    for row in range(6):
        columns = (signs[:, row].double().numpy() @ root).T
        expected = np.linalg.lstsq(columns, w[row].double().numpy() @ root, rcond=None)[0]
        # The normal equations in fp32 square the condition of the columns.
        np.testing.assert_allclose(scale[:, row].numpy(), expected, rtol=2e-3, atol=2e-4)


def test_planes_of_the_same_signs_share_a_scale():
    w = weight(2, 32)
    signs = torch.where(w > 0, 1.0, -1.0).expand(2, 2, 32)
    torch.testing.assert_close(fit_scales(signs, signs, w).sum(0), w.abs().mean(-1), rtol=1e-4, atol=0)


def test_the_nearest_of_all_levels_is_found():
    scale = weight(4, 3).abs().T.contiguous()
    levels, wanted = Levels(scale), weight(50, 4, seed=3).T.contiguous() * 2
    value, code = levels.nearest(wanted)
    every = np.array([[sum(s * x for s, x in zip(row, signs, strict=True)) for signs in
                       itertools.product((-1, 1), repeat=3)] for row in scale.T.tolist()])  # fmt: skip
    expected = np.abs(every[:, None] - wanted.numpy()[..., None]).min(-1)
    np.testing.assert_allclose((value - wanted).abs().numpy(), expected, rtol=1e-5, atol=1e-6)
    signs = levels.signs(code.T)  # 3,4,50
    torch.testing.assert_close((scale[..., None] * signs).sum(0), value)
    torch.testing.assert_close(levels.values(code.T), value.T)


def test_the_low_rank_is_the_best_under_the_moment():
    residual, moment = weight(20, 48), correlated(48)
    root = torch.linalg.cholesky(moment)
    up, down = fit_low_rank(residual, moment.float(), root.float(), 3)
    tail = np.linalg.svd(residual.double().numpy() @ root.numpy(), compute_uv=False)[3:]  # Eckart-Young
    best = float((tail**2).sum())
    assert best <= energy(residual - up @ down, moment) < 1.02 * best  # int8 rows are all that is between them
    for rows in (up, down):
        codes, size = quantize_rows(rows)
        torch.testing.assert_close(codes * size[:, None], rows, rtol=1e-6, atol=0)


def test_more_planes_and_a_low_rank_are_nearer():
    w, moment = weight(40, 64), correlated(64)
    errors = [round_matrix(w, moment, planes).error for planes in (1, 2, 3, 4)]
    assert all(b < 0.5 * a for a, b in itertools.pairwise(errors))
    errors = [round_matrix(w, moment, 1, rank).error for rank in (0, 1, 4, 16)]
    assert all(b < a for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("moment", [torch.zeros(32, 32), torch.diag((torch.arange(32) < 3).double())])
def test_inputs_that_never_came_are_no_obstacle(moment):
    w = weight(5, 32)
    found = round_matrix(w, moment, 2, 1)
    assert found.matrix().isfinite().all()
    assert energy(w - found.matrix(), torch.eye(32).double()) < 0.3 * energy(w, torch.eye(32).double())


def test_a_matrix_of_zeros():
    found = round_matrix(torch.zeros(4, 32), correlated(32), 2, 2)
    assert found.matrix().abs().max() == 0


def test_the_same_every_time_and_as_model_pt_has_it():
    w, moment = weight(24, 64), correlated(64)
    a, b = (round_matrix(w, moment, 2, 3).export_tensors() for _ in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a["bits"].shape == (2, 24, 8) and a["scale"].shape == (2, 24)
    one = round_matrix(w, moment, 1, 0)
    tensors = one.export_tensors()
    assert torch.equal(tensors["bits"], pack_bits(one.signs[0])) and tensors["scale"].shape == (24,)
    assert tensors["down"].shape == (0, 64) and tensors["up"].shape == (24, 0)
