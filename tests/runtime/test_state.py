import copy
import json
import os
import pickle
import struct

import numpy as np
import pytest
import safetensors.numpy
import tiny

from dfssm.base import DfssmError
from dfssm.runtime import Engine, State

IDS = np.random.default_rng(2).integers(0, 256, 9)


def follow(engine, state, tokens=(3, 1, 4, 1, 5)):
    """Logits of the next steps: two states are equal when these are."""
    return [engine.step([token], state)[0].tolist() for token in tokens]


@pytest.fixture
def state(engine):
    state = engine.new_state()
    engine.prefill(IDS, state)
    return state


def test_a_saved_state_continues_identically(engine, state, tmp_path):
    path = tmp_path / "a.state"
    state.save(path)
    loaded = engine.load_state(path)
    assert loaded.tokens.tolist() == [len(IDS)]
    assert loaded.logits.tolist() == state.logits.tolist()
    assert follow(engine, loaded) == follow(engine, state)
    assert [p.name for p in tmp_path.iterdir()] == ["a.state"], "no temporary file may stay"


def test_a_state_file_is_safetensors(engine, state, tmp_path):
    from safetensors.numpy import load_file

    state.save(tmp_path / "a.state")
    tensors = load_file(tmp_path / "a.state")
    assert set(tensors) == {*state.tensors, "logits", "tokens"}
    assert all((tensors[name] == tensor).all() for name, tensor in state.tensors.items())


def test_bytes_are_the_file(engine, state, tmp_path):
    state.save(tmp_path / "a.state")
    data, saved = state.to_bytes(), (tmp_path / "a.state").read_bytes()
    assert {data, saved} == {state.clone().to_bytes() for _ in range(10)}  # safetensors orders metadata at random
    (tmp_path / "b.state").write_bytes(data)
    three = State.from_bytes(data), State.from_bytes(saved), State.load(tmp_path / "b.state")
    assert [follow(engine, found) for found in three] == [follow(engine, state)] * 3
    for bad in (b"", data[:-1], bytearray(data), None):
        with pytest.raises(DfssmError, match="what was given is not a state that this dfssm can read"):
            State.from_bytes(bad)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, State.clone, lambda s: pickle.loads(pickle.dumps(s)), lambda s: State.from_bytes(s.to_bytes())],
)
def test_a_copy_of_a_row_is_a_state_of_its_own(engine, copied):
    batch = engine.new_state(3)
    engine.prefill(IDS.reshape(3, 3), batch)
    row = copied(batch.row(1))
    assert (row.batch, row.whole is row, row.tokens.tolist()) == (1, True, [3])
    alone = follow(engine, row)
    assert batch.tokens.tolist() == [3, 3, 3]
    assert [engine.step([9, token, 9], batch)[1].tolist() for token in (3, 1, 4, 1, 5)] == alone


def test_rollback_continues_identically(engine, state):
    before = state.clone()
    first = follow(engine, state)
    assert follow(engine, state) != first, "the state must matter"
    state.copy_from(before)
    assert follow(engine, state) == first
    assert before.tokens.tolist() == [len(IDS)], "the copy must not move"


def test_a_row_shares_memory_with_its_batch(engine, state):
    batch = engine.new_state(3)
    batch.row(1).copy_from(state)
    assert batch.tokens.tolist() == [0, len(IDS), 0]
    alone = follow(engine, state)
    together = [engine.step([9, token, 9], batch)[1].tolist() for token in (3, 1, 4, 1, 5)]
    assert together == alone


def test_one_prefix_serves_a_batch(engine, state):
    batch = engine.new_state(2)
    batch.copy_from(state)
    logits = engine.step([3, 3], batch)
    assert logits[0].tolist() == logits[1].tolist() == engine.step([3], state)[0].tolist()


def test_reset_is_a_new_state(engine, state):
    state.reset()
    assert follow(engine, state) == follow(engine, engine.new_state())


def test_wrong_copies_and_rows_are_named(engine, state):
    with pytest.raises(DfssmError, match="cannot copy a state of batch 2 into one of batch 3"):
        engine.new_state(3).copy_from(engine.new_state(2))
    with pytest.raises(DfssmError, match="row of a state of batch 1 is 1: give a whole number from 0 to 0"):
        state.row(1)


