"""Penalties, bias, processors, ends and log-probabilities through the engine: in texts, slots, on a device."""

import numpy as np
import pytest
import tiny
import torch
from backends import BACKENDS, on_device
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from dfssm.base import DfssmError
from dfssm.runtime import Engine, GenerationConfig, Sampler, Sampling

PROMPT = [5, 6, 7, 6]
PENALTIES = {"repetition_penalty": 1.5, "presence_penalty": 0.7, "frequency_penalty": 0.4}
DRAWN = {"temperature": 1.5, "min_p": 0.02, "seed": 3}


def not_twice(ids, logits):
    """No token follows itself."""
    logits[ids[-1]] = -np.inf
    return logits


SETTINGS = {
    "penalties": PENALTIES,
    "penalties, drawn": PENALTIES | DRAWN,
    "bias": {"logit_bias": {7: 2.5, 200: -100.0}, **DRAWN},
    "processor": {"processors": not_twice},
    "logprobs": {"logprobs": 3, **DRAWN},
    "min p": DRAWN,
}


@pytest.fixture(scope="module")
def engine(tiny_bundle):
    engine = Engine.load(tiny_bundle, threads=1)
    engine.config["eos_token_id"] = None  # random weights would end the text anywhere
    return engine


@pytest.fixture(params=SETTINGS)
def settings(request):
    return SETTINGS[request.param]


def made(engine, prompt=PROMPT, number=12, **settings):
    generation = engine.generate(prompt, max_tokens=number, **settings)
    list(generation)
    return generation


def test_a_greedy_text_is_that_of_transformers_processors(engine):
    """Over the engine's logits, each step's; presence and frequency as OpenAI writes them."""
    state, ids, penalty = engine.new_state(), list(PROMPT), LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5)])
    logits = engine.prefill(ids, state)
    for _ in range(30):
        scores = penalty(torch.tensor([ids]), torch.from_numpy(logits.copy()))[0].numpy()
        for token in set(ids[len(PROMPT) :]):
            scores[token] -= np.float32(0.4) * np.float32(ids[len(PROMPT) :].count(token))
            scores[token] -= np.float32(0.7)
        ids.append(int(scores.argmax()))
        logits = engine.step(ids[-1:], state)
    assert made(engine, number=30, **PENALTIES).tokens == ids[len(PROMPT) :]
    assert ids[len(PROMPT) :] != made(engine, number=30).tokens


@pytest.mark.parametrize("kind", BACKENDS)
def test_every_backend_makes_the_same_text(engine, kind, settings):
    found, expected = (made(one, **settings) for one in (BACKENDS[kind](engine), engine))
    assert found.tokens == expected.tokens and found.logprobs == expected.logprobs
    assert len(found.logprobs) == (12 if "logprobs" in settings else 0)


def test_log_probabilities_are_of_the_logits_at_each_step(engine):
    found, state = made(engine, logprobs=2, **PENALTIES), engine.new_state()
    logits = engine.prefill(PROMPT, state)
    for token, told in zip(found.tokens, found.logprobs, strict=True):
        expected = torch.from_numpy(logits[0]).double().log_softmax(-1)
        assert told.token == token and [t for t, _ in told.top] == expected.topk(2).indices.tolist()
        found = [told.logprob, *(p for _, p in told.top)]
        np.testing.assert_allclose(found, [expected[token], *expected.topk(2).values], rtol=1e-12, atol=1e-12)
        logits = engine.step([token], state)


def test_speculation_makes_the_same_text(cpu_target, tmp_path, settings):
    """A choice is made of the logits after verified tokens alone, and penalties see those."""
    engine = Engine.load(tiny.write_bundle(tmp_path / "b", target=cpu_target, state_dtype="fp16-deferred"), threads=1)
    plain = made(engine, number=60, ignore_eos=True, **settings)

    def draft(ids, count):  # right, wrong, right, ...
        at = len(ids) - len(PROMPT)
        return [token if (at + i) % 3 else 0 for i, token in enumerate(plain.tokens[at : at + count])]

    found = made(engine, number=60, ignore_eos=True, speculate=5, draft=draft, **settings)
    assert found.tokens == plain.tokens and found.logprobs == plain.logprobs
    assert 0 < found.speculation.kept < found.speculation.drafted


def test_a_text_that_is_cut_goes_on_after_what_it_had(engine, settings):
    whole = made(engine, **settings)
    for cut in range(1, 12):
        state = engine.new_state()
        with engine.generate(PROMPT, state=state, **settings) as first:
            while len(first.tokens) < cut:
                first._next()
        rest = made(engine, [], 12 - cut, state=state, after=first, **settings)
        assert first.tokens + rest.tokens == whole.tokens and first.logprobs + rest.logprobs == whole.logprobs


def test_of_another_turn_what_was_before_is_the_prompt(engine):
    state = engine.new_state()
    first = made(engine, state=state)
    second = made(engine, [1, 2], 3, state=state, after=first)
    assert second.history == ([*PROMPT, *first.tokens, 1, 2], second.tokens)
    assert made(engine, [], 2, state=state, after=second).history[0] == second.history[0]


