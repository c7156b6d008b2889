"""Texts that are made together against each made alone: whoever joins, leaves or goes back, and whatever fails."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from backends import BACKENDS, on_device

from dfssm.base import DfssmError
from dfssm.runtime import Engine, GenerationConfig, QueueFull, Sampler, Scheduler
from dfssm.runtime.prefix_cache import PrefixCache, size
from dfssm.runtime.scheduler import side_by_side
from dfssm.runtime.text import TextStream

CAPACITY = 4


@pytest.fixture(scope="module")
def engine(tiny_bundle) -> Engine:
    return Engine.load(tiny_bundle, threads=1)


@pytest.fixture(params=["ort", "device"])
def run_by(request, engine) -> Engine:
    return BACKENDS[request.param](engine)


def alone(engine, prompt, config, forced=()):
    """The tokens of a text that begins with `forced`, by the engine's steps: nothing of generate or the scheduler."""
    state, sampler = engine.new_state(), Sampler(config, prompt, forced)
    tokens, ends = list(forced), engine.ends(config)
    logits = engine.prefill(prompt, state)[0]
    for token in forced:
        logits = engine.step(token, state)[0]
    while len(tokens) < config.max_tokens:
        token = sampler.choose(logits, int(state.tokens[0]))
        if token in ends:
            break
        tokens.append(token)
        logits = engine.step(token, state)[0]
    return tokens


def run(scheduler):
    while scheduler.step():
        pass


@pytest.mark.parametrize("seed", range(3))
def test_a_random_schedule_changes_no_text(run_by, seed):
    rng = np.random.default_rng(seed)
    scheduler = Scheduler(run_by, CAPACITY, queue=100)
    shared = rng.integers(0, 256, 200)
    requests, forced = [], {}
    done = dict.fromkeys(("submit", "cancel", "rewind"), 0)
    for _ in range(120):
        action = rng.choice(["submit", "step", "step", "step", "cancel", "rewind"])
        open_ = [request for request in requests if not request.finish_reason]
        if action == "submit":
            prompt = np.append(shared[: rng.integers(0, 200)], rng.integers(0, 256, rng.integers(1, 9)))
            temperature, penalty = rng.choice([0.0, 1.0]), rng.choice([0.0, 1.0])
            config = GenerationConfig(
                max_tokens=rng.integers(0, 20), temperature=temperature, seed=len(requests), presence_penalty=penalty
            )
            requests.append(scheduler.submit(prompt, config))
        elif action == "step":
            scheduler.step()
            continue
        elif not open_ or rng.random() < 0.5:
            continue
        elif action == "cancel":
            rng.choice(open_).cancel()
        elif action == "rewind":
            request = rng.choice(open_)
            if request.cancelled or request.back:
                continue
            count = int(rng.integers(0, len(request.tokens) + 1))
            request.rewind(count, seed=int(rng.integers(100)))
            forced[request] = request.tokens[:count]
        done[action] += 1
    run(scheduler)
    assert scheduler.running == scheduler.waiting == 0 and min(done.values()) > 3 and scheduler.reused
    for request in requests:
        expected = alone(run_by, request.prompt, request.config, forced.get(request, ()))
        if request.finish_reason == "cancelled":
            assert request.tokens == expected[: len(request.tokens)]
        else:
            assert request.tokens == expected
            stream = TextStream(run_by.vocabulary, request.prompt.tolist())
            assert request.text == "".join(map(stream.push, expected)) + stream.flush()


