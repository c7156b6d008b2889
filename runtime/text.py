"""From tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .rows import RECENT

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a token that is one byte, to a decoder with ByteFallback


class Vocabulary:
    """What single tokens of `tokenizer`, which stays as it is, mean as text; what was found out once is kept."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        kinds = _decoders(tokenizer)
        self._byte_fallback, self._byte_level = "ByteFallback" in kinds, "ByteLevel" in kinds
        self._known: dict[int, bytes | None] = {}

    def bytes_of(self, token: int) -> bytes | None:
        """Of a token that adds the same to every text: none of a special one. None where it depends on the text."""
        if token not in self._known:
            self._known[token] = self._look_up(token)
        return self._known[token]

    def _look_up(self, token: int) -> bytes | None:
        decode = self.tokenizer.decode
        name = self.tokenizer.id_to_token(token)
        if name is None or decode([token], skip_special_tokens=False) != decode([token]):
            return b""  # padding of the vocabulary, or a special token
        if self._byte_level:
            known = set(name) <= _BYTE_LEVEL.keys()  # an added token need not be
            return bytes(_BYTE_LEVEL[character] for character in name) if known else name.encode()
        if self._byte_fallback and (byte := _BYTE.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        return None


class TextStream:
    """Incremental `tokenizer.decode`: each token is its bytes, and a piece the characters whose last byte has come.

    The pieces, joined, are the decoding of the whole, special tokens left out; bytes that are no character become
    U+FFFD as soon as that is certain.
    `context`: the tokens before the first pushed one, of which the last `RECENT` are looked at. They may end inside a
    character: it is complete, and shown, with its last byte. They also tell that a text has begun, of which decoders of
    the SentencePiece kind drop the leading space.
    """

    def __init__(self, vocabulary: Vocabulary, context: Sequence[int] = ()):
        self._vocabulary = vocabulary
        self._last: list[int] = []  # the last token that was none of the special ones
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        for token in context[-RECENT:]:
            self.push(token)

    def push(self, token: int) -> str:
        """The text that became certain by this token; often empty."""
        return self._characters.decode(self._bytes(token))

    def flush(self) -> str:
        """What is held back: the bytes that never became a character, as U+FFFD."""
        return self._characters.decode(b"", final=True)

    def _bytes(self, token: int) -> bytes:
        """What `token` adds to the text after those before it."""
        found = self._vocabulary.bytes_of(token)
        if found is None:
            # Some decoders make whole characters of a token, with a space in front or without by what is before.
            decode, last = self._vocabulary.tokenizer.decode, self._last
            found = decode([*last, token])[len(decode(last)) :].encode()
            self._last = [token]
        elif found:
            self._last = [token]
        return found


def _decoders(tokenizer: Tokenizer) -> set[str]:
    """The kinds of decoders that make text of the tokens."""
    if tokenizer.decoder is None:
        return set()
    found = json.loads(tokenizer.decoder.__getstate__())
    return {decoder["type"] for decoder in found.get("decoders", [found])}


def _byte_level() -> dict[str, int]:
    """The byte of each character that a byte-level vocabulary is written in: printable Latin-1 is itself, all others
    are, in their order, the characters from U+0100 on.
    """
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level()


class StopFilter:
    """Passes text through up to the first of the stop strings, which may arrive in any number of pieces."""

    def __init__(self, stop: Sequence[str]):
        self._stop = [s for s in stop if s]
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The part of the text so far that can be no part of a stop string; sets `stopped` at a full one."""
        if not self._stop:
            return piece
        text = self._held + piece
        found = min((at for s in self._stop if (at := text.find(s)) >= 0), default=-1)
        if found >= 0:
            self.stopped, self._held = True, ""
            return text[:found]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back as a possible beginning of a stop string."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
