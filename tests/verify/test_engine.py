"""TensorRT bundles in `dfssm compare` and `dfssm eval`, over the stand-in of a device."""

import dataclasses
import json

import pytest
import tiny
import torch
from backends import trt_bundle
from click.testing import CliRunner

from dfssm.cli.main import dfssm
from dfssm.model.checkpoint import save_student
from dfssm.targets import get_target
from dfssm.verify.bundle import compare_bundle

LIMITS = {"max_batch": 3, "max_tokens": 9, "max_logits": 4}

pytestmark = pytest.mark.filterwarnings("ignore:.*never verified on this machine:RuntimeWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save_student(path, tiny.CONFIG, {name: torch.from_numpy(array) for name, array in tiny.tensors().items()})
    tiny.write_tokenizer(path.with_name("tokenizer.json"))
    return path


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8"])
def portable(request, tmp_path_factory):
    return tiny.write_bundle(tmp_path_factory.mktemp("b") / request.param, target="onnx", state_dtype=request.param)


def run(*arguments):
    done = CliRunner().invoke(dfssm, [str(argument) for argument in arguments], catch_exceptions=False)
    return done.exit_code, json.loads(done.stdout) if "--json" in arguments else done.stdout


class Wrong:
    """A session of which an output is changed: `edit(name, value, tokens)` of each."""

    def __init__(self, session, edit):
        self.session, self.edit = session, edit

    def __getattr__(self, name):
        return getattr(self.session, name)

    def run(self, names, feeds):
        tokens = feeds["input_ids"].shape[1]
        found = self.session.run(names, feeds)
        return [self.edit(name, value, tokens) for name, value in zip(names, found, strict=True)]


def test_an_engine_is_compared_with_its_student(portable, model, tmp_path, monkeypatch):
    """Of a prompt the logits come four at a time: so many tokens a call, each from the states of the engine."""
    folder = trt_bundle(tmp_path / "b", portable, monkeypatch, **LIMITS)
    seen = []
    result = compare_bundle(folder, model, 23, lambda done, total: seen.append((done, total)))
    assert seen == [(step, len(seen)) for step in range(1, len(seen) + 1)]
    status, printed = run("compare", folder, model, "--tokens", 23, "--json")
    assert printed == result
    assert status == 0 and result["passed"] and result["tokens"] == 23
    assert result["layers"] == {} and result["identical"] is None
    kinds = ("conv_state_out", "ssm_state_out")
    assert set(result["outputs"]) == {"logits", *(f"{kind}.{layer}" for kind in kinds for layer in range(2))}
    for found in result["outputs"].values():
        assert 0 <= found["rms_rel"] <= found["tolerance"] < 0.3 and found["max_rel"] < 0.2
    status, text = run("compare", folder, model, "--tokens", 5)
    assert status == 0 and text.rstrip().endswith("passed") and "shows no values inside its layers" in text


@pytest.mark.parametrize(
    "wrong, of_prompts",
    [
        ("logits", False),
        ("logits", True),
        ("ssm_state_out.1", False),
        ("ssm_state_out.0", True),
        ("conv_state_out.1", True),
    ],
)
def test_what_is_wrong_is_found(wrong, of_prompts, model, tmp_path, monkeypatch):
    """Half the numbers of one output, in prompts or in steps alone."""
    portable = tiny.write_bundle(tmp_path / "p", target="onnx", state_dtype="fp16")

    def edit(name, value, tokens):
        if name == wrong and (tokens > 1) == of_prompts:
            value = value.copy()
            value.reshape(-1)[::2] *= 0.5
        return value

    session = Wrong(get_target("onnx").open_session(portable, threads=1), edit)
    folder = trt_bundle(tmp_path / "b", portable, monkeypatch, session, **LIMITS)
    status, result = run("compare", folder, model, "--tokens", 12, "--json")
    assert status == 1 and not result["passed"]
    assert [name for name, found in result["outputs"].items() if not found["passed"]] == [wrong]
    status, text = run("compare", folder, model, "--tokens", 12)
    assert status == 1 and "FAILED" in next(line for line in text.splitlines() if line.startswith(wrong))


def test_another_model_is_named(portable, tmp_path, monkeypatch):
    config = dataclasses.replace(tiny.CONFIG, n_layer=1)
    tensors = {name: torch.from_numpy(array) for name, array in tiny.tensors(config).items()}
    save_student(tmp_path / "other.pt", config, tensors)
    folder = trt_bundle(tmp_path / "b", portable, monkeypatch, **LIMITS)
    done = CliRunner().invoke(dfssm, ["compare", str(folder), str(tmp_path / "other.pt")])
    assert done.exit_code == 1 and "was not compiled from" in str(done.exception)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_perplexity_is_that_of_the_graph(portable, chunk, tmp_path, monkeypatch):
    """In the same pieces the same bits; and so few runs that the logits of four tokens come in each."""
    (tmp_path / "a.txt").write_text("hello world, hello hell " * 12)
    folder = trt_bundle(tmp_path / "b", portable, monkeypatch, **LIMITS | {"max_tokens": 64, "max_logits": 64})
    arguments = ["--data", tmp_path / "a.txt", "--window", 48, "--stride", 24, "--chunk", chunk, "--json"]
    (_, ours), (_, theirs) = (run("eval", "perplexity", path, *arguments) for path in (folder, portable))
    assert ours["perplexity"] == theirs["perplexity"] and ours["tokens"] == theirs["tokens"] > 100


def test_tasks_and_text_run(portable, tmp_path, monkeypatch):
    folder = trt_bundle(tmp_path / "b", portable, monkeypatch, **LIMITS)
    arguments = ["-p", "hello", "-n", 6, "--eos", 0]
    assert run("run", folder, *arguments) == run("run", portable, *arguments)
