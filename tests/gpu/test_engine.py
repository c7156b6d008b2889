"""The engine on a GPU against the engine on the CPU, and against itself where the arithmetic is the same.

Every test but the last runs over the stand-in, too: the portable graph in ONNX Runtime on a device made of NumPy. It
differs from the reference as another backend does, in the order of its float sums.
"""

import numpy as np
import pytest
from gpu import devices
from gpu.devices import Device
from trt_graphs import widened

from dfssm.opset.tolerances import Tolerance, model_tolerance

# One process has the device, and compiles the model once.
pytestmark = pytest.mark.xdist_group("gpu")

PREFILL, STEPS = 20, 12


def script(engine, rows: int, tokens: int = PREFILL + STEPS, seed: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, engine.vocab_size, (rows, tokens))


def tolerance_of(engine) -> Tolerance:
    """Also for states that are carried on: a step of rounding fades in them. Seen between CPU backends: up to 1.4 %."""
    return model_tolerance(engine.config["n_layer"], engine.config["d_model"])


def set_state(state, other) -> None:
    """`state` becomes `other`, which may be of another bundle's file."""
    for name, array in state.tensors.items():
        array[:] = other.tensors[name]
    state.push()


def check_states(tolerance: Tolerance, ours, theirs) -> None:
    for name in theirs.tensors:
        if not name.startswith("ssm_scale"):
            tolerance.check(widened(ours.tensors, name), widened(theirs.tensors, name), name)


def check_each_call(engine, reference, calls: list[np.ndarray]) -> None:
    """Calls of ids [B,T], each from the states that the reference stored: nothing adds up from call to call. In
    one, an activation on a tie of int8 may round either way; most calls have no such tie.
    """
    ours, theirs = engine.new_state(len(calls[0])), reference.new_state(len(calls[0]))
    tolerance, errors = tolerance_of(engine), []
    for ids in calls:
        set_state(ours, theirs)
        logits, expected = engine.prefill(ids, ours), reference.prefill(ids, theirs)
        tolerance.check(logits, expected, "logits")
        check_states(tolerance, ours, theirs)
        errors.append(tolerance.error(logits, expected))
    assert np.median(errors) < 1e-5


def equal(a, b) -> None:
    assert np.array_equal(a.logits, b.logits) and np.array_equal(a.tokens, b.tokens)
    for name, array in a.tensors.items():
        assert np.array_equal(array, b.tensors[name]), name


@pytest.mark.parametrize("rows", [1, devices.MAX_BATCH])
def test_each_call_is_that_of_the_reference(device, reference, rows):
    check_each_call(device, reference, np.split(script(device, rows), range(PREFILL, PREFILL + STEPS), axis=1))


@pytest.mark.parametrize("rows", [1, devices.MAX_BATCH])
def test_states_stay_on_the_device(device, reference, rows):
    """The same calls, each from the states that the one before left where they are."""
    ours, theirs = device.new_state(rows), reference.new_state(rows)
    ids, tolerance = script(device, rows), tolerance_of(device)
    tolerance.check(device.prefill(ids[:, :PREFILL], ours), reference.prefill(ids[:, :PREFILL], theirs), "logits")
    for step in ids[:, PREFILL:].T:
        tolerance.check(device.step(step, ours), reference.step(step, theirs), "logits")
    check_states(tolerance, ours, theirs)
    assert ours.tokens.tolist() == theirs.tokens.tolist()


def test_states_are_updated_in_place(device):
    assert device.backend.in_place, "a trial of it spoilt a state: is every kernel right in place?"


@pytest.mark.parametrize("rows", [1, devices.MAX_BATCH])
def test_recorded_steps_are_those_that_are_not(device, rows, monkeypatch):
    recorded, plain = device.new_state(rows), device.new_state(rows)
    ids = script(device, rows).T
    for step in ids:
        device.step(step, recorded)
    assert recorded.pool.recorded, "TensorRT lets no step of this engine be recorded"
    monkeypatch.setattr(device.backend, "recordable", lambda context: False)
    for step in ids:
        device.step(step, plain)
    assert not plain.pool.recorded
    equal(recorded, plain)


