"""What libdfssm_runtime does with bundles that are damaged, hostile, of another kind, or hold code."""

import json
import os
import shutil

import numpy as np
import pytest
import tiny
from lower_layer import moments
from native.runtime_library import CXX, drive, reseal, run

from dfssm.base.files import part_of
from dfssm.targets.bundle import file_entry, read_manifest
from dfssm.targets.ort_cpu import LIBRARY

pytestmark = pytest.mark.xdist_group("native")


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def opened(bundle, *options: int, **environment: str) -> str:
    return drive(" ".join(map(str, ["open", bundle, *options])), **environment)[0]


def flip(path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json", "libdfssm_ort_cpu.so"])
def test_a_flipped_bit_is_found(name, bundle):
    if not (bundle / name).exists():
        pytest.skip("the bundle has no library")
    flip(bundle / name, (bundle / name).stat().st_size // 2)
    assert (
        opened(bundle) == f"error 2 {bundle / name} does not match the sha256 in its manifest: copy or compile it again"
    )
    (bundle / name).write_bytes(b"x")
    assert opened(bundle).startswith(f"error 2 {bundle / name} has 1 bytes, its manifest says ")
    (bundle / name).unlink()
    assert opened(bundle).startswith(f"error 2 {bundle / name} is missing")
    os.mkfifo(bundle / name)
    assert opened(bundle).startswith(f"error 2 {bundle / name} cannot be read")


def test_a_bundle_is_the_old_or_the_new_while_its_files_are_replaced(bundle, tmp_path):
    """In the lower layer of an overlay mount, as Python's reader."""
    new = tiny.write_bundle(tmp_path / "new", target=read_manifest(bundle).target, state_dtype="int8", seed=1)
    (bundle / "old").write_text("which the new one has not")
    places = moments(bundle, new, tmp_path)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    assert drive(*(f"open {place}" for place in places), TMPDIR=str(temporary)) == [""] * len(places)
    if (new / LIBRARY).exists():  # the bundle's own, wherever it lies
        loaded = drive(*(f"open {place} 1" for place in places), TMPDIR=str(temporary), DFSSM_ORT_LIBRARY="")
        assert loaded == [""] * len(places)
    assert not list(temporary.iterdir())
    models = {read_manifest(folder).files["model.onnx.data"]["sha256"] for folder in places}
    assert len(models) == 2
    parts = [place / part_of((place / "manifest.json").read_bytes()) for place in places]
    graph = next(part / "model.onnx" for part in parts if (part / "model.onnx").exists())
    flip(graph, 100)
    assert "model.onnx does not match the sha256 in its manifest: copy or compile it again" in opened(graph.parents[1])


def test_all_of_a_manifest_counts(bundle):
    path = bundle / "manifest.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"vocab_size": 265', b'"vocab_size": 264'))
    assert "does not match its own sha256" in opened(bundle)
    for end in range(0, len(content), 61):
        path.write_bytes(content[:end])
        assert opened(bundle).startswith("error 2 ")
    path.write_bytes(b"[" * 100_000)
    assert opened(bundle).startswith("error 2 ")
    path.unlink()
    assert opened(bundle) == f"error 2 {path} is missing: give a complete bundle, copy or compile it again"
    assert opened(bundle.parent / "none").startswith(f"error 2 {bundle.parent / 'none'} cannot be read")


WRONG = {
    "format": "other",
    "version": 3,
    "target": "gpu",
    "layout": True,
    "state_dtype": "fp64",
    "machine": "sparc",
    "tools": [],
    "surprise": 1,
    "engine": {"lowering": "plugin"},
    "config.vocab_size": 2**70,
    "config.n_layer": 2**62,
    "config.d_model": 2**24,
    "config.d_state": 0,
    "config.headdim": -1,
    "config.d_conv": 2.5,
    "config.expand": None,
    "config.eos_token_id": [3, 999],
    "files.model.onnx.bytes": 2**64,
    "files.model.onnx.bytes ": "1",
    "files.model.onnx.sha256": None,
}


@pytest.mark.parametrize("place", WRONG)
def test_a_wrong_value_is_refused(place, bundle):
    """Also where the hash of the manifest is right."""

    def change(manifest) -> None:
        of, _, key = place.strip().rpartition(".")
        parent = manifest["files"]["model.onnx"] if of.startswith("files") else manifest[of] if of else manifest
        parent[key] = WRONG[place]

    reseal(bundle, change)
    answer = opened(bundle)
    assert answer.startswith("error 2 ") and len(answer) < 400


@pytest.mark.parametrize("name", ["../outside", "a/b", "", ".", "..", "/etc/passwd", "new\nline"])
def test_a_name_reaches_nothing_outside(name, bundle):
    (bundle.parent / "outside").write_bytes(b"x")
    reseal(bundle, lambda manifest: manifest["files"].update({name: file_entry(bundle.parent / "outside")}))
    assert "is not valid" in opened(bundle)


def test_a_bundle_of_version_1_is_read(bundle):
    def older(manifest) -> None:
        manifest["version"] = 1
        for entry in manifest["files"].values():
            del entry["chunks_sha256"]
        for key in ("machine", "model_sha256"):
            del manifest[key]

    reseal(bundle, older)
    path = bundle / "manifest.json"
    document = json.loads(path.read_text())
    del document["manifest_sha256"]
    path.write_text(json.dumps(document))
    assert opened(bundle) == ""
    flip(bundle / "model.onnx.data", 100)
    assert "does not match the sha256" in opened(bundle)


def test_links_are_followed(bundle, tmp_path):
    """A bundle in a cache is links to files of other names."""
    for path in list(bundle.iterdir()):
        path.rename(tmp_path / f"blob-{path.name}")
        path.symlink_to(tmp_path / f"blob-{path.name}")
    (tmp_path / "tmp").mkdir()
    assert opened(bundle, TMPDIR=str(tmp_path / "tmp")) == ""
    assert not list((tmp_path / "tmp").iterdir())


def test_a_graph_may_name_only_the_weights_of_its_bundle(bundle):
    path = bundle / "model.onnx"
    path.write_bytes(path.read_bytes().replace(b"model.onnx.data", b"../../../../etc"))
    assert "does not lie in model.onnx.data" in opened(bundle, 0, 1)


def test_weights_that_are_too_short_are_refused(bundle):
    os.truncate(bundle / "model.onnx.data", 1000)
    entry = {"model.onnx.data": file_entry(bundle / "model.onnx.data")}
    reseal(bundle, lambda manifest: manifest["files"].update(entry))
    assert "does not lie in model.onnx.data" in opened(bundle)


def test_no_damage_of_a_graph_ends_the_process(bundle):
    """Bytes changed at random, and the graph cut off, behind hashes that nobody compares."""
    path, rng = bundle / "model.onnx", np.random.default_rng(0)
    content = path.read_bytes()
    lines = []
    for i in range(48):
        damaged = bytearray(content)
        for at in rng.integers(0, len(content), 3):
            damaged[at] = rng.integers(0, 256)
        copy = shutil.copytree(bundle, bundle.parent / f"damaged-{i}")
        (copy / path.name).write_bytes(
            damaged if i % 4 else damaged[: rng.integers(0, len(content))].ljust(len(content), b"\0")
        )
        lines.append(f"open {copy} 0 1")
    answers = drive(*lines)
    assert sum(answer.startswith("error ") for answer in answers) > 24


def test_other_targets_and_machines_are_refused(bundle):
    reseal(bundle, lambda manifest: manifest.update(target="trt"))
    assert opened(bundle).startswith("error 2 ")


def test_without_onnx_runtime_or_kernels_it_says_so(bundle, tmp_path):
    (tmp_path / "empty.so").touch()
    assert opened(bundle, DFSSM_ONNXRUNTIME="none.so").startswith("error 4 ONNX Runtime does not load (none.so")
    assert opened(bundle, DFSSM_ORT_LIBRARY="none.so").startswith("error 4 none.so does not exist")
    found = opened(bundle, DFSSM_ORT_LIBRARY=str(tmp_path / "empty.so"))
    assert found.startswith(f"error 4 {tmp_path / 'empty.so'} does not load into ONNX Runtime")


def test_the_code_of_a_bundle_runs_only_with_trust(tmp_path):
    """Its library leaves a mark when it is loaded."""
    bundle, mark = tiny.write_bundle(tmp_path / "bundle"), tmp_path / "mark"
    source = tmp_path / "library.cpp"
    source.write_text(
        f'#include <cstdio>\n__attribute__((constructor)) void begin() {{ std::fclose(std::fopen("{mark}", "w")); }}\n'
    )
    library = bundle / "libdfssm_ort_cpu.so"
    run(*CXX, "-shared", "-fPIC", source, "-o", library)
    reseal(bundle, lambda manifest: manifest["files"].update({library.name: file_entry(library)}))
    assert opened(bundle) == "" and not mark.exists()  # by the installed one
    assert opened(bundle, DFSSM_ORT_LIBRARY="").startswith("error 4 ") and not mark.exists()
    assert opened(bundle, 1, DFSSM_ORT_LIBRARY="").startswith(f"error 4 {library} does not load") and mark.exists()
    mark.unlink()
    assert opened(bundle, DFSSM_ORT_LIBRARY="", DFSSM_TRUST="1").startswith("error 4 ") and mark.exists()
    mark.unlink()
    reseal(bundle, lambda manifest: manifest["files"].pop(library.name))  # what is not listed is not opened
    assert opened(bundle, 1, DFSSM_ORT_LIBRARY="").startswith("error 4 ") and not mark.exists()
