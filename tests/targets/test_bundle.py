"""Manifests: what is written is what is read, and whatever is wrong is one line that names it."""

import json

import pytest

from dfssm.opset import DfssmError
from dfssm.targets.bundle import Manifest, check_files, file_entry, read_manifest


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"graph")
    (tmp_path / "model.onnx.data").write_bytes(b"weights" * 1000)
    files = {name: file_entry(tmp_path / name) for name in ("model.onnx", "model.onnx.data")}
    manifest = Manifest("ort-cpu", {"vocab_size": 7, "dt_limit": [0.0, None]}, "fp16", 1, files, {"x": "1"}, {})
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    return tmp_path


def edit(bundle, **changes):
    path = bundle / "manifest.json"
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def test_round_trip(bundle):
    manifest = read_manifest(bundle)
    assert manifest.target == "ort-cpu" and manifest.config["dt_limit"] == [0.0, None]
    assert Manifest(**vars(manifest)).to_json() == (bundle / "manifest.json").read_text()
    check_files(bundle, manifest)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"format": "other"}, "not the manifest of a bundle"),
        ({"version": 2}, "has bundle version 2, this dfssm reads version 1"),
        ({"layout": None}, "key 'layout' is missing"),
        ({"extra": 1}, "key 'extra' is unknown"),
        ({"target": "gpu"}, "unknown target 'gpu', known are ort-cpu, onnx, trt"),
        ({"state_dtype": "fp8"}, "unknown state_dtype 'fp8'"),
        ({"files": {"../model.onnx": {"sha256": "", "bytes": 1}}}, "file '../model.onnx' is not valid"),
        ({"files": {"model.onnx": {"bytes": 1}}}, "file 'model.onnx' is not valid"),
        ({"files": {"model.onnx": 3}}, "file 'model.onnx' is not valid"),
        ({"files": {}}, "no entry for model.onnx"),
        ({"engine": 3}, "'engine' is not an object"),
        ({"engine": {"builder": "x"}}, "key 'engine' is for target trt, and needed there"),
        ({"target": "trt"}, "key 'engine' is for target trt, and needed there"),
        ({"target": "trt", "engine": {"builder": "x"}}, "no entry for model.engine"),
        ({"files": []}, "'files' is not an object"),
        ({"config": "x"}, "'config' is not an object"),
    ],
)
def test_bad_manifest_is_named(bundle, changes, words):
    edit(bundle, **changes)
    with pytest.raises(DfssmError, match=words) as caught:
        read_manifest(bundle)
    assert "\n" not in str(caught.value) and "manifest.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\xff", '{"format": "dfssm-bundle"}'])
def test_damaged_manifest_is_named(bundle, text):
    (bundle / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DfssmError, match="manifest.json"):
        read_manifest(bundle)


def test_no_bundle(tmp_path):
    with pytest.raises(DfssmError, match="is not a bundle: it has no manifest.json"):
        read_manifest(tmp_path)
    with pytest.raises(DfssmError, match="nowhere does not exist: give a bundle"):
        read_manifest(tmp_path / "nowhere")


def test_missing_file(bundle):
    (bundle / "model.onnx.data").unlink()
    with pytest.raises(DfssmError, match="model.onnx.data is missing"):
        check_files(bundle, read_manifest(bundle), hashes=False)


def test_truncated_file(bundle):
    (bundle / "model.onnx.data").write_bytes(b"weights" * 999)
    with pytest.raises(DfssmError, match="has 6993 bytes, its manifest says 7000"):
        check_files(bundle, read_manifest(bundle), hashes=False)


def test_changed_file(bundle):
    (bundle / "model.onnx.data").write_bytes(b"weightz" * 1000)
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, hashes=False)
    with pytest.raises(DfssmError, match="model.onnx.data does not match the sha256"):
        check_files(bundle, manifest)
