"""The documentation as a site: it is built without a warning, has every document, and reads nothing from elsewhere."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from documents import ROOT, every

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("site")]

READ = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}


class Reads(HTMLParser):
    """What a page makes a browser read, and its links."""

    def __init__(self, page: str):
        super().__init__()
        self.read, self.links = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        of = dict(attributes)
        if READ.get(tag) in of and (tag != "link" or of.get("rel") not in ("index", "search", "next", "prev")):
            self.read.append(of[READ[tag]])
        if tag == "a" and "href" in of:
            self.links.append(of["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", "."]
    done = subprocess.run([*command, folder], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def test_every_document_is_a_page(site):
    pages = {str(page.relative_to(site).with_suffix("")) for page in site.rglob("*.html")}
    assert {str(document.relative_to(ROOT).with_suffix("")) for document in every()} - pages == set()
    assert "docs/index.html" in (site / "index.html").read_text()


def test_pages_read_their_own_files_only(site):
    for page in site.rglob("*.html"):
        read = Reads(page.read_text()).read
        assert [name for name in read if re.match(r"\w+:|//", name) and not name.startswith("data:")] == [], page.name
        assert [name for name in read if not (page.parent / name.partition("?")[0]).is_file()] == [], page.name
    for style in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)]*", style.read_text()) == [], style.name


def test_links_lead_to_pages(site):
    for page in site.rglob("*.html"):
        links = [link.partition("#")[0] for link in Reads(page.read_text()).links]
        assert [
            link for link in links if link and not re.match(r"\w+:", link) and not (page.parent / link).exists()
        ] == []


def test_docstrings_become_lists(site):
    """`Attributes:` of our docstrings, one of which has a line that goes on."""
    page = (site / "docs" / "api.html").read_text()
    assert "<p>top_k: keep the k largest; 0 = all.</p>" in page
    assert re.search(r"<p>processors: functions \(ids, logits\) -&gt; logits, called in this order; see", page)
