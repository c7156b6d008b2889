"""The documents name what is there: files, headings, and options that the commands have."""

import re
import shlex
import tomllib

import click
import pytest
from documents import ROOT, anchors, commands, every, links

from dfssm.cli.compile import command as dfcompile
from dfssm.cli.main import dfssm

NAMES = [str(path.relative_to(ROOT)) for path in every()]
PROGRAMS = {"dfssm": dfssm, "dfcompile": dfcompile}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    broken = []
    for link in links((ROOT / name).read_text()):
        target, _, anchor = link.partition("#")
        path = (ROOT / name).parent / target if target else ROOT / name
        if re.match(r"\w+:", link):
            continue
        if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("name", NAMES)
def test_the_tests_that_are_named_are_there(name):
    """As file.py::test_name, with as much of the file's path as it takes."""
    for file, test in re.findall(r"([\w/]+\.py)::(\w+)", (ROOT / name).read_text()):
        files = [path for path in (ROOT / "tests").rglob("*.py") if f"/{path}".endswith(f"/{file}")]
        assert any(re.search(rf"def {test}\(", path.read_text()) for path in files), f"{file}::{test}"


def own_commands(name: str) -> list[list[str]]:
    """The lines of a document that start one of our programs, in words. Two blanks end a command, [] holds options."""
    lines = [re.split(r"\s{2,}| > ", command)[0] for command in commands((ROOT / name).read_text())]
    return [shlex.split(re.sub(r"[][]", "", line)) for line in lines if line.split()[0] in PROGRAMS]


@pytest.mark.parametrize("name", [name for name in NAMES if own_commands(name)])
def test_commands_have_these_options(name):
    """Nothing is run: a wrong name or value is an error of click's."""
    for words in own_commands(name):
        command, arguments = PROGRAMS[words[0]], words[1:]
        try:
            while isinstance(command, click.Group):
                context = click.Context(command)
                _, command, arguments = command.resolve_command(context, arguments)
            command.make_context(command.name, arguments)
        except click.UsageError as error:
            pytest.fail(f"{shlex.join(words)}: {error.message}")


def test_the_version_to_cite_is_this_one():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
