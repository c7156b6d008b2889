"""A model whose numbers are not finite: every call says so, and where it began; what it has read is broken."""

import dataclasses

import numpy as np
import pytest
import tiny
from backends import BACKENDS, MAX_TOKENS

from dfssm.base import DfssmError
from dfssm.runtime import Engine

IDS = np.arange(3, 3 + MAX_TOKENS)


EDITS = {
    "layers.1.scan.dt_bias": "ssm_state of layer 1: its weights are too large or damaged, look for where with",
    "layers.0.conv.bias": "ssm_state of layer 0: its weights",
    "layers.0.out_proj.scale": "conv_state of layer 1: its weights",
    "layers.1.out_proj.scale": "the logits: its weights",
    "norm_f.weight": "the logits: its weights",
}


@pytest.fixture(scope="module", params=EDITS)
def damaged(request, cpu_target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "b"
    tiny.write_bundle(folder, state_dtype="fp16", target=cpu_target, edit=tiny.not_a_number(request.param))
    return folder, f"are not finite after {{}} tokens, first in {EDITS[request.param]}"


@pytest.mark.parametrize("kind", BACKENDS)
def test_every_call_names_where_it_began(damaged, kind):
    folder, named = damaged
    engine = BACKENDS[kind](Engine.load(folder, threads=1))
    state, slots = engine.new_state(), engine.slots(2)
    slot = slots.join()
    calls = {
        "prefill": lambda: engine.prefill(IDS, state),
        "logits": lambda: engine.logits(IDS, state),
        "step": lambda: engine.step(IDS[:1], state),
        "slots": lambda: slots.run([slot], IDS[None]),
        "generate": lambda: list(engine.generate(IDS, max_tokens=4)),
        "generate, with a state": lambda: list(engine.generate(IDS, max_tokens=4, state=state)),
    }
    read = {"step": 1, "logits": min(len(IDS), engine.backend.max_logits)}
    for name, call in calls.items():
        with pytest.raises(DfssmError, match=named.format(read.get(name, len(IDS)))):
            call()
        if "generate" not in name and name != "slots":
            with pytest.raises(DfssmError, match=r"the state is broken \(its numbers are not finite\): reset it"):
                engine.step([1], state)
        state.reset()
    with pytest.raises(DfssmError, match=r"broken \(its numbers are not finite\)"):
        slots.save(slot, state)


def test_what_a_step_finds_after_advances(damaged):
    folder, named = damaged
    engine = Engine.load(folder, threads=1)
    state = engine.new_state()
    engine.advance(IDS[:1], state)
    engine.advance(IDS[:1], state)
    with pytest.raises(DfssmError, match=named.format(2)):
        list(engine.generate("", state=state))


def test_one_row_of_a_batch_does_not_spoil_the_others(tmp_path, cpu_target):
    """Token 9 has no number for its embedding: who reads it is broken, and nobody else."""

    def edit(tensors):
        tensors["lm_head.scale"] = tensors["embedding.scale"].copy()
        tensors["lm_head.weight"] = tensors["embedding.weight"]
        tensors["embedding.scale"][9] = np.nan

    config = dataclasses.replace(tiny.CONFIG, tie_embeddings=False)
    engine = Engine.load(tiny.write_bundle(tmp_path / "b", config, cpu_target, edit=edit), threads=1)
    alone = [engine.step([token], engine.new_state())[0].tolist() for token in (1, 2)]
    state = engine.new_state(3)
    with pytest.raises(DfssmError, match="not finite after 1 tokens, first in conv_state of layer 0: its weights"):
        engine.step([1, 9, 2], state)
    assert [state.logits[row].tolist() for row in (0, 2)] == alone
    with pytest.raises(DfssmError, match="row 1 of the state is broken"):
        engine.step([1, 1, 1], state)
    state.row(1).reset()
    engine.step([1, 1, 1], state)
    slots = engine.slots(3)
    three = [slots.join() for _ in range(3)]
    with pytest.raises(DfssmError, match="not finite after 1 tokens"):
        slots.run(three, [[1], [9], [2]])
    saved = engine.new_state()
    slots.save(three[2], saved)
    assert saved.logits[0].tolist() == alone[1]
    slots.reset(three[1])
    slots.run(three, [[1], [1], [1]])


@pytest.mark.parametrize("kind", ["fp16", "fp32"])
def test_an_overflow_of_the_stored_state_names_the_state_dtype(tmp_path, cpu_target, kind):
    """The remedy is that of the cause; an infinite number is put in by hand, for a kernel stores none in fp16."""
    engine = Engine.load(tiny.write_bundle(tmp_path / "b", target=cpu_target, state_dtype=kind), threads=1)
    state = engine.new_state()
    engine.step([1], state)
    state.tensors["ssm_state.1"][0, 2], state.logits[0, 3] = np.inf, np.nan
    remedy = "fp16 is too small for it, compile with --state-dtype fp32" if kind == "fp16" else "its weights are"
    with pytest.raises(DfssmError, match=f"after 1 tokens, first in ssm_state of layer 1: {remedy}"):
        engine.require_finite(state)
