"""The process that reads and renders chat templates, as transformers does: Jinja in a sandbox; see `chat`."""

from __future__ import annotations

import json
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # put behind what the model is to go on with, to find it in the rendered text


def answer(request: list[Any]) -> str:
    """What `ChatTemplate` asks: [text] to read a template, [text, messages, add_generation_prompt, tokens, tools] to
    render it.
    """
    template, names = _template(request[0])
    return _render(template, names, *request[1:]) if request[1:] else ""


class _Generation(Extension):
    """{% generation %}, which marks for a training what the model says: it changes nothing of the text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _template(text: str) -> tuple[Template, set[str]]:
    """The template, and the names that it looks up."""
    extensions = [loopcontrols, _Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False} | options)
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(text), find_undeclared_variables(environment.parse(text))


def _render(
    template: Template,
    names: set[str],
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
    tokens: dict[str, str],
    tools: list[dict[str, Any]] | None,
) -> str:
    if tools is not None and "tools" not in names:
        raise TemplateError("it takes no tools")
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    if not add_generation_prompt:
        messages = [*messages[:-1], messages[-1] | {"content": messages[-1]["content"] + _TAG}]
    # Templates ask whether there are tools and documents by `is none`.
    given = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": tools, "documents": None}
    text = template.render(**given, **tokens)
    if add_generation_prompt:
        return text
    at = text.rindex(_TAG.strip())
    return text[:at] if text[at:].startswith(_TAG) else text[:at].rstrip()  # a template that trims


def _raise(message: str) -> None:
    raise TemplateError(message)
