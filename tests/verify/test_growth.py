"""States that grow: what 72 tokens do not show is found before a bundle is kept."""

import json

import numpy as np
import pytest
import student_ref
import tiny
import torch

from dfssm.cli.main import dfcompile
from dfssm.model.checkpoint import save_student
from dfssm.verify import growth
from dfssm.verify.bundle import SEED


def student(path, speed: float):
    """A student whose layer 1 forgets nothing and adds about 80 `speed` to its state at each token."""
    tensors = tiny.tensors()
    tensors["layers.1.scan.A_log"][:] = -30
    tensors["layers.1.scan.dt_bias"][:] = np.log(np.expm1(10 * speed))  # softplus of it is 10 `speed`
    tensors["layers.1.conv.bias"][:] = 3
    save_student(path, tiny.CONFIG, {name: torch.from_numpy(array) for name, array in tensors.items()})
    return tensors


def compiled(tmp_path, capsys, *options):
    with pytest.raises(SystemExit) as ended:
        dfcompile([str(tmp_path / "model.pt"), "-o", str(tmp_path / "b"), *options])
    return ended.value.code or 0, capsys.readouterr()


def entry(tmp_path):
    return json.loads((tmp_path / "b/manifest.json").read_text())["verification"]["states"]


def test_a_state_that_saturates_is_an_error_that_names_layer_and_remedy(tmp_path, cpu_target, capsys):
    student(tmp_path / "model.pt", speed=1)
    code, printed = compiled(tmp_path, capsys, "--target", cpu_target, "--state-dtype", "fp16")
    assert code == 1 and not (tmp_path / "b").exists()
    error = printed.err.splitlines()[-1]
    assert error.startswith("dfcompile: error: a state of layer 1 reaches 65504, where fp16 ends, within ")
    assert error.endswith(" random tokens: compile with --state-dtype fp32")
    assert int(error.split(" within ")[1].split()[0]) > 512, "64 tokens would have shown it"
    for dtype in ("fp32", "int8"):
        code, printed = compiled(tmp_path, capsys, "--target", cpu_target, "--state-dtype", dtype, "--force")
        assert code == 0 and entry(tmp_path) is None and "warning" not in printed.out + printed.err


@pytest.mark.parametrize("speed, warned", [(0.2, True), (0.005, False)])
def test_the_largest_state_is_that_of_the_reference(tmp_path, cpu_target, capsys, speed, warned):
    tensors = student(tmp_path / "model.pt", speed)
    code, printed = compiled(tmp_path, capsys, "--target", cpu_target, "--state-dtype", "fp16")
    assert code == 0
    found = entry(tmp_path)
    assert found["tokens"] == growth.TOKENS and found["layer"] == 1
    ids = np.random.default_rng(SEED).integers(0, tiny.CONFIG.vocab_size, (1, growth.TOKENS))
    states, largest = student_ref.zero_states(tiny.CONFIG, 1, "fp16"), 0.0
    for piece in np.split(ids, growth.TOKENS // growth.CALL, axis=1):
        _, states = student_ref.step(tiny.CONFIG, tensors, piece, states)
        largest = max(largest, float(np.abs(states["ssm_state.1"].astype(np.float32)).max()))
    # Activations on the other side of a rounding tie move a sum of 1,024 tokens by less than that.
    assert found["largest"] == pytest.approx(largest, rel=0.01)
    assert found["share"] == pytest.approx(found["largest"] / 65504)
    assert ("warning: states of layer 1 reach" in printed.out) == warned


def test_numbers_that_overflow_are_named_as_the_models_own(tmp_path, cpu_target, capsys):
    tensors = tiny.tensors()
    tensors["layers.1.norm.weight"][:] = 3e38
    save_student(tmp_path / "model.pt", tiny.CONFIG, {name: torch.from_numpy(array) for name, array in tensors.items()})
    code, printed = compiled(tmp_path, capsys, "--target", cpu_target)
    assert code == 1 and not (tmp_path / "b").exists()
    assert "the model's numbers are not finite, first in layers.1.norm: its weights are too large" in printed.err
