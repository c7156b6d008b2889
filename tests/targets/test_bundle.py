"""Manifests: what is written is what is read, and whatever is wrong is one line that names it."""

import dataclasses
import hashlib
import json
import os
import platform

import pytest

from dfssm.base import DfssmError
from dfssm.targets.bundle import Manifest, check_files, file_entry, loading, open_bundle, read_manifest, sealed


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"graph")
    (tmp_path / "model.onnx.data").write_bytes(b"weights" * 1_000_000)
    files = {name: file_entry(tmp_path / name) for name in ("model.onnx", "model.onnx.data")}
    config = {"vocab_size": 7, "dt_limit": [0.0, None]}
    machine, student = platform.machine(), "ab" * 32
    manifest = Manifest("ort-cpu", config, "fp16", 1, files, {"x": "1"}, {}, machine=machine, model_sha256=student)
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    return tmp_path


@pytest.fixture
def bundle_1(bundle):
    """The same as version 1 had it."""
    document = json.loads((bundle / "manifest.json").read_text()) | {"version": 1}
    for key in ("machine", "model_sha256", "manifest_sha256"):
        del document[key]
    for entry in document["files"].values():
        del entry["chunks_sha256"]
    (bundle / "manifest.json").write_text(json.dumps(document, indent=2) + "\n")
    return bundle


def edit(bundle, **changes):
    """A manifest with other values, None for one without the key, and a hash of itself that is right."""
    path = bundle / "manifest.json"
    document = json.loads(path.read_text()) | changes
    del document["manifest_sha256"]
    path.write_text(sealed({key: value for key, value in document.items() if value is not None}))


def test_round_trip(bundle):
    manifest = read_manifest(bundle)
    assert manifest.target == "ort-cpu" and manifest.config["dt_limit"] == [0.0, None]
    assert Manifest(**vars(manifest)).to_json() == (bundle / "manifest.json").read_text()
    check_files(bundle)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "9" * 10_000])
def test_what_is_no_json_is_one_line(bundle, text):
    (bundle / "manifest.json").write_text(text)
    with pytest.raises(DfssmError, match=r"^.*manifest.json cannot be read \(.*\): compile the model again$"):
        read_manifest(bundle)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"format": "other"}, "not the manifest of a bundle"),
        ({"version": 3}, "has bundle version 3, this dfssm reads versions 1 and 2"),
        ({"version": 1}, "key 'manifest_sha256' is unknown"),
        ({"layout": 0}, "layout is 0, target ort-cpu has 1"),
        ({"machine": 3}, "'machine' or 'model_sha256' is no text"),
        ({"model_sha256": None}, "key 'model_sha256' is missing"),
        ({"layout": None}, "key 'layout' is missing"),
        ({"extra": 1}, "key 'extra' is unknown"),
        ({"target": "gpu"}, "unknown target 'gpu', known are ort-cpu, onnx, trt"),
        ({"state_dtype": "fp8"}, "unknown state_dtype 'fp8'"),
        ({"files": {"../model.onnx": {"sha256": "", "bytes": 1}}}, "file '../model.onnx' is not valid"),
        *(({"files": {name: {"sha256": "", "bytes": 1}}}, f"file '{name}' is not valid") for name in ("", ".", "..")),
        ({"files": {"model.onnx": {"sha256": "", "bytes": 1}}}, "file 'model.onnx' is not valid"),
        ({"files": {"model.onnx": {"bytes": 1}}}, "file 'model.onnx' is not valid"),
        ({"files": {"model.onnx": 3}}, "file 'model.onnx' is not valid"),
        ({"files": {}}, "no entry for model.onnx"),
        ({"engine": 3}, "'engine' is not an object"),
        ({"engine": {"builder": "x"}}, "key 'engine' is for target trt, and needed there"),
        ({"target": "trt", "layout": 0}, "key 'engine' is for target trt, and needed there"),
        ({"target": "trt", "layout": 0, "engine": {"builder": "x"}}, "no entry for model.engine"),
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
        check_files(bundle, hashes=False)


def test_truncated_file(bundle):
    (bundle / "model.onnx.data").write_bytes(b"weights" * 999)
    with pytest.raises(DfssmError, match="has 6993 bytes, its manifest says 7000000"):
        check_files(bundle, hashes=False)


def test_changed_file(bundle):
    (bundle / "model.onnx.data").write_bytes(b"weightz" * 1_000_000)
    check_files(bundle, hashes=False)
    with pytest.raises(DfssmError, match="model.onnx.data does not match the sha256"):
        check_files(bundle)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 5 << 20])