def test_states_of_other_sizes_take_turns(device):
    ids = script(device, devices.MAX_BATCH).T
    apart = []
    for rows in (1, devices.MAX_BATCH):
        apart.append(device.new_state(rows))
        for step in ids:
            device.step(step[:rows], apart[-1])
    turns = [device.new_state(state.batch) for state in apart]
    for step in ids:
        for state in turns:
            device.step(step[: state.batch], state)
    for one, other in zip(apart, turns, strict=True):
        equal(one, other)


def test_a_prompt_longer_than_a_run_is_read_in_pieces(device):
    (ids,) = script(device, 1, devices.MAX_TOKENS + 7)
    whole, pieces = device.new_state(), device.new_state()
    device.prefill(ids, whole)
    device.prefill(ids[: devices.MAX_TOKENS], pieces)
    device.prefill(ids[devices.MAX_TOKENS :], pieces)
    equal(whole, pieces)


def test_rows_of_unequal_lengths(device):
    ids = script(device, devices.MAX_BATCH)
    rows = [row[: 3 + 7 * i] for i, row in enumerate(ids)]
    together, alone = device.new_state(len(rows)), [device.new_state() for _ in rows]
    device.step(ids[:, -1], together)
    for i, state in enumerate(alone):
        state.copy_from(together.row(i))
    device.prefill(rows, together)
    for i, (row, state) in enumerate(zip(rows, alone, strict=True)):
        device.prefill(row, state)
        equal(together.row(i), state)


def test_a_row_and_its_batch_see_each_other(device, reference):
    states = []
    for engine in (device, reference):
        states.append(state := engine.new_state(2))
        engine.step([1, 2], state)
        row, start = state.row(1), state.row(0).clone()
        engine.step([3], row)
        engine.step([4, 5], state)
        engine.step([6], row)
        state.row(0).copy_from(start)
        engine.step([7, 8], state)
    tolerance = tolerance_of(device)
    tolerance.check(states[0].logits, states[1].logits, "logits")
    check_states(tolerance, *states)
    states[0].row(1).reset()
    assert not any(array[1].any() for array in states[0].tensors.values())
    assert all(array[0].any() for array in states[0].tensors.values())


def test_a_state_goes_to_the_host_and_back(device, tmp_path):
    """Saved and loaded, cloned, and written to: what runs on is what would have run on."""
    (ids,) = script(device, 1)
    stayed = device.new_state()
    device.prefill(ids[:PREFILL], stayed)
    copied = stayed.clone()
    stayed.save(tmp_path / "state")
    written = device.new_state()
    device.step([1], written)
    set_state(written, stayed)
    written.tokens[:] = stayed.tokens
    states = [stayed, copied, device.load_state(tmp_path / "state"), written]
    for token in ids[PREFILL:]:
        for state in states:
            device.step([token], state)
    for state in states[1:]:
        equal(stayed, state)


def test_logits_of_all_tokens_are_those_of_prompts(device):
    """Also of rows that do not all go into one run; the last ones bit for bit."""
    ids = script(device, devices.MAX_BATCH, 6)
    state, tolerance = device.new_state(len(ids)), tolerance_of(device)
    found = device.logits(ids, state)
    for tokens in range(1, 7):
        expected = device.prefill(ids[:, :tokens], other := device.new_state(len(ids)))
        tolerance.check(found[:, tokens - 1], expected, f"logits of token {tokens}")
    equal(state, other)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "top_k": 40, "seed": 1}], ids=["greedy", "top k"])
def test_the_device_chooses_what_the_host_does(device, settings, monkeypatch):
    texts = [device.generate("Once upon a time", max_tokens=30, **settings) for _ in range(2)]
    for _ in texts[0]:
        pass
    monkeypatch.setattr(device.backend.cuda, "most_largest", 0)
    for _ in texts[1]:
        pass
    assert len(texts[0].tokens) > 10 and texts[0].tokens == texts[1].tokens


def test_a_text_is_the_same_twice(device):
    texts = ["".join(device.generate("Once upon a time", max_tokens=40)) for _ in range(2)]
    assert len(texts[0]) > 20 and texts[0] == texts[1]


@pytest.mark.gpu
@pytest.mark.parametrize("builder", devices.BUILDERS)
def test_native_is_plugin(builder, opened, state_dtype):
    """The engine without plugins, which takes one token a call, against the one with them."""
    native, plugin = (opened(Device(builder, lowering), state_dtype) for lowering in ("native", "plugin"))
    check_each_call(native, plugin, np.split(script(plugin, 1), PREFILL + STEPS, axis=1))
