"""Slots of one pool against states of their own: whoever joins or leaves, each sequence is what it is alone."""

import numpy as np
import pytest
import student_ref
import tiny
from backends import BACKENDS, MAX_TOKENS, on_device

from dfssm.base import DfssmError
from dfssm.runtime import Engine

CAPACITY = 4


@pytest.fixture(params=BACKENDS)
def run_by(request, engine) -> Engine:
    return BACKENDS[request.param](engine)


class Alone:
    """A sequence with a state of its own, in the engine on the CPU."""

    def __init__(self, engine):
        self.engine, self.state = engine, engine.new_state()

    def read(self, ids):
        return self.engine.prefill(ids, self.state)[0]


def equal(slots, slot, alone):
    state = slots.engine.new_state()
    slots.save(slot, state)
    assert state.tokens.tolist() == alone.state.tokens.tolist() == [slot.tokens]
    assert state.logits.tolist() == alone.state.logits.tolist()
    for name, tensor in alone.state.tensors.items():
        assert np.array_equal(state.tensors[name], tensor), name


@pytest.mark.parametrize("seed", range(3))
def test_a_random_schedule_changes_no_bit_of_any_sequence(run_by, engine, seed):
    rng = np.random.default_rng(seed)
    slots, there = run_by.slots(CAPACITY), {}
    done = dict.fromkeys(("join", "leave", "reset", "copy", "move", "run"), 0)
    for _ in range(80):
        action = rng.choice([*done, "join", "join", "run", "run"])
        taken = list(there)
        rng.shuffle(taken)
        if action == "join" and len(slots) < CAPACITY:
            there[slots.join()] = Alone(engine)
        elif action == "leave" and taken:
            slots.leave(taken[0])
            del there[taken[0]]
        elif action == "reset" and taken:
            slots.reset(taken[0])
            there[taken[0]].state.reset()
        elif action == "copy" and len(taken) > 1:
            slots.copy(*taken[:2])
            there[taken[1]].state.copy_from(there[taken[0]].state)
        elif action == "move" and taken:  # out of the pool and back into another slot
            state = run_by.new_state()
            slots.save(taken[0], state)
            slots.load(taken[-1], state)
            there[taken[-1]].state.copy_from(there[taken[0]].state)
        elif action == "run" and taken:
            batch = taken[: rng.integers(1, len(taken) + 1)]
            ids = rng.integers(0, engine.vocab_size, (len(batch), rng.choice([1, 1, 1, 3, MAX_TOKENS])))
            logits = slots.run(batch, ids)
            for slot, row, found in zip(batch, ids, logits, strict=True):
                assert found.tolist() == there[slot].read(row).tolist()
        else:
            continue
        done[action] += 1
        assert sorted(slot.row for slot in there) == list(range(len(slots)))
    assert min(done.values()) >= 2, done
    for slot, alone in there.items():
        equal(slots, slot, alone)


def rows_of(slots) -> list[list[np.ndarray]]:
    """The states of all rows, taken or not."""
    found = []
    for row in range(slots.capacity + 1):
        state = slots.engine.new_state()
        slots.pool.read(row, state.tensors)
        found.append([*state.tensors.values(), slots.pool.logits[row].copy()])
    return found


@pytest.mark.parametrize(
    "act, touched",
    [
        (lambda slots, three: slots.join(), [3]),
        (lambda slots, three: slots.leave(three[0]), [0]),
        (lambda slots, three: slots.leave(three[2]), []),
        (lambda slots, three: slots.reset(three[1]), [1]),
        (lambda slots, three: slots.copy(three[2], three[0]), [0]),
        (lambda slots, three: slots.run(three[1:2], [[7]]), [1]),
        (lambda slots, three: slots.run(three[1:], [[7, 8], [8, 9]]), [1, 2]),
    ],
    ids=["join", "leave", "leave, the last", "reset", "copy", "run of one", "run of two"],
)
def test_nothing_touches_a_row_that_it_is_not_about(run_by, act, touched):
    slots = run_by.slots(CAPACITY)
    for row in range(CAPACITY + 1):  # what lies in free rows is not zeros
        state = run_by.new_state()
        run_by.prefill([row + 1, 2], state)
        slots.pool.write(row, state.tensors)
    three = [slots.join() for _ in range(3)]
    slots.run(three, [[1, 2], [3, 4], [5, 6]])
    before = rows_of(slots)
    act(slots, three)
    after = rows_of(slots)
    changed = [i for i, pair in enumerate(zip(before, after, strict=True)) if not all(map(np.array_equal, *pair))]
    assert changed == touched


