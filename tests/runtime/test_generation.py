import copy
import pickle

import numpy as np
import pytest
import tiny

from dfssm.base import DfssmError
from dfssm.runtime import Engine
from dfssm.runtime.text import Vocabulary


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
        def __getattr__(self, name):
            return getattr(original, name)

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
        *(({"prompt": "a", "max_tokens": n}, f"max_tokens is {n!r}: give a whole") for n in (2.5, True, None, "5")),
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


@pytest.fixture
def scripted(engine, monkeypatch):
    """scripted(prompt, ids, state) -> the text of a generation that chooses these ids, with byte-fallback tokens."""
    tokenizer = tiny.byte_fallback_tokenizer()
    monkeypatch.setitem(engine.__dict__, "tokenizer", tokenizer)
    monkeypatch.setitem(engine.__dict__, "vocabulary", Vocabulary(tokenizer))

    def run(prompt, ids, state=None):
        script = iter(ids)
        monkeypatch.setattr(Engine, "choose", lambda *_: (next(script), 0.0))
        return "".join(engine.generate(prompt, max_tokens=len(ids), state=state))

    return run


def through_slots(engine):
    def carry(state, path):
        slots, new = engine.slots(2), engine.new_state()
        slot, other = slots.join(), slots.join()
        slots.load(slot, state)
        slots.copy(slot, other)
        slots.save(other, new)
        return new

    return carry


def through_a_file(engine):
    def carry(state, path):
        state.save(path)
        return engine.load_state(path)

    return carry


def into_a_row(engine):
    def carry(state, path):
        batch = engine.new_state(3)
        batch.row(2).copy_from(state)
        return batch.row(2)

    return carry


CARRIERS = {
    "itself": lambda engine: lambda state, path: state,
    "file": through_a_file,
    "pickle": lambda engine: lambda state, path: pickle.loads(pickle.dumps(state)),
    "deepcopy": lambda engine: lambda state, path: copy.deepcopy(state),
    "copy": lambda engine: lambda state, path: copy.copy(state),
    "clone": lambda engine: lambda state, path: state.clone(),
    "row": into_a_row,
    "slots": through_slots,
}


@pytest.mark.parametrize("carry", CARRIERS)
def test_a_turn_that_ends_inside_a_character_is_continued(engine, scripted, tmp_path, carry):
    """本語です in turns of two bytes: each turn shows the characters whose last byte it made, and none is torn."""
    carry = CARRIERS[carry](engine)
    ids, state = list("日本語です🚀é".encode()), engine.new_state()
    for begin in range(3, len(ids), 2):
        turn = ids[begin : begin + 2]
        text = scripted(ids[:begin] if begin == 3 else "", turn, state)
        before, after = (bytes(ids[:end]).decode(errors="ignore") for end in (begin, begin + 2))
        assert text == after[len(before) :]
        state = carry(state, tmp_path / "a.state")
    assert text == "é"


def test_the_prompt_may_end_inside_a_character(engine, scripted):
    for cut in range(1, 15):
        ids = list("日本語です".encode())
        before = bytes(ids[:cut]).decode(errors="ignore")
        assert scripted(ids[:cut], ids[cut:]) == "日本語です"[len(before) :]
        state = engine.new_state()  # the same, read by the engine's other calls
        engine.prefill(ids[:cut], state)
        engine.step(ids[cut : cut + 1], state)
        assert scripted("", ids[cut + 1 :], state) == "日本語です"[len(bytes(ids[: cut + 1]).decode(errors="ignore")) :]


def test_half_a_character_is_shown_where_nothing_can_follow(engine, scripted, monkeypatch):
    half = list("日本".encode())[:4]
    assert scripted([104], half) == "日\ufffd"
    assert scripted([104], half, engine.new_state()) == "日"
    script = iter(half)
    monkeypatch.setattr(Engine, "choose", lambda *_: (next(script), 0.0))
    last = engine.generate([104], max_tokens=4, state=engine.new_state())
    assert ("".join(last), last.flush(), last.flush(), last.text) == ("日", "\ufffd", "", "日\ufffd")
    monkeypatch.setitem(engine.config, "eos_token_id", 263)
    assert scripted([104], [*half, 263], engine.new_state()) == "日\ufffd"


def test_a_saved_state_of_before_there_were_recent_tokens_loads(engine, tmp_path):
    from safetensors.numpy import load_file, save_file

    state = engine.new_state()
    engine.prefill([1, 2, 3], state)
    state.save(tmp_path / "new")
    save_file(
        load_file(tmp_path / "new"),
        tmp_path / "old",
        metadata={"format": "dfssm-state", "version": "1", "model": engine.model},
    )
    old = engine.load_state(tmp_path / "old")
    assert old.recent.tolist() == [[-1] * 8] and old.tokens.tolist() == [3]
    assert engine.load_state(tmp_path / "new").recent.tolist() == [[-1] * 5 + [1, 2, 3]]


