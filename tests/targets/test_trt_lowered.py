"""The lowered graph of the demo model on the host: the plugins' own code and kernels, emulated, as custom ops of ONNX
Runtime, beside the ort-cpu bundle.
"""

import numpy as np
import pytest
import student_ref
from plugins_trt import adapter
from trt_graphs import DEMO, step, widened, write_step

from dfssm.compiler.pipeline import Request, compile_model
from dfssm.model.checkpoint import load_student_tensors
from dfssm.opset.tolerances import model_tolerance
from dfssm.targets import get_target
from dfssm.targets.trt_lowering import lower

PREFILL, STEPS = 20, 12

pytestmark = [
    pytest.mark.skipif(bool(adapter.missing()), reason=str(adapter.missing())),
    pytest.mark.skipif(not get_target("ort-cpu").probe().usable, reason="ort-cpu cannot be used here"),
]


@pytest.mark.slow
@pytest.mark.parametrize("state_dtype", ["fp32", "fp16", "int8"])
def test_demo_equals_ort_cpu(state_dtype, tmp_path):
    """32 tokens, teacher-forced: a prefill of 20 and 12 steps. Each call starts from the states that ort-cpu stored, so
    that nothing adds up from call to call; within a call activations on a tie of int8 may round either way, which is
    what `model_tolerance` allows for. (Most calls have no such tie and agree to 1e-6.)
    """
    bundle = tmp_path / "ort-cpu"
    compile_model(Request(DEMO, "ort-cpu", bundle, state_dtype=state_dtype, verify=False))
    reference = get_target("ort-cpu").open_session(bundle, threads=1)
    write_step(tmp_path / "trt", "demo", state_dtype)
    lower(tmp_path / "trt" / "model.onnx", tmp_path / "trt" / "lowered.onnx")
    emulated = adapter.session(tmp_path / "trt" / "lowered.onnx")

    config, _ = load_student_tensors(DEMO)
    tolerance = model_tolerance(config.n_layer, config.d_model)
    ids = np.random.default_rng(4).integers(0, config.vocab_size, (1, PREFILL + STEPS))
    states = student_ref.zero_states(config, 1, state_dtype)
    errors = []
    for call in np.split(ids, [PREFILL, *range(PREFILL + 1, PREFILL + STEPS)], axis=1):
        logits, new = step(emulated, call, states)
        expected, states = step(reference, call, states)
        assert logits.shape == (1, 1, config.vocab_size)
        tolerance.check(logits, expected[:, -1:], "logits")
        errors.append(tolerance.error(logits, expected[:, -1:]))
        for name in states:
            if not name.startswith("ssm_scale"):
                tolerance.check(widened(new, name), widened(states, name), name)
    assert len(errors) == 1 + STEPS and np.median(errors) < 1e-5