def test_an_entry_has_the_hash_of_the_whole_and_of_chunks_of_a_mebibyte(size, tmp_path):
    content = bytes(range(256)) * (size // 256) + bytes(size % 256)
    (tmp_path / "a").write_bytes(content)
    chunks = [hashlib.sha256(content[at : at + 1048576]).digest() for at in range(0, size, 1048576)]
    assert file_entry(tmp_path / "a") == {
        "sha256": hashlib.sha256(content).hexdigest(),
        "chunks_sha256": hashlib.sha256(b"".join(chunks)).hexdigest(),
        "bytes": size,
    }


@pytest.mark.parametrize("at", [0, 1 << 20, 6_999_999])
def test_one_other_bit_is_found(bundle, at):
    with (bundle / "model.onnx.data").open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(DfssmError, match="model.onnx.data does not match the sha256"):
        open_bundle(bundle)


def test_damaged_weights_are_named_whatever_the_block_does_with_them(bundle):
    (bundle / "model.onnx.data").write_bytes(b"weightz" * 1_000_000)
    entered = False
    with pytest.raises(DfssmError, match="model.onnx.data does not match the sha256"), loading(bundle) as opened:
        entered = opened.size("model.onnx.data") == 7_000_000
        raise ValueError("of weights that make no sense")
    assert entered
    with loading(bundle, hashes=False) as opened:
        assert opened.read("model.onnx") == b"graph"


@pytest.mark.parametrize("name, content", [("model.onnx", b"grapf"), ("model.onnx.data", b"short")])
def test_a_graph_that_changed_or_another_size_is_found_before_the_block(bundle, name, content):
    (bundle / name).write_bytes(content)
    with pytest.raises(DfssmError, match=f"{name} (does not match|has 5 bytes)"), loading(bundle):
        pytest.fail("its graph would be opened")


def test_no_byte_of_a_manifest_may_change(bundle):
    path = bundle / "manifest.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DfssmError, match="manifest.json"):
            read_manifest(bundle)
    path.write_bytes(whole.rstrip())
    with pytest.raises(DfssmError, match="does not match its own sha256"):
        read_manifest(bundle)


def test_the_hash_of_a_manifest_is_that_of_its_bytes_with_zeros_in_its_place(bundle):
    text = (bundle / "manifest.json").read_text()
    digest = json.loads(text)["manifest_sha256"]
    assert text.count(digest) == 1 and text.endswith(f'"{digest}"\n}}\n')
    assert hashlib.sha256(text.replace(digest, "0" * 64).encode()).hexdigest() == digest


def test_version_1_is_read_and_checked(bundle_1):
    with open_bundle(bundle_1) as bundle:
        assert bundle.manifest.machine is None and bundle.manifest.model_sha256 == ""
        assert set(bundle.manifest.files["model.onnx"]) == {"sha256", "bytes"}
    with loading(bundle_1) as bundle:
        assert bundle.read("model.onnx.data") == b"weights" * 1_000_000  # read while it is hashed
    (bundle_1 / "model.onnx.data").write_bytes(b"weightz" * 1_000_000)
    with pytest.raises(DfssmError, match="model.onnx.data does not match the sha256"):
        open_bundle(bundle_1)


def test_a_bundle_for_another_machine_is_one_line(bundle, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    made_for = read_manifest(bundle).machine
    with pytest.raises(DfssmError, match=f"is for {made_for}, this machine is riscv64: compile the model again here$"):
        open_bundle(bundle)
    manifest = dataclasses.replace(read_manifest(bundle), target="onnx", layout=0, machine=None)
    (bundle / "manifest.json").write_text(manifest.to_json())
    open_bundle(bundle)


def test_what_was_checked_is_what_is_read(bundle, tmp_path_factory):
    """The folder is exchanged, and a file of it replaced, after the check."""
    with open_bundle(bundle) as opened:
        moved = tmp_path_factory.mktemp("old") / "b"
        (bundle / "model.onnx").rename(bundle / "gone")
        (bundle / "model.onnx").write_bytes(b"other")
        bundle.rename(moved)
        bundle.mkdir()
        assert opened.read("model.onnx") == b"graph" and opened.size("model.onnx.data") == 7_000_000


def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_refused(bundle):
    (bundle / "model.onnx").unlink()
    os.mkfifo(bundle / "model.onnx")
    with pytest.raises(DfssmError, match=r"model.onnx cannot be read \(no regular file\): copy or compile it again"):
        open_bundle(bundle)
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").mkdir()
    with pytest.raises(DfssmError, match="model.onnx is missing"):
        open_bundle(bundle)
