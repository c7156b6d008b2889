"""Commands on files whose numbers and names mislead: one line, soon, and nothing lost."""

import json
import resource
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from commands import run_commands

from dfssm.base import DfssmError
from dfssm.compiler.pipeline import Request, compile_model
from dfssm.model.config import Mamba2Config
from dfssm.model.hf_import import load_teacher, save_teacher
from dfssm.model.teacher import Mamba2LM
from dfssm.runtime import Engine
from dfssm.targets.bundle import sealed


@pytest.fixture
def says(tiny_bundle, tmp_path) -> Callable[..., Path]:
    """says(n_layer=3) -> the tiny bundle with another config, its manifest sealed again."""

    def make(**values) -> Path:
        bundle = tmp_path / "bundle"
        shutil.copytree(tiny_bundle, bundle)
        document = json.loads((bundle / "manifest.json").read_text())
        del document["manifest_sha256"]
        document["config"] |= values
        (bundle / "manifest.json").write_text(sealed(document))
        return bundle

    return make


@pytest.mark.parametrize(
    "values",
    [{"n_layer": 10**9}, {"n_layer": 10**5, "vocab_size": 10**12}, {"rank": 10**6}, {"planes": 1000}],
    ids=str,
)
def test_a_config_of_more_weights_than_the_file_has_is_one_line_at_once(says, values, tmp_path):
    """inspect made a list of all layers; bench probed as much memory as such weights would take."""
    bundle = says(**values)
    for done in run_commands([["dfssm", "inspect", bundle], ["dfssm", "bench", bundle, "--rounds", "1"]], tmp_path):
        assert (done.status, done.out, done.err.count("\n")) == (1, "", 1), done.err
        assert "its manifest" in done.err and done.err.endswith("compile the model again\n")


def test_a_config_that_is_none_names_the_bundle(says, invoke):
    bundle = says(d_conv="4")
    with pytest.raises(DfssmError, match=rf"{bundle}/manifest.json: config: d_conv is '4'.*compile the model again"):
        invoke("inspect", bundle)


@pytest.mark.parametrize("name", ["eos_token_id", "bos_token_id"])
@pytest.mark.parametrize("value", [10**30, tiny.CONFIG.vocab_size, -1, "</s>", True, [0, "a"]])
def test_ids_that_the_vocabulary_lacks(says, name, value):
    """An end of 10^30 was an OverflowError of eval; others were named as the tokenizer's, which does not have them."""
    with pytest.raises(DfssmError, match=rf"/manifest.json: config: {name} is .*\(0 to 264\), or a list of them"):
        Engine.load(says(**{name: value}))


def test_a_student_has_no_such_ids_either(tiny_model, tmp_path, invoke):
    content = torch.load(tiny_model, weights_only=True)
    content["config"]["eos_token_id"] = 265
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(DfssmError, match=r"model.pt: config: eos_token_id is 265; it must be null, an id .*0 to 264"):
        invoke("inspect", tmp_path / "model.pt")


@pytest.fixture
def teacher(tmp_path) -> Path:
    save_teacher(Mamba2LM(Mamba2Config(64, 32, 1, d_state=8, headdim=8, eos_token_id=0)), tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.mark.parametrize("rank", [2, 16])
def test_weights_whose_sums_overflow(teacher, tmp_path, invoke, rank):
    model = load_teacher(teacher)
    model.layers[0].in_proj.weight.data.fill_(3e38)
    save_teacher(model, teacher)
    with pytest.raises(DfssmError, match=r"a projection has weights up to 3e\+38, too large to convert \(.*\): copy"):
        invoke("convert", teacher, "-o", tmp_path / "model.pt", "--rank", rank)
    assert not (tmp_path / "model.pt").exists()


@pytest.mark.parametrize("version", [torch.zeros(3), 1.0, True, None, "1"], ids=str)
def test_a_version_that_is_no_number(tiny_model, tmp_path, invoke, version):
    torch.save(torch.load(tiny_model, weights_only=True) | {"version": version}, tmp_path / "model.pt")
    with pytest.raises(
        DfssmError, match="model.pt: format version is .*, this dfssm reads 1 to 2; export the student again"
    ):
        invoke("inspect", tmp_path / "model.pt")


def test_torch_warns_of_nothing(tmp_path):
    """A TorchScript archive is refused in one line; torch's warning about it was another."""
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(torch.nn.Identity()), tmp_path / "model.pt")
    (done,) = run_commands([["dfcompile", "model.pt", "--target", "onnx"]], tmp_path)
    assert done.status == 1 and done.err.count("\n") == 1 and "model.pt: cannot be read" in done.err


def test_an_input_is_no_output(teacher, tmp_path, invoke):
    """Also where a link leads from the one to the other."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"vocab_size": 64, "d_model": 32, "n_layer": 1, "headdim": 8, "d_state": 8}))
    (tmp_path / "link").symlink_to(config)
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("config.json", "model.safetensors"):
        (linked / name).symlink_to(teacher / name)
    before = {path: path.read_bytes() for path in (config, teacher / "model.safetensors")}
    for source, command in (
        (config, ["init", "--config", config, "-o", config]),
        (config, ["init", "--config", tmp_path / "link", "-o", config]),
        (teacher, ["convert", linked, "-o", teacher / "model.safetensors"]),
    ):
        with pytest.raises(DfssmError, match="cannot write .*, which is read; give|it is what is read; give"):
            invoke(*command)
        assert source.exists()
    assert {path: path.read_bytes() for path in before} == before


def test_texts_that_are_read_are_no_outputs(teacher, tiny_bundle, tmp_path, invoke):
    text, tokenizer = tmp_path / "a.txt", tmp_path / "tokenizer.json"
    text.write_text("hello")
    tiny.write_tokenizer(tokenizer)
    (tmp_path / "link").symlink_to("a.txt")
    before = {path: path.read_bytes() for path in (text, tokenizer)}
    for command in (
        ["convert", teacher, "--data", text, "-o", text],
        ["convert", teacher, "--data", tmp_path, "-o", tmp_path / "link"],
        ["convert", teacher, "--data", text, "--tokenizer", tokenizer, "-o", tokenizer],
        ["run", tiny_bundle, "-f", text, "-n", 1, "--save-state", text],
    ):
        with pytest.raises(DfssmError, match="cannot write .*: it is what is read; give another place"):
            invoke(*command)
    assert {path: path.read_bytes() for path in before} == before


def test_a_state_cannot_be_saved_under_what_is_no_name(tiny_bundle):
    state = Engine.load(tiny_bundle).new_state()
    for name in ("a\0b", "\ud800"):
        with pytest.raises(DfssmError, match="cannot write .*: no file can have this name"):
            state.save(name)


def test_what_a_disk_had_no_room_for_is_named_by_its_target(tiny_model, tmp_path):
    """And not by its draft, whose name nobody knows."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(
            DfssmError, match=rf"^cannot write {tmp_path}/new/model.onnx: .*(limit|large); choose another"
        ):
            compile_model(Request(tiny_model, "onnx", tmp_path / "new", verify=False))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_several_prompts_are_not_one(tiny_bundle):
    engine = Engine.load(tiny_bundle)
    with pytest.raises(DfssmError, match="the prompt has 2 rows, generate continues one: call it for each"):
        engine.generate([[1, 2], [3, 4]])
    assert engine.generate([[1, 2]]).prompt_tokens == 2
