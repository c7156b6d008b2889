import numpy as np
import pytest
import tiny

from dfssm.runtime.text import StopFilter, TextStream

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


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def stream(tokenizer, ids, context=()):
    text = TextStream(tokenizer, context)
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
