"""The windows, and that teacher, student and bundle are measured alike."""

import json

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner

from dfssm.eval.perplexity import measure, windows
from dfssm.eval.text import Text
from dfssm.opset import DfssmError

END = tiny.CONFIG.eos_token_id


@pytest.fixture
def perplexity():
    """perplexity(*arguments) -> the JSON of `dfssm eval perplexity arguments`."""
    from dfssm.cli.main import dfssm

    def run(*arguments):
        arguments = ["eval", "perplexity", *map(str, arguments), "--json"]
        result = CliRunner().invoke(dfssm, arguments, catch_exceptions=False)
        assert result.exit_code == 0 and result.stdout.count("\n") == 1, result.output
        return json.loads(result.stdout)

    return run


class TestWindows:
    @pytest.mark.parametrize("tokens", [2, 3, 7, 8, 9, 64, 65])
    @pytest.mark.parametrize("window, stride", [(2, 1), (8, 1), (8, 3), (8, 7), (100, 50)])
    def test_every_token_but_the_first_is_scored_once_after_context_enough(self, tokens, window, stride):
        scored = []
        for start, first, stop in windows(tokens, window, stride):
            assert stop - start <= window and start % stride == 0
            assert first == 1 or first - start >= window - stride
            scored += range(first, stop)
        assert scored == list(range(1, tokens))


class TestMeasure:
    @pytest.mark.parametrize("window, stride", [(40, 20), (40, 39), (33, 8), (400, 200)])
    def test_it_is_the_plain_loop(self, scorer, window, stride):
        ids = np.random.default_rng(0).integers(0, END, 150)
        nats, done = 0.0, []
        for start, first, stop in windows(len(ids), window, stride):
            logits, _ = scorer.logits(ids[None, start : stop - 1], scorer.new_state(1))
            table = torch.log_softmax(torch.from_numpy(logits[0]).double(), -1)
            nats -= sum(float(table[t - start - 1, ids[t]]) for t in range(first, stop))
        found = measure(scorer, Text(ids, np.arange(150)), window, stride, done.append)
        # A student's activations may cross a tie in a window of another length: see assert_close.
        rel = 1e-6 if scorer.kind == "teacher" else 1e-2
        assert found.nats == pytest.approx(nats, rel=rel)
        assert found.tokens == 149 == sum(done) and found.perplexity == pytest.approx(np.exp(found.nats / 149))
        assert found.bytes == 149 and found.bits_per_byte == pytest.approx(found.nats / np.log(2) / 149)

    def test_an_engine_of_few_rows_gets_no_more(self, scorers, monkeypatch):
        scorer, batches = scorers["bundle"], []
        new_state = scorer.new_state
        monkeypatch.setattr(scorer, "max_batch", 2)
        monkeypatch.setattr(scorer, "new_state", lambda batch: batches.append(batch) or new_state(batch))
        measure(scorer, Text(np.arange(150) % END, np.arange(150)), 20, 10)
        assert max(batches) == 2

    @pytest.mark.parametrize("window, stride", [(8, 0), (8, 8), (8, 9), (1, 1)])
    def test_windows_without_context_are_refused(self, scorers, window, stride):
        with pytest.raises(DfssmError, match="give (a stride from 1 to 7|at least 2 tokens)"):
            measure(scorers["student"], Text(np.arange(9), np.arange(9)), window, stride)


class TestCommand:
    def test_student_and_bundle_agree_on_the_demo_model(self, perplexity, demo, demo_bundle, story, write):
        settings = ("--data", write(story), "--window", 32, "--stride", 16)
        student = perplexity(demo / "model.pt", *settings)
        bundle = perplexity(demo_bundle, *settings, "--tokenizer", demo / "tokenizer.json")
        assert (student["kind"], bundle["kind"]) == ("student", "bundle")
        assert student["tokens"] == bundle["tokens"] > 40 and student["bytes"] == bundle["bytes"]
        assert student["perplexity"] < 60  # an untrained model is at the size of the vocabulary, 4096
        assert bundle["perplexity"] == pytest.approx(student["perplexity"], rel=1e-3)

    def test_json(self, perplexity, teacher, write):
        path = write("hello world, hello world")
        found = perplexity(teacher, "--data", path, "--data", path, "--tokens", 5)
        assert set(found) == {
            *("perplexity", "tokens", "nats", "bytes", "bits_per_byte", "window", "stride", "model", "kind")
        }
        assert found["tokens"] == 5 and (found["window"], found["stride"]) == (1024, 512)
        assert found["perplexity"] == pytest.approx(np.exp(found["nats"] / 5))
        assert found["model"] == str(teacher) and found["kind"] == "teacher"

    def test_json_lines(self, perplexity, student, write):
        plain, lines = write("hello world"), write([{"text": "hello world"}], "a.jsonl")
        assert perplexity(student, "--data", lines) == perplexity(student, "--data", plain)

    def test_a_line_for_people(self, student, write):
        from dfssm.cli.main import dfssm

        result = CliRunner().invoke(dfssm, ["eval", "perplexity", str(student), "--data", str(write("hello world"))])
        assert "(student): perplexity" in result.stdout and "bits a byte" in result.stdout

    def test_settings_are_checked_before_the_model_is_read(self, tmp_path):
        from dfssm.cli.main import dfssm

        arguments = ["eval", "perplexity", str(tmp_path / "no"), "--data", "no", "--window", "8", "--stride", "8"]
        with pytest.raises(DfssmError, match="stride is 8 and window 8: give a stride from 1 to 7"):
            CliRunner().invoke(dfssm, arguments, catch_exceptions=False)
