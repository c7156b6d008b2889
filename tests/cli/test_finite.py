"""Commands on a bundle whose numbers are not finite."""

import pytest
import tiny
import torch

from dfssm.cli.main import main
from dfssm.model.checkpoint import save_student


@pytest.mark.parametrize(
    "command",
    [
        ["run", "-p", "hello"],
        ["run", "-p", "hello", "--json"],
        ["run", "-p", "hello", "-n", "0", "--save-state", "a.state"],
        ["eval", "perplexity", "--data", "a.txt"],
    ],
)
def test_a_command_ends_with_one_line_that_names_the_layer(tmp_path, monkeypatch, cpu_target, capsys, command):
    tiny.write_bundle(tmp_path / "b", target=cpu_target, edit=tiny.not_a_number("layers.1.scan.dt_bias"))
    (tmp_path / "a.txt").write_text("hello world, hello")
    monkeypatch.chdir(tmp_path)
    at = 2 if command[0] == "eval" else 1
    with pytest.raises(SystemExit, match="1"):
        main([*command[:at], "b", *command[at:]])
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("dfssm: error: the model's numbers are not finite after") == 1
    assert "first in ssm_state of layer 1: its weights are too large or damaged" in printed.err.splitlines()[-1]
    assert not (tmp_path / "a.state").exists()


@pytest.mark.parametrize(
    "name, where",
    [
        ("layers.1.scan.dt_bias", "layers.1.scan"),
        ("layers.0.norm.weight", "layers.0.norm"),
        ("norm_f.weight", "norm_f"),
    ],
)
def test_a_student_names_the_module(tmp_path, capsys, name, where):
    tensors = tiny.tensors()
    tensors[name][:] = 3e38  # finite: others are refused when the file is read
    save_student(tmp_path / "model.pt", tiny.CONFIG, {name: torch.from_numpy(array) for name, array in tensors.items()})
    tiny.write_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text("hello world, hello")
    with pytest.raises(SystemExit, match="1"):
        main(["eval", "perplexity", str(tmp_path / "model.pt"), "--data", str(tmp_path / "a.txt")])
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert f"the model's numbers are not finite, first in {where}: its weights are too large or damaged" in printed.err
