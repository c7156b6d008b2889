"""Text through the engine and the commands: read whole, and ended where the model's text ends."""

import dataclasses
import json

import pytest
import tiny
from click.testing import CliRunner

from dfssm.base import DfssmError
from dfssm.runtime import Engine

LONG = "hello world " * 11


def save(tokenizer, path):
    tokenizer.save(str(path))
    return path


@pytest.fixture
def cutting(tokenizer, tmp_path):
    """A tokenizer.json as training scripts leave it: it asks for 8 tokens a text, filled up to 8."""
    tokenizer = tokenizer.from_str(tokenizer.to_str())
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return save(tokenizer, tmp_path / "tokenizer.json")


@pytest.fixture
def bundle_of(cpu_target, tmp_path, monkeypatch):
    """bundle_of(tokenizer.json) -> a bundle with it."""

    def make(file, config=tiny.CONFIG):
        content = file.read_bytes()
        monkeypatch.setattr(tiny, "write_tokenizer", lambda path: path.write_bytes(content))
        return tiny.write_bundle(tmp_path / "b", config, target=cpu_target)

    return make


def test_an_engine_reads_the_whole_prompt(cutting, tokenizer, bundle_of):
    ids = tokenizer.encode(LONG).ids
    assert len(ids) > 8
    engine = Engine.load(bundle_of(cutting))
    generation = engine.generate(LONG, max_tokens=0)
    list(generation)
    assert generation.prompt_tokens == len(ids)


def test_the_command_reads_the_whole_prompt(cutting, tokenizer, bundle_of):
    from dfssm.cli.main import dfssm

    arguments = ["run", str(bundle_of(cutting)), "-p", LONG, "-n", "1", "--json"]
    found = json.loads(CliRunner().invoke(dfssm, arguments, catch_exceptions=False).stdout)
    assert found["prompt_tokens"] == len(tokenizer.encode(LONG).ids)


def test_a_tokenizer_that_changed_under_an_open_bundle_is_refused(bundle_of, tokenizer, tmp_path):
    bundle = bundle_of(save(tokenizer, tmp_path / "t.json"))
    engine = Engine.load(bundle)
    file = bundle / "tokenizer.json"
    file.write_text(file.read_text().replace("hell", "hexl"))
    with pytest.raises(DfssmError, match=r"tokenizer.json: has changed since the model was opened"):
        engine.generate("hello")


def test_several_ends_go_through_a_bundle_to_the_command(bundle_of, tokenizer, tmp_path):
    from dfssm.cli.main import dfssm

    config = dataclasses.replace(tiny.CONFIG, eos_token_id=(3, 264))
    bundle = bundle_of(save(tokenizer, tmp_path / "t.json"), config)
    assert json.loads((bundle / "manifest.json").read_text())["config"]["eos_token_id"] == [3, 264]

    def run(*more):
        arguments = ["run", str(bundle), "-p", "hello", "-n", "30", "--json", "--temperature", "3", "--seed", "1"]
        return json.loads(CliRunner().invoke(dfssm, [*arguments, *more], catch_exceptions=False).stdout)

    free = run("--eos", "264")["tokens"]
    late = next(token for token in free if token not in free[:6])
    cut = run("--eos", str(late), "--eos", str(free[5]))
    assert (cut["finish_reason"], cut["tokens"]) == ("eos", free[: free.index(free[5])])
