import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch

from dfssm.base import DfssmError
from dfssm.runtime import Engine

PROMPT = np.random.default_rng(1).integers(0, 256, 12)


def as_list(logits):
    return logits.tolist()


def test_prefill_equals_step_by_step(engine):
    at_once, by_step = engine.new_state(), engine.new_state()
    logits = engine.prefill(PROMPT, at_once)
    for token in PROMPT:
        last = engine.step([token], by_step)
    assert logits.shape == last.shape == (1, tiny.CONFIG.vocab_size)
    # a state stored in few bits is rounded once a run: more often step by step
    tolerance = {"fp32": 1e-4, "fp16": 0.05, "int8": 0.5}[engine.manifest.state_dtype]
    assert np.abs(logits - last).max() <= tolerance
    assert at_once.tokens.tolist() == by_step.tokens.tolist() == [len(PROMPT)]


def test_logits_of_all_tokens_end_with_those_of_prefill(engine):
    every = engine.logits(PROMPT)
    assert every.shape == (1, len(PROMPT), tiny.CONFIG.vocab_size)
    assert as_list(every[:, -1]) == as_list(engine.prefill(PROMPT, engine.new_state()))


def test_chunks_of_a_prompt_do_not_change_it(engine, monkeypatch):
    whole = engine.prefill(PROMPT, engine.new_state())
    all_tokens = engine.logits(PROMPT)
    monkeypatch.setattr(engine.backend, "max_tokens", 5)
    state = engine.new_state()
    tolerance = {"fp32": 1e-4, "fp16": 0.05, "int8": 0.5}[engine.manifest.state_dtype]
    assert np.abs(engine.prefill(PROMPT, state) - whole).max() <= tolerance
    assert np.abs(engine.logits(PROMPT) - all_tokens).max() <= tolerance
    assert state.tokens.tolist() == [len(PROMPT)]


def test_states_are_updated_in_place(engine):
    state = engine.new_state()
    before = {name: tensor.ctypes.data for name, tensor in state.tensors.items()}
    engine.prefill(PROMPT, state)
    engine.step([7], state)
    assert {name: tensor.ctypes.data for name, tensor in state.tensors.items()} == before
    assert all(tensor.any() for tensor in state.tensors.values())


def test_logits_that_were_returned_stay_as_they_are(engine):
    state = engine.new_state()
    first = engine.step([1], state)
    kept = first.copy()
    engine.step([2], state)
    assert as_list(first) == as_list(kept)


def test_a_batch_equals_its_rows(engine):
    rows = PROMPT.reshape(3, 4)
    state = engine.new_state(3)
    together = engine.prefill(rows, state)
    steps = engine.step([5, 6, 7], state)
    for index, row in enumerate(rows):
        alone = engine.new_state()
        assert as_list(engine.prefill(row, alone)[0]) == as_list(together[index])
        assert as_list(engine.step([5 + index], alone)[0]) == as_list(steps[index])


def test_rows_of_unequal_lengths_equal_single_rows(engine):
    rows = [PROMPT[:3], PROMPT[3:10], PROMPT[10:11]]
    state = engine.new_state(3)
    together = engine.prefill(rows, state)
    steps = engine.step(np.array([5, 6, 7]), state)
    assert state.tokens.tolist() == [4, 8, 2]
    for index, row in enumerate(rows):
        alone = engine.new_state()
        assert as_list(engine.prefill(row.tolist(), alone)[0]) == as_list(together[index])
        assert as_list(engine.step(5 + index, alone)[0]) == as_list(steps[index])


def test_a_prompt_in_two_parts_is_the_prompt(engine):
    state = engine.new_state()
    engine.prefill(PROMPT[:5], state)
    continued = engine.logits(PROMPT[5:], state)
    whole = engine.new_state()
    engine.prefill(PROMPT, whole)
    tolerance = {"fp32": 1e-4, "fp16": 0.05, "int8": 0.5}[engine.manifest.state_dtype]
    assert np.abs(continued[0, -1] - whole.logits[0]).max() <= tolerance
    assert as_list(state.logits[0]) == as_list(continued[0, -1])


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ([], "row 0 of the prompt has no tokens"),
        ([1, 265], "token id 265 is out of range: this model has ids 0 to 264"),
        ([-1], "token id -1 is out of range"),
        ([0.5], "token ids are float64"),
        ([[1, 2], [3]], "the prompt has 2 rows, the state has 1"),
        ([[1], []], "row 1 of the prompt has no tokens"),
        (None, "token ids are object"),
        ({1, 2}, "token ids are object"),
        (iter([1]), "token ids are object"),
        ("text", "token ids are <U4"),
    ],
)
def test_a_wrong_prompt_is_named(engine, ids, named):
    with pytest.raises(DfssmError, match=named):
        engine.prefill(ids, engine.new_state())


