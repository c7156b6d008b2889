"""The table of weights against the modules that hold them, and its roles against the names written out."""

import subprocess
import sys

import pytest

from dfssm.model.config import DFSSMConfig
from dfssm.model.teacher import Mamba2LM
from dfssm.model.tensors import ROLES, role, student_tensors, weights

SHAPE = {"vocab_size": 48, "d_model": 32, "n_layer": 2, "d_state": 8, "headdim": 16, "rank": 2}
ROLE_OF = {
    "scaffold": "layers.{}.in_proj.bits layers.{}.in_proj.scale layers.{}.out_proj.bits layers.{}.out_proj.scale",
    "low rank": " ".join(
        f"layers.{{}}.{p}_proj.{part}" for p in ("in", "out") for part in ("down", "down_scale", "up", "up_scale")
    ),
    "head": "lm_head.weight lm_head.scale",
    "embedding": "embedding.weight embedding.scale",
    "convolution": "layers.{}.conv.weight layers.{}.conv.bias",
    "scan": "layers.{}.scan.A_log layers.{}.scan.D layers.{}.scan.dt_bias",
    "norms": "layers.{}.norm.weight layers.{}.gated_norm.weight norm_f.weight",
}


@pytest.mark.parametrize("change", [{}, {"tie_embeddings": False, "ngroups": 2}, {"d_conv": 3, "expand": 1}])
def test_it_is_the_parameters_of_the_teacher_in_their_order(change):
    config = DFSSMConfig(**SHAPE | change)
    held = {name: tuple(value.shape) for name, value in Mamba2LM(config).state_dict().items()}
    assert {weight.name: weight.shape(config) for weight in weights(config)} == held
    assert [weight.name for weight in weights(config)] == list(held)


def test_every_tensor_of_a_student_has_one_role():
    config = DFSSMConfig(**SHAPE, tie_embeddings=False)
    expected = {name.format(i): one for one, names in ROLE_OF.items() for name in names.split() for i in range(2)}
    assert {name: tensor.role for name, tensor in student_tensors(config).items()} == expected
    assert all(role(name) == one for name, one in expected.items()) and tuple(ROLE_OF) == ROLES


@pytest.mark.parametrize("name", ["layers.0.surprise", "in_proj.weight", "layers.0.in_proj.weight"])
def test_another_name_is_no_role(name):
    with pytest.raises(KeyError, match=name):
        role(name)


def test_it_needs_no_torch():
    code = "import sys, dfssm.model.tensors; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
