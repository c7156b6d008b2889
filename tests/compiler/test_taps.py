"""dfcompile --taps: a file more, which changes no other and computes the same, or there is no bundle."""

import onnx
import pytest
import tiny
import torch

import dfssm.verify.graph
from dfssm.base import DfssmError
from dfssm.cli.main import dfcompile
from dfssm.compiler.pipeline import Request, compile_model
from dfssm.model.checkpoint import save_student
from dfssm.runtime import Engine
from dfssm.targets import TARGETS, get_target
from dfssm.targets.bundle import TAPS, read_manifest


@pytest.fixture
def model(tmp_path):
    save_student(tmp_path / "model.pt", tiny.CONFIG, {name: torch.from_numpy(a) for name, a in tiny.tensors().items()})
    return tmp_path / "model.pt"


@pytest.mark.parametrize("target", [name for name in TARGETS if not get_target(name).IS_ENGINE])
def test_taps_are_a_file_more_and_change_no_other(target, model, tmp_path):
    files = {}
    for name, taps in (("plain", False), ("tapped", True), ("again", True)):
        files[name] = compile_model(Request(model, target, tmp_path / name, taps=taps)).manifest.files
    entry = files["tapped"].pop(TAPS)
    assert files["tapped"] == files["plain"] and files["again"] == files["plain"] | {TAPS: entry}
    (tmp_path / "tapped" / TAPS).write_bytes(b"")
    with pytest.raises(DfssmError, match="taps.onnx has 0 bytes, its manifest says"):
        Engine.load(tmp_path / "tapped")
    compile_model(Request(model, target, tmp_path / "again", force=True))
    assert TAPS not in read_manifest(tmp_path / "again").files and not (tmp_path / "again" / TAPS).exists()


def test_taps_that_compute_otherwise_are_no_bundle(model, tmp_path, monkeypatch):
    def write_other(source, folder):
        graph = onnx.load(source, load_external_data=False)
        next(node for node in graph.graph.node if node.op_type == "Add").op_type = "Sub"
        onnx.save(graph, folder / TAPS)

    monkeypatch.setattr(dfssm.verify.graph, "write_taps", write_other)
    with pytest.raises(DfssmError, match="^taps.onnx gives other logits than model.onnx: run the command again"):
        compile_model(Request(model, "onnx", tmp_path / "b", taps=True))
    assert not (tmp_path / "b").exists()


def test_an_engine_has_no_taps(model, capsys):
    with pytest.raises(SystemExit, match="1"):
        dfcompile([str(model), "--target", "trt", "--taps"])
    assert "target trt shows no hidden states: leave out --taps, or compile for ort-cpu" in capsys.readouterr().err
