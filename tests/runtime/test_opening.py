"""Opening a bundle: wherever its files lie, and whatever becomes of them afterwards."""

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from chats import add_template
from fake_device import FakeCuda, FakeEngine
from lower_layer import moments

from dfssm.base import DfssmError
from dfssm.runtime import Engine
from dfssm.runtime.opening import require_config
from dfssm.runtime.ort import OrtBackend
from dfssm.runtime.state import State
from dfssm.runtime.tensorrt import TensorRTBackend
from dfssm.targets import get_target
from dfssm.targets.bundle import MANIFEST, file_entry, open_bundle, read_manifest
from dfssm.verify.layer import layer_nodes

IDS = [[1, 2, 3, 250, 7]]


@pytest.fixture(params=["ort-cpu", "onnx"])
def bundle(request, tmp_path) -> Path:
    if not get_target(request.param).probe().usable:
        pytest.skip("the op library is not built")
    return tiny.write_bundle(tmp_path / "bundle", target=request.param, state_dtype="int8")


def logits(bundle: Path, **options) -> np.ndarray:
    engine = Engine.load(bundle, threads=1, **options)
    state = engine.new_state()
    return np.stack([engine.prefill(IDS, state), engine.step([9], state)])


@pytest.mark.parametrize("mmap", [True, False])
def test_files_may_be_links_to_elsewhere_and_so_may_the_folder(bundle, tmp_path, mmap):
    expected = logits(bundle)
    store, linked = tmp_path / "store", tmp_path / "linked"
    store.mkdir()
    linked.mkdir()
    for number, file in enumerate(sorted(bundle.iterdir())):  # as in a cache: other names, no suffixes
        shutil.copyfile(file, store / f"blob{number}")
        (linked / file.name).symlink_to(f"../store/blob{number}")
    assert np.array_equal(logits(linked, mmap=mmap), expected)
    (tmp_path / "link").symlink_to("linked")
    assert np.array_equal(logits(tmp_path / "link", mmap=mmap), expected)
    done = subprocess.run(
        [sys.executable, "-m", "dfssm.cli.main", "run", ".", "-p", "a", "-n", "3"],
        cwd=tmp_path / "link", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_links_take_a_folder_for_temporary_files(bundle, tmp_path, monkeypatch):
    weights = bundle / "model.onnx.data"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkdtemp", read_only)
    with pytest.raises(DfssmError, match=r"data, a link .*\(Read-only file system\): set TMPDIR to a"):
        Engine.load(bundle)


def test_the_tokenizer_is_read_where_the_engine_was_loaded(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(bundle.parent)
    engine = Engine.load(bundle.name)
    monkeypatch.chdir("/")
    assert "".join(engine.generate("hello", max_tokens=4)) == "".join(
        Engine.load(bundle).generate("hello", max_tokens=4)
    )


def test_the_bytes_of_a_path_need_not_be_utf8(bundle, tmp_path):
    expected = logits(bundle)
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xe9d"))
    shutil.copytree(bundle, place)
    assert np.array_equal(logits(place), expected)


def test_weights_in_memory_are_not_those_of_the_file(bundle):
    engine = Engine.load(bundle, threads=1, mmap=False)
    expected = engine.prefill(IDS, engine.new_state())
    weights = bundle / "model.onnx.data"
    with weights.open("r+b") as file:  # in place, as nobody should
        file.write(bytes(weights.stat().st_size))
    assert np.array_equal(engine.prefill(IDS, engine.new_state()), expected)
    with pytest.raises(DfssmError, match="does not match the sha256"):
        Engine.load(bundle)


def test_a_folder_that_is_exchanged_while_it_is_opened_does_not_mix(bundle, tmp_path):
    expected = logits(bundle)
    target = read_manifest(bundle).target
    other = tiny.write_bundle(tmp_path / "other", target=target, state_dtype="int8", seed=1)
    with open_bundle(bundle) as opened:
        bundle.rename(tmp_path / "old")
        other.rename(bundle)
        session = get_target(target).open_session(opened, threads=1)
    shutil.rmtree(tmp_path / "old")
    backend = OrtBackend(session, in_place=False)
    state = State.zeros("", backend.layout, backend.vocab_size, 1)
    backend.bind(state).run(np.array(IDS), 0, lambda: None)
    assert np.array_equal(state.logits, expected[0]) and not np.array_equal(logits(bundle)[0], expected[0])


@pytest.fixture
def replaced(bundle, tmp_path) -> tuple[list[Path], Path]:
    """What `bundle` is while another takes its place in the lower layer of an overlay mount, and that other one."""
    other = tiny.write_bundle(tmp_path / "other", target=read_manifest(bundle).target, state_dtype="fp16", seed=1)
    with (other / "tokenizer.json").open("a") as file:
        file.write("\n")
    manifest = read_manifest(other)
    files = manifest.files | {"tokenizer.json": file_entry(other / "tokenizer.json")}
    (other / MANIFEST).write_text(dataclasses.replace(manifest, files=files).to_json())
    add_template(other)
    return moments(bundle, other, tmp_path), other


def test_an_engine_is_the_old_or_the_new_while_files_are_replaced(bundle, replaced):
    places, other = replaced
    old, new = logits(places[0]), logits(other)
    found = ["old" if read_manifest(place).state_dtype == "int8" else "new" for place in places]
    assert found == sorted(found, reverse=True) and {*found} == {"old", "new"}
    for place, kind in zip(places, found, strict=True):
        assert np.array_equal(logits(place), old if kind == "old" else new)


def test_what_is_read_by_its_path_is_of_the_manifest_while_files_are_replaced(replaced, tmp_path, monkeypatch):
    places, _ = replaced
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))  # a tokenizer that is new is read in another process
    switched = next(place for place in places if read_manifest(place).state_dtype == "fp16")
    engine = Engine.load(switched, threads=1)
    assert engine.tokenizer.encode("hello").ids and not (switched / "chat_template.jinja").exists()
    assert engine.chat_template([{"role": "user", "content": "a"}]) == "<user>a<|end|><assistant>"
    with open_bundle(switched) as opened:
        assert layer_nodes(opened, 0)[0].name.startswith("/layers.0/")


