"""Planted separation is found exactly; the sums over products are those over pairs and centroids, one by one."""

import numpy as np
import pytest
from planted import states_of_separation

from dfssm.analysis.gram import Draws, by_category, centroid_accuracy, cosines, one_hot, separation

LABELS = np.repeat([0, 1, 2], [3, 5, 4])


@pytest.mark.parametrize("wanted", [0.0, 0.3, 1.0])
def test_planted_separation(wanted):
    (states,) = states_of_separation(LABELS, [wanted])
    products = cosines(states)
    assert separation(products, one_hot(LABELS)) == pytest.approx(wanted, abs=1e-12)
    assert by_category(products, one_hot(LABELS)) == pytest.approx(np.full(3, wanted), abs=1e-12)


def some(seed=0, channels=4):
    return np.random.default_rng(seed).standard_normal((len(LABELS), channels)) + 0.5


def test_separation_is_the_mean_over_pairs():
    states = some()
    unit = states / np.linalg.norm(states, axis=1, keepdims=True)
    within, between = [], []
    of = {0: ([], []), 1: ([], []), 2: ([], [])}
    for i, a in enumerate(unit):
        for j, b in enumerate(unit):
            if i != j:
                (within if LABELS[i] == LABELS[j] else between).append(a @ b)
                of[LABELS[i]][int(LABELS[i] != LABELS[j])].append(a @ b)
    found = cosines(states)
    assert separation(found, one_hot(LABELS)) == pytest.approx(np.mean(within) - np.mean(between))
    assert by_category(found, one_hot(LABELS)) == pytest.approx([np.mean(w) - np.mean(b) for w, b in of.values()])


def test_a_prompt_that_is_drawn_twice_makes_no_pair_with_itself():
    """Weights are copies, whose pairs of copies do not count."""
    states, drawn = some(), np.array([0, 0, 2, 3, 3, 3, 6, 7, 8, 9, 10, 10])
    products, same = cosines(states)[np.ix_(drawn, drawn)], drawn[:, None] == drawn
    within = (LABELS[drawn][:, None] == LABELS[drawn]) & ~same
    wanted = products[within].mean() - products[~within & ~same].mean()
    weights = np.bincount(drawn, minlength=len(LABELS)).astype(float)
    assert separation(cosines(states), one_hot(LABELS), weights) == pytest.approx(wanted)


def test_a_state_of_zeros_has_no_direction():
    states = some()
    states[0] = 0
    assert np.isfinite(cosines(states)).all() and not cosines(states)[0].any()


@pytest.mark.parametrize("seed", range(3))
def test_nearest_centroids_leave_the_prompt_out(seed):
    states = some(seed)
    right = []
    for i, state in enumerate(states):
        kept = np.arange(len(states)) != i
        centroids = [states[kept & (LABELS == label)].mean(0) for label in range(3)]
        right.append(np.argmin([np.linalg.norm(state - c) for c in centroids]) == LABELS[i])
    assert centroid_accuracy(states @ states.T, one_hot(LABELS)) == pytest.approx(np.mean(right))


def test_a_label_of_one_prompt_is_not_counted():
    labels = np.array([0, 0, 1, 1, 2])
    states = np.array([[0.0], [0.1], [5.0], [5.1], [0.05]])
    assert centroid_accuracy(states @ states.T, one_hot(labels)) == 0.5  # 2 takes both of 0, its own prompt is left out


def test_draws_keep_the_sizes_of_categories():
    draws = Draws.of(LABELS, 5, seed=0)
    for shuffled, weights in zip(draws.shuffled, draws.weights, strict=True):
        assert shuffled.sum(0).tolist() == [3, 5, 4]
        assert (one_hot(LABELS).T @ weights).tolist() == [3, 5, 4]
    assert any(weights.max() > 1 for weights in draws.weights)
