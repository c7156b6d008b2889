"""Chat templates: Jinja beside a tokenizer, which makes one text of the messages of a chat. They are programs from
elsewhere, so they run in a sandbox in another process (`jinja`), with bounds of time and memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from dfssm.base.child import Child, ChildError
from dfssm.base.errors import DfssmError, reason
from dfssm.base.extras import require
from dfssm.base.jsonfile import parse_object
from dfssm.base.reading import read_file

from .files import Files

PACKAGES = {"chat": ["jinja2"]}
"""What rendering takes; see `dfssm.base.extras`."""

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
FILES = FILE, CONFIG
"""What Hugging Face keeps beside a tokenizer.json: the template, and the names of special tokens, or both in the
latter."""

_TOKENS = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))

Message = Mapping[str, Any]
"""{"role": "user", "content": "Hello"}, say."""

Tool = Mapping[str, Any]
"""{"type": "function", "function": {"name": ..., "description": ..., "parameters": JSON schema}}."""


class ChatTemplate:
    """The chat template in `folder`: chat_template.jinja, else that of tokenizer_config.json. Threads may share it.

    Args: `files`: those of `folder`, open. `sha256`: of each of these files that may be read; None: any.
    Raises DfssmError where there is none, or it is no template.
    """

    def __init__(self, folder: Path, files: Files | None = None, sha256: Mapping[str, str] | None = None):
        text, config = _find(folder, files, sha256)
        if text is None:
            where = "beside the model's tokenizer.json, and compile a bundle again"
            raise DfssmError(f"{folder}: has no chat template; put {FILE} {where}")
        require(PACKAGES)
        tokens = {name: config.get(name) for name in _TOKENS}
        self.tokens = {
            name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items() if token
        }
        self._text, self._child, self._lock = text, Child(f"{__package__}.jinja", "answer"), Lock()
        try:
            self._child.ask([text])
        except ChildError as error:
            raise DfssmError(f"{folder}: its chat template cannot be read ({error}); put a right one there") from None

    def __call__(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, tools: Sequence[Tool] | None = None
    ) -> str:
        """The text of `messages`, up to where the model is to answer or, without the prompt for that, to go on with the
        last of them. It is to be encoded without more special tokens: the template has written them. `tools`: what the
        model may call.

        Raises DfssmError for what are no messages, and where the template refuses them, takes no tools, or takes too
        much.
        """
        if not isinstance(messages, Sequence) or not messages:
            raise DfssmError(f"the messages are {messages!r}: give a list of at least one")
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise DfssmError(f"a message is {message!r}: give an object with role and content")
        plain, given = [dict(message) for message in messages], None if tools is None else list(tools)
        request = [self._text, plain, add_generation_prompt, self.tokens, given]
        try:
            with self._lock:
                return str(self._child.ask(request))
        except (ChildError, TypeError) as error:  # what JSON does not hold
            raise DfssmError(f"the chat template refuses these messages ({error}): use another") from None


def beside(tokenizer: Path) -> list[Path]:
    """The files of the chat template beside a tokenizer.json, which go where it goes; none without a template."""
    folder = tokenizer.parent
    found = _find(folder)[0] is not None
    return [path for name in FILES if found and (path := folder / name).is_file()]


def _find(
    folder: Path, files: Files | None = None, sha256: Mapping[str, str] | None = None
) -> tuple[str | None, dict[str, Any]]:
    """The template's text, None where there is none, and what tokenizer_config.json has."""
    content, other = (_read(folder / name, files, sha256) for name in FILES)
    config = parse_object(other or b"")
    if content is not None:
        try:
            return content.decode(), config
        except UnicodeError as error:
            raise DfssmError(f"{folder / FILE}: cannot be read ({error}); put a right one there") from None
    text = config.get("chat_template")
    if isinstance(text, list):  # several, by name
        named = [entry for entry in text if isinstance(entry, dict)]
        text = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
    return text if isinstance(text, str) else None, config


def _read(file: Path, files: Files | None, sha256: Mapping[str, str] | None) -> bytes | None:
    """What is in the file; None where it is missing or may not be read."""
    if not (files or file.is_file()) or (sha256 is not None and file.name not in sha256):
        return None
    try:
        content = files.read(file.name) if files else read_file(file)
    except OSError as error:
        raise DfssmError(f"{file}: cannot be read ({reason(error)}); put a right one there") from None
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256[file.name]:
        raise DfssmError(f"{file}: has changed since the model was opened; give the bundle as it was compiled")
    return content
