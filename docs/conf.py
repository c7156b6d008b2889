"""The documentation as a site: `make site`. Sphinx reads the same Markdown that is read in the repository.

The root of the repository is the source folder, so that links between documents, and to sources, hold in both.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

project = "dfssm"
author = copyright = "the dfssm authors"
release = version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
include_patterns = ["*.md", "docs/*.md", "examples/**/*.md"]
exclude_patterns = ["build", "dist", ".venv", ".cache"]
root_doc = "docs/index"
nitpicky = True
# Types of other packages have no page here.
nitpick_ignore_regex = [("py:.*", r"(?!dfssm\.).*"), ("py:.*", r"dfssm\.(?!Engine$).*")]

myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # a document may begin a section below the level before it

autodoc_typehints = "signature"
autodoc_member_order = "bysource"

html_theme = "furo"  # its fonts are the system's: nothing is read from elsewhere
html_title = f"dfssm {version}"
html_copy_source = False
html_show_sphinx = False

# Of the table of contents: the documents stay free of Sphinx's own syntax.
CONTENTS = {
    "Start": ["README", "docs/concepts", "docs/faq"],
    "Make a model": ["docs/convert", "docs/distill", "docs/distill_scale", "docs/results", "docs/eval", "docs/study"],
    "Run it": ["docs/runtime", "docs/cpp", "docs/serve", "docs/trt", "docs/triton", "docs/arm", "docs/jetson"],
    "Specification": ["docs/ops", "docs/export", "docs/format", "docs/json", "docs/api"],
    "Speed": ["docs/performance", "docs/bench", "docs/gpu"],
    "Trust": ["docs/reliability", "SECURITY"],
    "Models": ["examples/demo/README", "examples/demo/teacher/README", "examples/books/README"],
    "Project": ["CONTRIBUTING", "CHANGELOG", "THIRD_PARTY"],
}


_SECTION = re.compile(r"(Args|Attributes|Returns|Raises)\b:? ?(.*)")


def as_rst(app, what, name, thing, options, lines):
    """Our docstrings are read in the source: sections are a word at the margin, what goes on is indented."""
    text = re.sub(r"[*|\\]", r"\\\g<0>", "\n".join(lines))
    text = re.sub(r"`([^`\n]+)`", r"``\1``", text)
    found, listed = [], False
    for line in text.splitlines():
        section, depth = _SECTION.match(line), len(line) - len(line.lstrip())
        if section:
            listed = not section[2]
            found += ["", f"**{section[1]}** {section[2]}".rstrip(), *[""] * listed]
        elif listed and depth:
            found.append(("- " if depth == 4 else "  ") + line.strip())
        else:
            found.append(line.strip() if depth < 8 else line)
    lines[:] = found


def add_contents(app, name, source):
    if name == root_doc:
        for caption, documents in CONTENTS.items():
            lines = [":hidden:", f":caption: {caption}", "", *(f"/{document}" for document in documents)]
            source[0] += "\n".join(["", "```{toctree}", *lines, "```", ""])


def add_front_page(app, error):
    """The site's own address leads to the contents."""
    if not error:
        page = f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html"><title>{project}</title>'
        (Path(app.outdir) / "index.html").write_text(page)


def setup(app):
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", as_rst)
    app.connect("build-finished", add_front_page)
