"""`dfssm convert --data`: what it writes and says, and what it refuses."""

import json

import click
import numpy as np
import pytest
import tiny
import torch

from dfssm.base import DfssmError
from dfssm.cli.options import Duration
from dfssm.model.checkpoint import load_student_tensors
from dfssm.model.config import Mamba2Config
from dfssm.model.hf_import import save_teacher
from dfssm.model.ledger import model_bytes
from dfssm.model.quant import unpack_bits
from dfssm.model.teacher import Mamba2LM

END = tiny.CONFIG.eos_token_id
CONFIG = Mamba2Config(vocab_size=END + 1, d_model=32, n_layer=2, d_state=8, headdim=8, eos_token_id=END)


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(0)
    save_teacher(Mamba2LM(CONFIG), tmp_path / "t")
    tiny.write_tokenizer(tmp_path / "t" / "tokenizer.json")
    return tmp_path / "t"


@pytest.fixture
def text(write):
    words = np.random.default_rng(0).choice("hello world or he will not say the word".split(), 500)
    return write(" ".join(words), "text.txt")


def test_a_calibrated_student_and_what_is_said_of_it(teacher, text, invoke, tmp_path):
    output = tmp_path / "new" / "model.pt"
    output.parent.mkdir()
    done = invoke(
        *("convert", teacher, "--data", text, "--tokens", 640, "--window", 32, "--rank", 2, "--planes", 2),
        *("--threads", torch.get_num_threads(), "-o", output, "--json"),
    )
    result = json.loads(done.stdout)
    found = result["calibration"]
    assert (found["tokens"], found["window"]) == (640, 32) and found["seconds"] > 0
    assert list(found["errors"]) == [f"layers.{i}.{name}" for i in (0, 1) for name in ("in_proj", "out_proj")]
    assert all(0 < error < 0.2 for error in found["errors"].values())
    config, tensors = load_student_tensors(output)
    assert config.to_dict() == result["config"] and config.eos_token_id == END
    assert len(tensors) == result["tensors"]
    assert (output.parent / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()
    said = invoke("convert", teacher, "--data", text, "--tokens", 640, "--window", 32, "-o", output).stdout
    assert "; calibrated on 640 tokens in " in said
    assert json.loads(invoke("convert", teacher, "-o", output, "--json").stdout)["calibration"] is None


def test_a_budget_is_kept_and_what_it_buys_is_said(teacher, text, invoke, tmp_path):
    options = ("--data", text, "--tokens", 640, "--window", 32, "-o", tmp_path / "model.pt")
    result = json.loads(invoke("convert", teacher, *options, "--budget", 0.026, "--json").stdout)
    assert sum(model_bytes(result["config"]).values()) <= 26_000
    assert list(result["calibration"]["sensitivity"]) == list(result["calibration"]["errors"])
    config, tensors = load_student_tensors(tmp_path / "model.pt")
    assert config.to_dict() == result["config"] and not config.alike
    rank, planes = config.scaffold("layers.1.out_proj")
    assert tensors["layers.1.out_proj.down"].shape == (rank, config.d_inner)
    lines = invoke("convert", teacher, *options, "--budget", 0.026).stdout.splitlines()
    assert lines[1].split() == ["layer", "in_proj", "out_proj"] and lines[3].endswith(
        f"{planes} plane{'s' * (planes > 1)}, rank {rank}"
    )
    refined = json.loads(invoke("convert", teacher, *options, "--budget", 0.026, "--refine", "1s", "--json").stdout)
    assert refined["config"] == result["config"]
    for name in ("planes", "rank"):
        done = invoke("convert", teacher, *options, "--budget", 0.026, f"--{name}", 2)
        assert done.exit_code == 2 and f"chooses the {name} of each projection: leave out --{name}" in done.stderr
    with pytest.raises(DfssmError, match="the budget is 0.001 MB, but the smallest student"):
        invoke("convert", teacher, *options, "--budget", 0.001)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text": ""}, "text.txt: has 0 tokens, two windows of 512 need 1,024; give more --data or a smaller --window"),
        ({"tokenizer": None}, "tokenizer.json does not exist: give the teacher's own with --tokenizer"),
        ({"vocab": 40}, "the model knows ids 0 to 39; give the teacher's own with --tokenizer"),
        ({"data": "nowhere"}, "nowhere does not exist: give --data text"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(teacher, text, invoke, tmp_path, change, message):
    if "text" in change:
        text.write_text(change["text"])
    if "tokenizer" in change:
        (teacher / "tokenizer.json").unlink()
    if "vocab" in change:
        config = Mamba2Config(vocab_size=40, d_model=32, n_layer=1, d_state=8, headdim=8)
        save_teacher(Mamba2LM(config), teacher)
    with pytest.raises(DfssmError, match=message) as error:
        invoke("convert", teacher, "--data", change.get("data", text), "-o", tmp_path / "model.pt")
    assert "\n" not in str(error.value) and not (tmp_path / "model.pt").exists()


def test_options_of_calibration_ask_for_data(teacher, invoke, tmp_path):
    for option, value in (("--tokens", 640), ("--window", 640), ("--refine", "5m"), ("--budget", 1)):
        done = invoke("convert", teacher, option, value, "-o", tmp_path / "model.pt")
        assert done.exit_code == 2 and f"{option} is for a calibration: give --data too" in done.stderr.replace(
            "\n", " "
        )


@pytest.mark.parametrize("value, seconds", [("300s", 300), ("5m", 300), ("1.5h", 5400), ("0s", None), ("5", None)])
def test_a_time_has_a_unit(value, seconds):
    if seconds:
        assert Duration().convert(value, None, None) == seconds
    else:
        with pytest.raises(click.BadParameter, match=f"{value} is not a time as 300s, 5m or 1.5h"):
            Duration().convert(value, None, None)


def test_refining_trains_what_was_calibrated(teacher, text, invoke, tmp_path):
    def tensors(*options):
        arguments = ("convert", teacher, "--data", text, "--tokens", 640, "--window", 32, "--rank", 2, *options)
        done = invoke(*arguments, "-o", tmp_path / "model.pt", "--json")
        return json.loads(done.stdout), load_student_tensors(tmp_path / "model.pt")[1]

    (_, before), (result, after) = tensors(), tensors("--refine", "1s")
    assert result["calibration"]["tokens"] > 0 and result["calibration"]["tokens"] % (4 * 32) == 0
    name = "layers.1.in_proj.bits"
    same = (unpack_bits(before[name]) == unpack_bits(after[name])).float().mean()
    assert 0.6 < same < 1  # it began there, not at random signs, and moved
    assert not torch.equal(before["norm_f.weight"], after["norm_f.weight"])
