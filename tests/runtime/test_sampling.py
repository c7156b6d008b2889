import numpy as np
import pytest

from dfssm.base import DfssmError
from dfssm.runtime import sampling as module
from dfssm.runtime.sampling import Sampling, choose_each, total_weight, weights

# Probabilities that are exact in binary, so that the cases below can be worked by hand.
P = np.array([1 / 8, 1 / 2, 1 / 16, 1 / 4, 1 / 16])
LOGITS = np.log(P).astype(np.float32)


DRAWS = 512


def chosen(logits, bits, **settings) -> list[int]:
    """What is chosen where these are the random bits, whole numbers below 2^53."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_random_bits", lambda seed, position: bits[position])
        return [Sampling(**{"temperature": 1.0} | settings).choose(logits, i) for i in range(len(bits))]


def probabilities(**settings):
    """Token -> share of evenly spaced draws, to a draw."""
    tokens = chosen(LOGITS, [(i << 53) // DRAWS for i in range(DRAWS)], **settings)
    return {token: tokens.count(token) / DRAWS for token in dict.fromkeys(tokens)}


def near(expected: dict) -> dict:
    return pytest.approx(expected, abs=1.5 / DRAWS)


def test_greedy_takes_the_largest_and_the_first_of_equals():
    assert Sampling().choose(LOGITS, 0) == 1
    assert Sampling().choose(np.array([0, 3, 1, 3], np.float32), 0) == 1


def test_no_filter_is_the_softmax():
    assert probabilities() == near({0: 0.125, 1: 0.5, 2: 0.0625, 3: 0.25, 4: 0.0625})


def test_temperature_half_squares_the_probabilities():
    squares = P**2 / (P**2).sum()
    assert probabilities(temperature=0.5) == near(dict(enumerate(squares)))


def test_top_k_keeps_the_k_largest_in_order():
    assert probabilities(top_k=2) == near({1: 2 / 3, 3: 1 / 3})
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
    order = np.argsort(-logits, kind="stable")
    p = np.exp(logits[order].astype(np.float64))
    last = np.searchsorted(np.cumsum(p) / p.sum(), 0.9)
    (token,) = chosen(logits, [2**53 - 1], top_p=0.9)
    assert last > 256 and abs(int(np.flatnonzero(order == token)[0]) - last) <= 1


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.7, 1e6])
def test_weights_are_the_softmax(temperature):
    logits = np.float32(5) * np.random.default_rng(1).standard_normal(3000).astype(np.float32)
    expected = np.exp((logits - logits.max()).astype(np.float64) / np.float64(np.float32(temperature)))
    # 2e-7 of the polynomial; the exponent, up to 64, is rounded three times; the weight is cut to 2^-30
    np.testing.assert_allclose(weights(logits, logits.max(), temperature) / 2**30, expected, rtol=1e-5, atol=2**-29)
    assert weights(logits, logits.max(), temperature).max() == 2**30


def test_nothing_is_left_of_what_is_infinitely_small():
    assert weights(np.array([-np.inf, 0, -3e38], np.float32), np.float32(0), 1e-300).tolist()[::2] == [0, 0]
    assert total_weight(np.array([np.nan, 0], np.float32), 1.0) == total_weight(np.array([np.inf, 0], np.float32), 1.0)
    assert total_weight(np.array([-np.inf, -np.inf], np.float32), 1.0) == 0


def test_the_sum_has_no_order():
    rng = np.random.default_rng(2)
    logits = rng.standard_normal(40_000).astype(np.float32)
    expected = sum(weights(logits, logits.max(), 0.7).tolist())
    for _ in range(3):
        assert total_weight(rng.permutation(logits), 0.7) == expected


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.8}, {"temperature": 2.0}])
def test_draws_follow_the_probabilities(settings):
    tokens, keep = np.argsort(-P, kind="stable"), settings.get("top_k", 5 if "top_p" not in settings else 3)
    left = np.where(np.isin(np.arange(5), tokens[:keep]), P ** (1 / settings.get("temperature", 1.0)), 0)
    expected = dict(enumerate(left / left.sum()))
    sampling, n = Sampling(**{"temperature": 1.0, "seed": 7} | settings), 20_000
    counts = np.bincount([sampling.choose(LOGITS, position) for position in range(n)], minlength=5)
    for token, count in enumerate(counts):
        p = expected.get(token, 0.0)
        assert abs(count - n * p) <= 4 * (n * p * (1 - p)) ** 0.5, f"token {token}: {count} draws of {n}, p={p}"


@pytest.mark.parametrize("size", [2, 5, 256, 257, 3000])
def test_a_draw_is_the_inverse_of_the_running_sum(size):
    """In falling order, whole numbers throughout; also far down a flat distribution, which takes more than one look."""
    logits = np.random.default_rng(size).integers(0, 3, size).astype(np.float32)
    order = sorted(range(size), key=lambda token: (-logits[token], token))
    sums = np.cumsum(weights(logits, logits.max(), 1.0)[order], dtype=object)
    bits = [0, 2**53 - 1, *np.random.default_rng(0).integers(0, 2**53, 100).tolist()]
    expected = [order[next(i for i, s in enumerate(sums) if s * 2**53 > b * sums[-1])] for b in bits]
    assert chosen(logits, bits) == expected


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


def test_rows_that_choose_together_choose_as_alone():
    rng = np.random.default_rng(5)
    kinds = [
        {}, {"temperature": 1.0}, {"temperature": 0.3}, {"temperature": 40.0}, {"temperature": 1e-300},
        {"temperature": 1.0, "top_k": 7}, {"temperature": 9.0, "top_k": 900}, {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 0.7}, {"temperature": 2.0, "min_p": 0.02}, {"temperature": 0.8, "top_k": 5000},
    ]  # fmt: skip
    samplings = [Sampling(seed=seed, **kind) for seed in range(12) for kind in kinds]
    logits = (3 * rng.standard_normal((len(samplings), 2500))).round(1).astype(np.float32)  # with ties
    logits[::7, ::3] = -np.inf
    logits[50, 9], logits[61, 8] = np.nan, np.inf
    positions = rng.integers(0, 1000, len(samplings)).tolist()
    found = choose_each(samplings, logits, positions)
    assert found == [s.choose(row, position) for s, row, position in zip(samplings, logits, positions, strict=True)]
    assert (found[50], found[61]) == (9, 8)
    for sampling, row, position, token in zip(samplings, logits, positions, found, strict=True):
        if sampling.temperature and np.isfinite(row.max()) and not sampling.min_p and sampling.top_p == 1:
            order = np.lexsort((np.arange(len(row)), -row))[: sampling.top_k or None]
            sums = np.cumsum(weights(row[order], row.max(), sampling.temperature), dtype=object)
            bits = module._random_bits(sampling.seed, position)
            assert token == order[next(i for i, s in enumerate(sums) if s * 2**53 > bits * sums[-1])]


def test_a_choice_is_of_one_draw_however_far_it_looks(monkeypatch):
    """Without a seed another draw at each look would take the probability from the tokens that take several."""
    logits = np.zeros((4, 3000), np.float32)
    calls = []

    def last(seed, position):
        calls.append(position)
        return 2**53 - 1

    monkeypatch.setattr(module, "_random_bits", last)
    samplings = [Sampling(1.0), Sampling(1.0, top_p=0.99), Sampling(1.0), Sampling(1.0, top_k=2)]
    assert choose_each(samplings, logits, [0, 1, 2, 3]) == [2999, 2969, 2999, 1] and calls == [0, 1, 2, 3]
    assert samplings[0].choose(logits[0], 4) == 2999 and calls[4:] == [4]
