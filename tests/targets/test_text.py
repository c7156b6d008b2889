"""The one rule by which text becomes tokens."""

import hashlib
import json
import os
from importlib.metadata import version

import numpy as np
import pytest
import tiny

from dfssm.base import DfssmError, child
from dfssm.targets.text import document, encode, encode_documents, end_tokens, load_tokenizer


def save(tokenizer, path):
    tokenizer.save(str(path))
    return path


def test_a_text_is_taken_whole_whatever_the_file_asks_for(tokenizer, tmp_path):
    cutting = tokenizer.from_str(tokenizer.to_str())
    cutting.enable_truncation(8)
    cutting.enable_padding(length=8)
    for text in ("hello", "hello world " * 11):
        ids = load_tokenizer(save(cutting, tmp_path / "t.json"), "another").encode(text).ids
        assert ids == tokenizer.encode(text).ids and len(ids) != 8


def test_dropout_of_a_training_is_none_here(tokenizer, tmp_path):
    """It would make other tokens of a text each time."""
    contents = json.loads(tokenizer.to_str())
    contents["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    loaded = load_tokenizer(tmp_path / "tokenizer.json", "another")
    expected = tokenizer.encode("hello world").ids
    assert all(loaded.encode("hello world").ids == expected for _ in range(20))


def test_padding_beyond_all_memory_is_not_done(tokenizer, tmp_path):
    contents = json.loads(tokenizer.to_str())
    contents["padding"] = {
        **{"strategy": {"Fixed": 10**18}, "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "x"},
    }
    (tmp_path / "t.json").write_text(json.dumps(contents))
    assert load_tokenizer(tmp_path / "t.json", "another").encode("hello").ids == tokenizer.encode("hello").ids


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100000, b'{"model": {"type": "BPE"}}', b"\xff\xfe", None])
def test_what_is_no_tokenizer_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(DfssmError, match=r"^[^\n]*t.json: [^\n]*; give another$"):
        load_tokenizer(tmp_path / "t.json", "another")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "t.json")
    with pytest.raises(DfssmError, match=r"t.json: cannot be read \(no regular file\); give another"):
        load_tokenizer(tmp_path / "t.json", "another")


def hostile(tokenizer, path, **changes):
    path.write_text(json.dumps(json.loads(tokenizer.to_str()) | changes))
    return path


