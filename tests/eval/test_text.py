"""Tokens and bytes of a text, whatever kind of file it lies in."""

import importlib.util

import pytest
import tiny
from tokenizers import Tokenizer

from dfssm.base import DfssmError
from dfssm.base.endings import END_OF_TEXT
from dfssm.eval.text import read_text

END = tiny.CONFIG.eos_token_id


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

    def test_json_lines_and_parquet_are_the_same_text_as_plain(self, scorers, write):
        documents = ["hello\nworld", "é€😀 wor", '"hello" \\ he']
        plain = read_text([write(END_OF_TEXT.join(documents))], scorers["student"])
        assert plain.ends[-1] == sum(len(document.encode()) for document in documents)
        rows = [{"text": f" {document} "} for document in documents]
        files = [write(rows, "a.jsonl")]
        if importlib.util.find_spec("pyarrow"):
            files.append(write({"id": [1, 2, 3], "text": documents}, "a.parquet"))
        for file in files:
            found = read_text([file], scorers["student"])
            assert found.ids.tolist() == plain.ids.tolist() and found.ends.tolist() == plain.ends.tolist()

    def test_a_folder_is_all_its_text_in_the_order_of_names(self, scorers, write, tmp_path):
        files = [write("hello", "a.txt"), write([{"text": "world"}], "b/c.jsonl"), write("he", "d.txt")]
        write("{}", "config.json")
        assert (
            read_text([tmp_path], scorers["student"]).ids.tolist() == read_text(files, scorers["student"]).ids.tolist()
        )

    def test_batches_make_no_difference(self, scorers, write, monkeypatch):
        path = write(f"hello é world{END_OF_TEXT}" * 20)
        whole = [read_text([path], scorers["student"], tokens) for tokens in (None, 30)]
        monkeypatch.setattr("dfssm.model.text._BATCH", 5)
        for text, tokens in zip(whole, (None, 30), strict=True):
            found = read_text([path], scorers["student"], tokens)
            assert found.ids.tolist() == text.ids.tolist() and found.ends.tolist() == text.ends.tolist()

    def test_what_cannot_be_read(self, scorers, write, tmp_path):
        with pytest.raises(DfssmError, match="no file in it ends in .txt, .jsonl"):
            read_text([tmp_path], scorers["student"])
        with pytest.raises(DfssmError, match="nothing does not exist: give --data text"):
            read_text([tmp_path / "nothing"], scorers["student"])
        with pytest.raises(DfssmError, match="a.jsonl, line 2: has no string 'text'"):
            read_text([write([{"text": "hello"}, {}], "a.jsonl")], scorers["student"])

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
