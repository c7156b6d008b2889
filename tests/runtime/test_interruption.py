"""Ctrl-C and errors at every point of what changes a state: it is afterwards of one moment, or refused."""

import copy
import pickle
import signal
import threading

import numpy as np
import pytest
from backends import BACKENDS
from signals import everywhere

from dfssm.base import DfssmError
from dfssm.runtime import Engine

IDS = np.random.default_rng(3).integers(0, 256, 11)
CHUNK = 4


@pytest.fixture(scope="module")
def engine(tiny_bundle):
    engine = Engine.load(tiny_bundle, threads=1)
    engine.config["eos_token_id"] = None
    return engine


@pytest.fixture(params=BACKENDS)
def run_by(request, engine, monkeypatch):
    run_by = BACKENDS[request.param](engine)
    for most in ("max_tokens", "max_logits"):
        monkeypatch.setattr(run_by.backend, most, CHUNK)
    return run_by


def moment(state):
    """All that a state holds."""
    return [t.tolist() for t in (*state.tensors.values(), state.logits, state.tokens, state.recent)]


def refused_until_mended(engine, state, sound):
    """A broken state is refused, whatever it is asked for, and serves again after a reset or a copy."""
    slots = engine.slots(1)
    slot = slots.join()
    uses = (
        lambda: engine.step([1] * state.batch, state),
        lambda: engine.prefill([[1, 2]] * state.batch, state),
        lambda: engine.logits([[1, 2]] * state.batch, state),
        state.to_bytes,
        lambda: state.save("/nowhere/at/all"),
        state.clone,
        lambda: copy.copy(state),
        lambda: copy.deepcopy(state),
        lambda: pickle.dumps(state),
        lambda: engine.new_state(state.batch).copy_from(state),
        lambda: [engine.generate([1], state=state.row(row)) for row in range(state.batch)],
        lambda: [slots.load(slot, state.row(row)) for row in range(state.batch)],
    )
    for use in uses:
        with pytest.raises(DfssmError, match=r"the state is broken \(.*\): reset it, or copy a sound one into it"):
            use()
    state.copy_from(sound)
    assert moment(state) == moment(sound)
    engine.step([1] * state.batch, state)
    state.reset()
    assert moment(state) == moment(engine.new_state(state.batch))


def is_of_one_moment(engine, state, moments, sound):
    """Whether it is one of `moments`, by how many tokens its rows have read; else it must be refused."""
    try:
        state.require_sound()
    except DfssmError:
        refused_until_mended(engine, state, sound)
        return False
    assert moment(state) == moments[tuple(state.tokens.tolist())]
    return True


def moments_of(engine, parts, start):
    """Tokens read -> the state then, when `parts` i64[B,T] are read one after the other."""
    state = start.clone()
    found = {tuple(state.tokens.tolist()): moment(state)}
    for part in parts:
        engine.prefill(part, state)
        found[tuple(state.tokens.tolist())] = moment(state)
    return found


@pytest.mark.parametrize("call", ["prefill", "logits", "steps"])
def test_ctrl_c_in_a_run_leaves_a_moment_or_a_broken_state(run_by, call):
    ids = np.stack([IDS, IDS[::-1]])
    start = run_by.new_state(2)
    run_by.prefill([[7], [8]], start)
    size = 1 if call == "steps" else CHUNK
    moments = moments_of(run_by, [ids[:, at : at + size] for at in range(0, len(IDS), size)], start)

    def make():
        state = start.clone()
        run_by._pool(state)

        def steps(ids, state):
            for column in ids.T:
                run_by.advance(column, state)

        act = steps if call == "steps" else getattr(run_by, call)
        return lambda: act(ids, state), lambda: is_of_one_moment(run_by, state, moments, start)

    found = everywhere(make)
    assert any(found) and not all(found)


def test_a_signal_keeps_what_was_read(engine):
    """Nearly all come while the library runs: its run ends and is counted, then they are raised."""
    ids = np.random.default_rng(1).integers(0, engine.vocab_size, 64 * 64)
    moments = moments_of(engine, [ids[None, at : at + 64] for at in range(0, len(ids), 64)], engine.new_state())
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    state, sound, read = engine.new_state(), 0, set()
    try:
        for trial in range(40):
            state.reset()
            with pytest.raises(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.0005 * trial)  # in here: a busy machine is late
                while True:
                    engine.prefill(ids, state)
                    state.reset()
            sound += is_of_one_moment(engine, state, moments, engine.new_state())
            read.add(int(state.tokens[0]))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert sound > 20 and len(read) > 3, (sound, read)


def test_a_run_that_fails_half_way_breaks_its_rows_alone(run_by, monkeypatch):
    state = run_by.new_state(3)
    ids = np.arange(9).reshape(3, 3)
    run_by.prefill(ids, state)
    before = moment(state.row(0)), moment(state.row(2))
    pool = run_by._pool(state)

    def fail(ids, start, done, release_memory=False):
        pool.write(start, {name: tensor.copy() + 1 for name, tensor in state.row(2).tensors.items()})
        raise RuntimeError("half-way")

    with monkeypatch.context() as patch:
        patch.setattr(pool, "run", fail)
        with pytest.raises(RuntimeError, match="half-way"):
            run_by.step([1], state.row(1))
    assert (moment(state.row(0)), moment(state.row(2))) == before
    for use in (state.to_bytes, lambda: run_by.step([1, 2, 3], state), lambda: run_by.prefill([[1]] * 3, state)):
        with pytest.raises(DfssmError, match="row 1 of the state is broken .*: reset it"):
            use()
    run_by.step([4], state.row(2))
    state.row(1).copy_from(state.row(0))
    run_by.step([1, 1, 2], state)
    assert state.row(0).logits.tolist() == state.row(1).logits.tolist()