def test_threads_get_the_texts_that_generate_makes(engine):
    """With what ends texts early: the model's own end, ids, stop strings over several tokens."""
    configs = [GenerationConfig(temperature=1.5, seed=seed, max_tokens=40, logprobs=2) for seed in range(24)]
    for index, config in enumerate(configs):
        text = list(engine.generate(f"hello {index}", config))
        if index % 3 == 1:
            configs[index] = replace(config, stop=["".join(text)[11:15], "".join(text)[20:22]])
        if index % 3 == 2:
            configs[index] = replace(config, stop_ids=range(0, 256, 16))
    expected = [engine.generate(f"hello {index}", config) for index, config in enumerate(configs)]
    texts = ["".join(generation) for generation in expected]
    found = {}
    with Scheduler(engine, CAPACITY) as scheduler:

        def client(first):
            for index in range(first, len(configs), 8):
                request = scheduler.submit(f"hello {index}", configs[index])
                found[index] = "".join(request), request

        threads = [threading.Thread(target=client, args=(first,)) for first in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    for index, generation in enumerate(expected):
        text, request = found[index]
        assert text == request.text == texts[index]
        for name in ("tokens", "finish_reason", "logprobs", "prompt_tokens"):
            assert getattr(request, name) == getattr(generation, name), name
        assert request.submitted <= request.begun <= request.ended
    assert {request.finish_reason for _, request in found.values()} == {"length", "stop", "eos"}


def test_a_prompt_holds_no_text_up_and_prompts_take_turns(engine):
    scheduler = Scheduler(engine, CAPACITY, prefix_cache=0)
    piece = engine.backend.max_tokens
    text = scheduler.submit([1], max_tokens=30, ignore_eos=True)
    scheduler.step()
    first, second = (scheduler.submit(np.full(5 * piece, token), max_tokens=1) for token in (2, 3))
    for _ in range(10):
        before, read = len(text.tokens), scheduler.read
        scheduler.step()
        assert len(text.tokens) == before + 1 and scheduler.read == read + piece
        if not second.finish_reason:
            assert 0 <= first.read - second.read <= piece if first.slot and second.slot else True
    assert first.finish_reason == second.finish_reason == "length"


def test_short_prompts_are_read_together_and_none_is_overtaken(engine):
    scheduler = Scheduler(engine, 2)
    requests = [scheduler.submit([token, 1, 2], max_tokens=2, ignore_eos=True) for token in range(6)]
    ended = []
    while scheduler.step():
        ended += [request for request in requests if request.finish_reason and request not in ended]
        assert scheduler.read in (6, 12, 18), "two prompts a round"
    assert ended == requests[:4] and requests[5].finish_reason == "length"


def test_a_shared_prefix_is_read_once(engine):
    piece = engine.backend.max_tokens
    prefix = np.random.default_rng(0).integers(0, 256, 32 * piece)
    prompts = [np.append(prefix, [index, 7]) for index in range(16)]
    scheduler = Scheduler(engine, 8)
    requests = [scheduler.submit(prompt, max_tokens=3) for prompt in prompts]
    run(scheduler)
    assert scheduler.read == len(prefix) + 16 * 2 and scheduler.reused == 15 * len(prefix)
    assert [request.cached_tokens for request in requests] == [0] + 15 * [len(prefix)]
    again = scheduler.submit(prompts[0], max_tokens=3)  # later
    run(scheduler)
    assert scheduler.read == len(prefix) + 17 * 2
    for request in (*requests, again):
        assert request.tokens == alone(engine, request.prompt, request.config)


def test_one_prompt_of_several_texts_is_read_once(engine):
    """Also where no piece ends with it."""
    prompt = np.random.default_rng(0).integers(0, 256, 100)
    scheduler = Scheduler(engine, 8)
    requests = [scheduler.submit(prompt, max_tokens=5, temperature=1.0, seed=seed) for seed in range(16)]
    run(scheduler)
    assert scheduler.read == len(prompt)
    for request in requests:
        assert request.tokens == alone(engine, prompt, request.config)


def test_where_prompts_part_is_kept_from_the_second_one_on(engine):
    piece = engine.backend.max_tokens
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, 256, 2 * piece)
    scheduler = Scheduler(engine, 1)
    cached = []
    for _ in range(3):
        request = scheduler.submit(np.append(prefix, rng.integers(0, 256, 3 * piece)), max_tokens=1)
        run(scheduler)
        cached.append(request.cached_tokens)
    assert cached == [0, 0, len(prefix)]


def test_the_cache_is_bounded_by_bytes_and_forgets_what_was_used_least_recently(engine):
    one = size(engine.new_state())
    cache = PrefixCache("model", 2, 3 * one)
    keys = [cache.keys(np.array([token, token]))[0] for token in range(4)]
    for key in keys[:3]:
        cache.put(key, engine.new_state())
    cache.find([keys[0]])
    cache.put(keys[3], engine.new_state())
    assert [key in cache for key in keys] == [True, False, True, True]
    assert cache.nbytes == 3 * one and len(cache) == 3
    assert cache.find(keys)[0] == 2 and cache.find([keys[1]]) == (0, None)
    assert PrefixCache("other", 2, 1).keys(np.array([0, 0])) != keys[:1], "another model's"
    assert PrefixCache("model", 2, 0).keys(np.array([0, 0])) == [], "nothing is kept"
    with pytest.raises(DfssmError, match=f"prefix_cache is {one - 1}: one state takes {one} bytes"):
        Scheduler(engine, prefix_cache=one - 1)


