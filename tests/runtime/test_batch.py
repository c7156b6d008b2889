"""Several texts by one call, and one text by an asynchronous loop: each is the one that it is alone."""

import asyncio
import dataclasses
import logging
import threading

import pytest
from backends import BACKENDS

from dfssm.base import DfssmError
from dfssm.runtime import Completion, Engine, GenerationConfig

PROMPTS = ["hello world", [5], "é", list(range(100)) * 2, "hello world"]
CONFIG = GenerationConfig(max_tokens=14, temperature=1.5, seed=3, frequency_penalty=0.3, logprobs=1)


@pytest.fixture(scope="module")
def engine(tiny_bundle):
    return Engine.load(tiny_bundle, threads=1)


def alone(engine, prompt, config) -> Completion:
    return engine.generate(prompt, config).result()


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_texts_are_those_of_one_at_a_time(engine, kind, rows):
    configs = [dataclasses.replace(CONFIG, seed=seed, max_tokens=4 * seed) for seed in range(len(PROMPTS))]
    configs[1] = dataclasses.replace(CONFIG, temperature=0.0, stop="l")
    run_by = BACKENDS[kind](engine)
    found = run_by.generate_batch(PROMPTS, configs, rows=rows)
    assert found == [alone(run_by, prompt, config) for prompt, config in zip(PROMPTS, configs, strict=True)]
    assert {one.finish_reason for one in found} <= {"length", "eos", "stop"} and found[0].tokens == []


def test_continuations_of_one_prompt_have_seeds_that_follow_and_read_it_once(engine, monkeypatch):
    read = []
    original = type(engine).run

    def run(self, pool, rows, span, ids):
        read.append(ids.shape)
        original(self, pool, rows, span, ids)

    monkeypatch.setattr(type(engine), "run", run)
    found = engine.generate_batch([PROMPTS[3], [1, 2]], CONFIG, n=4)
    assert sum(rows * tokens for rows, tokens in read if tokens > 1) == len(PROMPTS[3]) + 2
    expected = [
        alone(engine, prompt, dataclasses.replace(CONFIG, seed=seed))
        for prompt in (PROMPTS[3], [1, 2])
        for seed in (3, 4, 5, 6)
    ]
    assert found == expected and len({tuple(one.tokens) for one in found[:4]}) == 4


def test_no_prompts_are_no_texts(engine):
    assert engine.generate_batch([]) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prompts": "hello"}, "the prompts are 'hello': give a list"),
        ({"prompts": ["a", ""]}, "the prompt is tokens"),
        ({"prompts": ["a"], "n": 0}, "n is 0: give a whole number >= 1"),
        ({"prompts": ["a"], "rows": 0}, "rows is 0"),
        ({"prompts": ["a"], "config": [CONFIG, CONFIG]}, "1 prompts and 2 configs: give each prompt one"),
        ({"prompts": ["a"], "stop_ids": [1000]}, "token id 1000 is out of range"),
    ],
)
def test_what_is_no_batch_is_named(engine, arguments, named):
    with pytest.raises(DfssmError, match=named):
        engine.generate_batch(**arguments)


def test_an_error_of_one_text_is_raised(engine):
    def fail(ids, logits):
        raise ZeroDivisionError

    configs = [CONFIG, dataclasses.replace(CONFIG, processors=fail)]
    with pytest.raises(ZeroDivisionError):
        engine.generate_batch(PROMPTS[:2], configs)


def test_a_result_is_the_text_that_was_iterated(engine):
    generation = engine.generate("hello", CONFIG)
    pieces = [next(generation)]
    result = generation.result()
    assert result == generation.result() == alone(engine, "hello", CONFIG) and result.text.startswith(pieces[0])
    assert result.logprobs == generation.logprobs and len(result.logprobs) == len(result.tokens) == 14


class TestAsync:
    def test_pieces_are_those_of_the_plain_loop(self, engine):
        async def collect():
            threads.add(threading.get_ident())
            return [piece async for piece in engine.generate("hello", CONFIG, processors=remember)]

        def remember(ids, logits):
            threads.add(threading.get_ident())
            return logits

        threads: set[int] = set()
        assert asyncio.run(collect()) == list(engine.generate("hello", CONFIG)) and len(threads) > 1

    def test_two_texts_at_a_time(self, engine):
        async def collect(prompt):
            return "".join([piece async for piece in engine.generate(prompt, CONFIG)])

        async def both():
            return await asyncio.gather(collect("hello"), collect("é"))

        assert asyncio.run(both()) == [alone(engine, prompt, CONFIG).text for prompt in ("hello", "é")]

    def test_a_cancelled_loop_closes_the_text_when_its_step_has_ended(self, engine):
        """The state is then of one moment, and free for another."""
        begun, go_on = threading.Event(), threading.Event()

        def wait(ids, logits):
            if len(ids) > 4:
                begun.set()
                assert go_on.wait(60)
            return logits

        async def cancel():
            async def collect():
                async for _ in generation:
                    pass

            task = asyncio.create_task(collect())
            await asyncio.to_thread(begun.wait)
            task.cancel()
            await asyncio.sleep(0)
            assert generation.finish_reason is None, "its step runs"
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task

        state = engine.new_state()
        generation = engine.generate([1, 2, 3], max_tokens=20, state=state, processors=wait, ignore_eos=True)
        asyncio.run(cancel())
        assert generation.finish_reason == "cancelled" and state.tokens[0] == 3 + len(generation.tokens) > 3
        engine.generate([], state=state, max_tokens=2).result()

    def test_an_error_is_raised_and_closes_the_text(self, engine):
        async def collect():
            async for _ in generation:
                pass

        def fail(ids, logits):
            raise ZeroDivisionError

        generation = engine.generate("hello", processors=fail)
        with pytest.raises(ZeroDivisionError):
            asyncio.run(collect())
        assert generation.finish_reason == "cancelled"


def test_what_things_say_of_themselves(engine):
    state, slots = engine.new_state(2), engine.slots(3)
    engine.prefill([[1, 2], [3, 4]], state)
    slots.run([slots.join()], [[1]])
    text = engine.generate([1, 2, 3], max_tokens=4, ignore_eos=True)
    assert repr(engine) == f"<Engine {engine.folder}: {engine.manifest.target}, fp16 states, threads=1>"
    assert repr(state) == "<State of 2 sequences: [2, 2] tokens read, 0.0 MB>"
    assert repr(slots) == "<Slots: 1 of 3 taken>" and repr(slots._slots[0]) == "<Slot: row 0, 1 tokens read>"
    assert repr(text) == "<Generation: 3 + 0 tokens, not finished>"
    text.result()
    assert repr(text) == "<Generation: 3 + 4 tokens, length>"


def test_the_librarys_logger_tells_of_engines_and_texts(tiny_bundle, caplog):
    assert not logging.getLogger("dfssm").handlers
    with caplog.at_level(logging.DEBUG, logger="dfssm"):
        engine = Engine.load(tiny_bundle, threads=1)
        engine.generate([1, 2, 3], max_tokens=4, ignore_eos=True).result()
    opened, made = (record.getMessage() for record in caplog.records if record.name.startswith("dfssm.runtime"))
    assert opened.startswith(f"opened {tiny_bundle}: ") and "1 threads" in opened
    assert made.startswith("text ended: 3 + 4 tokens, length, ")
