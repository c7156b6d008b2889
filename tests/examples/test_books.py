"""05_books.py: what it takes from an edition."""

import pytest
from click.testing import CliRunner

from dfssm.base.errors import DfssmError
from tests.examples_as_modules import load

OPF = """<package xmlns="http://www.idpf.org/2007/opf"><manifest>
<item href="text/titlepage.xhtml" id="t"/><item href="text/two.xhtml" id="b"/><item href="text/one.xhtml" id="a"/>
</manifest><spine><itemref idref="t"/><itemref idref="a"/><itemref idref="b"/></spine></package>"""
PAGE = """<html xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops"><head><title>No</title></head>
<body epub:type="{kind}">{body}</body></html>"""


@pytest.fixture
def book(tmp_path):
    text = tmp_path / "a_book" / "src" / "epub" / "text"
    text.mkdir(parents=True)
    (text.parent / "content.opf").write_text(OPF)
    pages = {
        "titlepage": ("frontmatter", "<p>Not of the book</p>"),
        "one": (
            "bodymatter z3998:fiction",
            "<section><h2>One</h2>"
            '<p>First <i>line</i><a href="#n" epub:type="noteref">12</a>, and\n\tmore.</p></section>',
        ),
        "two": (
            "bodymatter",
            "<blockquote><p><span>A verse,</span><br/><span>two\u00a0lines</span></p></blockquote>"
            "<ul><li><p>An item\u2060—in a list</p></li><li>Another</li></ul><p> </p>",
        ),
    }
    for name, (kind, body) in pages.items():
        (text / f"{name}.xhtml").write_text(PAGE.format(kind=kind, body=body))
    return tmp_path / "a_book"


def test_paragraphs_of_the_main_part_in_the_order_of_the_spine(book, tmp_path):
    books = load("05_books.py")
    done = CliRunner().invoke(books.books, [str(book), "-o", str(tmp_path / "out")], catch_exceptions=False)
    assert done.exit_code == 0
    wanted = "One\n\nFirst line, and more.\n\nA verse, two lines\n\nAn item—in a list\n\nAnother\n"
    assert (tmp_path / "out" / "a_book.txt").read_text() == wanted


@pytest.mark.parametrize("broken", ["content.opf", "text/one.xhtml"])
def test_what_is_no_edition_is_refused(book, broken):
    books = load("05_books.py")
    (book / "src" / "epub" / broken).unlink()
    with pytest.raises(DfssmError, match="content.opf|one.xhtml"):
        books.text_of(book)
    (book / "src" / "epub" / broken).write_text("<open>")
    with pytest.raises(DfssmError, match="not XML"):
        books.text_of(book)
