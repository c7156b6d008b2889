"""dfcompile --target trt: whole bundles on a machine without a GPU, what their manifest says, and how they open."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import student_ref
import tiny
import torch
from documents import ROOT
from trt_graphs import DEMO

from dfssm.base import DfssmError
from dfssm.cli.main import dfcompile
from dfssm.compiler.pipeline import Request, compile_model
from dfssm.model.checkpoint import save_student
from dfssm.model.config import preset
from dfssm.model.convert import init_student
from dfssm.runtime import Engine
from dfssm.targets import cuda, trt, trt_options
from dfssm.targets.bundle import check_files, read_manifest

pytestmark = pytest.mark.skipif(not find_spec("tensorrt_rtx"), reason="tensorrt_rtx is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("in") / "model.pt"
    config = student_ref.config("plain")
    save_student(path, config, {name: torch.from_numpy(array) for name, array in tiny.tensors(config).items()})
    return path


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(cuda, "devices", lambda: ([], "there is no CUDA driver (libcuda.so.1)"))


def run(capsys, *args) -> tuple[int, str, str]:
    try:
        dfcompile([str(arg) for arg in args])
        status = 0
    except SystemExit as exit:
        status = exit.code
    return status, *capsys.readouterr()


def test_plugin_bundle(model, tmp_path, capsys):
    try:
        trt.find_library()
    except DfssmError as error:
        pytest.skip(str(error))
    out = tmp_path / "b"
    arguments = ("--target", "trt", "--builder", "tensorrt-rtx", "--sm", "86,89", "--max-tokens", 128, "-o", out)
    status, text, _ = run(capsys, model, *arguments, "--json")
    report = json.loads(text)
    assert status == 0 and set(report["files"]) == {"golden.safetensors", "model.engine", trt.LIBRARY}
    assert sorted(path.name for path in out.iterdir()) == sorted([*report["files"], "manifest.json"])
    manifest = read_manifest(out)
    check_files(out)
    engine = manifest.engine
    assert report["engine"] == engine and (engine["sm"], engine["why"]) == ([86, 89], "--builder")
    assert engine["refused"] == {"fuse": {}}, "all of a layer is fused"
    assert [profile["max"] for profile in engine["profiles"]] == [[1, 1], [1, 128]]
    assert (manifest.state_dtype, manifest.layout) == (trt.DEFAULT_STATE_DTYPE, trt.layout())
    # What was proven, and that it is not the run of the engine.
    assert manifest.verification["passed"] is None and manifest.verification["graph"]["passed"] is True
    assert "runs on a GPU" in manifest.verification["why_not"]
    with pytest.raises(DfssmError, match="model.engine is for tensorrt-rtx .*SM 86, 89, and there is no CUDA driver"):
        Engine.load(out)


@pytest.mark.slow
def test_size_and_memory(tmp_path):
    """Of the 130m shape: TensorRT adds the plugins' attributes and some constants, no kernel of its own in a layer. At
    this rate the 1.3B, 281 MB and 48 layers, stays below 1.02 of its model.pt.
    """
    try:
        trt.find_library()
    except DfssmError as error:
        pytest.skip(str(error))
    config, tensors = init_student(preset("mamba2-130m"), seed=0, rank=16, planes=1)
    save_student(tmp_path / "model.pt", config, tensors)
    options = {"builder": "tensorrt-rtx"}
    report = compile_model(Request(tmp_path / "model.pt", "trt", tmp_path / "b", verify=False, options=options))
    added = report.manifest.files["model.engine"]["bytes"] - (tmp_path / "model.pt").stat().st_size
    assert added < 2e6 + 50e3 * config.n_layer
    build = next(record for record in report.passes if record.name == "build")
    assert build.peak_rss_bytes < 2e9


@pytest.mark.slow
def test_the_figures_of_the_documents_are_the_builders():
    """Of the demo model. Those of another TensorRT may differ."""
    try:
        trt.find_library()
    except DfssmError as error:
        pytest.skip(str(error))
    if (version := trt_options.installed()["tensorrt-rtx"].rpartition(".")[0]) != "1.7.1":
        pytest.skip(f"the documents have those of TensorRT-RTX 1.7.1, here is {version}")
    command = [sys.executable, ROOT / "tests/tools/builder_figures.py", DEMO, "--sm", "86"]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    told = re.findall(r"^\| demo, ((?:steps|prompts) .*)$", (ROOT / "docs/trt.md").read_text(), re.MULTILINE)
    assert made.splitlines()[1:] == [f"| {row}" for row in told]


def test_native_bundle(model, tmp_path, capsys):
    out = tmp_path / "b"
    status, text, _ = run(capsys, model, "--target", "trt", "--lowering", "native", "-o", out)
    assert status == 0
    assert sorted(path.name for path in out.iterdir()) == ["golden.safetensors", "manifest.json", "model.engine"]
    assert "the engine was not run: the engine runs on a GPU" in text and "op by op, over 64 + " in text
    assert "built by tensorrt-rtx" in text and "it needs none) for SM 80, 86, 89, 120" in text
    assert read_manifest(out).engine["profiles"] == [{"min": [1, 1], "opt": [1, 1], "max": [1, 1], "logits": 1}]


def test_what_is_not_fused_is_told(model, tmp_path, capsys, monkeypatch):
    try:
        trt.find_library()
    except DfssmError as error:
        pytest.skip(str(error))
    monkeypatch.setattr("dfssm.targets.trt_lowering.fuse.MOST_COLUMNS", 32)
    arguments = ("--target", "trt", "--sm", "86", "--no-verify", "-o", tmp_path / "b")
    status, text, _ = run(capsys, model, *arguments)
    why = "GatedRMSNorm /layers.0/gated_norm has 64 columns, shared memory holds 32"
    assert status == 0 and f"fuse not applied at /layers.0/out_proj: {why}\n" in text
    assert read_manifest(tmp_path / "b").engine["refused"]["fuse"]["/layers.0/out_proj"] == why


def test_progress(model, tmp_path):
    seen = {}

    def progress(name, done, total):
        assert seen.get(name, (0, total)) <= (done, total)
        seen[name] = done, total

    options = {"lowering": "native", "sm": "86"}
    compile_model(Request(model, "trt", tmp_path / "b", verify=False, options=options), progress)
    assert list(seen) == ["write", "build"] and all(done == total for done, total in seen.values())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--sm", "86", "--builder", "tensorrt"), "builder tensorrt "),
        (("--sm", "86", "--timing-cache", "t"), "--timing-cache: tensorrt-rtx times nothing"),
        (("--sm", "20", "--lowering", "native"), "builds no native engine for SM 20, only for 80"),
    ],
)
def test_errors_are_one_line(arguments, words, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trt, "find_library", lambda folder=None: tmp_path / trt.LIBRARY)
    status, out, err = run(capsys, model, "--target", "trt", "-o", tmp_path / "b", *arguments)
    assert status == 1 and out == "" and err.startswith("dfcompile: error: ") and err.count("\n") == 1
    assert words in err and not list(tmp_path.iterdir())
