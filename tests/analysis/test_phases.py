"""Planted phases are found at their layers, and none is claimed that chance shows, too."""

import itertools

import numpy as np
import pytest

from dfssm.analysis.phases import boundaries, described, find_phases, steps

PLANTED = np.array([0.1] * 4 + [0.6] * 5 + [0.3] * 3)


def test_planted_phases():
    assert boundaries(PLANTED) == (4, 9)
    assert steps(PLANTED, (4, 9)) == pytest.approx([0.5, -0.3])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("phases", [1, 2, 3, 4])
def test_they_fit_best_of_all_cuts(seed, phases):
    curve = np.random.default_rng(seed).standard_normal(9)

    def cost(cuts):
        return sum(((part - part.mean()) ** 2).sum() for part in np.split(curve, list(cuts)))

    best = min(map(cost, itertools.combinations(range(1, 9), phases - 1)))
    assert cost(boundaries(curve, phases)) == pytest.approx(best)


def test_fewer_layers_than_phases():
    assert boundaries([1.0, 2.0]) == (1,) and boundaries([1.0]) == ()


def test_what_chance_shows_is_not_claimed():
    """The smaller of the two steps is not larger than that of random weights; then neither is larger than shuffled."""
    rng = np.random.default_rng(0)
    noise = 0.01 * rng.standard_normal((50, len(PLANTED)))
    random = np.where(np.arange(len(PLANTED)) < 6, 0.1, 0.5)
    first, second = find_phases(PLANTED, PLANTED + noise, noise, random)
    assert (first.layer, first.low, first.high, first.claimed) == (4, 4, 4, True)
    assert (second.layer, second.claimed) == (9, False) and second.chance == pytest.approx(0.4)
    text = "Phases begin at layer 4. 1 of 2 boundaries are not claimed: chance makes such steps, too."
    assert described([first, second]) == text
    assert not any(one.claimed for one in find_phases(PLANTED, PLANTED + noise, 100 * noise, 0 * random))


def test_a_step_that_some_prompts_alone_make_is_not_claimed():
    """In a tenth of the draws there is hardly a step: the least of 95 % is not larger than chance."""
    flat = np.full(len(PLANTED), 0.1)
    sure, unsure = (np.array([PLANTED] * (100 - n) + [flat] * n) for n in (2, 10))
    none = np.zeros((10, len(PLANTED)))
    first, second = find_phases(PLANTED, sure, none + 0.01 * (np.arange(len(PLANTED)) > 3), none[0])
    assert first.claimed and second.claimed and first.least == pytest.approx(0.5) and first.chance > 0
    assert not any(one.claimed for one in find_phases(PLANTED, unsure, none, none[0]))


def test_an_interval_is_as_wide_as_the_bootstrap_says():
    early, late = np.roll(PLANTED, -1), np.roll(PLANTED, 1)
    drawn = np.array([early] * 10 + [PLANTED] * 80 + [late] * 10)
    (first, _) = find_phases(PLANTED, drawn, np.zeros((10, len(PLANTED))), np.zeros(len(PLANTED)))
    assert (first.low, first.layer, first.high) == (3, 4, 5) and str(first) == "layer 4 (90 %: 3 to 5)"
