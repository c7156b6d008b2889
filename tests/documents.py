"""What the documents say: their blocks of code, the commands in these, their links and headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_FENCED = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?<=\n\n)((?: {4}.*\n)+)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def every() -> list[Path]:
    """Every document that people read: the top level's, docs/ and those of the examples."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")])


def fenced(text: str) -> list[tuple[str, str]]:
    """The blocks between ``` marks, in order: (language or "", contents)."""
    return _FENCED.findall(text)


def in_block(block: str) -> Iterator[str]:
    """The commands of a block, without comments; "\\" at the end of a line joins it to the next."""
    for line in re.sub(r"\\\n\s*", "", block).splitlines():
        if command := re.sub(r"\s+# .*", "", line).strip():
            yield command


def commands(text: str) -> list[str]:
    """The commands of every block that is indented, or fenced and of no language."""
    blocks = [body for language, body in fenced(text) if not language] + _INDENTED.findall(_FENCED.sub("", text))
    return [command for block in blocks for command in in_block(block)]


def programs(command: str) -> list[list[str]]:
    """The programs that a command starts, each in words, without its variables and redirections. Two blanks end a
    command, [] holds options.
    """
    found = []
    for one in re.split(r" (?:\||&&|--no-python) ", re.split(r"\s{2,}", command)[0]):
        words = shlex.split(re.sub(r"(?<= )\[+|\]+(?= |$)", "", re.sub(r" [<>] ?\S+", "", one)))
        while words and re.match(r"\w+=", words[0]):
            del words[0]
        found += [words] if words else []
    return found


def links(text: str) -> list[str]:
    """Targets of the links and pictures."""
    return _LINK.findall(_FENCED.sub("", text))


def anchors(text: str) -> set[str]:
    """What a link may name after "#", as GitHub makes it of the headings."""
    headings = _HEADING.findall(_FENCED.sub("", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
