"""The text, the windows, and that teacher, student and bundle are measured alike."""

import json

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer

from dfssm.eval.perplexity import measure, windows
from dfssm.eval.scorer import END_OF_TEXT
from dfssm.eval.text import Text, read_text
from dfssm.opset import DfssmError

END = tiny.CONFIG.eos_token_id


@pytest.fixture
def write(tmp_path):
    def write(text, name="a.txt"):
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return tmp_path / name

    return write


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


class TestText:
    def test_documents_end_at_the_mark_and_at_the_end_of_a_file(self, scorers, write, tmp_path):
        scorer = scorers["student"]
        write(f"hello\n{END_OF_TEXT}\n  world é {END_OF_TEXT}\n\n")
        write("hello", "b.txt")
        text = read_text([tmp_path], scorer)
        encode = scorer.tokenizer.encode
        assert text.ids.tolist() == [
            *(*encode("hello").ids, END),
            *(*encode("world é").ids, END),
            *(*encode("hello").ids, END),
        ]
        assert text.ends[-1] == len("hello" + "world é" + "hello") + 1  # é has two bytes
        assert text.scored_bytes == text.ends[-1] - len("hello")  # which is the first token

    def test_bytes_are_those_of_the_tokens(self, scorers, write):
        scorer = scorers["student"]
        document = "aé€😀 hello world"
        text = read_text([write(document)], scorer)
        raw = document.encode()
        for index in range(len(text.ids) - 1):
            decoded = scorer.tokenizer.decode(text.ids[: index + 1].tolist())
            if "\ufffd" not in decoded:
                assert raw[: text.ends[index]].decode() == decoded

    def test_only_so_many_tokens(self, scorers, write):
        path = write(f"hello world hello world{END_OF_TEXT}" * 300)
        whole = read_text([path], scorers["student"])
        part = read_text([path], scorers["student"], tokens=9)
        assert len(part.ids) == 10 and part.ids.tolist() == whole.ids[:10].tolist()
        assert part.ends.tolist() == whole.ends[:10].tolist()

    @pytest.mark.parametrize("text", ["", " \n ", END_OF_TEXT])
    def test_no_text(self, scorers, write, text):
        with pytest.raises(DfssmError, match="there is no text to score"):
            read_text([write(text)], scorers["student"])

    def test_no_files(self, scorers, tmp_path):
        with pytest.raises(DfssmError, match=r"no \*.txt file in this folder"):
            read_text([tmp_path], scorers["student"])
        with pytest.raises(DfssmError, match="cannot be read"):
            read_text([tmp_path / "nothing"], scorers["student"])

    def test_a_tokenizer_that_does_not_fit(self, scorers, write, monkeypatch):
        monkeypatch.setattr(scorers["student"], "vocab_size", 5)
        with pytest.raises(DfssmError, match="the model has 5: give the model's own with --tokenizer"):
            read_text([write("hello")], scorers["student"])

    def test_a_tokenizer_that_would_cut_is_told_not_to(self, student, write, tmp_path):
        from dfssm.eval.scorer import open_scorer

        tokenizer = Tokenizer.from_file(str(student.with_name("tokenizer.json")))
        tokenizer.enable_truncation(4)
        tokenizer.save(str(tmp_path / "cut.json"))
        assert len(read_text([write("hello world" * 9)], open_scorer(student, tmp_path / "cut.json")).ids) > 5


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

    def test_a_line_for_people(self, student, write):
        from dfssm.cli.main import dfssm

        result = CliRunner().invoke(dfssm, ["eval", "perplexity", str(student), "--data", str(write("hello world"))])
        assert "(student): perplexity" in result.stdout and "bits a byte" in result.stdout

    def test_settings_are_checked_before_the_model_is_read(self, tmp_path):
        from dfssm.cli.main import dfssm

        arguments = ["eval", "perplexity", str(tmp_path / "no"), "--data", "no", "--window", "8", "--stride", "8"]
        with pytest.raises(DfssmError, match="stride is 8 and window 8: give a stride from 1 to 7"):
            CliRunner().invoke(dfssm, arguments, catch_exceptions=False)