def test_decoding_of_a_changing_batch_replays_graphs(engine):
    run_by = on_device(engine)
    slots = run_by.slots(CAPACITY)
    batch = [slots.join(), slots.join()]
    for token in range(6):
        slots.run(batch, [[token], [token + 1]])
    launches = run_by.backend.cuda.launches
    assert launches == 5, "all but the first run"
    batch.append(slots.join())
    slots.run(batch, [[1], [2], [3]])
    slots.leave(batch.pop())
    for token in range(6):
        slots.run(batch, [[token], [token + 1]])
    assert run_by.backend.cuda.launches == launches + 6, "the graphs of two rows are still there"


@pytest.mark.parametrize("kind", [{}, {"in_place": False}, {"rtx": True}], ids=["in_place", "apart", "rtx"])
def test_rows_at_addresses_that_tensorrt_does_not_take(kind, cpu_target, tmp_path):
    """The stand-in refuses them, too: such rows run elsewhere, and come back."""
    config = student_ref.config("odd")
    engine = Engine.load(tiny.write_bundle(tmp_path / "b", config, cpu_target, "int8", tokenizer=False), threads=1)
    assert config.conv_dim * (config.d_conv - 1) * 4 % 256
    slots, alone = on_device(engine, **kind).slots(3), [Alone(engine) for _ in range(3)]
    three = [slots.join() for _ in alone]
    for token, some in enumerate(([0, 1, 2], [1], [1, 2], [2], [1, 2], [1, 2], [0, 1, 2], [2], [2])):
        ids = np.array([[token + row, 3][: 1 + token % 2] for row in some])
        logits = slots.run([three[row] for row in some], ids)
        for row, found, read in zip(some, logits, ids, strict=True):
            assert found.tolist() == alone[row].read(read).tolist()
    for slot, other in zip(three, alone, strict=True):
        equal(slots, slot, other)


def test_what_is_bound_and_recorded_for_batches_is_bounded(engine):
    for run_by, kept, most in ((engine, "_batches", 19), (on_device(engine, max_batch=8), "_graphs", 19)):
        slots = run_by.slots(8)
        eight, ranges, largest = [slots.join() for _ in range(8)], 0, 0
        for start in range(8):
            for stop in range(start + 1, 9):
                slots.run(eight[start:stop], [[1]] * (stop - start))
                largest = max(largest, len(getattr(slots.pool, kept)))
                ranges += 1
        assert ranges == 36 and 10 < largest <= most


def test_memory_is_given_back(engine):
    run_by = on_device(engine)
    slots = run_by.slots(CAPACITY)
    slots.run([slots.join()], [[1]])
    assert run_by.backend.cuda.memory
    del slots
    assert not run_by.backend.cuda.memory


def test_a_pool_may_have_more_rows_than_a_run(engine):
    slots = on_device(engine, max_batch=2).slots(3)
    three = [slots.join() for _ in range(3)]
    slots.run(three[1:], [[1], [2]])
    with pytest.raises(DfssmError, match="3 rows, the engine was built for 2: compile with --max-batch 3"):
        slots.run(three, [[1], [2], [3]])


def test_wrong_uses_are_named(engine):
    with pytest.raises(DfssmError, match="capacity is 0"):
        engine.slots(0)
    slots = engine.slots(2)
    one, two = slots.join(), slots.join()
    with pytest.raises(DfssmError, match="all 2 slots are taken: let one leave"):
        slots.join()
    with pytest.raises(DfssmError, match="twice"):
        slots.run([one, one], [[1], [2]])
    for ids in ([[1]], np.zeros((2, 0)), [1, 2], [[[1]], [[2]]]):
        with pytest.raises(DfssmError, match="2 slots and tokens .*: give each slot a row"):
            slots.run([one, two], ids)
    for ids, named in (
        ([[1], [265]], "token id 265 is out of range"),
        ([[-1], [1]], "token id -1 is out of range"),
        ([[1.0], [2.0]], "token ids are float64"),
        ([[True], [False]], "token ids are bool"),
        ([[None], [1]], "token ids are object"),
        (None, "token ids are object"),
    ):
        with pytest.raises(DfssmError, match=named):
            slots.run([one, two], ids)
    assert slots.run([one, two], [[1], [2]]).shape == (2, engine.vocab_size)  # nothing was broken
    with pytest.raises(DfssmError, match="the state has 2: use state.row"):
        slots.load(one, engine.new_state(2))
    slots.leave(one)
    for use in (slots.leave, slots.reset, lambda slot: slots.run([slot], [[1]]), engine.slots(2).reset):
        with pytest.raises(DfssmError, match="has left, or is of another pool"):
            use(one)
    with pytest.raises(DfssmError, match="of another pool"):
        engine.slots(1).reset(two)