def test_a_state_of_other_weights_is_refused(engine, state, cpu_target, tmp_path):
    kind = engine.manifest.state_dtype
    other = Engine.load(tiny.write_bundle(tmp_path / "b", target=cpu_target, state_dtype=kind, seed=1))
    state.save(tmp_path / "a.state")
    for use in (lambda: other.load_state(tmp_path / "a.state"), lambda: other.step([1], state)):
        with pytest.raises(DfssmError, match="the state is of a bundle with other weights or --isa"):
            use()


def test_a_state_of_another_dtype_is_refused(engine, state, cpu_target, tmp_path):
    kind = {"fp32": "fp16", "fp16": "int8", "int8": "fp32"}[engine.manifest.state_dtype]
    other = Engine.load(tiny.write_bundle(tmp_path / "b", target=cpu_target, state_dtype=kind))
    with pytest.raises(DfssmError, match=r"ss[a-z]+_[a-z]+\.0 of the state is .*, this bundle has"):
        other.step([1], state)


def damaged(tmp_path, data: bytes):
    path = tmp_path / "bad.state"
    path.write_bytes(data)
    return path


def rewritten(data: bytes, change) -> bytes:
    """The file with its header changed by `change(header)`."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda h: h["logits"].update(shape=[1, 10**12]), "invalid shape, data type, or offset"),
        (lambda h: h["logits"].update(data_offsets=[0, 4]), "invalid shape, data type, or offset"),
        (lambda h: h["tokens"].update(dtype="F64"), "'tokens' is float64"),
        (lambda h: h["tokens"].update(dtype="I32", shape=[1, 2]), "'tokens' is int32"),
        (lambda h: h["tokens"].update(dtype="F32", shape=[1, 2]), "not of one batch"),
        (lambda h: h["logits"].update(dtype="I8", shape=[1, 16]), "its logits are int8"),
        (lambda h: h["logits"].update(dtype="F16", shape=[1, 8]), "its logits are float16"),
        (lambda h: h.pop("tokens"), "invalid offset"),
        (lambda h: h["__metadata__"].update(version="9"), "dfssm-state version 9"),
        (lambda h: h.pop("__metadata__"), "it is no state, not dfssm-state 1"),
    ],
)
def test_a_changed_header_is_refused(tmp_path, change, named):
    State.zeros("m", {"conv_state.0": (np.dtype(np.float32), (2, 3))}, 4, 1).save(tmp_path / "good.state")
    path = damaged(tmp_path, rewritten((tmp_path / "good.state").read_bytes(), change))
    with pytest.raises(DfssmError, match=f"bad.state is not a state that this dfssm can read.*{named}"):
        State.load(path)


@pytest.mark.parametrize(
    "tokens",
    [np.array([3.0], np.float32), np.array([3], np.int8), np.array([-1]), np.array([2**62]), np.array([], np.int64)],
    ids=str,
)
def test_numbers_of_tokens_that_are_none_are_refused(tokens):
    state = State.zeros("m", {"conv_state.0": (np.dtype(np.float32), (2, 3))}, 4, 1)
    arrays = {name: array[: len(tokens)] for name, array in {**state.tensors, "logits": state.logits}.items()}
    data = safetensors.numpy.save(arrays | {"tokens": tokens}, {"format": "dfssm-state", "version": "1", "model": "m"})
    with pytest.raises(DfssmError, match=r"is not a state .*its numbers of tokens are none"):
        State.from_bytes(data)


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"\xff" * 100, struct.pack("<Q", 10) + b"not a json"])
def test_another_file_is_refused(tmp_path, data):
    with pytest.raises(DfssmError, match="is not a state that this dfssm can read"):
        State.load(damaged(tmp_path, data))


@pytest.mark.parametrize("cut", [-1, -40])
def test_a_cut_or_longer_file_is_refused(tmp_path, cut):
    State.zeros("m", {"conv_state.0": (np.dtype(np.float32), (2, 3))}, 4, 1).save(tmp_path / "good.state")
    data = (tmp_path / "good.state").read_bytes()
    for bad in (data[:cut], data + b"\0"):
        with pytest.raises(DfssmError, match="is not a state that this dfssm can read"):
            State.load(damaged(tmp_path, bad))


def test_the_arrays_of_a_state_are_written_to_and_not_replaced(engine, state):
    """A session holds their addresses: it read from, and wrote to, the memory of an array that was gone."""
    engine.step([1], state)
    with pytest.raises(TypeError):
        state.tensors["ssm_state.0"] = np.zeros_like(state.tensors["ssm_state.0"])
    other = state.clone()
    state.reset()
    for name, tensor in state.tensors.items():
        tensor[:] = other.tensors[name]
    state.push()
    assert follow(engine, state) == follow(engine, other)


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(DfssmError, match="nothing.state does not exist: give a file that a state was saved to"):
        State.load(tmp_path / "nothing.state")
    state = State.zeros("m", {}, 1, 1)
    with pytest.raises(DfssmError, match="cannot write "):
        state.save(tmp_path / "no" / "folder.state")


def test_a_state_made_by_hand_is_looked_at_before_it_runs(engine):
    """A session gets the address of an array alone: of another size or form it would write over what lies behind."""
    good = engine.new_state(2)

    def made(change):
        arrays = {name: np.array(array) for name, array in good.tensors.items()}
        rest = {"logits": good.logits.copy(), "tokens": good.tokens.copy(), "recent": good.recent.copy()}
        change(arrays, rest)
        return State(engine.model, arrays, **rest)

    assert engine.step([1, 2], made(lambda arrays, rest: None)).shape == (2, engine.vocab_size)
    name = "conv_state.0"
    closed = np.zeros_like(good.tensors[name])
    closed.flags.writeable = False
    for change, named in (
        (lambda arrays, rest: arrays.update({name: arrays[name][:1]}), "its tensors are not of one batch"),
        (lambda arrays, rest: arrays.update({name: arrays[name][..., :1]}), f"{name} is no array in one piece"),
        (lambda arrays, rest: arrays.update({name: arrays[name][..., :1].copy()}), f"{name} of the state is float32"),
        (
            lambda arrays, rest: arrays.update({name: np.asfortranarray(arrays[name])}),
            f"{name} is no array in one piece",
        ),
        (lambda arrays, rest: arrays.update({name: closed}), f"{name} is no array in one piece that can be written to"),
        (lambda arrays, rest: arrays.update({name: arrays[name].tolist()}), f"{name} is no array in one piece"),
        (
            lambda arrays, rest: arrays.update({name: arrays[name].astype(np.float64)}),
            f"{name} of the state is float64",
        ),
        (lambda arrays, rest: arrays.update({name: arrays[name].astype(">f4")}), f"{name} of the state is"),
        (lambda arrays, rest: arrays.pop(name), f"{name} of the state is missing"),
        (lambda arrays, rest: rest.update(logits=rest["logits"][:, :-1].copy()), "the state has logits of"),
        (lambda arrays, rest: rest.update(logits=rest["logits"][:1]), "its tensors are not of one batch"),
        (lambda arrays, rest: rest.update(logits=rest["logits"].astype(np.float16)), "its logits are float16"),
        (lambda arrays, rest: rest.update(tokens=rest["tokens"].astype(np.int32)), "its numbers of tokens are none"),
        (lambda arrays, rest: rest.update(tokens=[0, 0]), "tokens is no array"),
        (lambda arrays, rest: rest.update(recent=rest["recent"][:, :3].copy()), "its recent tokens are not those of"),
        (lambda arrays, rest: rest.update(recent=rest["recent"] + 10**6), "its recent tokens are none of its model"),
    ):
        state = made(change)
        with pytest.raises(DfssmError, match=named):
            engine.step([1, 2], state)
        with pytest.raises(DfssmError, match=named):
            engine.new_state(2).copy_from(state)


def test_the_name_of_a_saved_state_survives_a_power_cut(state, tmp_path, monkeypatch):
    """Its folder is synced, too, once the name is there."""
    synced, fsync = [], os.fsync

    def note(handle):
        synced.append((os.readlink(f"/proc/self/fd/{handle}"), (tmp_path / "a").exists()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    state.save(tmp_path / "a")
    assert synced[-1] == (str(tmp_path), True) and len(synced) > 1
