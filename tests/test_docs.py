"""The documents name what is there: files, headings, and options that the commands have."""

import os
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
from documents import ROOT, anchors, commands, every, links, programs

from dfssm.cli.compile import command as dfcompile
from dfssm.cli.main import dfssm

NAMES = [str(path.relative_to(ROOT)) for path in every()]
PROGRAMS = {"dfssm": dfssm, "dfcompile": dfcompile}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


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


NOT_CHECKED = {
    "./decode": "the reader's program",
    "./ids": "the reader's program",
    "./run_calls": "is built in the lines above it",
    ".venv/bin/pre-commit install": "a tool of git",
    "cd": "of the shell",
    "curl": "tests/serve sends the same requests",
    "docker": "needs a Docker engine; tests/test_docker.py",
    "export": "of the shell",
    "g++": "docs/trt.md is run elsewhere: tests/test_docs_run.py; docs/cpp.md: tests/native/test_install.py",
    "git": "the reader's text",
    "head": "of the system",
    "lm_eval": "finds dfssm from its release after 0.4.13 on: docs/eval.md",
    "pip install $(echo dist/dfssm-*.whl)[compile]": "tests/test_readme.py",
    "pip install dist/dfssm-*.whl": "tests/test_readme.py",
    "polygraphy": "docs/trt.md is run: tests/test_docs_run.py",
    "python with_plugins.py": "printed in docs/trt.md",
    "python3 -m gpu_harness": "of the folder that scripts/gpu_check.sh packs: tests/gpu_harness",
    "source": "of the shell",
    "torchrun": "PyTorch's; what it starts is looked at",
    "tritonserver": "docs/triton.md is run elsewhere: tests/test_docs_run.py",
    "trtexec": "NVIDIA's: docs/trt.md",
}
"""How a program begins -> why its words are not looked at. Those of every other one are: its options, files and targets
exist.
"""


def started(name: str) -> list[list[str]]:
    """The programs that a document starts."""
    return [words for command in commands((ROOT / name).read_text()) for words in programs(command)]


def wrong(words: list[str]) -> str:
    """What is wrong with a program's words, "" where nothing is. Nothing is run."""
    program, *arguments = words
    if any(" ".join(words).startswith(start) for start in NOT_CHECKED):
        return ""
    if program in PROGRAMS:
        return wrong_options(PROGRAMS[program], arguments)
    if program == "make":
        of_make = re.search(r"^\.PHONY:(.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
        return "" if set(arguments) <= set(of_make) else "no such target"
    if words[:2] == ["pip", "install"]:
        return "" if all(map(of_project, arguments[1:])) else "no such extra or version"
    if program.rpartition("/")[2] == "python":
        module = arguments[:2] if arguments[0] == "-m" else []
        if module[1:] == ["pytest"]:
            paths = [word for word in arguments if word.startswith("tests/")]
            return "" if all((ROOT / path).exists() for path in paths) else "no such test"
        file = module[1].removeprefix("dfssm.").replace(".", "/") + ".py" if module else arguments[0]
        return wrong_script(ROOT / file, arguments[len(module) or 1 :])
    if program == "cmake":
        text = "".join((ROOT / folder / "CMakeLists.txt").read_text() for folder in (".", "native", "plugins/trt"))
        defined = re.findall(r"-D(\w+)=", " ".join(arguments))
        named = re.findall(r"--(?:target|component) ((?:\w+ ?)+)", " ".join(arguments))
        return "".join(f"no {name}" for name in (*defined, *" ".join(named).split()) if name not in text)
    if program.endswith(".sh"):
        return "" if os.access(ROOT / program, os.X_OK) else "no such script"
    return "how is it checked?"


def wrong_options(command: click.Command, arguments: list[str]) -> str:
    """A wrong name or value is an error of click's."""
    try:
        while isinstance(command, click.Group):
            context = click.Context(command)
            _, command, arguments = command.resolve_command(context, arguments)
        command.make_context(command.name, arguments)
    except click.UsageError as error:
        return error.message
    return ""


def wrong_script(file: Path, arguments: list[str]) -> str:
    """Of a Python file of ours: its options are in its text."""
    if not file.is_file():
        return f"no file {file}"
    text = file.read_text()
    names = [word.partition("=")[0] for word in arguments if word.startswith("-")]
    return "".join(f"no option {name}" for name in names if f'"{name}"' not in text)


def of_project(requirement: str) -> bool:
    """dfssm's extras, its wheel of this version."""
    if extras := re.fullmatch(r"dfssm\[?([\w,]*)\]?", requirement):
        return set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])
    return requirement.startswith(f"dfssm-{PROJECT['version']}-")


@pytest.mark.parametrize("name", [name for name in NAMES if started(name)])
def test_commands_name_what_is_there(name):
    """The options of every command, the files of every script, the targets of make."""
    assert [f"{shlex.join(words)}: {found}" for words in started(name) if (found := wrong(words))] == []


def test_what_is_not_looked_at_is_in_a_document():
    lines = [" ".join(words) for name in NAMES for words in started(name)]
    assert [start for start in NOT_CHECKED if not any(line.startswith(start) for line in lines)] == []


def test_the_version_to_cite_is_this_one():
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()