@pytest.mark.parametrize(
    "recent", ["", "[" * 9999, "[[1]]", "[[1e9,1,1,1,1,1,1,1]]", f"[{[265] * 8}]", f"[{[-2] * 8}]"]
)
def test_recent_tokens_that_are_none_are_refused(engine, tmp_path, recent):
    from safetensors.numpy import load_file, save_file

    engine.new_state().save(tmp_path / "a")
    metadata = {"format": "dfssm-state", "version": "1", "model": engine.model, "recent": recent}
    save_file(load_file(tmp_path / "a"), tmp_path / "bad", metadata=metadata)
    with pytest.raises(DfssmError, match="is not a state that this dfssm can read"):
        engine.load_state(tmp_path / "bad")


def test_a_reset_state_has_read_nothing(engine):
    state = engine.new_state(2)
    engine.prefill([[1, 2], [3, 4]], state)
    assert state.recent[:, -2:].tolist() == [[1, 2], [3, 4]]
    state.row(1).reset()
    assert state.recent[:, -2:].tolist() == [[1, 2], [-1, -1]]


@pytest.fixture
def free(engine):
    """A greedy text that nothing ends."""
    generation = engine.generate("hello", **LIVELY)
    list(generation)
    return generation


def ended(engine, **settings):
    generation = engine.generate("hello", **LIVELY, **settings)
    list(generation)
    return generation.finish_reason, generation.tokens


def test_each_of_several_ids_ends_the_text(engine, free, monkeypatch):
    early = free.tokens[4]
    late = next(token for token in free.tokens if token not in free.tokens[:5])
    assert early not in free.tokens[:4]
    for ids in ([late, early], [early, late]):
        monkeypatch.setitem(engine.config, "eos_token_id", ids)
        assert ended(engine) == ("eos", free.tokens[:4])


def test_ids_that_are_given_are_instead_of_the_models(engine, free, monkeypatch):
    monkeypatch.setitem(engine.config, "eos_token_id", free.tokens[4])
    assert ended(engine, eos=free.tokens[9]) == ("eos", free.tokens[: free.tokens.index(free.tokens[9])])
    assert ended(engine, eos=(free.tokens[2], free.tokens[1])) == ("eos", free.tokens[:1])
    assert ended(engine, eos=()) == ("length", free.tokens)


def test_end_of_text_ends_where_the_config_names_none(engine, free, monkeypatch):
    """As bundles of state-spaces' checkpoints are, of before the tokenizer's was looked at."""
    name = engine.tokenizer.id_to_token(free.tokens[4])

    class Neox:
        def token_to_id(self, token):
            return free.tokens[4] if token == "<|endoftext|>" else None

        def __getattr__(self, attribute):
            return getattr(original, attribute)

    original = engine.tokenizer
    assert name and engine.config["eos_token_id"] is None
    monkeypatch.setitem(engine.__dict__, "tokenizer", Neox())
    assert ended(engine) == ("eos", free.tokens[:4])


def test_no_stop_text_is_none(engine, free):
    assert ended(engine, stop=None) == ended(engine, stop=[]) == ("length", free.tokens)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prompt": [-1]}, "token id -1 is out of range"),
        ({"prompt": [1.0]}, "token ids are float64: give integers"),
        ({"prompt": [None]}, "token ids are object: give integers"),
        ({"prompt": [[1], [1, 2]]}, "token ids are no plain list: give integers"),
        ({"prompt": [2**70]}, "token ids are object: give integers"),
        ({"prompt": None}, "token ids are object: give integers"),
        ({"prompt": b"hello"}, "token ids are .*: give integers"),
        ({"prompt": "caf\udce9"}, r"the text 'caf\\udce9' is not UTF-8"),
        ({"prompt": "a", "max_tokens": 10**5000}, "max_tokens has over 4,000 digits: give a whole number >= 0"),
        ({"prompt": "a", "seed": -(10**5000)}, "seed has over 4,000 digits: give a whole number >= 0"),
        ({"prompt": "a", "stop": [None]}, r"stop is \[None\]: give a string"),
        ({"prompt": "a", "stop": 5}, r"stop is 5: give a string"),
        ({"prompt": "a", "eos": -1}, "token id -1 is out of range"),
        ({"prompt": "a", "eos": [265]}, "token id 265 is out of range"),
        ({"prompt": "a", "eos": ["b"]}, "token ids are <U1: give integers"),
    ],
)
def test_what_is_no_prompt_or_setting_is_named(engine, arguments, named):
    with pytest.raises(DfssmError, match=named):
        engine.generate(**arguments)