def renamed(old: str, new: str):
    """An edit of a graph: one of its inputs or outputs gets another name, everywhere."""

    def edit(graph: onnx.GraphProto) -> None:
        for value in (*graph.input, *graph.output):
            value.name = new if value.name == old else value.name
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [new if name == old else name for name in names]

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        renamed("conv_state.0", "conv_state.x"),
        renamed("ssm_state.1", "other"),
        renamed("conv_state_out.0", "conv_state_out.9"),
        renamed("logits", "other"),
        lambda graph: graph.ClearField("output"),
        lambda graph: graph.output.pop(),
        lambda graph: graph.input.append(onnx.helper.make_tensor_value_info("more", onnx.TensorProto.STRING, [1])),
    ],
    ids=["input", "state", "new_state", "logits", "no_outputs", "one_less", "string"],
)
def test_a_graph_that_is_no_step_is_one_line(bundle, edit):
    """Its inputs and outputs were looked up by name and type as if there could be no others."""
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    edit(model.graph)
    onnx.save(model, bundle / "model.onnx")
    manifest = read_manifest(bundle)
    files = manifest.files | {"model.onnx": file_entry(bundle / "model.onnx")}
    (bundle / MANIFEST).write_text(dataclasses.replace(manifest, files=files).to_json())
    with pytest.raises(DfssmError, match="model.onnx is not the graph of a step: compile the model again"):
        Engine.load(bundle)


SIZES = {
    **{"vocab_size": 264, "n_layer": 3, "d_model": 128, "d_state": 8},
    **{"headdim": 16, "expand": 4, "ngroups": 1, "d_conv": 3},
}


class TestConfig:
    """The manifest's config against what runs."""

    def change(self, bundle: Path, **changes) -> None:
        manifest = read_manifest(bundle)
        manifest = dataclasses.replace(manifest, config=manifest.config | changes)
        (bundle / MANIFEST).write_text(manifest.to_json())

    @pytest.mark.parametrize("name, value", SIZES.items())
    def test_another_size_is_one_line(self, bundle, name, value):
        self.change(bundle, **{name: value})
        named = name if name in ("vocab_size", "n_layer", "d_model") else r"(conv|ssm)_state\.0"
        with pytest.raises(DfssmError, match=rf"its manifest says {named} .*, its graph has .*: compile the model"):
            Engine.load(bundle)

    def test_two_sizes_whose_product_is_right_are_one_line(self, bundle):
        self.change(bundle, d_model=128, expand=1)
        with pytest.raises(DfssmError, match="its manifest says d_model 128, its graph has 64: compile"):
            Engine.load(bundle)

    @pytest.mark.parametrize("name", SIZES)
    @pytest.mark.parametrize("value", [None, 0, -1, True, 1.5, "8", [8], 10**30])
    def test_what_is_no_size_is_one_line(self, bundle, name, value):
        self.change(bundle, **{name: value})
        with pytest.raises(DfssmError, match="its manifest says "):
            Engine.load(bundle)

    def test_another_state_dtype_is_one_line(self, bundle):
        manifest = dataclasses.replace(read_manifest(bundle), state_dtype="fp16")
        (bundle / MANIFEST).write_text(manifest.to_json())
        with pytest.raises(DfssmError, match=r"says ssm_state\.0 float16\[.*, its graph has int8\["):
            Engine.load(bundle)

    @pytest.mark.parametrize("state_dtype", ["fp32", "fp16", "int8"])
    def test_a_device_is_asked_the_same(self, tmp_path, state_dtype):
        """Bindings of an engine: the stand-in has those of the graph."""
        bundle = tiny.write_bundle(tmp_path / "b", target="onnx", state_dtype=state_dtype)
        manifest = read_manifest(bundle)
        fake = FakeCuda()
        backend = TensorRTBackend(FakeEngine(fake, get_target("onnx").open_session(bundle, 1)), fake)
        require_config(bundle, manifest, backend)
        other = dataclasses.replace(manifest, config=manifest.config | {"d_state": 8})
        with pytest.raises(DfssmError, match=r"says conv_state\.0 float32\[\d+, 3\], its graph has float32\[\d+, 3\]"):
            require_config(bundle, other, backend)
