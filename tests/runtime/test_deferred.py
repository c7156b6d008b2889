"""Bundles with a deferred state: the same bits for any cut into runs, and tokens that are taken back."""

import numpy as np
import pytest
import tiny

from dfssm.base.errors import DfssmError
from dfssm.compiler.pipeline import Request, compile_model
from dfssm.runtime import Engine, State

IDS = np.random.default_rng(5).integers(0, tiny.CONFIG.vocab_size, 40)


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8"])
def engine(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / request.param
    return Engine.load(tiny.write_bundle(folder, state_dtype=f"{request.param}-deferred"))


def logits_of(engine, cut, state):
    pieces = np.split(IDS, np.cumsum(cut)[:-1])
    return np.concatenate([engine.logits(piece, state)[0] for piece in pieces])


def test_any_cut_into_runs_gives_the_same_bits(engine):
    expected = logits_of(engine, [1] * 40, engine.new_state())
    for cut in ([40], [8] * 5, [3, 9, 1, 20, 7]):
        np.testing.assert_array_equal(logits_of(engine, cut, engine.new_state()), expected)


def test_it_is_the_immediate_state(tmp_path):
    """In fp32, where nothing is rounded; what rounding does, tests/plugins/test_deferred.py says."""
    one, other = (
        Engine.load(tiny.write_bundle(tmp_path / kind, state_dtype=kind)) for kind in ("fp32-deferred", "fp32")
    )
    ours, theirs = (logits_of(engine, [1] * 40, engine.new_state()) for engine in (one, other))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_row_that_takes_tokens_back_has_not_read_them(engine, tokens):
    expected = logits_of(engine, [1] * 40, engine.new_state())
    state = engine.new_state(2)
    pool = engine._pool(state)
    for at in range(0, 40, 4):  # what is wrong is read behind one that is right, as drafts are
        right = IDS[at : at + 4]
        wrong = (right[:1] + 1 + np.arange(tokens)) % tiny.CONFIG.vocab_size
        engine.logits([[3], [right[0]]], state)
        engine.logits([wrong, wrong], state)
        pool.rollback(1, tokens)
        np.testing.assert_array_equal(engine.logits([right[1:], right[1:]], state)[1], expected[at + 1 : at + 4])
    with pytest.raises(DfssmError, match="^16 tokens cannot be taken back: compile with a -deferred --state-dtype$"):
        pool.rollback(1, 16)


def test_saved_copied_and_reset_states_go_on(engine):
    expected = logits_of(engine, [40], engine.new_state())
    state = engine.new_state()
    engine.logits(IDS[:13], state)
    loaded = State.from_bytes(state.to_bytes())
    for other in (loaded, state.clone()):
        np.testing.assert_array_equal(engine.logits(IDS[13:], other)[0], expected[13:])
    state.reset()
    np.testing.assert_array_equal(engine.logits(IDS, state)[0], expected)


def test_slots_have_counts_of_their_own(engine):
    expected = logits_of(engine, [40], engine.new_state())
    slots = engine.slots(2)
    one, two = slots.join(), slots.join()
    slots.run([one], [IDS[:5]])
    slots.run([two], [IDS[:18]])
    for at in range(10):
        logits = slots.run([one, two], [[IDS[5 + at]], [IDS[18 + at]]])
        np.testing.assert_array_equal(logits, [expected[5 + at], expected[18 + at]])


def test_a_count_that_is_none_is_one_line(engine):
    state = engine.new_state()
    state.tensors["pending_count.0"][0] = 16
    with pytest.raises(DfssmError, match="input 'pending_count' has 16, expected at most 15"):
        engine.prefill(IDS[:2], state)


def test_what_has_no_deferred_states_says_so(tmp_path):
    (tmp_path / "model.pt").touch()
    with pytest.raises(DfssmError, match="^target trt has no deferred states: compile with --state-dtype int8, or for"):
        compile_model(Request(tmp_path / "model.pt", "trt", state_dtype="int8-deferred"))
    with pytest.raises(DfssmError, match="^a model repository for Triton has no deferred states: compile with --state"):
        compile_model(Request(tmp_path / "model.pt", "ort-cpu", state_dtype="int8-deferred", emit="triton-repository"))
