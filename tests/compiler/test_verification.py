"""What the verification of dfcompile finds: a number, a wiring, a state or a graph that is not the student's."""

import numpy as np
import pytest
import student_ref
from compiles import RUN_HERE, fails, save

from dfssm.export.builder import GraphBuilder
from dfssm.targets import get_target
from dfssm.verify.bundle import SEED, TOKENS


@pytest.mark.parametrize("target", RUN_HERE)
@pytest.mark.parametrize(
    "tensor, node",
    [
        ("embedding.weight", "Embedding.out of /embed"),
        ("layers.1.norm.weight", "RMSNorm.out of /layers.1/norm"),
        ("layers.1.in_proj.bits", "BinaryScaffoldMatMul.y of /layers.1/in_proj"),
        ("layers.0.out_proj.up", "BinaryScaffoldMatMul.y of /layers.0/out_proj"),
        ("layers.0.conv.bias", "CausalConv1dStep.y of /layers.0/conv"),
        ("layers.1.scan.D", "SelectiveScanStep.y of /layers.1/scan"),
        ("layers.0.scan.A_log", "SelectiveScanStep.new_state of /layers.0/scan"),
        ("norm_f.weight", "RMSNorm.out of /norm_f"),
        ("lm_head.scale", "logits of /lm_head"),
    ],
)
def test_one_changed_number_is_found(target, tensor, node, command, tmp_path, monkeypatch):
    """A single element that is not the student's fails the verification, and the message names the op it is in."""
    model = save(tmp_path / "untied.pt", student_ref.config("untied"))
    module = get_target(target)
    lower = module.lower

    def wrong(tensors, layout):
        changed = np.array(tensors[tensor])
        where = 0
        if tensor == "embedding.weight":  # a row of the table counts only where its token is drawn
            where = np.random.default_rng(SEED).integers(0, len(changed), TOKENS)[0] * changed.shape[1]
        number = changed.flat[where]
        changed.flat[where] = number * 1.01 + 0.01 if changed.dtype == np.float32 else number ^ 1
        return lower(dict(tensors) | {tensor: changed}, layout)

    monkeypatch.setattr(module, "lower", wrong)
    fails(command(model, "--target", target), f"the bundle does not compute what the student does: {node}")


@pytest.mark.parametrize(
    ("op", "changes", "words"),
    [
        ("SelectiveScanStep", lambda a: {"B_start": a["C_start"], "C_start": a["B_start"]}, "of /layers.0/scan"),
        ("SelectiveScanStep", lambda a: {"x_start": a["x_start"] + 1}, "of /layers.0/scan"),
        ("SelectiveScanStep", lambda a: {"dt_start": a["dt_start"] - 1}, "of /layers.0/scan"),
        ("CausalConv1dStep", lambda a: {"x_start": a["x_start"] + 1}, "CausalConv1dStep.y of /layers.0/conv"),
        ("GatedRMSNorm", lambda a: {"z_start": a["z_start"] + 1}, "GatedRMSNorm.out of /layers.0/gated_norm"),
    ],
    ids=["B and C", "x", "dt", "xBC", "z"],
)
def test_wrong_wiring_is_found(op, changes, words, model, command, monkeypatch):
    """Ops that are right, but read other columns: what an op made of its own inputs is not enough."""
    dfssm = GraphBuilder.dfssm

    def wired(self, kind, *args, **keywords):
        return dfssm(self, kind, *args, **keywords | (changes(keywords) if kind == op else {}))

    monkeypatch.setattr(GraphBuilder, "dfssm", wired)
    fails(command(model, "--target", "onnx"), words)


def test_states_are_carried(model, command, monkeypatch):
    """States of two layers exchanged on their way out: right in the prefill, wrong at the first step after it."""
    from dfssm.verify import bundle

    run = bundle.run

    def crossed(infer, *arguments):
        a, b = "ssm_state.0", "ssm_state.1"
        return run(lambda feeds: infer(feeds | {a: feeds[b], b: feeds[a]}), *arguments)

    monkeypatch.setattr(bundle, "run", crossed)
    fails(command(model, "--target", "ort-cpu"), "of /layers.0/scan")


def test_shipped_graph_must_agree(model, command, monkeypatch):
    from dfssm.verify import bundle

    calls_of = bundle.calls_of

    def drifting(infer, feeds, ids, calls):
        for call, outputs in enumerate(calls_of(infer, feeds, ids, calls), 1):
            yield outputs | {"logits": outputs["logits"] + (call == len(calls)) * np.float32(1e-3)}

    monkeypatch.setattr(bundle, "calls_of", drifting)
    fails(command(model, "--target", "ort-cpu"), "model.onnx gives other logits than its ops do one by one")
