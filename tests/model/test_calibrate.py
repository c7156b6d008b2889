"""Students calibrated on text, against their teacher and against conversion without data."""

import pytest
import torch

from dfssm.base import DfssmError
from dfssm.model import calibrate as module
from dfssm.model.calibrate import Moments, calibrate
from dfssm.model.checkpoint import check_tensors
from dfssm.model.convert import convert
from dfssm.model.quant import dequantized
from dfssm.model.rounding import damped
from dfssm.model.student import PackedBinaryLinear, from_tensors
from dfssm.model.teacher import Mamba2LM


def divergence(teacher, student, ids):
    wanted, found = (model(ids)[0].log_softmax(-1) for model in (teacher, student))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("rank, planes", [(0, 1), (4, 1), (2, 2), (0, 3), (1, 4)])
def test_nearer_to_the_teacher_than_without_data_on_other_text(teacher, windows, rank, planes):
    config, tensors, errors = calibrate(teacher, windows, rank, planes)
    check_tensors("calibrated", config, tensors)
    assert (config.rank, config.planes) == (rank, planes)
    assert list(errors) == [f"layers.{i}.{name}" for i in (0, 1) for name in ("in_proj", "out_proj")]
    other = torch.randint(64, (8, 40), generator=torch.Generator().manual_seed(2))
    free = divergence(teacher, from_tensors(*convert(teacher, rank, planes)), other)
    assert divergence(teacher, from_tensors(config, tensors), other) < 0.8 * free


def test_each_projection_sees_what_it_sees_in_the_student(teacher, windows, monkeypatch):
    seen = []
    fit = module.round_matrix
    monkeypatch.setattr(module, "round_matrix", lambda w, moment, *more: seen.append(moment) or fit(w, moment, *more))
    config, tensors, _ = calibrate(teacher, windows, 2)
    student, expected = from_tensors(config, tensors), []
    for layer in student.modules():
        if isinstance(layer, PackedBinaryLinear):
            layer.register_forward_pre_hook(lambda _, inputs: expected.append(dequantized(inputs[0]).flatten(0, 1)))
    student(windows)
    assert len(seen) == len(expected) == 4
    for moment, x in zip(seen, expected, strict=True):
        # Sums in another order move some activations over a rounding tie, by one code in 127.
        assert torch.dist(moment, (x.T @ x).double()) < 1e-3 * moment.norm()


def test_the_result_does_not_depend_on_the_pieces(teacher, windows, monkeypatch):
    """The first layer's inputs are exact; those of the second are of a student whose sums, in another order, move
    activations over a rounding tie, and with them a sign. In pieces of 1 to 13 windows it moved by 1.5 % at most.
    """
    first = calibrate(teacher, windows, 2)[2]
    monkeypatch.setattr(module, "PIECE", 7 * windows.shape[1])  # 24 windows in pieces of 7
    found = calibrate(teacher, windows, 2)[2]
    for name, error in first.items():
        assert found[name] == pytest.approx(error, rel=1e-4 if name.startswith("layers.0.") else 0.03)


def test_the_same_every_time(teacher, windows):
    a, b = (calibrate(teacher, windows, 2, 2)[1] for _ in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_teacher_stays_as_it_was_and_may_be_fp16(teacher, windows, config):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    calibrate(teacher, windows, 2)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    narrow = Mamba2LM(config).eval().requires_grad_(False)
    narrow.load_state_dict({name: value.half() for name, value in before.items()}, assign=True)
    wide = Mamba2LM(config).eval().requires_grad_(False)
    wide.load_state_dict({name: value.half().float() for name, value in before.items()})
    a, b = (calibrate(model, windows, 2)[1] for model in (narrow, wide))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (3, 65)])  # one token; and one more than a chunk
def test_text_of_any_shape(teacher, shape, monkeypatch):
    monkeypatch.setattr(module, "FEWEST", 0)
    config, tensors, _ = calibrate(teacher, torch.randint(64, shape), 1)
    check_tensors("calibrated", config, tensors)


def test_progress_counts_the_layers(teacher, windows):
    seen = []
    calibrate(teacher, windows, 0, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_a_text_that_makes_a_student_worse_is_refused(teacher, windows, config):
    least = 4 * config.d_inner
    with pytest.raises(DfssmError, match=f"has {least - 1} tokens, too few .* at least {least}, or convert without"):
        calibrate(teacher, windows.flatten()[None, : least - 1], 2)
    calibrate(teacher, windows.flatten()[None, :least], 2)


def test_numbers_that_are_not_finite_are_named(windows, config):
    torch.manual_seed(0)
    model = Mamba2LM(config)
    with torch.no_grad():
        model.layers[1].out_proj.weight.fill_(3e38)
    with pytest.raises(DfssmError, match="its numbers in layers.1.out_proj are not finite on this text: copy or train"):
        calibrate(model, windows, 2)


def test_the_best_matrix_is_ridge_regression():
    g = torch.Generator().manual_seed(0)
    weight, x, y = (torch.randn(*shape, generator=g) for shape in ((3, 16), (50, 16), (50, 3)))
    moments = Moments("", weight)
    for part in (slice(0, 20), slice(20, 50)):
        moments.add(x[part], y[part])
    ridge = (damped(moments.second) - moments.second).sqrt()  # as more rows, that ask for the teacher's weight
    rows = torch.cat([x.double(), ridge])
    wanted = torch.cat([y.double(), ridge @ weight.double().T])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(moments.best(), expected.float(), rtol=1e-4, atol=1e-5)
