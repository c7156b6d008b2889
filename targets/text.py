"""From text to tokens: the one rule of all that reads text, whether it runs, measures or trains a model.

A text is taken whole, neither cut nor padded, whatever its tokenizer.json asks for. Where a text begins, its special
tokens (BOS) are those of the tokenizer's template. It ends with the ids of the model's config, else <|endoftext|>.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dfssm.opset.endings import END_OF_TEXT, end_ids
from dfssm.opset.errors import DfssmError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_PROBE = "Once upon a time, 1 \u00e9\U0001f600\0"  # whatever a tokenizer may not have, and what most have


def load_tokenizer(file: Path, give: str, vocab_size: int | None = None, sha256: str | None = None) -> Tokenizer:
    """Read a tokenizer.json.

    Args: `give`: what the user is to give where the file is none. `vocab_size`: of the model, which must know all ids.
        `sha256`: what the file must be.
    Raises DfssmError when it cannot be read, is no tokenizer.json, or is not that of the model.
    """
    from tokenizers import Tokenizer

    try:
        content = file.read_bytes()
    except OSError as error:
        raise DfssmError(f"{file}: cannot be read ({error.strerror or error}); give {give}") from None
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise DfssmError(f"{file}: has changed since the model was opened; give {give}")
    try:
        tokenizer = Tokenizer.from_buffer(content)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Much of what a file lacks shows only in use: an id for what is unknown, a token that a template names.
        tokenizer.decode(tokenizer.encode(_PROBE).ids)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises no type of its own, and its panics are no Exception
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DfssmError(f"{file}: is no tokenizer.json ({reason}); give {give}") from None
    if vocab_size is not None:
        # By the largest id, not by their number: a padded vocabulary has more ids than tokens, and ids may have gaps.
        name, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1], default=("", -1))
        if largest >= vocab_size:
            found = f"token {name!r} has id {largest}, the model knows ids 0 to {vocab_size - 1}"
            raise DfssmError(f"{file}: {found}; give {give}")
    return tokenizer


def end_tokens(configured: object, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a text: those of the config's `eos_token_id`; where it has none, that of <|endoftext|>, if any.
    The first separates documents.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    return end_ids(configured) or (() if end is None else (end,))


def require_utf8(text: str) -> None:
    """DfssmError for a text with half a surrogate pair, which Python makes of bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeError:
        raise DfssmError(f"the text {text[:40]!a} is not UTF-8: convert it, or give its token ids") from None


def encode(text: str, tokenizer: Tokenizer, begins: bool = True) -> list[int]:
    """The ids of a text, with the special tokens of the template where it `begins` one. DfssmError if it is no text."""
    require_utf8(text)
    return tokenizer.encode(text, add_special_tokens=begins).ids


def document(found: Encoding, end: int) -> list[int]:
    """The ids of an encoded document, with the special tokens of the template, ended by one `end`."""
    ids: list[int] = found.ids
    return ids if ids[-1:] == [end] else [*ids, end]


def encode_documents(texts: Sequence[str], tokenizer: Tokenizer, offsets: bool = False) -> list[Encoding]:
    """Encode whole documents together, with the special tokens of the template; `offsets` cost time."""
    encode_batch = tokenizer.encode_batch if offsets else tokenizer.encode_batch_fast
    return encode_batch(list(texts), add_special_tokens=True)
