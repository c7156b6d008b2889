"""Hidden states: bundle, student and teacher against a NumPy student; patches; what is refused."""

import numpy as np
import pytest
import student_ref
import tiny
import torch

from dfssm.base import DfssmError
from dfssm.model.config import Mamba2Config
from dfssm.model.student import from_tensors
from dfssm.model.teacher import Mamba2LM
from dfssm.opset.tolerances import model_tolerance
from dfssm.runtime import Engine
from dfssm.targets import get_target

C = tiny.CONFIG
LAYERS = C.n_layer + 1
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9]]


@pytest.fixture(scope="module")
def student():
    return from_tensors(C, {name: torch.from_numpy(array) for name, array in tiny.tensors().items()})


@pytest.fixture(scope="module", params=["ort-cpu", "onnx", "student", "teacher"])
def model(request, student, tmp_path_factory):
    if request.param == "student":
        return student
    if request.param == "teacher":
        torch.manual_seed(0)
        return Mamba2LM(Mamba2Config(vocab_size=265, d_model=64, n_layer=2, headdim=8, d_state=16)).eval()
    if why_not := get_target(request.param).why_not_run():
        pytest.skip(why_not)
    return Engine.load(tiny.write_bundle(tmp_path_factory.mktemp("taps") / "b", target=request.param, taps=True))


def reference(ids, monkeypatch):
    """The residual stream f32[L,B,T,D], which is what each norm of the NumPy student reads, and the logits."""
    seen, norm = [], student_ref.REFERENCES["RMSNorm"]
    monkeypatch.setitem(student_ref.REFERENCES, "RMSNorm", lambda x, *a, **k: seen.append(x) or norm(x, *a, **k))
    logits, _ = student_ref.step(C, tiny.tensors(), ids, student_ref.zero_states(C, len(ids), "fp32"))
    return np.stack(seen), logits


@pytest.mark.parametrize("model", ["ort-cpu", "onnx", "student"], indirect=True)
def test_the_residual_stream_is_that_of_a_numpy_student(model, monkeypatch):
    ids = np.array([PROMPTS[0], PROMPTS[2]])
    wanted, logits = reference(ids, monkeypatch)
    bound = model_tolerance(C.n_layer, C.d_model)
    found = model.hidden(ids, last=False)
    assert found.states.shape == (LAYERS, 2, 5, C.d_model) and found.states.dtype == np.float32
    for ours, theirs in zip([*found.states, found.logits], [*wanted, logits[:, -1]], strict=True):
        assert bound.error(ours, theirs) <= bound.relative, bound.reason


def test_rows_of_any_length_are_those_alone_and_layers_are_chosen(model):
    whole = model.hidden(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = model.hidden(prompt, last=False)
        np.testing.assert_allclose(whole.states[:, row], alone.states[:, 0, -1], rtol=0, atol=1e-5)
        np.testing.assert_allclose(whole.logits[row], alone.logits[0], rtol=0, atol=1e-4)
    some = model.hidden(PROMPTS, layers=[2, 0])
    assert np.array_equal(some.states, whole.states[[2, 0]]) and np.array_equal(some.logits, whole.logits)
    assert model.hidden(PROMPTS, layers=()).states.shape[0] == 0


def test_a_patch_takes_the_place_of_the_last_residual(model):
    """Prompts of equal length exchange theirs, layer by layer."""
    a, b = [3, 1, 4, 1], [9, 2, 6, 5]
    plain = model.hidden([a, b])
    for layer in range(plain.states.shape[0]):
        same = model.hidden([a, b], patch={layer: plain.states[layer]})
        assert np.array_equal(same.states, plain.states) and np.array_equal(same.logits, plain.logits)
        swapped = model.hidden([a, b], patch={layer: plain.states[layer, ::-1]})
        assert np.array_equal(swapped.states[:layer], plain.states[:layer])
        assert np.array_equal(swapped.states[layer], plain.states[layer, ::-1])
        assert not np.array_equal(swapped.logits, plain.logits)
    np.testing.assert_allclose(swapped.logits, plain.logits[::-1], rtol=0, atol=1e-5)  # after the last layer: all of it
    head = model.hidden([[0], [0]], layers=(), patch={layer: plain.states[layer, ::-1]})
    np.testing.assert_allclose(head.logits, swapped.logits, rtol=0, atol=1e-5)
    at_embedding = model.hidden([a, b], patch={0: plain.states[0, ::-1]})
    exchanged = model.hidden([[*a[:-1], b[-1]], [*b[:-1], a[-1]]])
    np.testing.assert_allclose(at_embedding.logits, exchanged.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("state_dtype", ["fp16", "int8-deferred"])
def test_any_storage_of_states_has_the_same_hidden_states(state_dtype, cpu_target, tmp_path, student):
    """They are read in one run, within which states are fp32."""
    engine = Engine.load(tiny.write_bundle(tmp_path / "b", target=cpu_target, state_dtype=state_dtype, taps=True))
    bound = model_tolerance(C.n_layer, C.d_model)
    found, wanted = engine.hidden(PROMPTS), student.hidden(PROMPTS)
    for ours, theirs in zip([*found.states, found.logits], [*wanted.states, wanted.logits], strict=True):
        assert bound.error(ours, theirs) <= bound.relative, bound.reason
    assert engine.prefill(PROMPTS[0], engine.new_state()) == pytest.approx(found.logits[:1], abs=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layers": [LAYERS]}, "^layer is 3: give a whole number from 0 to 2 .0 is the embedding.$"),
        ({"patch": {-1: np.zeros((3, C.d_model))}}, "^layer is -1"),
        ({"patch": {1: np.zeros((2, C.d_model))}}, r"^the patch of layer 1 has shape \[2, 64\]: give \[3, 64\], a row"),
        ({"patch": {1: np.full((3, C.d_model), np.nan)}}, "^the model's numbers are not finite up to layer 1"),
        ({"last": False}, "rows of unequal lengths: call it row by row$"),
    ],
)
def test_what_no_model_has_is_refused(model, options, message):
    with pytest.raises(DfssmError, match=message):
        model.hidden(PROMPTS, **options)
    with pytest.raises(DfssmError, match="^token id 265 is out of range: this model has ids 0 to 264$"):
        model.hidden([1, 265])


def test_a_bundle_without_taps_says_so(tiny_bundle):
    with pytest.raises(DfssmError, match="shows no hidden states: compile it again with --taps, for ort-cpu or onnx$"):
        Engine.load(tiny_bundle).hidden([1, 2])


def test_a_bundle_that_was_replaced_is_not_mixed_with_the_old_one(cpu_target, tmp_path):
    engine = Engine.load(tiny.write_bundle(tmp_path / "b", target=cpu_target, taps=True))
    (tmp_path / "b").rename(tmp_path / "old")
    tiny.write_bundle(tmp_path / "b", target=cpu_target, state_dtype="fp16", taps=True)
    with pytest.raises(DfssmError, match="has changed since it was opened: load it again$"):
        engine.hidden([1, 2])
