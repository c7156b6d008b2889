"""The choice of a token where the logits are: what goes between host and device for it, and that it is the host's."""

import numpy as np
import pytest
import tiny
from backends import on_device

from dfssm.base import DfssmError
from dfssm.runtime import Engine
from dfssm.runtime.sampling import Sampling, largest

PROMPT = [5, 6, 7]
GREEDY, TOP_K = {}, {"temperature": 0.9, "top_k": 5, "seed": 3}
SETTINGS = [
    GREEDY,
    TOP_K,
    {"temperature": 2.0, "top_k": 40, "top_p": 0.7, "seed": 4},
    {"temperature": 1.1, "top_k": 1},
    {"temperature": 0.8, "top_k": 1000, "seed": 5},
    {"temperature": 1.5, "top_p": 0.8, "seed": 6},
    {"temperature": 1.0, "seed": 7},
]


def tokens_of(engine, number, state=None, prompt=PROMPT, **settings) -> list[int]:
    with engine.generate(prompt, max_tokens=number, eos=(), state=state, **settings) as text:
        list(text)
        return text.tokens


@pytest.mark.parametrize("most", [1024, 4, 0])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_tokens_are_those_that_the_host_chooses(engine, settings, most):
    device = on_device(engine)
    device.backend.cuda.most_largest = most
    expected = tokens_of(engine, 12, **settings)
    assert tokens_of(device, 12, **settings) == expected
    state = device.new_state()
    assert tokens_of(device, 12, state, **settings) == expected
    theirs = engine.new_state()
    tokens_of(engine, 12, theirs, **settings)
    assert state.logits.tolist() == theirs.logits.tolist(), "they come when they are asked for"


@pytest.mark.parametrize(
    "settings, to_device, to_host",
    [
        (GREEDY, 0, 8 + 4),
        (TOP_K, 8, 5 * (8 + 4)),
        ({"temperature": 1.0, "top_p": 0.9, "seed": 1}, 8 + 4, (8 + 4) * tiny.CONFIG.vocab_size + 8),
        ({"temperature": 1.0, "seed": 1}, 8 + 4, (8 + 4) * tiny.CONFIG.vocab_size + 8),
    ],
    ids=["greedy", "top k", "top p", "of all"],
)
@pytest.mark.parametrize("kind", [{}, {"rtx": True}], ids=["trt", "rtx"])
def test_what_a_token_costs(engine, settings, to_device, to_host, kind):
    """One wait; the token that was chosen on the device is read there. (Its most are all of these logits.)"""
    counts = []
    for number in (5, 15):
        device = on_device(engine, **kind)
        state, cuda = device.new_state(), device.backend.cuda
        device.prefill(PROMPT, state)
        before = cuda.syncs, cuda.copied["to device"], cuda.copied["to host"], cuda.launches
        generation = device.generate([], max_tokens=number, eos=(), state=state, **settings)
        for _ in generation:
            pass
        after = cuda.syncs, cuda.copied["to device"], cuda.copied["to host"], cuda.launches
        counts.append(np.subtract(after, before))
    assert (counts[1] - counts[0]).tolist() == [10, 10 * to_device, 10 * to_host, 10]


def test_a_library_of_an_earlier_bundle(engine):
    """It has no sum of the weights: all logits come to the host."""
    device = on_device(engine)
    device.backend.cuda.weighs = False
    device.backend.cuda.total_weight = None
    for settings in SETTINGS[-2:]:
        assert tokens_of(device, 5, **settings) == tokens_of(engine, 5, **settings)


@pytest.mark.parametrize("top_p", [1.0, 0.99])
def test_a_token_that_is_none_of_the_largest(engine, top_p):
    """All logits are asked for where the choice is not among those that came; it is the same."""
    settings = {"temperature": 50.0, "top_p": top_p, "seed": 2}  # all but flat
    device = on_device(engine)
    device.backend.cuda.most_largest = tiny.CONFIG.vocab_size // 2
    state, cuda = device.new_state(), device.backend.cuda
    tokens_of(device, 3, state, **settings)
    syncs = cuda.syncs
    assert tokens_of(device, 40, state, [], **settings) == tokens_of(engine, 43, **settings)[3:]
    assert (50 < cuda.syncs - syncs < 80) if top_p == 1 else (cuda.syncs - syncs == 80)


def test_temperatures_of_a_batch_and_their_change(engine):
    """Each row has its own, by which its logits are weighed from the next step on."""
    found = []
    for run in (engine, on_device(engine, max_batch=3)):
        slots = run.slots(3)
        batch, tokens = [slots.join() for _ in range(3)], [[[1], [2], [3]]]
        for temperatures in 4 * [(0.5, 1.0, 2.0)] + 4 * [(1.0, 1.0, 0.0)]:
            samplings = [Sampling(temperature, seed=4) for temperature in temperatures]
            tokens.append([[token] for token in slots.choose(batch, tokens[-1], samplings)])
        found.append(tokens)
    assert found[0] == found[1]


def test_another_token_than_the_chosen_is_read(engine):
    device = on_device(engine)
    ours, theirs = device.new_state(), engine.new_state()
    for state, run in ((ours, device), (theirs, engine)):
        tokens_of(run, 4, state)
        run.advance(np.array([9]), state)
        tokens_of(run, 2, state, prompt=[])
        run.prefill([3, 2, 1], state)
        tokens_of(run, 2, state, prompt=[])
    assert ours.logits.tolist() == theirs.logits.tolist() and ours.recent.tolist() == theirs.recent.tolist()


