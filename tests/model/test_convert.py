"""Students made without training."""

import math

import pytest
import torch

from dfssm.model.checkpoint import check_tensors, save_student
from dfssm.model.config import DFSSMConfig, Mamba2Config
from dfssm.model.convert import binarize, convert, init_student, low_rank, student_from_teacher
from dfssm.model.quant import unpack_bits
from dfssm.model.student import from_tensors
from dfssm.model.teacher import Mamba2LM

CONFIG = Mamba2Config(vocab_size=64, d_model=64, n_layer=2, d_state=8, headdim=16)


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return Mamba2LM(CONFIG).eval()


def weights(tensors, name):
    """The float matrix that the tensors of one projection stand for."""
    bits, scale = (tensors[f"{name}.{part}"] for part in ("bits", "scale"))
    if bits.ndim == 2:
        bits, scale = bits[None], scale[None]
    down, up = (tensors[f"{name}.{p}"] * tensors[f"{name}.{p}_scale"][:, None] for p in ("down", "up"))
    return (unpack_bits(bits) * scale[..., None]).sum(0) + up @ down


def test_scale_is_the_best_one_for_the_signs():
    w = torch.randn(5, 96)
    latents, scales, residual = binarize(w)
    for wrong in (0.99, 1.01):
        other = w - wrong * scales[0][:, None] * torch.sign(latents[0])
        assert (other.square().sum(-1) > residual.square().sum(-1)).all()
    torch.testing.assert_close(scales[0], w.abs().mean(-1))


def test_planes_and_ranks_bring_the_weights_closer():
    w = torch.randn(40, 64)
    errors = [binarize(w, planes)[2].norm() for planes in (1, 2, 3, 4)]
    assert all(b < 0.8 * a for a, b in zip(errors, errors[1:], strict=False))
    residual = binarize(w)[2]
    errors = [torch.dist(residual, torch.mm(*low_rank(residual, r))) for r in (0, 1, 4, 16, 40)]
    assert all(b < a for a, b in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 1e-4 * errors[0]


def test_low_rank_of_a_large_matrix_is_the_truncated_svd():
    torch.manual_seed(0)
    a = torch.randn(300, 8) @ torch.randn(8, 200) + 0.01 * torch.randn(300, 200)
    up, down = low_rank(a, 8)
    u, s, v = torch.linalg.svd(a, full_matrices=False)
    best = torch.dist(a, u[:, :8] * s[:8] @ v[:8])
    assert torch.dist(a, up @ down) <= 1.001 * best
    state = torch.random.get_rng_state()
    assert torch.equal(low_rank(a, 8)[0], up)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("rank, planes", [(0, 1), (4, 1), (4, 2)])
def test_converted_tensors_are_a_student_near_its_teacher(teacher, rank, planes):
    config, tensors = convert(teacher, rank, planes)
    assert (config.rank, config.planes) == (rank, planes)
    check_tensors("converted", config, tensors)
    for name in ("layers.0.in_proj", "layers.1.out_proj"):
        w = teacher.get_parameter(f"{name}.weight")
        # The sign of uniform weights leaves a quarter of their energy, each further plane a quarter of that.
        assert torch.dist(weights(tensors, name), w) < 0.51**planes * w.norm()
    assert torch.equal(tensors["layers.1.scan.dt_bias"], teacher.layers[1].scan.dt_bias)


@torch.no_grad()
def test_many_planes_give_the_teacher_back(teacher):
    config, tensors = convert(teacher, rank=8, planes=10)
    ids = torch.randint(CONFIG.vocab_size, (2, 12))
    expected, actual = teacher(ids)[0], from_tensors(config, tensors)(ids)[0]
    assert (actual - expected).abs().max() < 0.05 * expected.abs().max()  # int8 activations remain


@pytest.mark.parametrize("rank, planes", [(0, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_trainable_student_starts_at_the_conversion(rank, planes, tied):
    torch.manual_seed(0)
    teacher = Mamba2LM(Mamba2Config(**CONFIG.to_dict() | {"tie_embeddings": tied}))
    exported = student_from_teacher(teacher, rank, planes).export_tensors()
    config, tensors = convert(teacher, rank, planes)
    assert set(exported) == set(tensors)
    assert all(torch.equal(exported[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("rank, planes", [(0, 1), (4, 1), (4, 3)])
@torch.no_grad()
def test_trainable_student_starts_at_a_packed_one(rank, planes, teacher):
    _, tensors = init_student(CONFIG, 3, rank, planes)
    exported = student_from_teacher(teacher, rank, planes, tensors=tensors).export_tensors()
    for name in ("layers.0.in_proj", "layers.1.out_proj"):
        assert all(torch.equal(exported[f"{name}.{part}"], tensors[f"{name}.{part}"]) for part in ("bits", "scale"))
        # A row whose largest code was not 127 gets new codes, each at most half a step from the old value.
        wanted, found = weights(tensors, name), weights(exported, name)
        assert torch.dist(found, wanted) < 0.02 * wanted.norm()
    assert torch.equal(exported["layers.0.scan.D"], teacher.layers[0].scan.D)


def test_trainable_student_shares_nothing_with_its_teacher(teacher):
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student = student_from_teacher(teacher, 2)
    with torch.no_grad():
        for parameter in student.parameters():
            assert parameter.requires_grad
            parameter.add_(1.0)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_random_student_is_the_same_for_the_same_seed():
    _, a = init_student(CONFIG, seed=5, rank=3)
    _, b = init_student(CONFIG, seed=5, rank=3)
    _, c = init_student(CONFIG, seed=6, rank=3)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["layers.1.in_proj.bits"], c["layers.1.in_proj.bits"])
    assert not torch.equal(a["layers.1.in_proj.bits"], a["layers.0.in_proj.bits"])


@pytest.mark.parametrize("change", [{}, {"tie_embeddings": False}, {"n_layer": 12, "d_model": 256}])
@pytest.mark.parametrize("rank, planes", [(0, 1), (16, 1), (16, 2)])
@torch.no_grad()
def test_random_student_is_lively(change, rank, planes, tmp_path):
    config, tensors = init_student(Mamba2Config(**CONFIG.to_dict() | change), rank=rank, planes=planes)
    save_student(tmp_path / "model.pt", config, tensors)  # as strict as the file format
    logits, state = from_tensors(config, tensors)(torch.arange(64)[None])
    assert 0.5 < logits.std() < 5
    assert logits.argmax(-1).unique().numel() > 8
    assert all(0.001 < s.abs().max() < 1000 for s in state.ssm)
    assert math.isfinite(float(logits.sum()))


def test_shape_brings_its_own_rank():
    config, _ = init_student(DFSSMConfig.from_teacher(CONFIG, rank=3, planes=2))
    assert (config.rank, config.planes) == (3, 2)
