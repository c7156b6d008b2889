import numpy as np
import pytest

from dfssm.opset import DfssmError
from dfssm.runtime.sampling import Sampler, Sampling, candidates, draw

# Probabilities that are exact in binary, so that the cases below can be worked by hand.
P = np.array([1 / 8, 1 / 2, 1 / 16, 1 / 4, 1 / 16])
LOGITS = np.log(P).astype(np.float32)


def probabilities(**settings):
    """Token -> probability after the filters."""
    tokens, weights = candidates(LOGITS, Sampling(**{"temperature": 1.0} | settings))
    return dict(zip(tokens.tolist(), (weights / weights.sum()).round(6).tolist(), strict=True))


def test_greedy_takes_the_largest_and_the_first_of_equals():
    assert Sampler(Sampling())(LOGITS) == 1
    assert Sampler(Sampling())(np.array([0, 3, 1, 3], np.float32)) == 1


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
    sampler, n = Sampler(Sampling(**{"temperature": 1.0, "seed": 7} | settings)), 20_000
    counts = np.bincount([sampler(LOGITS) for _ in range(n)], minlength=5)
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


def test_a_seed_gives_the_same_draws_and_another_seed_others():
    def draws(seed):
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler(LOGITS) for _ in range(50)]

    assert draws(3) == draws(3) != draws(4)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"temperature": -1.0}, "temperature is -1.0"), ({"temperature": float("nan")}, "temperature is nan"),
     ({"top_k": -1}, "top_k is -1"), ({"top_p": 0.0}, "top_p is 0.0"), ({"top_p": 1.1}, "top_p is 1.1"),
     ({"seed": -5}, "seed is -5")],
)  # fmt: skip
def test_a_setting_out_of_range_is_named(settings, named):
    with pytest.raises(DfssmError, match=named):
        Sampling(**settings)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_overflowed_are_an_error(bad):
    with pytest.raises(DfssmError, match="logit of token 2 is"):
        Sampler(Sampling())(np.array([0, 1, bad], np.float32))
