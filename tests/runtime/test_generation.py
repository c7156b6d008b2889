import numpy as np
import pytest

from dfssm.opset import DfssmError
from dfssm.runtime import Engine


@pytest.fixture(scope="module")
def engine(tiny_bundle):
    engine = Engine.load(tiny_bundle)
    engine.config["eos_token_id"] = None  # random weights would end the text anywhere
    return engine


LIVELY = {"temperature": 2.0, "seed": 5, "max_tokens": 60}


def test_pieces_join_to_the_decoded_tokens(engine):
    generation = engine.generate("hello world", **LIVELY)
    pieces = list(generation)
    assert "".join(pieces) == generation.text == engine.tokenizer.decode(generation.tokens)
    assert len(generation.tokens) == 60 and generation.finish_reason == "length"
    assert generation.prompt_tokens == len(engine.tokenizer.encode("hello world").ids)
    assert generation.prefill_seconds > 0 and generation.decode_seconds > 0
    assert any(ord(c) > 127 for c in generation.text), "the text must have characters of several tokens"


def test_greedy_is_the_largest_logit_of_each_step(engine):
    generation = engine.generate([1, 2, 3], max_tokens=8)
    list(generation)
    state, expected = engine.new_state(), []
    logits = engine.prefill([1, 2, 3], state)
    for _ in range(8):
        expected.append(int(logits[0].argmax()))
        logits = engine.step(expected[-1:], state)
    assert generation.tokens == expected


def test_a_seed_repeats_the_text(engine):
    texts = ["".join(engine.generate("hello", temperature=1.0, seed=seed, max_tokens=40)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_stop_string_across_tokens_is_not_shown(engine):
    free = "".join(engine.generate("hello", **LIVELY))
    stop = free[20:23]
    at = free.find(stop)
    generation = engine.generate("hello", **LIVELY, stop=["never there", stop])
    assert "".join(generation) == free[:at]
    assert generation.finish_reason == "stop"
    assert "".join(engine.generate("hello", **LIVELY, stop=stop)) == free[:at]


def test_eos_ends_the_text(engine, monkeypatch):
    free = engine.generate("hello", **LIVELY)
    list(free)
    monkeypatch.setitem(engine.config, "eos_token_id", free.tokens[10])
    generation = engine.generate("hello", **LIVELY)
    list(generation)
    assert generation.finish_reason == "eos"
    assert generation.tokens == free.tokens[: free.tokens.index(free.tokens[10])]


def test_a_state_has_read_all_that_was_generated_and_continues(engine):
    """Twice twenty tokens from a state are the forty of one run: nothing is read twice or left out."""
    forty = engine.generate("hello world", max_tokens=40)
    list(forty)
    state = engine.new_state()
    first = engine.generate("hello world", max_tokens=20, state=state)
    list(first)
    assert state.tokens[0] == first.prompt_tokens + 20
    second = engine.generate("", max_tokens=20, state=state)
    list(second)
    assert first.tokens + second.tokens == forty.tokens


def test_max_tokens_zero_only_reads_the_prompt(engine):
    state = engine.new_state()
    generation = engine.generate("hello", max_tokens=0, state=state)
    assert list(generation) == [] and state.tokens[0] == generation.prompt_tokens


def test_special_tokens_are_added_to_a_fresh_text_only(engine, monkeypatch):
    calls = []
    original = engine.tokenizer

    class Recorder:
        decode = original.decode

        def encode(self, text, add_special_tokens):
            calls.append(add_special_tokens)
            return original.encode(text, add_special_tokens=add_special_tokens)

    monkeypatch.setitem(engine.__dict__, "tokenizer", Recorder())
    state = engine.new_state()
    list(engine.generate("hello", max_tokens=1, state=state))
    list(engine.generate("hello", max_tokens=1, state=state))
    assert calls == [True, False]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens is -1"),
        ({"prompt": "a", "temperature": -1}, "temperature is -1"),
    ],
)
def test_wrong_arguments_are_named_at_the_call(engine, arguments, named):
    with pytest.raises(DfssmError, match=named):
        engine.generate(**arguments)


def test_wrong_states_and_ids_are_named(engine):
    with pytest.raises(DfssmError, match="the state has 2: use state.row"):
        engine.generate("a", state=engine.new_state(2))
    with pytest.raises(DfssmError, match="the prompt is empty"):
        engine.generate("", state=engine.new_state())
    with pytest.raises(DfssmError, match="token id 1000"):
        list(engine.generate(np.array([1000])))
