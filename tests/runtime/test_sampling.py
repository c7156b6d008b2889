import numpy as np
import pytest

from dfssm.opset import DfssmError
from dfssm.runtime.sampling import Sampling, candidates, draw

# Probabilities that are exact in binary, so that the cases below can be worked by hand.
P = np.array([1 / 8, 1 / 2, 1 / 16, 1 / 4, 1 / 16])
LOGITS = np.log(P).astype(np.float32)


def probabilities(**settings):
    """Token -> probability after the filters."""
    tokens, weights = candidates(LOGITS, Sampling(**{"temperature": 1.0} | settings))
    return dict(zip(tokens.tolist(), (weights / weights.sum()).round(6).tolist(), strict=True))


def test_greedy_takes_the_largest_and_the_first_of_equals():
    assert Sampling().choose(LOGITS, 0) == 1
    assert Sampling().choose(np.array([0, 3, 1, 3], np.float32), 0) == 1


def test_no_filter_is_the_softmax():
    assert probabilities() == {0: 0.125, 1: 0.5, 2: 0.0625, 3: 0.25, 4: 0.0625}


def test_temperature_half_squares_the_probabilities():
    squares = P**2 / (P**2).sum()
    assert probabilities(temperature=0.5) == pytest.approx(dict(enumerate(squares)), abs=1e-5)


def test_top_k_keeps_the_k_largest_in_order():
    assert probabilities(top_k=2) == pytest.approx({1: 2 / 3, 3: 1 / 3}, abs=1e-5)
    assert list(probabilities(top_k=2)) == [1, 3]
    assert len(probabilities(top_k=99)) == 5


def test_top_k_takes_the_first_of_equals():
    assert set(probabilities(top_k=4)) == {1, 3, 0, 2}


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.4, {1}), (0.5, {1}), (0.51, {1, 3}), (0.75, {1, 3}), (0.8, {1, 3, 0}), (1.0, {0, 1, 2, 3, 4})],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, kept):
    assert set(probabilities(top_p=top_p)) == kept


def test_top_p_counts_within_what_top_k_left():
    # after top_k=2 the two are 2/3 and 1/3: the first alone reaches 0.6
    assert probabilities(top_k=2, top_p=0.6) == {1: 1.0}


def test_nucleus_of_a_large_vocabulary_equals_the_full_sort():
    logits = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)  # flat: needs more than one pass
    tokens, _ = candidates(logits, Sampling(temperature=1.0, top_p=0.9))
    order = np.argsort(-logits, kind="stable")
    p = np.exp(logits[order].astype(np.float64))
    expected = order[: np.searchsorted(np.cumsum(p) / p.sum(), 0.9) + 1]
    assert abs(len(tokens) - len(expected)) <= 1 and len(tokens) > 256
    common = min(len(tokens), len(expected))
    assert (tokens[:common] == expected[:common]).all()


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.8}, {"temperature": 2.0}])
def test_draws_follow_the_probabilities(settings):
    expected = probabilities(**settings)
    sampling, n = Sampling(**{"temperature": 1.0, "seed": 7} | settings), 20_000
    counts = np.bincount([sampling.choose(LOGITS, position) for position in range(n)], minlength=5)
    for token, count in enumerate(counts):
        p = expected.get(token, 0.0)
        assert abs(count - n * p) <= 4 * (n * p * (1 - p)) ** 0.5, f"token {token}: {count} draws of {n}, p={p}"


@pytest.mark.parametrize("size", [1, 5, 256, 257, 1000])
def test_draw_is_the_inverse_of_the_running_sum(size):
    weights = np.random.default_rng(size).integers(0, 3, size).astype(np.float32)  # with zeros; sums are exact
    weights[-1] = 0 if size > 1 else 1
    for uniform in [0.0, *np.random.default_rng(0).random(200), np.nextafter(1.0, 0.0)]:
        expected = int(np.argmax(np.cumsum(weights) > uniform * weights.sum()))
        assert draw(weights, float(uniform)) == expected and weights[expected] > 0


def test_a_draw_is_of_the_seed_and_the_position():
    def draws(seed, positions):
        return [Sampling(temperature=1.0, seed=seed).choose(LOGITS, position) for position in positions]

    assert draws(3, range(50)) == draws(3, range(20)) + draws(3, range(20, 50)) != draws(4, range(50))
    assert draws(2**80, range(50)) != draws(3, range(50))
    assert draws(None, range(50)) != draws(None, range(50))


@pytest.mark.parametrize("seed", [0, 12345])
def test_draws_of_neighbouring_positions_are_independent(seed):
    """Pairs of draws against the product of their probabilities: chi-square of 24 degrees, 70 is 1e-6 likely."""
    sampling, n = Sampling(temperature=1.0, seed=seed), 20_000
    draws = np.array([sampling.choose(LOGITS, position) for position in range(n + 1)])
    found = np.bincount(draws[:-1] * 5 + draws[1:], minlength=25).reshape(5, 5)
    expected = n * np.outer(P, P)
    assert ((found - expected) ** 2 / expected).sum() < 70


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"temperature": -1.0}, "temperature is -1.0"), ({"temperature": float("nan")}, "temperature is nan"),
     ({"top_k": -1}, "top_k is -1"), ({"top_p": 0.0}, "top_p is 0.0"), ({"top_p": 1.1}, "top_p is 1.1"),
     ({"seed": -5}, "seed is -5"), ({"temperature": "1"}, "temperature is '1'"), ({"temperature": None}, "is None"),
     ({"temperature": float("inf")}, "is inf"), ({"top_k": 1.5}, "top_k is 1.5"), ({"top_p": True}, "top_p is True"),
     ({"seed": 1.5}, "seed is 1.5"), ({"seed": float("nan")}, "seed is nan")],
)  # fmt: skip
def test_a_setting_out_of_range_is_named(settings, named):
    with pytest.raises(DfssmError, match=named):
        Sampling(**settings)


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}])
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-45, 1e-20, 1e-6])
def test_near_temperature_zero_the_largest_is_drawn(temperature, filters):
    sampling = Sampling(temperature, seed=1, **filters)
    logits = np.array([0, -3e4, 3e4, 3e4 - 1, 1e-3], np.float32)
    assert {sampling.choose(logits, position) for position in range(50)} == {2}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_is_chosen(bad, temperature):
    assert Sampling(temperature).choose(np.array([0, 1, bad, 2], np.float32), 0) == 2
