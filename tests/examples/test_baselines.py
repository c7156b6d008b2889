"""04_baselines.py: what the baselines round to."""

import json

import numpy as np
import pytest
import tiny
import torch
from examples_as_modules import load

from dfssm.model.config import Mamba2Config
from dfssm.model.hf_import import save_teacher
from dfssm.model.quant import dequantized
from dfssm.model.rounding import damped
from dfssm.model.teacher import Mamba2LM


@pytest.fixture(scope="module")
def example():
    return load("04_baselines.py")


def draw(m, k):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, k, generator=g) @ torch.randn(k, k, generator=g)
    return torch.randn(m, k, generator=g), (x.T @ x).double()


@pytest.mark.parametrize("bits, group", [(2, 0), (4, 0), (2, 32)])
def test_to_the_nearest_level(example, bits, group):
    weight, _ = draw(6, 64)
    found, spent = example.round_to_nearest(weight, bits, group)
    assert spent == bits + 32 / (group or 64)
    for row, rounded in zip(
        weight.numpy().reshape(-1, group or 64), found.numpy().reshape(-1, group or 64), strict=True
    ):
        levels = np.linspace(*(float(np.float16(end)) for end in (row.min(), row.max())), 2**bits)
        expected = levels[np.abs(row[:, None] - levels).argmin(-1)]
        np.testing.assert_allclose(rounded, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("planes, bits", [(1, 1.8), (1, 2.2), (2, 3.0)])
def test_refined_binarisation_stays_in_its_bits_and_makes_errors_good(example, planes, bits):
    weight, moment = draw(48, 96)
    found, spent = example.refined_binarisation(weight, moment, planes, bits)
    assert planes < spent <= bits
    rows, columns = example._scales(weight, planes)  # without the moment, and without columns that get more
    rest, plain = weight, torch.zeros_like(weight)
    for row in rows:
        plain += row[:, None] * columns * torch.where(rest > 0, 1.0, -1.0)
        rest = weight - plain

    def energy(apart):
        return float(((apart.double() @ damped(moment)) * apart.double()).sum())

    assert energy(weight - found) < 0.8 * energy(weight - plain)


@torch.no_grad()
def test_what_is_not_rounded_is_the_teacher_on_int8_activations(example):
    torch.manual_seed(0)
    teacher = Mamba2LM(Mamba2Config(vocab_size=40, d_model=32, n_layer=2, d_state=8, headdim=8)).eval()
    windows, moments = torch.randint(40, (5, 12)), {}
    model = example.by_layer(teacher, windows, lambda path, w, moment: moments.setdefault(path, moment) is None or w)
    wanted, found = teacher(windows)[0], model(windows)[0]
    assert 0 < torch.dist(found, wanted) < 0.05 * wanted.norm()
    first = dequantized(teacher.layers[0].norm(dequantized(teacher.embedding(windows)))).flatten(0, 1)
    torch.testing.assert_close(moments["layers.0.in_proj"], (first.T @ first).double())
    assert len(moments) == 4


def test_every_rounding_is_measured(example, tmp_path, capsys):
    torch.manual_seed(0)
    end = tiny.CONFIG.eos_token_id
    teacher = Mamba2LM(Mamba2Config(vocab_size=end + 1, d_model=64, n_layer=1, d_state=8, headdim=8, eos_token_id=end))
    with torch.no_grad():
        teacher.embedding.weight.mul_(20)  # logits far from uniform
    save_teacher(teacher, tmp_path / "t")
    tiny.write_tokenizer(tmp_path / "t" / "tokenizer.json")
    for name, seed in (("text", 0), ("held", 1)):
        words = np.random.default_rng(seed).choice("hello world or he will not say the word".split(), 500)
        (tmp_path / f"{name}.txt").write_text(" ".join(words))
    texts = ("--data", tmp_path / "text.txt", "--held-out", tmp_path / "held.txt")
    sizes = ("--tokens", 512, "--window", 32, "--rank", 1, 3, "--planes", 1, 4)
    more = ("--budget", 0.04, "--table", 4, "--plot", tmp_path / "plot.svg")
    example.main([str(argument) for argument in (tmp_path / "t", *texts, *sizes, *more)])
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    first = ["free 1", "calibrated 1", "calibrated 1/3", "arb 1"]
    last = ["budget 0.04", "table 4", "table 4/64", "table 4/32"]
    assert list(rows) == [*first, *(name.replace("1", "4", 1) for name in first), "rtn 4", "rtn 4/64", *last]
    assert all(row["kl"] > 0 and np.isfinite(row["ratio"]) for row in rows.values())
    assert rows["rtn 4"]["kl"] < rows["arb 1"]["kl"] and rows["calibrated 4"]["kl"] < rows["calibrated 1"]["kl"]
    assert [rows[name]["bits"] for name in last[1:]] == [4.5, 4.5, 5.0]  # rows of 64
    assert rows["table 4/32"]["kl"] != rows["table 4"]["kl"] == rows["table 4/64"]["kl"]
    for planes in (1, 4):
        assert planes < rows[f"arb {planes}"]["bits"] <= rows[f"calibrated {planes}"]["bits"]
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(name in drawn for name in ("calibrated, rank 3", "rtn, groups of 64", "budget", "KL divergence"))
