"""From text to tokens: the one rule of all that reads text, whether it runs, measures or trains a model.

A text is taken whole, neither cut nor padded, and always as the same tokens (no dropout), whatever its tokenizer.json
asks for. Where a text begins, its special tokens (BOS) are those of the tokenizer's template. It ends with the ids of
the model's config, else <|endoftext|>.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dfssm.base.child import Child, ChildError, possible
from dfssm.base.endings import END_OF_TEXT, end_ids
from dfssm.base.errors import DfssmError, reason
from dfssm.base.reading import read_file

from .trust import record, recorded

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_PROBES = (
    "Once upon a time, 1 \u00e9\U0001f600\0",  # whatever a tokenizer may not have, and what most have
    *(sign * 300 + end for sign in "a 1.\n" for end in ("", "!", "\0")),  # where bad regular expressions do not end
)


def load_tokenizer(file: Path, give: str, vocab_size: int | None = None, sha256: str | None = None) -> Tokenizer:
    """Read a tokenizer.json. One that is new to this user is first tried in a process of its own, see `child`.

    Args: `give`: what the user is to give where the file is none. `vocab_size`: of the model, which must know all ids.
        `sha256`: what the file must be.
    Raises DfssmError when it cannot be read, is no tokenizer.json, takes too much to use, or is not that of the model.
    """
    try:
        content = read_file(file)
    except OSError as error:
        raise DfssmError(f"{file}: cannot be read ({reason(error)}); give {give}") from None
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise DfssmError(f"{file}: has changed since the model was opened; give {give}")
    from importlib.metadata import version  # takes memory: see dfssm.base.extras

    tried = f"tokenizers-{version('tokenizers')}"
    try:
        if possible() and not recorded(found, tried):
            with Child(__name__, "_try_file") as child:
                child.ask([str(file), found])
            record(found, tried)
        tokenizer = parse(content)
    except (ChildError, ValueError) as error:
        raise DfssmError(f"{file}: is no tokenizer.json ({error}); give {give}") from None
    if vocab_size is not None:
        # By the largest id, not by their number: a padded vocabulary has more ids than tokens, and ids may have gaps.
        begun = tokenizer.encode("")  # what the template puts in front of a text need not be in the vocabulary
        known = tokenizer.get_vocab() | dict(zip(begun.tokens, begun.ids, strict=True))
        name, largest = max(known.items(), key=lambda entry: entry[1], default=("", -1))
        if largest >= vocab_size:
            found = f"token {name!r} has id {largest}, the model knows ids 0 to {vocab_size - 1}"
            raise DfssmError(f"{file}: {found}; give {give}")
    return tokenizer


def parse(content: bytes) -> Tokenizer:
    """The tokenizer of a tokenizer.json that has been tried. ValueError when it is none."""
    from tokenizers import Tokenizer

    with _value_errors():
        tokenizer = Tokenizer.from_buffer(content)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):  # of a training: other tokens each time
            tokenizer.model.dropout = None
        # Much of what a file lacks shows only in use: an id for what is unknown, a token that a template names.
        for text in _PROBES:
            tokenizer.decode(tokenizer.encode(text).ids)
    return tokenizer


@contextmanager
def _value_errors() -> Iterator[None]:
    """What the library raises, as a ValueError of one line: it has no own type, and its panics are no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(reason(error)) from None


def _try_file(request: list[str]) -> None:
    file, sha256 = request
    content = read_file(file)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError("it has changed while it was read")
    parse(content)


def end_tokens(configured: object, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a text: those of the config's `eos_token_id`; where it has none, that of <|endoftext|>, if any.
    The first separates documents.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    return end_ids(configured) or (() if end is None else (end,))


def require_ends(configured: object, tokenizer: Tokenizer) -> tuple[int, ...]:
    """`end_tokens`, at least one. DfssmError where there is none."""
    ends = end_tokens(configured, tokenizer)
    if not ends:
        raise DfssmError(f"neither the config has an eos_token_id nor the tokenizer {END_OF_TEXT}: give --tokenizer")
    return ends


def require_utf8(text: str) -> None:
    """DfssmError for a text with half a surrogate pair, which Python makes of bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeError:
        raise DfssmError(f"the text {text[:40]!a} is not UTF-8: convert it, or give its token ids") from None


def encode(text: str, tokenizer: Tokenizer, begins: bool = True) -> list[int]:
    """The ids of a text, with the special tokens of the template where it `begins` one. DfssmError if it is no text."""
    require_utf8(text)
    try:
        with _value_errors():
            return tokenizer.encode(text, add_special_tokens=begins).ids
    except ValueError as error:  # a regular expression gives up
        raise DfssmError(f"the tokenizer cannot read the text {text[:40]!a} ({error}): use another") from None


def document(found: Encoding, end: int) -> list[int]:
    """The ids of an encoded document, with the special tokens of the template, ended by one `end`."""
    ids: list[int] = found.ids
    return ids if ids[-1:] == [end] else [*ids, end]


def encode_documents(texts: Sequence[str], tokenizer: Tokenizer, offsets: bool = False) -> list[Encoding]:
    """Encode whole documents together, with the special tokens of the template; `offsets` cost time. DfssmError for one
    that the tokenizer cannot read.
    """
    encode_batch = tokenizer.encode_batch if offsets else tokenizer.encode_batch_fast
    try:
        with _value_errors():
            return encode_batch(list(texts), add_special_tokens=True)
    except ValueError:
        for text in texts:  # it is not said which
            encode(text, tokenizer)
        raise
