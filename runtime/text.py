"""From tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character (yet)

# A UTF-8 character has at most four bytes. Byte-fallback decoders show a run of bytes that ends in half a
# character as one U+FFFD a byte, also for the whole character before it: four bytes, and three of the
# unfinished one.
_UNCERTAIN = 7


class TextStream:
    """Incremental `tokenizer.decode`: the pieces, joined, are the decoding of the whole.

    A character may be spread over several tokens; until its last byte is there the decoder shows U+FFFD, so
    trailing ones are held back until the next token or `flush`.
    `context`: the tokens before the first pushed one. Decoders of the SentencePiece kind drop the leading
    space of what they decode: with the context in front, a space between prompt and answer is kept.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self._decode = tokenizer.decode
        self._window = list(context)  # tokens that still influence what comes next
        self._clean = len(self._window)  # tokens of the window that ended on a whole character
        self._sent = len(self._decode(self._window)) if self._window else 0

    def push(self, token: int) -> str:
        """The text that became certain by this token; often empty."""
        self._window.append(token)
        text = self._decode(self._window)
        held = min(_UNCERTAIN, len(text) - len(text.rstrip(REPLACEMENT)))
        piece = text[self._sent : len(text) - held]
        self._sent = max(self._sent, len(text) - held)
        if piece and not held:
            # Everything is out: keep only the tokens since the last such point, as context for the next.
            del self._window[: self._clean]
            self._clean = len(self._window)
            self._sent = len(self._decode(self._window))
        return piece

    def flush(self) -> str:
        """What is held back: the bytes that never became a character, as U+FFFD."""
        text = self._decode(self._window)
        piece = text[self._sent :]
        self._sent = len(text)
        return piece


class StopFilter:
    """Passes text through up to the first of the stop strings, which may arrive in any number of pieces."""

    def __init__(self, stop: Sequence[str]):
        self._stop = [s for s in stop if s]
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The part of the text so far that can be no part of a stop string; sets `stopped` at a full one."""
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
