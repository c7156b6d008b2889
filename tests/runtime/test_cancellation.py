"""Generations that are cut short: the state has read the prompt and all tokens, so the text goes on as if uncut."""

import gc
import itertools

import numpy as np
import pytest
import tiny
from backends import BACKENDS
from signals import everywhere

from dfssm.base import DfssmError
from dfssm.runtime import Engine

PROMPT = "hello world"
SETTINGS = {
    "greedy": {},
    "seeded": {"temperature": 2.0, "seed": 5},
    "nucleus": {"temperature": 2.0, "top_p": 0.9, "seed": 9},
}
TOTAL = 16


@pytest.fixture(scope="module", params=["byte level", "byte fallback"])
def engine(request, tiny_bundle):
    engine = Engine.load(tiny_bundle, threads=1)
    engine.config["eos_token_id"] = None  # random weights would end the text anywhere
    if request.param == "byte fallback":
        engine.__dict__["tokenizer"] = tiny.byte_fallback_tokenizer()
    return engine


@pytest.fixture(params=SETTINGS)
def settings(request):
    return SETTINGS[request.param]


def uncut(engine, state=None, prompt=PROMPT, **settings):
    generation = engine.generate(prompt, max_tokens=TOTAL, state=state, **settings)
    "".join(generation)
    return generation


def goes_on(engine, generation, whole, **settings):
    """What `generation` has, and what its state has still to say, are the `whole` one."""
    assert generation.state.tokens[0] == generation.prompt_tokens + len(generation.tokens)
    rest = engine.generate("", max_tokens=TOTAL - len(generation.tokens), state=generation.state, **settings)
    list(rest)
    assert generation.tokens + rest.tokens == whole.tokens
    assert generation.text + rest.text == whole.text


def by_close(generation, pieces):
    list(itertools.islice(generation, pieces))
    generation.close()


def by_with(generation, pieces):
    with generation as g:
        for _ in range(pieces):
            next(g, None)


def by_break(generation, pieces):
    for index, _ in enumerate(generation, 1):
        if index == pieces:
            break
    generation.close()


def by_an_error_of_the_caller(generation, pieces):
    with pytest.raises(ZeroDivisionError), generation:
        for index, _ in enumerate(generation, 1):
            if index == pieces:
                raise ZeroDivisionError
        raise ZeroDivisionError


@pytest.mark.parametrize("cut", [by_close, by_with, by_break, by_an_error_of_the_caller])
def test_a_text_that_is_cut_after_any_piece_goes_on(engine, settings, cut):
    whole = uncut(engine, engine.new_state(), **settings)
    for pieces in range(1, TOTAL + 1):
        generation = engine.generate(PROMPT, max_tokens=TOTAL, state=engine.new_state(), **settings)
        cut(generation, pieces)
        assert generation.finish_reason in ("cancelled", "length")
        assert list(generation) == []
        goes_on(engine, generation, whole, **settings)


def test_a_text_in_turns_of_any_length_is_one_text(engine, settings):
    whole = uncut(engine, **settings)
    for turn in range(1, TOTAL):
        state, tokens, text = engine.new_state(), [], ""
        while len(tokens) < TOTAL:
            count = min(turn, TOTAL - len(tokens))
            generation = engine.generate("" if tokens else PROMPT, max_tokens=count, state=state, **settings)
            text += "".join(generation)
            tokens += generation.tokens
        assert tokens == whole.tokens and text + generation.flush() == whole.text


def test_what_a_stop_string_held_back_is_in_the_text(engine, settings):
    """A stop string that begins with everything that may come holds all of it back."""
    whole = uncut(engine, engine.new_state(), **settings)
    stop = whole.text[:-1] + "\0"
    for pieces in range(1, 4):
        generation = engine.generate(PROMPT, max_tokens=TOTAL, state=engine.new_state(), stop=stop, **settings)
        for _ in range(pieces):
            generation._next()
        assert generation.text == ""
        generation.close()
        goes_on(engine, generation, whole, **settings)


def test_ctrl_c_at_any_point_of_a_generation(engine, settings):
    whole = uncut(engine, engine.new_state(), **settings)

    def make():
        generation = engine.generate(PROMPT, max_tokens=TOTAL, state=engine.new_state(), **settings)
        pieces = []

        def act():
            for piece in generation:
                pieces.append(piece)

        def check():
            generation.close()
            state = generation.state
            if state.rows.broken:
                state.reset()
                return False
            if generation.finish_reason == "cancelled" and not generation.tokens:
                assert state.tokens[0] in (0, generation.prompt_tokens)
                if not state.tokens[0]:  # before the prompt was read
                    return True
            shown = "".join(pieces)
            assert generation.text.startswith(shown)
            goes_on(engine, generation, whole, **settings)
            return True

        return act, check

    found = everywhere(make, most=150)
    assert found.count(True) > len(found) / 2


