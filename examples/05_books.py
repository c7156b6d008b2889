"""Text of public-domain books, for the fair bench: the editions of Standard Ebooks, one file a book.

    git clone https://github.com/standardebooks/herman-melville_moby-dick books/herman-melville_moby-dick
    python examples/05_books.py books/* -o build/books

A file has the book's main part, a paragraph a line and an empty line between them. Editions change: books.txt has the
commits that docs/results.md has figures of, and the sha256 of the file that each gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import click

from dfssm.base import paths
from dfssm.base.errors import DfssmError
from dfssm.base.files import write_file
from dfssm.base.reading import read_file
from dfssm.cli.process import run

_HTML, _OPF, _OPS = ("{http://www.w3.org/1999/xhtml}", "{http://www.idpf.org/2007/opf}",
                     "{http://www.idpf.org/2007/ops}")  # fmt: skip
_BLOCKS = {_HTML + name for name in ("h1", "h2", "h3", "h4", "h5", "h6", "p", "li", "td", "dt", "dd")}
_JOINER, _HAIR, _NO_BREAK = "\u2060", "\u200a", "\u00a0"


def text_of(folder: Path) -> str:
    """The main part of the book whose repository is in `folder`. Raises DfssmError if there is no book."""
    epub = folder / "src" / "epub"
    if not (epub / "content.opf").is_file():
        raise DfssmError(f"{folder}: no src/epub/content.opf in it; name a clone of a Standard Ebooks repository")
    package = _parsed(epub / "content.opf")
    names = {item.get("id"): item.get("href", "") for item in package.iter(_OPF + "item")}
    lines: list[str] = []
    for reference in package.iter(_OPF + "itemref"):
        page = _parsed(paths.file(epub / names[reference.get("idref")], "a page of the book"))
        body = page.find(_HTML + "body")
        if body is not None and "bodymatter" in body.get(_OPS + "type", ""):
            lines += _paragraphs(body)
    return "\n\n".join(lines) + "\n"


def _parsed(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(read_file(file))
    except ElementTree.ParseError as error:
        raise DfssmError(f"{file}: not XML ({error}); clone the repository again") from None


def _paragraphs(element: ElementTree.Element) -> Iterator[str]:
    for child in element:
        if child.tag in _BLOCKS and not any(inner.tag in _BLOCKS for inner in child.iter() if inner is not child):
            text = _text(child).replace(_JOINER, "").replace(_HAIR, "").replace(_NO_BREAK, " ")
            if line := " ".join(text.split()):
                yield line
        else:
            yield from _paragraphs(child)


def _text(element: ElementTree.Element) -> str:
    """Without the numbers of notes."""
    if element.tag == _HTML + "br":
        return " "
    if "noteref" in element.get(_OPS + "type", ""):
        return ""
    return (element.text or "") + "".join(_text(child) + (child.tail or "") for child in element)


@click.command(help=__doc__.replace("\n\n    ", "\n\n\b\n    ", 1))
@click.argument("folders", nargs=-1, required=True, type=click.Path(), metavar="FOLDER...")
@click.option("-o", "--output", required=True, type=click.Path(), metavar="DIR", help="Where the files go.")
def books(folders: tuple[str, ...], output: str) -> None:
    for folder in map(Path, folders):
        write_file(Path(output) / f"{folder.name}.txt", text_of(folder), parents=True)


if __name__ == "__main__":
    run(books, Path(__file__).name)
