"""Token files and windows: what is trained on is all of the text, once an epoch, in an order that can be resumed."""

import json
import os
import resource

import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer

from dfssm.base import DfssmError, files
from dfssm.base.endings import END_OF_TEXT
from dfssm.distill import data
from dfssm.distill.data import Windows, open_tokens, sample, tokenize

END = tiny.CONFIG.eos_token_id
VOCAB = END + 1


@pytest.fixture
def run(tokenizer, tmp_path):
    """run(paths, ...) -> Tokens in the folder `tokens`."""

    def run(paths, held_out=0.25, tokenizer=tokenizer, end=END, vocab_size=VOCAB, **options):
        return tokenize(paths, tokenizer, end, vocab_size, held_out, tmp_path / "tokens", **options)

    return run


@pytest.fixture
def encodings(monkeypatch):
    """The batches that were tokenised, one list of documents each."""
    found, encode = [], data.encode
    monkeypatch.setattr(data, "encode", lambda texts, *more: found.append(texts) or encode(texts, *more))
    return found


def plainly(tokenizer, *documents):
    return [token for document in documents for token in (*tokenizer.encode(document).ids, END)]


class TestTokenize:
    def test_documents_of_all_kinds_each_followed_by_the_end(self, write, run, tokenizer, tmp_path):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        write(f"hello{END_OF_TEXT} world é ", "data/a.txt")
        write([{"text": "hello"}, {"text": "two"}], "data/b.jsonl")
        write("", "data/c.txt")
        write({"text": ["three", "four"]}, "data/d.parquet")
        found = run([tmp_path / "data"], held_out=0.0)
        assert found.train.tolist() == plainly(tokenizer, "hello", "world é", "hello", "two", "three", "four")
        assert len(found.held_out) == 0

    def test_the_last_share_of_each_file_is_kept_apart(self, write, run, tokenizer, monkeypatch):
        monkeypatch.setattr("dfssm.model.text._BATCH", 20)
        files = {"a.txt": "hello world " * 9, "b.txt": "abc " * 7, "c.txt": "d"}
        found = run([write(text, name) for name, text in files.items()], held_out=0.3)
        train, held_out = [], []
        for text in files.values():
            ids = plainly(tokenizer, text.strip())
            cut = len(ids) - round(0.3 * len(ids))
            train, held_out = train + ids[:cut], held_out + ids[cut:]
        assert found.train.tolist() == train and found.held_out.tolist() == held_out

    def test_progress_is_the_text_in_bytes(self, write, run, monkeypatch):
        monkeypatch.setattr("dfssm.model.text._BATCH", 3)
        done = []
        run([write([{"text": "é€"}, {"text": " abc "}, {"text": "d"}], "a.jsonl")], progress=done.append)
        assert done == [8, 1]  # é and € have five bytes

    @pytest.mark.parametrize("content", ["", f" \n{END_OF_TEXT}"])
    def test_no_text(self, write, run, content, tmp_path):
        paths = [write(content), write(content, "b.txt")]
        with pytest.raises(DfssmError, match="a.txt, .*b.txt: there is no text to train on; give --data more"):
            run(paths)
        assert not (tmp_path / "tokens").exists()

    def test_a_tokenizer_that_does_not_fit(self, write, run):
        with pytest.raises(DfssmError, match=f"makes token {END}, the teacher has {END}: .* with --tokenizer"):
            run([write("hello")], vocab_size=END)

    def test_a_folder_that_cannot_be_written(self, write, tokenizer):
        with pytest.raises(DfssmError, match="cannot write "):
            tokenize([write("hello")], tokenizer, END, VOCAB, 0.0, write("a file", "file"))

    @pytest.mark.parametrize("held_out", [0.0, 0.9])
    def test_a_full_disk_leaves_nothing_half_written(self, write, run, tmp_path, held_out):
        path, limits = write("abc" * 9999), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            with pytest.raises(DfssmError, match=r"cannot write .*tokens: File too large; choose another place"):
                run([path], held_out=held_out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not (tmp_path / "tokens").exists()


class TestReuse:
    @pytest.fixture
    def paths(self, write):
        return [write("hello world", "a.txt"), write("abcd", "b.txt")]

    def test_the_same_text_is_not_tokenised_again(self, paths, run, encodings):
        first = run(paths)
        assert encodings == [["hello world"], ["abcd"]]
        again = run(paths)
        assert len(encodings) == 2
        assert again.train.tolist() == first.train.tolist() and again.held_out.tolist() == first.held_out.tolist()

    @pytest.mark.parametrize("name", ["held_out", "vocab_size", "end", "tokenizer"])
    def test_what_was_tokenised_otherwise_is(self, paths, run, encodings, tokenizer, name):
        other = Tokenizer.from_str(tokenizer.to_str())
        other.add_tokens(["or"])
        value = {"held_out": 0.5, "vocab_size": VOCAB + 2, "end": END - 1, "tokenizer": other}[name]
        run(paths, vocab_size=VOCAB + 1)
        run(paths, **({"vocab_size": VOCAB + 1} | {name: value}))
        assert encodings == [["hello world"], ["abcd"]] * 2

    def test_what_changed_is(self, paths, run, encodings, write, tokenizer):
        run(paths, held_out=0.0)
        before = paths[1].stat()
        write("dcba", "b.txt")  # of the same size
        os.utime(paths[1], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        assert run(paths, held_out=0.0).train.tolist() == plainly(tokenizer, "hello world", "dcba")
        assert run(paths[:1], held_out=0.0).train.tolist() == plainly(tokenizer, "hello world")
        assert encodings == [["hello world"], ["abcd"], ["hello world"], ["dcba"], ["hello world"]]

    def test_what_fails_midway_leaves_what_was_there(self, paths, run, write, encodings, tmp_path):
        first = run(paths).train.tolist()
        before = {path.name: path.read_bytes() for path in (tmp_path / "tokens").iterdir()}
        bad = write('{"text": "a"}\n{"te', "c.jsonl")
        with pytest.raises(DfssmError, match="line 2"):
            run([*paths, bad])
        assert {path.name: path.read_bytes() for path in (tmp_path / "tokens").iterdir()} == before
        encodings.clear()
        assert run(paths).train.tolist() == first and not encodings

    def test_a_crash_before_the_end_leaves_what_was_there(self, paths, run, encodings, write, monkeypatch, tmp_path):
        first = run(paths).train.tolist()
        other = write("dcba", "c.txt")  # of as many tokens

        def crash(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(files, "_put", crash)
            with pytest.raises(KeyboardInterrupt):
                run([paths[0], other])
        encodings.clear()
        assert open_tokens(tmp_path / "tokens").train.tolist() == run(paths).train.tolist() == first
        assert not encodings and run([paths[0], other]).train.tolist() != first

    def test_a_truncated_file_is_made_again(self, paths, run, encodings, tmp_path):
        first = run(paths).train.tolist()
        file = tmp_path / "tokens" / "tokens.u32"
        file.write_bytes(file.read_bytes()[:-4])
        with pytest.raises(DfssmError, match="holds no whole tokens.u32; all ranks need the same folder"):
            open_tokens(tmp_path / "tokens")
        encodings.clear()
        assert run(paths).train.tolist() == first and encodings

    @pytest.mark.parametrize(
        "content", [b"", b"[]", b'{"train": 1}', b'{"train": "a", "held_out": "b"}', b"\xff", None]
    )
    def test_a_record_that_is_none_is_made_again(self, paths, run, tmp_path, content):
        first = run(paths).train.tolist()
        record = tmp_path / "tokens" / "tokens.json"
        record.unlink()
        os.mkfifo(record) if content is None else record.write_bytes(content)
        assert run(paths).train.tolist() == first and record.is_file() and record.read_bytes()[:1] == b"{"

    def test_another_rank_maps_what_the_first_wrote(self, paths, run, tmp_path):
        with pytest.raises(DfssmError, match="all ranks need the same folder"):
            open_tokens(tmp_path / "tokens")
        first = run(paths)
        found = open_tokens(tmp_path / "tokens")
        assert found.train.tolist() == first.train.tolist() and found.held_out.tolist() == first.held_out.tolist()
        assert isinstance(found.train, np.memmap) and len(found.held_out)


def starts(windows):
    """First ids, which are the places in the text where it is np.arange."""
    return windows[:, 0].tolist()


class TestWindows:
    @pytest.mark.parametrize("length, tokens", [(100, 7), (105, 7), (64, 32), (65, 32), (20, 1)])
    def test_every_token_is_predicted_once_an_epoch(self, length, tokens):
        windows = Windows(np.arange(length, dtype=np.uint32), tokens, seed=0)
        for _ in range(4):
            epoch = windows.take(windows.per_epoch)
            assert epoch.dtype == np.int64 and epoch.shape == (windows.per_epoch, tokens + 1)
            assert (np.diff(epoch) == 1).all()
            predicted = np.sort(epoch[:, 1:].ravel())
            assert (np.diff(predicted) == 1).all()
            assert predicted[0] <= tokens and length - len(predicted) < 2 * tokens

    def test_the_order_is_another_in_each_epoch_and_for_each_seed(self):
        ids = np.arange(1000)
        orders = [starts(windows.take(99)) for seed in (0, 1) for windows in [Windows(ids, 10, seed)] for _ in "ab"]
        assert len({tuple(order) for order in orders}) == 4
        assert all(order != sorted(order) for order in orders)
        assert starts(Windows(ids, 10, 0).take(99)) == orders[0]
        assert len({min(order) for order in orders}) > 1  # it is also cut from another offset on

    @pytest.mark.parametrize("world, count", [(2, 3), (3, 2), (6, 1)])
    def test_any_number_of_ranks_sees_the_same_windows_in_each_step(self, world, count):
        ids = np.arange(100)
        one = Windows(ids, 9, seed=0)
        ranks = [Windows(ids, 9, 0, rank, world) for rank in range(world)]
        for _ in range(7):  # across epochs
            assert np.concatenate([rank.take(count) for rank in ranks]).tolist() == one.take(6).tolist()

    def test_a_position_is_resumed_by_any_number_of_ranks(self):
        ids = np.arange(100)
        windows = [Windows(ids, 9, 0, rank, 2) for rank in range(2)]
        for _ in range(5):
            for rank in windows:
                rank.take(4)
        state = json.loads(json.dumps(windows[0].state_dict()))
        assert state == windows[1].state_dict()
        resumed = Windows(ids, 9, 0)
        resumed.load_state_dict(state)
        assert resumed.take(8).tolist() == np.concatenate([rank.take(4) for rank in windows]).tolist()

    def test_held_out_tokens_are_in_no_window(self, write, run, tokenizer):
        tokens = run([write("a" * 300 + "b" * 99)], held_out=0.25)
        a, b = (tokenizer.token_to_id(letter) for letter in "ab")
        windows = Windows(tokens.train, 10, 0)
        assert tokens.held_out.tolist() == [b] * 99 + [END]
        assert (windows.take(2 * windows.per_epoch) == a).all()

    @pytest.mark.parametrize("length", [0, 10, 19])
    def test_too_short_a_text(self, length):
        message = f"has {length} tokens, two windows of 10 need 20; give more --data or fewer --tokens"
        with pytest.raises(DfssmError, match=message):
            Windows(np.arange(length), 10, 0)
        assert Windows(np.arange(20), 10, 0).per_epoch == 1


class TestSample:
    @pytest.fixture
    def take(self, tokenizer):
        """take(paths, tokens, window=8) -> the windows of a sample."""
        return lambda paths, tokens, window=8: sample(paths, tokenizer, END, VOCAB, tokens, window)

    def test_windows_are_spread_over_all_files(self, write, take):
        paths = [write(letter * 400, f"{letter}.txt") for letter in "abc"]
        windows = take(paths, 80)
        assert windows.shape == (10, 8) and windows.dtype == np.int64
        found = [set(window) - {END} for window in windows.tolist()]
        assert len(set(map(frozenset, found))) >= 3
        assert take(paths, 10**6).size > 1100  # all there is, but for the end

    def test_no_more_is_read_than_is_needed(self, write, take, encodings):
        take([write("hello " * 10_000, "a.txt"), write("abc " * 10_000, "b.txt")], tokens=20)
        assert [len(text) for batch in encodings for text in batch] == [640, 640]

    @pytest.mark.parametrize("content", ["", "hello", " \n"])
    def test_too_little_text(self, write, take, content):
        with pytest.raises(
            DfssmError, match="a.txt: has [0-3] tokens, two windows of 8 need 16; give more --data or a"
        ):
            take([write(content)], 100)
