"""Samples: greedy continuations, token by token through the state, beside those of whole texts."""

import json

import pytest
import tiny
import torch
from tokenizers import Tokenizer

from dfssm.base import DfssmError
from dfssm.distill import samples as module
from dfssm.distill.report import page
from dfssm.distill.samples import samples
from dfssm.model.config import DFSSMConfig
from dfssm.model.student import DFSSMLM

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tiny.write_tokenizer(file)
    return Tokenizer.from_file(str(file))


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(3)
    shape = {"vocab_size": tiny.CONFIG.vocab_size, "d_model": 32, "n_layer": 2, "d_state": 8, "headdim": 8, "rank": 2}
    return DFSSMLM(DFSSMConfig(**shape)).eval()


def greedy(model, ids, count):
    """The next tokens, each from all that come before it at once."""
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return ids[-count:]


@pytest.mark.parametrize("prompt", ["h", "hello world"])
def test_are_the_most_likely_tokens(student, tokenizer, monkeypatch, prompt):
    monkeypatch.setattr(module, "LENGTH", 7)
    (found,) = samples(student, [prompt], tokenizer, (), CPU)
    wanted = greedy(student, tokenizer.encode(prompt).ids, 7)
    assert found == {"prompt": prompt, "text": tokenizer.decode(wanted)}


def test_end_at_an_end_token(student, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "LENGTH", 7)
    wanted = greedy(student, tokenizer.encode("hello").ids, 7)
    end = wanted[3]
    (found,) = samples(student, ["hello"], tokenizer, (end,), CPU)
    assert found["text"] == tokenizer.decode(wanted[: wanted.index(end)])


def test_a_run_logs_them_at_each_measurement_and_trains_the_same(distill, tmp_path, same_log):
    with_them = distill(tmp_path / "a", samples=["hello", "or <b>"], held_out=0.1)
    without = distill(tmp_path / "b", held_out=0.1)
    assert with_them["sha256"] == without["sha256"]
    lines = same_log(tmp_path / "a")
    found = [(line["step"], line.pop("samples")) for line in lines if "samples" in line]
    assert lines == same_log(tmp_path / "b")
    assert [step for step, _ in found] == [2, 4]
    assert [sample["prompt"] for sample in found[0][1]] == ["hello", "or <b>"]
    text = (tmp_path / "a" / "report.html").read_text()
    assert "<h2>hello…</h2>" in text and "or &lt;b&gt;…" in text


def test_they_need_no_held_out_text(distill, tmp_path):
    distill(tmp_path / "a", samples=["hello"], held_out=0.0)
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "samples" in line] == [2, 4]


def test_a_text_without_tokens_is_refused(distill, tmp_path):
    with pytest.raises(DfssmError, match="^sample '' has no tokens; give a text$"):
        distill(tmp_path / "a", samples=[""])


def test_the_report_has_each_prompt_from_first_to_last():
    def line(tokens, text):
        return {"step": 1, "tokens": tokens, "samples": [{"prompt": "once", "text": text}]}

    result = {"recipe": {}, "schedule": {}, "tokens": 2000, "seconds": 1.0, "held_out_tokens": 0}
    result |= {"perplexity": {}, "kl": {}, "same_top": {}}
    text = page("run", [line(1000, "a a"), line(2000, "a time")], result)
    assert text.index("1,000</td><td>a a") < text.index("2,000</td><td>a time") and text.count("once…") == 1
