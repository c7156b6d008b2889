"""Many commands in one process of their own, and environments that hold only some of the packages installed here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEAVY = ("torch", "onnx", "transformers", "lm_eval", "datasets", "polygraphy")
"""Modules of which a command that has nothing to do should import none."""

DRIVER = """
import contextlib, io, json, os, sys
from dfssm.cli.main import dfcompile
from dfssm.cli.main import main as dfssm

heavy, commands = json.load(sys.stdin)
done = []
for name, *arguments in commands:
    out, err, status = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO()), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            {"dfssm": dfssm, "dfcompile": dfcompile}[name](arguments)
        except SystemExit as end:
            status = end.code or 0
    for stream in (out, err):
        stream.seek(0)
    files = sorted(os.path.join(folder, name) for folder, *names in os.walk(".") for part in names for name in part)
    done.append([status, out.read(), err.read(), [name for name in heavy if name in sys.modules], files])
print(json.dumps(done))
"""


@dataclass(frozen=True)
class Done:
    """How a command ended, which HEAVY modules its process had imported by then, and what its folder then held."""

    status: int
    out: str
    err: str
    heavy: list[str]
    files: list[str]


def run_commands(
    commands: Sequence[Sequence[str | Path]], folder: Path, python: str | Path = sys.executable, **environment: str
) -> list[Done]:
    """Run `commands`, each a name and its arguments, through their entry points, one after the other, in `folder`."""
    texts = [list(map(str, command)) for command in commands]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run(
        [python, "-c", DRIVER], input=json.dumps([HEAVY, texts]), env=variables, cwd=folder,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [Done(*result) for result in json.loads(done.stdout)]


def environment(folder: Path, *packages: str) -> Path:
    """Make a virtual environment of links in `folder`: dfssm without extras, `packages`, and what these need.

    Everything else is as good as not installed. Returns its python.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    (site,) = folder.glob("lib/python*/site-packages")
    installed = Path(sysconfig.get_path("purelib"))
    for found in _with_needs("dfssm", *packages):
        for name in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(installed / name)
    return folder / "bin" / "python"


def _with_needs(*packages: str) -> list[Distribution]:
    """The distributions of packages and of all that they need."""
    found: dict[str, Distribution] = {}
    wanted, seen = [Requirement(package) for package in packages], set()
    while wanted:
        requirement = wanted.pop()
        for extra in ("", *requirement.extras):
            key = canonicalize_name(requirement.name), extra
            if key in seen:
                continue
            seen.add(key)
            try:
                found[key[0]] = distribution(requirement.name)
            except PackageNotFoundError:  # of a marker that is not of here, or not needed
                continue
            needed = map(Requirement, found[key[0]].requires or ())
            wanted += [need for need in needed if need.marker is None or need.marker.evaluate({"extra": extra})]
    return list(found.values())