def test_a_state_that_another_thread_runs_is_refused(engine, monkeypatch):
    state = engine.new_state()
    engine.step([1], state)
    running, go = threading.Event(), threading.Event()
    original = type(state.pool).run

    def slow(pool, *arguments):
        running.set()
        assert go.wait(10)
        original(pool, *arguments)

    monkeypatch.setattr(type(state.pool), "run", slow)
    thread = threading.Thread(target=engine.step, args=([2], state))
    thread.start()
    assert running.wait(10)
    with pytest.raises(DfssmError, match="or another thread runs it now"):
        state.to_bytes()
    go.set()
    thread.join()
    assert state.tokens.tolist() == [2] and state.to_bytes()


def test_ctrl_c_in_what_writes_a_state(run_by):
    source, old = run_by.new_state(2), run_by.new_state(2)
    run_by.prefill([[1, 2], [3, 4]], source)
    run_by.prefill([[5, 6, 7], [8, 9, 10]], old)
    kept = [old.row(row).clone() for row in range(2)]
    acts = {
        "copy": lambda state: state.copy_from(source),
        "reset": lambda state: state.reset(),
        "copy to a row": lambda state: state.row(1).copy_from(source.row(0)),
        "reset a row": lambda state: state.row(1).reset(),
    }
    for name, act in acts.items():
        state = old.clone()
        run_by._pool(state)
        act(state)
        moments = {tuple(s.tokens.tolist()): moment(s) for s in (old, state)}

        def make(act=act, moments=moments):
            state = old.clone()
            run_by._pool(state)
            run_by.step([1, 1], state)
            state.copy_from(old)
            return lambda: act(state), lambda: is_of_one_moment(run_by, state, moments, old)

        assert any(everywhere(make)), name
    assert [moment(old.row(row)) for row in range(2)] == [moment(k) for k in kept]


SLOT_ACTS = {
    "run": lambda slots, three, state: slots.run(three, [[1, 2], [3, 4], [5, 6]]),
    "run in another order": lambda slots, three, state: slots.run(three[::-1], [[1, 2], [3, 4], [5, 6]]),
    "leave": lambda slots, three, state: slots.leave(three[0]),
    "reset": lambda slots, three, state: slots.reset(three[1]),
    "copy": lambda slots, three, state: slots.copy(three[1], three[2]),
    "load": lambda slots, three, state: slots.load(three[1], state),
    "save": lambda slots, three, state: slots.save(three[1], state),
    "join": lambda slots, three, state: slots.join(),
}


@pytest.mark.parametrize("act", SLOT_ACTS)
def test_ctrl_c_in_slots_breaks_no_row_but_those_that_change(run_by, act):
    """Each slot has what it had or what it was to get, or is refused; and all serve again once they are reset."""
    prompts = [[1], [2, 3], [4, 5, 6]]
    loaded = run_by.new_state()
    run_by.prefill([9, 8, 7, 6, 5], loaded)

    def prepared():
        slots = run_by.slots(4)
        three = [slots.join() for _ in prompts]
        for slot, prompt in zip(three, prompts, strict=True):
            slots.run([slot], [prompt])
        return slots, three, loaded.clone()

    def saved(slots, slot):
        state = run_by.new_state()
        slots.save(slot, state)
        return moment(state)

    def seen(slots, three):
        return [saved(slots, slot) if slot.row >= 0 else "left" for slot in three]

    slots, three, state = prepared()
    before = seen(slots, three)
    SLOT_ACTS[act](slots, three, state)
    after, state_after = seen(slots, three), moment(state)

    def make():
        slots, three, state = prepared()

        def check():
            assert sorted(slot.row for slot in three if slot.row >= 0)[-1] < len(slots)
            broken = 0
            for index, slot in enumerate(three):
                if slot.row < 0:
                    assert act == "leave" and index == 0
                    continue
                try:
                    found = saved(slots, slot)
                except DfssmError as error:
                    assert "is broken (" in str(error)
                    assert before[index] != after[index] or "order" in act, "this one was not to change"
                    broken += 1
                    with pytest.raises(DfssmError, match="is broken"):
                        slots.run([slot], [[1]])
                    slots.reset(slot)
                else:
                    assert found in (before[index], after[index])
            if act == "save" and state.span[0] not in state.rows.broken:
                assert moment(state) in (moment(loaded), state_after)
            here = [slot for slot in three if slot.row >= 0]
            logits = slots.run(here, [[1]] * len(here))
            assert np.isfinite(logits).all() and len({slot.row for slot in here}) == len(here)
            slots.join()
            return broken

        return lambda: SLOT_ACTS[act](slots, three, state), check

    assert 0 in everywhere(make)