@pytest.mark.parametrize("kind", BACKENDS)
def test_slots_choose_by_every_option(engine, kind):
    engine = BACKENDS[kind](engine)
    slots, all_settings = engine.slots(4), list(SETTINGS.values())
    for some in (all_settings[:3], all_settings[3:]):
        samplers = [Sampler(Sampling(**settings), PROMPT) for settings in some]
        batch = [slots.join() for _ in some]
        tokens = slots.choose(batch, [PROMPT] * len(batch), samplers)
        for _ in range(11):
            tokens = slots.choose(batch, [[token] for token in tokens], samplers)
        for settings, sampler, slot in zip(some, samplers, batch, strict=True):
            expected = made(engine, **settings)
            assert (sampler.generated, sampler.logprobs) == (expected.tokens, expected.logprobs)
            slots.leave(slot)


def test_a_sampling_that_needs_the_text_is_refused_without_it(engine):
    slots = engine.slots(1)
    slot = slots.join()
    for settings in (PENALTIES, {"processors": not_twice}, {"logprobs": 0}):
        with pytest.raises(DfssmError, match=r"are of one text: give Sampler\(sampling, prompt\)"):
            slots.choose([slot], [[1]], [Sampling(**settings)])
    assert slot.tokens == 0
    assert slots.choose([slot], [[1]], [Sampling(logit_bias={9: 100})]) == [9]


def test_a_device_copies_the_row_of_logits_that_is_changed_and_no_other(engine):
    device = on_device(engine)
    slots = device.slots(4)
    batch, samplers = [slots.join() for _ in range(4)], [Sampler(Sampling()) for _ in range(4)]
    samplers[2] = Sampler(Sampling(**PENALTIES))
    counts = []
    for _ in range(4):
        before = device.backend.cuda.copied["to host"]
        slots.choose(batch, [[1]] * 4, samplers)
        counts.append(device.backend.cuda.copied["to host"] - before)
    assert counts[2:] == [4 * (8 + 4) + 4 * tiny.CONFIG.vocab_size] * 2, "and the four greedy tokens with their logits"


def test_numbers_that_are_not_finite_are_named(engine, monkeypatch):
    state = engine.new_state()
    generation = engine.generate(PROMPT, state=state, max_tokens=5, **PENALTIES)
    next(generation)
    state.logits[0, 3] = np.nan
    with pytest.raises(DfssmError, match="the model's numbers are not finite"):
        list(generation)


class TestEnds:
    def test_a_stop_id_ends_the_text_as_a_stop_string_does(self, engine):
        free = made(engine, temperature=2.0, seed=5)
        at = free.tokens.index(free.tokens[6])
        found = made(engine, temperature=2.0, seed=5, stop_ids=[free.tokens[6]])
        assert (found.finish_reason, found.tokens) == ("stop", free.tokens[:at])
        assert found.text == engine.tokenizer.decode(found.tokens)
        assert made(engine, temperature=2.0, seed=5, stop_ids=free.tokens[6]).tokens == free.tokens[:at]

    def test_what_a_stop_string_held_back_is_shown_before_a_stop_id(self, engine):
        free = made(engine, temperature=2.0, seed=5)
        found = made(engine, temperature=2.0, seed=5, stop_ids=[free.tokens[6]], stop=free.text + "\0")
        assert found.text == engine.tokenizer.decode(found.tokens) != ""

    def test_the_end_is_ignored(self, engine, monkeypatch):
        free = made(engine)
        monkeypatch.setitem(engine.config, "eos_token_id", free.tokens[3])
        assert made(engine).finish_reason == "eos" and made(engine, ignore_eos=True).tokens == free.tokens
        assert made(engine, ignore_eos=True, stop_ids=free.tokens[3]).finish_reason == "stop"
        with pytest.raises(DfssmError, match=r"eos is \(3, 4\) with ignore_eos: give one of them"):
            engine.generate(PROMPT, eos=(3, 4), ignore_eos=True)

    @pytest.mark.parametrize(
        ("settings", "named"),
        [({"stop_ids": [265]}, "token id 265 is out of range"), ({"stop_ids": "a"}, "token ids are <U1"),
         ({"logit_bias": {265: 1}}, "logit_bias names token 265: this model has ids 0 to 264")],
    )  # fmt: skip
    def test_ids_beyond_the_vocabulary_are_named_at_the_call(self, engine, settings, named):
        with pytest.raises(DfssmError, match=named):
            engine.generate(PROMPT, **settings)


def test_a_config_is_given_whole_or_by_its_fields(engine):
    config = GenerationConfig(max_tokens=7, **PENALTIES, **DRAWN)
    found = engine.generate(PROMPT, config)
    list(found)
    assert found.tokens == made(engine, number=7, **PENALTIES, **DRAWN).tokens and found.config == config
    assert engine.generate(PROMPT, config, max_tokens=3, stop="a").config.stop == ("a",)
    with pytest.raises(TypeError, match="max_token"):
        engine.generate(PROMPT, max_token=3)