@pytest.fixture
def untried(tmp_path, monkeypatch):
    """No tokenizer has been tried by this user. Returns the file that says which have been."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(child, "SECONDS", 1.0)
    return tmp_path / "state/dfssm" / f"tokenizers-{version('tokenizers')}"


def test_what_takes_more_than_it_may_is_one_line(tokenizer, untried, tmp_path):
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 64}  # each time 64 times as long
    file = hostile(tokenizer, tmp_path / "t.json", normalizer={"type": "Sequence", "normalizers": [grow] * 6})
    for _ in range(2):  # it is tried again, too
        with pytest.raises(DfssmError, match=r"t.json: is no tokenizer.json \(it takes more than 1 s\); give another$"):
            load_tokenizer(file, "another")
    assert not untried.exists()


def test_a_regular_expression_that_does_not_end_is_one_line(tokenizer, untried, tmp_path):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$z"}, "behavior": "Isolated", "invert": False}
    file = hostile(tokenizer, tmp_path / "t.json", pre_tokenizer=split)
    with pytest.raises(DfssmError, match=r"t.json: is no tokenizer.json \(.*retry-limit.*\); give another$"):
        load_tokenizer(file, "another")
    unlucky = split | {"pattern": {"Regex": "(q+)+$z"}}  # nothing that it is tried with has a q
    loaded = load_tokenizer(hostile(tokenizer, tmp_path / "t.json", pre_tokenizer=unlucky), "another")
    with pytest.raises(DfssmError, match=r"the tokenizer cannot read the text 'q+' \(.*retry-limit.*\): use another$"):
        encode("q" * 300, loaded)
    for offsets in (False, True):  # as texts to train on and to score are read
        with pytest.raises(DfssmError, match=r"cannot read the text 'q+' \(.*retry-limit.*\): use another$"):
            encode_documents(["hello", "q" * 300, "a"], loaded, offsets)


def test_a_tokenizer_is_tried_once(tokenizer, untried, tmp_path, monkeypatch):
    file = save(tokenizer, tmp_path / "t.json")
    load_tokenizer(file, "another")
    assert untried.read_text().split() == [hashlib.sha256(file.read_bytes()).hexdigest()]
    monkeypatch.setattr("dfssm.targets.text.Child", None)
    load_tokenizer(file, "another")


def test_where_nothing_can_be_recorded_it_is_tried_each_time(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert load_tokenizer(save(tokenizer, tmp_path / "t.json"), "another").to_str() == tokenizer.to_str()


def test_ids_decide_and_not_the_number_of_tokens(tokenizer, tmp_path):
    size = tiny.CONFIG.vocab_size
    padded = tokenizer.from_str(tokenizer.to_str())
    padded.add_special_tokens(["[PAD]"])
    file = save(padded, tmp_path / "padded.json")
    with pytest.raises(
        DfssmError, match=rf"token '\[PAD\]' has id {size}, the model knows ids 0 to {size - 1}; give x"
    ):
        load_tokenizer(file, "x", size)
    assert load_tokenizer(file, "x", size + 1).get_vocab_size() == size + 1
    gaps = json.loads(tokenizer.to_str())
    name = next(name for name, index in gaps["model"]["vocab"].items() if index == 7)
    gaps["model"]["vocab"][name] = 5000  # no more tokens than before
    (tmp_path / "gaps.json").write_text(json.dumps(gaps))
    with pytest.raises(DfssmError, match=f"has id 5000, the model knows ids 0 to {size - 1}"):
        load_tokenizer(tmp_path / "gaps.json", "x", size)
    template = json.loads(tokenizer.to_str())
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    template["post_processor"] = {
        **{"type": "TemplateProcessing", "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}], "pair": []},
        "special_tokens": {"<s>": {"id": "<s>", "ids": [6000], "tokens": ["<s>"]}},
    }
    (tmp_path / "template.json").write_text(json.dumps(template))
    with pytest.raises(DfssmError, match=f"token '<s>' has id 6000, the model knows ids 0 to {size - 1}"):
        load_tokenizer(tmp_path / "template.json", "x", size)


def test_the_template_begins_a_text_and_only_that():
    llama = tiny.byte_fallback_tokenizer()
    begin = llama.token_to_id("<s>")
    assert encode("he", llama) == [begin, *encode("he", llama, begins=False)]


def test_documents_begin_as_prompts_do_and_end_once():
    from tokenizers import processors

    llama = tiny.byte_fallback_tokenizer()
    begin, end = map(llama.token_to_id, ("<s>", "</s>"))
    plain = llama.encode("he", add_special_tokens=False).ids
    (found,) = encode_documents(["he"], llama)
    assert document(found, end) == [begin, *plain, end] == [*encode("he", llama), end]
    both = [("<s>", begin), ("</s>", end)]
    llama.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=both)
    (found,) = encode_documents(["he"], llama)
    assert document(found, end) == [begin, *plain, end]


def test_training_and_scoring_read_the_same_tokens(tmp_path):
    from dfssm.distill.data import encode as encode_to_train
    from dfssm.eval.text import read_text

    class Model:
        tokenizer, vocab_size = tiny.byte_fallback_tokenizer(), 265
        end = tokenizer.token_to_id("</s>")

    texts = ["he 日本語", "hhe e"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    read = read_text([tmp_path / "a.jsonl"], Model())
    assert read.ids.tolist() == encode_to_train(texts, Model.tokenizer, Model.end, 265).tolist()
    ends = np.flatnonzero(read.ids == Model.end)
    assert read.ids[[0, ends[0] + 1]].tolist() == [Model.tokenizer.token_to_id("<s>")] * 2
    assert read.ends[ends].tolist() == np.cumsum([len(text.encode()) for text in texts]).tolist()
    assert (np.diff(read.ends) >= 0).all() and read.scored_bytes == sum(len(text.encode()) for text in texts)


class TestEnds:
    def test_the_configs_ids_come_first(self, tokenizer):
        tokenizer = tokenizer.from_str(tokenizer.to_str())
        assert end_tokens(None, tokenizer) == ()
        assert end_tokens(0, tokenizer) == (0,) and end_tokens([7, 0, 7], tokenizer) == (7, 0)
        tokenizer.add_special_tokens(["<|endoftext|>"])
        assert end_tokens(None, tokenizer) == (tokenizer.token_to_id("<|endoftext|>"),)
        assert end_tokens(0, tokenizer) == (0,)

    @pytest.mark.parametrize("value", ["</s>", -1, [1, "x"], [True], 1.0, {}])
    def test_what_is_no_id_is_refused(self, value, tokenizer):
        with pytest.raises(DfssmError, match="config: eos_token_id is .*; it must be null, an integer >= 0, or a list"):
            end_tokens(value, tokenizer)
