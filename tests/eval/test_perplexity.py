"""The windows, and that teacher, student and bundle are measured alike."""

import json
import re

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner

from dfssm.base import DfssmError
from dfssm.eval.perplexity import divergence, measure, windows
from dfssm.eval.scorer import CHUNK, open_scorer
from dfssm.eval.text import Text

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

    def test_in_chunks_of_one_it_is_decoding(self, narrow_bundle):
        """With int8 states, which are rounded at the end of each run."""
        scorer, ids = open_scorer(narrow_bundle), np.random.default_rng(0).integers(0, END, 41)
        state, nats = scorer.engine.new_state(1), 0.0
        for token, target in zip(ids[:-1], ids[1:], strict=True):
            logits = scorer.engine.step(np.array([token]), state)
            nats -= float(torch.log_softmax(torch.from_numpy(logits[0]).double(), -1)[target])
        text = Text(ids, np.arange(41))
        assert measure(scorer, text, 41, 40, chunk=1).nats == pytest.approx(nats, rel=1e-6)
        assert measure(scorer, text, 41, 40).nats != pytest.approx(nats, rel=1e-6)

    def test_an_engine_of_few_rows_gets_no_more(self, scorers, monkeypatch):
        scorer, batches = scorers["bundle"], []
        new_state = scorer.new_state
        monkeypatch.setattr(scorer, "max_batch", 2)
        monkeypatch.setattr(scorer, "new_state", lambda batch: batches.append(batch) or new_state(batch))
        measure(scorer, Text(np.arange(150) % END, np.arange(150)), 20, 10)
        assert max(batches) == 2

    def test_divergence_by_hand(self):
        probabilities = np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]])
        found = divergence(*np.log(probabilities).astype(np.float32)[:, None])
        assert found == pytest.approx(0.25 * np.log(2), rel=1e-6)  # 0.5 ln 2 - 0.25 ln 2 + 0

    def test_divergence_of_extreme_logits(self):
        reference, logits = np.array([[0.0, 80.0, -300.0]], np.float32), np.array([[90.0, 0.0, 3e38]], np.float32)
        with np.errstate(all="raise", under="ignore"):
            assert divergence(reference, reference) == 0
            assert divergence(reference, logits) == pytest.approx(3e38, rel=1e-6)

    @pytest.mark.parametrize("window, stride", [(40, 20), (33, 8)])
    def test_against_a_reference(self, scorer, scorers, window, stride):
        ids = np.random.default_rng(0).integers(0, END, 150)
        text, reference = Text(ids, np.arange(150)), scorers["teacher"]
        found = measure(scorer, text, window, stride, reference=reference)
        alone = measure(scorer, text, window, stride)
        assert (found.nats, found.tokens) == (alone.nats, alone.tokens) and alone.against is None
        assert found.against.nats == measure(reference, text, window, stride).nats
        kl, same = [], []
        for start, first, stop in windows(len(ids), window, stride):
            logits = (m.logits(ids[None, start : stop - 1], m.new_state(1))[0] for m in (reference, scorer))
            q, p = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in logits)
            scored = slice(first - start - 1, None)
            kl += (q.exp() * (q - p)).sum(-1)[0, scored].tolist()
            same += (q.argmax(-1) == p.argmax(-1))[0, scored].tolist()
        # A student's activations may cross a tie in a window of another length: see assert_close.
        rel = 1e-4 if scorer.kind == "teacher" else 1e-2
        assert found.against.kl == pytest.approx(np.mean(kl), rel=rel, abs=1e-9)
        assert found.against.kl_stderr == pytest.approx(np.std(kl, ddof=1) / np.sqrt(149), rel=rel, abs=1e-9)
        assert found.against.same_top == pytest.approx(np.mean(same), abs=0.0 if scorer.kind == "teacher" else 0.03)
        if scorer.kind == "teacher":
            assert (found.against.kl, found.against.same_top) == (0, 1)
        else:
            assert found.against.kl > 0.01

    def test_a_reference_with_other_tokens_is_refused(self, scorers, monkeypatch):
        monkeypatch.setattr(scorers["teacher"], "vocab_size", 7)
        text = Text(np.arange(9), np.arange(9))
        with pytest.raises(DfssmError, match="model and reference have .* and 7 tokens: give a reference"):
            measure(scorers["student"], text, 8, 4, reference=scorers["teacher"])

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
            *("perplexity", "tokens", "nats", "bytes", "bits_per_byte"),
            *("window", "stride", "chunk", "model", "kind", "reference"),
        }
        assert found["tokens"] == 5 and (found["window"], found["stride"], found["chunk"]) == (1024, 512, CHUNK)
        assert found["perplexity"] == pytest.approx(np.exp(found["nats"] / 5))
        assert found["model"] == str(teacher) and found["kind"] == "teacher" and found["reference"] is None

    def test_a_student_against_its_teacher(self, perplexity, student, teacher, write):
        from dfssm.cli.main import dfssm

        settings = ["--data", str(write("hello world, hello world")), "--window", 8, "--stride", 4]
        found = perplexity(student, *settings, "--reference", teacher)
        against, alone = found["reference"], perplexity(teacher, *settings)
        assert set(against) == {"model", "kind", "perplexity", "ratio", "kl", "kl_stderr", "same_top"}
        assert (against["model"], against["kind"]) == (str(teacher), "teacher")
        assert against["perplexity"] == alone["perplexity"]
        assert against["ratio"] == pytest.approx(found["perplexity"] / alone["perplexity"])
        arguments = ["eval", "perplexity", str(student), *map(str, settings), "--reference", str(teacher)]
        shown = CliRunner().invoke(dfssm, arguments).stdout
        assert f"divergence from it {against['kl']:.5f} ±" in shown
        assert f"ratio {against['ratio']:.4f}" in shown and f"{against['same_top']:.2%}" in shown

    def test_json_lines(self, perplexity, student, write):
        plain, lines = write("hello world"), write([{"text": "hello world"}], "a.jsonl")
        assert perplexity(student, "--data", lines) == perplexity(student, "--data", plain)

    def test_a_line_for_people(self, student, write):
        from dfssm.cli.main import dfssm

        result = CliRunner().invoke(dfssm, ["eval", "perplexity", str(student), "--data", str(write("hello world"))])
        assert "(student): perplexity" in result.stdout and "bits per byte" in result.stdout
        one = ["eval", "perplexity", str(student), "--data", str(write("a"))]
        shown = CliRunner().invoke(dfssm, one).stdout
        assert re.fullmatch(r".* \(student\): perplexity [\d.]+\n1 tokens, 0 bytes, .*\n", shown)

    def test_settings_are_checked_before_the_model_is_read(self, tmp_path):
        from dfssm.cli.main import dfssm

        arguments = ["eval", "perplexity", str(tmp_path / "no"), "--data", "no", "--window", "8", "--stride", "8"]
        with pytest.raises(DfssmError, match="stride is 8 and window 8: give a stride from 1 to 7"):
            CliRunner().invoke(dfssm, arguments, catch_exceptions=False)