def test_one_failure_is_one_request(engine):
    def refuses(ids, logits):
        raise ZeroDivisionError("of a processor")

    scheduler = Scheduler(engine, CAPACITY)
    good = [scheduler.submit([token], max_tokens=8, ignore_eos=True) for token in (1, 2)]
    bad = scheduler.submit([3], processors=refuses)
    infinite = scheduler.submit([4], max_tokens=8, ignore_eos=True)
    later = scheduler.submit([5], max_tokens=8, ignore_eos=True)
    for _ in range(3):
        scheduler.step()
    for tensor in scheduler.slots.pool.tensors.values():
        tensor[infinite.row] = np.nan
    run(scheduler)
    assert bad.finish_reason == infinite.finish_reason == "error"
    with pytest.raises(ZeroDivisionError, match="of a processor"):
        next(bad)
    with pytest.raises(DfssmError, match="not finite after .* first in conv_state of layer 0"):
        "".join(infinite)
    for request in (*good, later):
        assert request.tokens == alone(engine, request.prompt, request.config)
    assert scheduler.running == 0


def test_a_run_that_fails_ends_those_that_were_in_it(engine, monkeypatch):
    scheduler = Scheduler(engine, 2)
    requests = [scheduler.submit([token], max_tokens=4, ignore_eos=True) for token in range(3)]
    scheduler.step()
    with monkeypatch.context() as patch:
        patch.setattr(scheduler.slots, "read", lambda *run: [][0])
        scheduler.step()
    run(scheduler)
    assert [request.finish_reason for request in requests] == ["error", "error", "length"]
    assert isinstance(requests[0].error, IndexError)
    assert requests[2].tokens == alone(engine, [2], requests[2].config)


def test_a_bug_of_the_scheduler_leaves_nobody_waiting(engine, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda given: None)
    scheduler = Scheduler(engine)
    monkeypatch.setattr(scheduler, "_write", lambda: [][0])
    with scheduler:
        request = scheduler.submit([1])
        with pytest.raises(DfssmError, match="ended by an error"):
            "".join(request)
        with pytest.raises(DfssmError, match="is closed"):
            scheduler.submit([1])


def test_cancelling_frees_the_slot_before_the_next_step(engine):
    scheduler = Scheduler(engine, 1)
    first, second, third = (scheduler.submit([token], max_tokens=100, ignore_eos=True) for token in (1, 2, 3))
    scheduler.step()
    assert (scheduler.running, scheduler.waiting) == (1, 2)
    written = len(first.tokens)
    with first:
        second.cancel()
    scheduler.step()
    assert first.finish_reason == second.finish_reason == "cancelled" and len(first.tokens) == written
    assert (scheduler.running, scheduler.waiting) == (1, 0) and third.tokens
    assert "".join(first) == first.text
    first.cancel()
    first.rewind(0)
    scheduler.step()
    assert len(first.tokens) == written, "it has ended"


def test_the_queue_is_bounded_and_closing_ends_it(engine):
    scheduler = Scheduler(engine, 1, queue=2)
    requests = [scheduler.submit([1], max_tokens=3) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests are waiting: try again later"):
        scheduler.submit([1])
    scheduler.step()
    requests.append(scheduler.submit([1], max_tokens=3))
    scheduler.close()
    assert [request.finish_reason for request in requests] == ["cancelled"] * 3
    with pytest.raises(DfssmError, match="is closed"):
        scheduler.submit([1])
    with Scheduler(engine) as scheduler:
        request = scheduler.submit([1], max_tokens=20, ignore_eos=True)
        endless = scheduler.submit([1], max_tokens=10**9, ignore_eos=True)
        scheduler.close(seconds=0.5)
        assert (request.finish_reason, endless.finish_reason) == ("length", "cancelled")


def test_wrong_uses_are_named(engine):
    for arguments, message in (
        ({"slots": 0}, "slots is 0"),
        ({"queue": 0}, "queue is 0"),
        ({"prefix_cache": -1}, "prefix_cache is -1"),
    ):
        with pytest.raises(DfssmError, match=message):
            Scheduler(engine, **arguments)
    with pytest.raises(DfssmError, match="slots is 8: give a whole number from 1 to 2"):
        Scheduler(on_device(engine, max_batch=2), 8)
    scheduler = Scheduler(engine)
    for prompt, message in ((265, "of range"), ([265], "of range"), ([], r"tokens \[0\]"), ("", r"tokens \[0\]")):
        with pytest.raises(DfssmError, match=message):
            scheduler.submit(prompt)
    with pytest.raises(DfssmError, match=r"the prompt is tokens \[2, 1\]"):
        scheduler.submit([[1], [2]])
    with pytest.raises(DfssmError, match="max_tokens is -1"):
        scheduler.submit([1], max_tokens=-1)
    assert not scheduler.waiting


@pytest.mark.parametrize(
    "rows, ordered",
    [([], []), ([3, 2], [2, 3]), ([0, 2], [0, 2]), ([4, 1, 5], [4, 1, 5]), ([0, 1, 4, 5], [0, 1, 4, 5])],
)
def test_rows_move_only_where_they_must(rows, ordered):
    class Lying:
        def __init__(self, row):
            self.row = row

    assert [request.row for request in side_by_side([Lying(row) for row in rows])] == ordered