@pytest.mark.parametrize("form", [tuple, np.array, torch.tensor, lambda a: list(map(np.array, a)), lambda a: [a]])
def test_a_prompt_is_any_list_of_integers(engine, form):
    ids = [3, 1, 4]
    expected = as_list(engine.prefill(ids, engine.new_state())[0])
    assert as_list(engine.prefill(form(ids), engine.new_state())[0]) == expected
    assert engine.logits(form(ids)).shape == (1, 3, engine.vocab_size)


@pytest.mark.parametrize("number", [10**9, 10**30])
def test_more_sequences_than_the_machine_has_memory_for_are_one_line(engine, number):
    for call in (engine.new_state, engine.slots):
        with pytest.raises(
            DfssmError, match=r"sequences takes [0-9,]+ MB, this machine has [0-9,]+ MB: run fewer at once"
        ):
            call(number)


@pytest.mark.parametrize("number", [0, -1, 1.5, True, None, "1"])
def test_a_number_of_rows_is_a_whole_number(engine, number):
    for name, call in (("batch", engine.new_state), ("capacity", engine.slots)):
        with pytest.raises(DfssmError, match=f"{name} is {number!r}: give a whole number >= 1"):
            call(number)
    if number != 0:
        with pytest.raises(
            DfssmError, match=f"row of a state of batch 2 is {number!r}: give a whole number from 0 to 1"
        ):
            engine.new_state(2).row(number)


def test_wrong_steps_and_batches_are_named(engine):
    with pytest.raises(DfssmError, match="step got 2 tokens for a state of 1 rows"):
        engine.step([1, 2], engine.new_state())
    with pytest.raises(DfssmError, match="token id 999"):
        engine.step([999], engine.new_state())
    with pytest.raises(DfssmError, match="batch is 0"):
        engine.new_state(0)
    with pytest.raises(DfssmError, match="unequal lengths"):
        engine.logits([[1, 2], [3]])
    with pytest.raises(DfssmError, match="got 2 rows of tokens, the state has 3"):
        engine.logits([[1, 2], [3, 4]], engine.new_state(3))


def test_an_untied_model_without_correction_runs(cpu_target, tmp_path):
    config = dataclasses.replace(tiny.CONFIG, tie_embeddings=False, rank=0, planes=2, ngroups=1)
    engine = Engine.load(tiny.write_bundle(tmp_path / "bundle", config, target=cpu_target))
    assert np.isfinite(engine.prefill(PROMPT, engine.new_state())).all()


def test_a_target_whose_states_are_not_in_place_gives_the_same(tmp_path):
    """The portable target has two sets of buffers: a stock op may write before it has read all."""
    engine = Engine.load(tiny.write_bundle(tmp_path / "bundle", target="onnx"))
    state = engine.new_state()
    stepped = [engine.step([token], state)[0] for token in PROMPT]
    assert np.abs(np.stack(stepped) - engine.logits(PROMPT)[0]).max() <= 1e-4


class TestLoad:
    def test_not_a_bundle(self, tmp_path):
        with pytest.raises(DfssmError, match="nothing does not exist: give a bundle"):
            Engine.load(tmp_path / "nothing")
        with pytest.raises(DfssmError, match="not a bundle: it has no manifest.json"):
            Engine.load(tmp_path)

    def test_an_altered_file_is_refused_by_its_hash(self, tiny_bundle, tmp_path):
        copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
        with open(copy / "model.onnx.data", "r+b") as data:
            data.write(b"\1\2\3")
        with pytest.raises(DfssmError, match="model.onnx.data does not match the sha256"):
            Engine.load(copy)
        Engine.load(copy, verify_hashes=False)

    def test_a_bundle_without_a_tokenizer_works_on_ids(self, cpu_target, tmp_path):
        engine = Engine.load(tiny.write_bundle(tmp_path / "bundle", target=cpu_target, tokenizer=False))
        assert engine.prefill([1, 2], engine.new_state()).shape == (1, tiny.CONFIG.vocab_size)
        with pytest.raises(DfssmError, match="no tokenizer.json: compile with --tokenizer"):
            engine.generate("hello")

    def test_config_and_manifest(self, tiny_bundle):
        engine = Engine.load(tiny_bundle, threads=1)
        assert engine.config == json.loads((tiny_bundle / "manifest.json").read_text())["config"]
        assert engine.threads == 1 and engine.backend.session.get_session_options().intra_op_num_threads == 1

    def test_running_a_bundle_imports_neither_torch_nor_onnx(self, tiny_bundle):
        code = (
            "import sys\nfrom dfssm.runtime import Engine\n"
            f"print(''.join(Engine.load({str(tiny_bundle)!r}).generate('hello', max_tokens=3)))\n"
            "print({'torch', 'onnx', 'transformers'} & set(sys.modules), file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stderr.strip() == "set()"