def test_what_a_step_left_is_not_taken_for_what_a_prompt_left(engine):
    """Neither the choice of the last step, nor its token, which lay where the next one is read."""
    found = []
    for run in (engine, on_device(engine)):
        slots, state, token = run.slots(1), run.new_state(), 1
        slot, made = slots.join(), []
        for _ in range(3):
            (token,) = slots.choose([slot], [[token]], [Sampling()])
        for ids in ([9, 8, 7], [token]):
            made += slots.choose([slot], [ids], [Sampling()])
        slots.save(slot, state)
        found.append((made, state.logits.tolist()))
    assert found[0] == found[1]


def test_rows_of_a_batch_are_continued_each(engine):
    """Rows of one pool in turn: logits of one stay where they are, or come to the host, while another runs."""
    device = on_device(engine)
    ours, theirs = device.new_state(3), engine.new_state(3)
    found = []
    for run, state in ((device, ours), (engine, theirs)):
        run.prefill([[1, 2, 3], [4, 5, 6], [7, 8, 9]], state)
        found.append([tokens_of(run, 2, state.row(row), [], **TOP_K) for row in (1, 2, 1, 0, 2)])
        found[-1].append(run.step([1, 2, 3], state).tolist())
        found[-1].append(tokens_of(run, 3, state.row(2), [], **GREEDY))
        state.row(0).reset()
        found[-1].append([state.logits.tolist(), state.tokens.tolist()])
    assert found[0] == found[1]


def test_a_batch_of_slots_chooses(engine):
    """Sequences with samplings of their own, which come and go, get the tokens that they get alone."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, engine.vocab_size, 4) for _ in SETTINGS]
    samplings = [Sampling(**settings) for settings in SETTINGS]
    expected = [tokens_of(engine, 6, prompt=prompt, **s) for prompt, s in zip(prompts, SETTINGS, strict=True)]
    for run_by in (engine, on_device(engine, max_batch=len(SETTINGS))):
        slots = run_by.slots(len(SETTINGS))
        there = [slots.join() for _ in SETTINGS]
        found = [slots.choose([slot], [p], [s]) for slot, p, s in zip(there, prompts, samplings, strict=True)]
        for number in range(1, 6):
            some = rng.permutation(len(SETTINGS)) if number == 3 else range(len(SETTINGS))
            batch = [there[i] for i in some]
            made = slots.choose(batch, [found[i][-1:] for i in some], [samplings[i] for i in some])
            for i, token in zip(some, made, strict=True):
                found[i].append(token)
        assert found == expected
    with pytest.raises(DfssmError, match="7 slots and 1 samplings: give each slot one"):
        slots.choose(there, np.ones((7, 1), int), samplings[:1])


@pytest.mark.parametrize("top_k, to_host", [(0, 12), (5, 60)], ids=["greedy", "top k"])
def test_logits_of_a_batch_stay_on_the_device(engine, top_k, to_host):
    device = on_device(engine)
    slots, cuda = device.slots(3), device.backend.cuda
    batch, sampling = [slots.join() for _ in range(3)], Sampling(0.9, top_k, seed=1) if top_k else Sampling()
    tokens = [[1], [2], [3]]
    for number in range(6):
        before = cuda.copied["to host"], cuda.syncs
        tokens = [[token] for token in slots.choose(batch, tokens, [sampling] * 3)]
        if number > 1:
            assert (cuda.copied["to host"] - before[0], cuda.syncs - before[1]) == (3 * to_host, 1)


def test_logits_that_were_written_count(engine):
    """Whoever has looked at the logits may have changed them: the choice is from what is there."""
    device = on_device(engine)
    state = device.new_state()
    tokens_of(device, 4, state)
    state.logits[0] = np.arange(device.vocab_size) % 7
    assert device.choose(state, Sampling()) == (6, 6.0)
    kept = state.clone()
    kept.logits[0, 3] = 50
    tokens_of(device, 2, state)
    state.copy_from(kept)
    assert device.choose(state, Sampling()) == (3, 50.0)


def test_numbers_that_are_not_finite_are_named(cpu_target, tmp_path):
    edit = tiny.not_a_number("layers.1.scan.D")
    engine = Engine.load(tiny.write_bundle(tmp_path / "b", target=cpu_target, edit=edit), threads=1)
    device = on_device(engine)
    state = device.new_state()
    device.advance(np.array([3]), state)
    for _ in range(2):
        token, logit = device.choose(state, Sampling())
        assert not np.isfinite(logit)
        device.advance(np.array([token]), state)
    with pytest.raises(DfssmError, match="not finite"):
        device.require_finite(state)


def test_largest_is_a_stable_sort():
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 300):
        for kind in ("plain", "ties", "zeros", "not finite"):
            logits = rng.standard_normal(size).astype(np.float32)
            if kind == "ties":
                logits = np.round(logits)
            elif kind == "zeros":
                logits = rng.choice(np.array([0.0, -0.0], np.float32), size)
            elif kind == "not finite":
                logits = rng.choice(np.array([np.nan, np.inf, -np.inf, 1, 2], np.float32), size)
            # NaN first, then falling; the lower token first
            expected = sorted(range(size), key=lambda i: (not np.isnan(logits[i]), -np.nan_to_num(logits[i], nan=0), i))  # noqa: B023
            for count in {1, 2, 5, size, size + 3}:
                tokens, values = largest(logits, count)
                assert tokens.tolist() == expected[:count]
                np.testing.assert_array_equal(values, logits[tokens])
