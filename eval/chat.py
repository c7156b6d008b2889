"""Chat templates: Jinja that lies beside a model, rendered as transformers does, in a sandbox in another process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dfssm.model.hf_tokens import json_object
from dfssm.opset.child import Child, ChildError
from dfssm.opset.errors import DfssmError
from dfssm.opset.reading import read_text

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # put behind what the model is to go on with, to find it in the rendered text

Message = dict[str, Any]


class ChatTemplate:
    """The chat template in `folder`: chat_template.jinja, else that of tokenizer_config.json.

    Raises DfssmError where there is none, or it is no template.
    """

    def __init__(self, folder: Path):
        config, file = json_object(folder / CONFIG), folder / FILE
        try:
            text = read_text(file) if file.is_file() else config.get("chat_template")
        except (OSError, ValueError) as error:
            raise DfssmError(f"{file}: cannot be read ({error}); put a right one there") from None
        if isinstance(text, list):  # several, by name
            named = [entry for entry in text if isinstance(entry, dict)]
            text = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
        if not isinstance(text, str):
            raise DfssmError(f"{folder}: has no chat template; put {FILE} there, or leave out --apply_chat_template")
        tokens = {name: config.get(name) for name in _TOKENS}
        self.tokens = {
            name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items() if token
        }
        self._text, self._child = text, Child(__name__, "_answer")
        try:
            self._child.ask([text])
        except ChildError as error:
            raise DfssmError(f"{folder}: its chat template cannot be read ({error}); put a right one there") from None

    def __call__(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of `messages`, up to where the model is to answer or, without the prompt for that, to go on with the
        last of them. Messages of the role system are left out if the template refuses them.
        """
        try:
            return str(self._child.ask([self._text, list(messages), add_generation_prompt, self.tokens]))
        except ChildError as error:
            raise DfssmError(f"the chat template refuses these messages ({error}): use another") from None


# ---- in the process of the template ----


def _answer(request: list[Any]) -> str:
    """What `ChatTemplate` asks: to read a template, or to render it."""
    template = _template(request[0])
    if not request[1:]:
        return ""
    messages, *rest = request[1:]
    try:
        return _render(template, messages, *rest)
    except TemplateError:
        return _render(template, [m for m in messages if m["role"] != "system"], *rest)


class _Generation(Extension):
    """{% generation %}, which marks for a training what the model says: it changes nothing of the text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _template(text: str) -> Template:
    extensions = [loopcontrols, _Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False} | options)
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(text)


def _render(template: Template, messages: list[Message], add_generation_prompt: bool, tokens: dict[str, str]) -> str:
    if not add_generation_prompt:
        messages = [*messages[:-1], messages[-1] | {"content": messages[-1]["content"] + _TAG}]
    text = template.render(messages=messages, add_generation_prompt=add_generation_prompt, **tokens)
    if add_generation_prompt:
        return text
    at = text.rindex(_TAG.strip())
    return text[:at] if text[at:].startswith(_TAG) else text[:at].rstrip()  # a template that trims


def _raise(message: str) -> None:
    raise TemplateError(message)