@pytest.mark.parametrize("kind", BACKENDS)
def test_an_error_half_way_ends_the_generation_and_breaks_its_state(engine, kind, monkeypatch):
    engine = BACKENDS[kind](engine)
    state = engine.new_state()
    generation = engine.generate(PROMPT, max_tokens=TOTAL, state=state)
    for _ in range(3):
        generation._next()
    tokens = list(generation.tokens)

    def fail(ids, start, done, release_memory=False):
        raise RuntimeError("half-way")

    monkeypatch.setattr(state.pool, "run", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        list(generation)
    assert generation.finish_reason == "cancelled" and generation.tokens == tokens
    with pytest.raises(DfssmError, match="the state is broken"):
        engine.generate("", state=state)
    monkeypatch.undo()
    state.reset()
    assert uncut(engine, state).tokens == uncut(engine).tokens


class TestOneAtATime:
    def refused(self, engine, state):
        with pytest.raises(DfssmError, match=r"a generation is open on the state: read it to its end, or close\(\) it"):
            engine.generate("a", state=state)

    def test_a_second_is_refused_until_the_first_is_closed(self, engine):
        state = engine.new_state()
        first = engine.generate(PROMPT, state=state)
        self.refused(engine, state)
        next(first)
        self.refused(engine, state)
        self.refused(engine, state.row(0))
        first.close()
        first.close()
        assert uncut(engine, state, "a").finish_reason == "length"

    def test_one_that_ended_allows_the_next(self, engine):
        state = engine.new_state()
        first = uncut(engine, state)
        second = engine.generate("", max_tokens=3, state=state)
        first.close()
        del first
        self.refused(engine, state)
        list(second)
        uncut(engine, state)

    def test_one_that_nobody_holds_is_closed(self, engine, settings):
        whole = uncut(engine, engine.new_state(), **settings)
        state, pieces = engine.new_state(), []
        for piece in engine.generate(PROMPT, max_tokens=TOTAL, state=state, **settings):
            pieces.append(piece)
            if len(pieces) == 3:
                break
        read = int(state.tokens[0]) - whole.prompt_tokens
        rest = engine.generate("", max_tokens=TOTAL - read, state=state, **settings)
        assert "".join(pieces) + "".join(rest) == whole.text

    def test_one_in_a_cycle_is_closed_when_that_is_collected(self, engine):
        state = engine.new_state()
        generation = engine.generate(PROMPT, state=state)
        generation.itself = generation
        next(generation)
        del generation
        gc.collect()
        uncut(engine, state)

    def test_one_whose_prompt_fails_is_closed(self, engine):
        state = engine.new_state()
        other = engine.new_state()
        other.model = "another"
        with pytest.raises(DfssmError, match="other weights"):
            list(engine.generate("a", state=other))
        for wrong in ({"max_tokens": -1}, {"prompt": []}):
            with pytest.raises(DfssmError):
                engine.generate(**{"prompt": "a", "state": state} | wrong)
        uncut(engine, state)

    def test_rows_are_states_of_their_own(self, engine, settings):
        whole = uncut(engine, engine.new_state(), **settings)
        batch = engine.new_state(2)
        two = [engine.generate(PROMPT, max_tokens=TOTAL, state=batch.row(row), **settings) for row in range(2)]
        for _ in range(3):
            for generation in two:
                next(generation)
        self.refused(engine, batch.row(1))
        for generation in two:
            generation.close()
            goes_on(engine, generation, whole, **settings)

    def test_a_copy_is_free(self, engine):
        state = engine.new_state()
        generation = engine.generate(PROMPT, max_tokens=TOTAL, state=state)
        next(generation)
        uncut(engine, state.clone(), "")
        assert len("".join(generation)) and np.isfinite(state.logits).all()


def test_closed_before_its_first_piece_it_has_read_nothing(engine):
    state = engine.new_state()
    with engine.generate(PROMPT, state=state) as generation:
        pass
    assert (generation.finish_reason, generation.text, state.tokens.tolist()) == ("cancelled", "", [0])
