"""Penalties, bias, processors and log-probabilities: worked by hand, and against transformers' processors."""

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dfssm.base import DfssmError
from dfssm.runtime import Sampler, Sampling
from dfssm.runtime import sampling as module

LOGITS = np.array([4, -4, 2, 1, 0], np.float32)


def changed(prompt=(), generated=(), logits=LOGITS, **settings) -> list[float]:
    before = logits.copy()
    found = Sampler(Sampling(**settings), prompt, generated).changed(logits)
    assert logits.tolist() == before.tolist(), "those of the state stay as they are"
    return found.tolist()


class TestByHand:
    def test_repetition_counts_prompt_and_text_once(self):
        """Positive logits are divided, negative ones multiplied."""
        assert changed([0, 1, 1], [2, 2], repetition_penalty=2.0) == [2, -8, 1, 1, 0]
        assert changed([0, 1], repetition_penalty=0.5) == [8, -2, 2, 1, 0]

    def test_presence_and_frequency_count_the_generated_text_alone(self):
        assert changed([0, 1], [2, 3, 2], presence_penalty=0.5) == [4, -4, 1.5, 0.5, 0]
        assert changed([0, 1], [2, 3, 2], frequency_penalty=0.25) == [4, -4, 1.5, 0.75, 0]
        assert changed([2], [2, 3, 2], frequency_penalty=0.25, presence_penalty=-1) == [4, -4, 2.5, 1.75, 0]

    def test_the_order_is_repetition_then_presence_then_bias(self):
        assert changed([], [0], repetition_penalty=2.0, presence_penalty=1.0, logit_bias={0: 3, 4: -7}) == [
            4 / 2 - 1 + 3, -4, 2, 1, -7,
        ]  # fmt: skip

    def test_an_empty_text_has_no_penalties(self):
        assert changed(repetition_penalty=9.0, presence_penalty=2.0, frequency_penalty=2.0) == LOGITS.tolist()

    def test_processors_get_the_text_and_what_the_others_left(self):
        seen = []

        def first(ids, logits):
            seen.append((ids.dtype, ids.tolist(), logits.tolist()))
            logits[0] = -np.inf
            return logits

        def second(ids, logits):
            seen.append(logits.tolist())
            return logits.astype(np.float64) * 2

        found = changed([3, 1], [2], logit_bias={1: 1}, processors=(first, second))
        assert found == [-np.inf, -6, 4, 2, 0]
        assert seen == [(np.int64, [3, 1, 2], [4, -3, 2, 1, 0]), [-np.inf, -3, 2, 1, 0]]
        assert Sampling(processors=first).processors == (first,)

    def test_each_choice_is_added_to_the_text(self):
        sampler = Sampler(Sampling(presence_penalty=2.0, frequency_penalty=2.0))
        # 3 2 1; -1 2 1; -1 -2 1; -1 -2 -3; -3 -2 -3; -3 -4 -3
        assert [sampler.choose(np.array([3, 2, 1], np.float32), i) for i in range(6)] == [0, 1, 2, 0, 1, 0]
        assert sampler.generated == [0, 1, 2, 0, 1, 0]

    def test_log_probabilities_are_the_models_own(self):
        probabilities = np.array([1 / 8, 1 / 2, 1 / 16, 1 / 4, 1 / 16])
        sampler = Sampler(Sampling(logprobs=2, logit_bias={2: 100}, temperature=0.5, seed=1), [1])
        assert sampler.choose(np.log(probabilities).astype(np.float32) + 3, 0) == 2
        (found,) = sampler.logprobs
        assert (found.token, [token for token, _ in found.top]) == (2, [1, 3])
        expected = np.log([1 / 16, 1 / 2, 1 / 4])  # the logits are rounded to 24 bits, of numbers below 4
        np.testing.assert_allclose([found.logprob, *(p for _, p in found.top)], expected, atol=4 * 2**-23)

    def test_no_most_probable_ones_are_told(self):
        sampler = Sampler(Sampling(logprobs=0))
        sampler.choose(LOGITS, 0)
        assert sampler.logprobs[0].top == () and sampler.logprobs[0].logprob < 0


def theirs(processors, ids, logits) -> np.ndarray:
    return LogitsProcessorList(processors)(torch.tensor([ids]), torch.from_numpy(logits)[None].clone())[0].numpy()


@pytest.mark.parametrize("seed", range(4))
def test_penalties_and_bias_are_those_of_transformers(seed):
    """Repetition over prompt and text alike, bit for bit; theirs adds a bias of single tokens in the same way."""
    rng = np.random.default_rng(seed)
    logits = 5 * rng.standard_normal(300).astype(np.float32)
    prompt, text = rng.integers(0, 300, (2, 40)).tolist()
    bias = {int(token): float(np.float32(rng.normal())) for token in rng.integers(0, 300, 10)}
    penalty = float(rng.uniform(0.5, 2))
    processors = [
        RepetitionPenaltyLogitsProcessor(penalty),
        SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]),
    ]
    expected = theirs(processors, prompt + text, logits)
    assert changed(prompt, text, logits, repetition_penalty=penalty, logit_bias=bias) == expected.tolist()


