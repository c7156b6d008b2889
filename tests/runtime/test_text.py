import numpy as np
import pytest
import tiny

from dfssm.runtime.text import StopFilter, TextStream, Vocabulary

TEXT = "hello world – naïve café 漢字 👩‍🚀 \u200b e\u0301 end"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    from tokenizers import Tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tiny.write_tokenizer(path)
    return Tokenizer.from_file(str(path))


@pytest.fixture(scope="module")
def sentencepiece():
    """A tokenizer as Llama's: a space is ▁, the decoder drops the first, bytes are tokens <0x..>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"helowrd", "▁hello", "▁world"]
    model = models.Unigram([(piece, -float(len(pieces) - i)) for i, piece in enumerate(pieces)], 0, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def llama():
    """As Llama's own file: BPE whose bytes are tokens <0x..>, the normalizer writes the space in front."""
    return tiny.byte_fallback_tokenizer()


@pytest.fixture(scope="module")
def metaspace():
    """The same with the decoder Metaspace, which drops the ▁ of a first token."""
    from tokenizers import decoders

    tokenizer = tiny.byte_fallback_tokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


@pytest.fixture(params=["byte_level", "sentencepiece", "llama", "metaspace"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def stream(tokenizer, ids, context=()):
    text = TextStream(Vocabulary(tokenizer), context)
    return [*(text.push(token) for token in ids), text.flush()]


def test_pieces_join_to_the_decoding_and_hold_whole_characters(tokenizer):
    ids = tokenizer.encode(TEXT).ids
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(ids) > len(TEXT), "the text must have characters of several tokens"
    assert sum(map(bool, pieces)) > len(TEXT) / 3, "the text must come piece by piece"


def test_every_cut_between_context_and_text_keeps_the_spaces(tokenizer):
    ids = tokenizer.encode("hello world hello world").ids
    for cut in range(1, len(ids)):
        joined = tokenizer.decode(ids[:cut]) + "".join(stream(tokenizer, ids[cut:], ids[max(0, cut - 8) : cut]))
        assert joined == tokenizer.decode(ids)


def test_bytes_that_are_no_character_are_shown_at_the_end_and_in_the_middle(byte_level):
    lead = byte_level.encode("漢").ids[:1]  # the first byte of three
    a = byte_level.encode("a").ids
    for ids in (lead, a + lead, lead + a, lead * 9 + a, a + lead * 9):
        assert "".join(stream(byte_level, ids)) == byte_level.decode(ids)


def test_a_long_run_of_bad_bytes_is_not_held_back_for_ever(byte_level):
    pieces = stream(byte_level, byte_level.encode("漢").ids[:1] * 20)
    assert sum(map(bool, pieces[:-1])) >= 12


def test_random_tokens_join_to_the_decoding(byte_level):
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(0, byte_level.get_vocab_size(), 60).tolist()
        assert "".join(stream(byte_level, ids)) == byte_level.decode(ids)


CUTS = "日本語です hello 👩‍🚀🇯🇵 w e\u0301 naïve  漢 world"


def ends_of_tokens(tokenizer, ids):
    """By the vocabulary alone: at which byte of the text each token ends. Of a byte-level one a character is a byte."""
    sizes = []
    for name in map(tokenizer.id_to_token, ids):
        one = name.startswith("<0x") or name in tiny.byte_level_alphabet()
        sizes.append(1 if one else len(name.replace("▁", " ") if tokenizer.token_to_id("<0x00>") else name))
    if tokenizer.token_to_id("<0x00>") is not None:
        sizes[0] -= 1  # the space in front of the text, which is none of its own
    return np.cumsum(sizes)


def complete(text, begin, end):
    """The characters whose last byte is one of the bytes [begin, end) of the text."""
    at = np.cumsum([len(character.encode()) for character in text])
    return "".join(character for character, last in zip(text, at, strict=True) if begin < last <= end)


def test_a_piece_is_the_characters_whose_last_byte_came_wherever_the_prompt_ends(tokenizer):
    ids = tokenizer.encode(CUTS, add_special_tokens=False).ids
    ends = ends_of_tokens(tokenizer, ids)
    assert ends[-1] == len(CUTS.encode()), "the oracle must know every token"
    inside = 0
    for cut in range(1, len(ids)):
        pieces, begin = TextStream(Vocabulary(tokenizer), ids[:cut]), ends[cut - 1]
        inside += complete(CUTS, 0, begin).encode() != CUTS.encode()[:begin]
        for token, end in zip(ids[cut:], ends[cut:], strict=True):
            assert pieces.push(token) == complete(CUTS, begin, end), (cut, tokenizer.id_to_token(token))
            begin = end
        assert pieces.flush() == ""
    assert inside > 20, "prompts must end inside characters"


def test_the_examples_of_the_fault(llama):
    """A prompt 日本語, then です; and 本語です cut after four bytes, which gave U+FFFD, nothing or 本 again."""
    text, ids = "日本語です", llama.encode("日本語です").ids[-15:]
    assert "".join(stream(llama, ids[9:], ids[:9])) == "です"
    assert "".join(stream(llama, ids[7:], ids[3:7])) == "語です"
    assert [len(piece) for piece in stream(llama, ids)] == [0, 0, 1] * len(text) + [0]


def test_special_tokens_are_no_text_and_do_not_begin_one(llama):
    begin, end = map(llama.token_to_id, ("<s>", "</s>"))
    hello = llama.encode("hello", add_special_tokens=False).ids
    assert "".join(stream(llama, [*hello, end], [begin])) == llama.decode([begin, *hello, end]) == "hello"
    assert "".join(stream(llama, hello, [begin, *hello])) == " hello"


def test_ids_without_a_token_are_no_text(llama):
    assert stream(llama, [llama.get_vocab_size() + 7]) == ["", ""]


def test_a_tokenizer_without_a_decoder_is_its_own_decoding():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert stream(words, [0, 1, 1]) == ["a", " b", " b", ""] and words.decode([0, 1, 1]) == "a b b"


def filtered(stop, pieces):
    stops, out = StopFilter(stop), []
    for piece in pieces:
        out.append(stops.push(piece))
        if stops.stopped:
            return out, True
    return [*out, stops.flush()], False


@pytest.mark.parametrize(
    ("stop", "pieces", "text", "stopped"),
    [
        (["END"], ["one END two"], "one ", True),
        (["END"], ["one E", "N", "D two"], "one ", True),
        (["END"], ["one E", "N", "E", "ND"], "one EN", True),
        (["aab"], ["aaa", "ab"], "aa", True),
        (["END"], ["one EN"], "one EN", False),
        (["xyz", "b"], ["ab xyz"], "a", True),
        (["\n\n"], ["a\n", "b\n", "\nc"], "a\nb", True),
        ([], ["any", "thing"], "anything", False),
        ([""], ["any"], "any", False),
    ],
)
def test_stop_strings_end_the_text_and_are_not_shown(stop, pieces, text, stopped):
    out, hit = filtered(stop, pieces)
    assert ("".join(out), hit) == (text, stopped)


def test_nothing_is_held_back_that_cannot_be_a_stop_string():
    assert StopFilter(["END"]).push("one two") == "one two"
    assert StopFilter(["END"]).push("one twE") == "one tw"
