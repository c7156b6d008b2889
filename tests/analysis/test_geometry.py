"""Principal components, dimensions and CKA, against their definitions."""

import numpy as np
import pytest

from dfssm.analysis.geometry import dimension, explained, linear_cka, principal, shuffled_columns

RNG = np.random.default_rng(0)


def test_principal_components_are_those_of_the_covariance():
    states = RNG.standard_normal((30, 6)) * [5, 3, 1, 1, 1, 1] + 7
    points, shares = principal(states)
    values, axes = np.linalg.eigh(np.cov(states.T))
    assert shares == pytest.approx(values[::-1][:2] / values.sum())
    wanted = (states - states.mean(0)) @ axes[:, ::-1][:, :2]
    assert np.abs(points) == pytest.approx(np.abs(wanted))


@pytest.mark.parametrize("planted", [1, 3, 10])
def test_planted_dimension(planted):
    states = RNG.standard_normal((40, planted)) @ np.linalg.qr(RNG.standard_normal((12, planted)))[0].T + 3
    assert dimension(states, 1.0) == planted
    assert dimension(np.full((5, 4), 0.1, np.float32)) == 0


def test_dimension_counts_the_variance():
    orthogonal = np.linalg.qr(RNG.standard_normal((20, 3)) - 0)[0]
    centred = orthogonal - orthogonal.mean(0)
    q = np.linalg.qr(centred)[0] * np.sqrt([0.9, 0.06, 0.04])  # shares of the variance
    assert dimension(q - q.mean(0), 0.9) == 1 and dimension(q, 0.95) == 2 and dimension(q, 0.97) == 3


def test_what_labels_explain():
    points = np.array([[0.0, 0], [0, 2], [10, 0], [10, 2]])
    assert explained(points, np.array([0, 0, 1, 1])) == pytest.approx(100 / 104)
    assert explained(points, np.array([0, 1, 0, 1])) == pytest.approx(4 / 104)


def test_shuffled_columns_keep_each_channels_values():
    states = RNG.standard_normal((9, 5))
    dealt = shuffled_columns(states, np.random.default_rng(1))
    assert np.array_equal(np.sort(dealt, 0), np.sort(states, 0)) and not np.array_equal(dealt, states)


def test_cka():
    x = RNG.standard_normal((50, 4))
    rotation = np.linalg.qr(RNG.standard_normal((4, 4)))[0]
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    y = RNG.standard_normal((50, 6))
    centre = np.eye(50) - 1 / 50
    k, m = (centre @ (v @ v.T) @ centre for v in (x, y))
    assert linear_cka(x, y) == pytest.approx((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))
    assert linear_cka(x, np.ones((50, 2))) == 0