FILTERS = [
    {"min_p": 0.05},
    {"min_p": 0.3, "temperature": 1.7},
    {"top_k": 50, "min_p": 0.1},
    {"top_p": 0.8, "min_p": 0.02, "temperature": 2.0},
    {"top_p": 0.5, "top_k": 20, "min_p": 0.2, "temperature": 0.7},
    {"top_p": 0.9},
    {"top_k": 7},
    {"min_p": 1.0},
]


@pytest.mark.parametrize("settings", FILTERS, ids=str)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_the_tokens_kept_are_those_of_transformers_warpers(settings, penalty, monkeypatch):
    """Every token that can be drawn, by draws at the middle of each one's share of the whole; also where there are more
    of them than the first look has (256).
    """
    rng = np.random.default_rng(len(str(settings)))
    for size in (40, 3000):
        logits, ids = 2 * rng.standard_normal(size).astype(np.float32), rng.integers(0, size, 30).tolist()
        named = {"temperature": 1.0} | settings
        warpers = [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(float(named["temperature"]))]
        warpers += [TopKLogitsWarper(named["top_k"])] if "top_k" in named else []
        warpers += [TopPLogitsWarper(named["top_p"])] if "top_p" in named else []
        warpers += [MinPLogitsWarper(named["min_p"])] if "min_p" in named else []
        kept = torch.from_numpy(theirs(warpers, ids, logits)).double().softmax(-1).numpy()
        order = np.argsort(-kept, kind="stable")[: int((kept > 0).sum())]
        middles = np.cumsum(kept[order]) - kept[order] / 2
        sampling = Sampling(**named, repetition_penalty=penalty)
        found = []
        for middle in [*middles, 1 - 2**-53]:
            monkeypatch.setattr(module, "_random_bits", lambda seed, position, at=middle: int(at * 2**53))
            found.append(Sampler(sampling, ids).choose(logits, 0))
        assert found == [*order, order[-1]]


def test_min_p_keeps_what_is_likely_enough_beside_the_most_likely(monkeypatch):
    """Of 1/2, 1/4, 1/8, 1/16, 1/16: the share of the largest decides, and equals are kept together."""
    logits = np.log(np.array([1 / 8, 1 / 2, 1 / 16, 1 / 4, 1 / 16])).astype(np.float32)

    def kept(**settings):
        sampling = Sampling(1.0, **settings)
        found = set()
        for i in range(64):
            monkeypatch.setattr(module, "_random_bits", lambda seed, position, i=i: (2 * i + 1) << 46)
            found.add(sampling.choose(logits, 0))
        return found

    assert kept(min_p=1.0) == {1} and kept(min_p=0.6) == {1} and kept(min_p=0.4) == {1, 3}
    assert kept(min_p=0.2) == {1, 3, 0} and kept(min_p=0.1) == kept() == {0, 1, 2, 3, 4}
    assert kept(min_p=0.1, top_p=0.7) == {1, 3} and kept(min_p=0.4, top_p=0.9) == {1, 3}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"min_p": 1.5}, "min_p is 1.5: give a number from 0 to 1"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0: give a number from 0.01 to 100"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1: give a number from -2 to 2"),
        ({"frequency_penalty": "1"}, "frequency_penalty is '1'"),
        ({"logit_bias": [3]}, r"logit_bias is \[3\]: give a mapping from token ids to numbers"),
        ({"logit_bias": {"3": 1.0}}, "a token id of logit_bias is '3': give a whole number"),
        ({"logit_bias": {-1: 1.0}}, "a token id of logit_bias is -1"),
        ({"logit_bias": {3: 101}}, "logit_bias of token 3 is 101: give a number from -100 to 100"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"processors": [3]}, r"a logits processor is 3: give a function \(ids, logits\) -> logits"),
        ({"processors": 3}, "processors is 3: give functions"),
    ],
)
def test_a_setting_that_is_none_is_named(settings, named):
    with pytest.raises(DfssmError, match=named):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        (lambda ids, logits: None, r"logits processor <lambda> returned None: return an array f32\[5\]"),
        (lambda ids, logits: logits[:4], r"returned float32\[4\]: return an array f32\[5\]"),
        (lambda ids, logits: ids, r"returned int64\[3\]: return an array f32\[5\]"),
        (lambda ids, logits: logits * np.float32(np.nan), "returned nan as the largest logit: leave one"),
        (lambda ids, logits: logits - np.float32(np.inf), "returned -inf as the largest logit: leave one"),
    ],
)
def test_a_processor_that_returns_no_logits_is_named(returned, named):
    with pytest.raises(DfssmError, match=named):
        Sampler(Sampling(processors=(returned,)), [1, 2, 3]).choose(LOGITS, 0)


def test_a_bias_beyond_the_vocabulary_is_named():
    with pytest.raises(DfssmError, match="logit_bias names token 5: this model has ids 0 to 4"):
        changed(logit_bias={5: 1.0})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_is_chosen_and_no_processor_sees_it(bad):
    sampler = Sampler(Sampling(repetition_penalty=2.0, processors=(lambda ids, logits: 1 / 0,)), [2])
    assert sampler.choose(np.array([0, 1, bad, 2], np.float32), 0) == 2 and sampler.generated == []
