"""The lock in requirements/: one resolution, with hashes, of all that pyproject.toml names."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETS = sorted(path.stem for path in REQUIREMENTS.glob("*.txt") if path.stem != "torch")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


def locked(name: str) -> dict[str, str]:
    """Requirement line ("numpy==2.4.6 ; python_full_version < '3.12'") -> its hashes, of a file in requirements/."""
    text = (REQUIREMENTS / f"{name}.txt").read_text()
    body = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    return dict(re.findall(r"^([a-z].*?) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", body, re.MULTILINE))


def versions(name: str, python: str) -> dict[str, str]:
    """Package -> locked version, for that Python ("3.11", "3.11.2") on an x86-64."""
    short, full = re.match(r"\d+\.\d+", python)[0], python if python.count(".") == 2 else f"{python}.1"
    environment = default_environment() | {"python_version": short, "python_full_version": full}
    found = {}
    for line in locked(name):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.name not in found, f"{requirement.name} twice for Python {python}"
            found[requirement.name] = str(requirement.specifier).removeprefix("==")
    return found


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_pinned_hashed_and_names_no_index(name):
    text = (REQUIREMENTS / f"{name}.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert "://" not in text and not [line for line in lines if line.startswith("-")]
    assert len(lines) == sum(1 + hashes.count("\n") for hashes in locked(name).values()), "a line of another kind"
    assert all("==" in line for line in locked(name))


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_a_subset_of_the_one_resolution(name):
    everything = locked("dev")
    names = {Requirement(line).name for line in everything}
    found = {line: hashes for line, hashes in locked(name).items() if name != "ray" or Requirement(line).name in names}
    assert found.items() <= everything.items()


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", [name for name in SETS if name != "build"])
def test_what_pyproject_names_is_in_its_set(name, python):
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = list(PROJECT["project"]["dependencies"])
    for extra in extras.keys() - {"ray"} if name == "dev" else [name]:
        wanted += [line for line in extras.get(extra, []) if not line.startswith("dfssm[")]
    found = versions(name, python)
    torch = (REQUIREMENTS / "torch.txt").read_text().split("torch==")[1].strip()
    for line in wanted:
        requirement = Requirement(line)
        pinned = torch if requirement.name == "torch" else found[requirement.name]
        assert requirement.specifier.contains(pinned, prereleases=True), f"{line}: locked is {pinned}"


def test_the_build_tools_are_those_of_pyproject():
    tools = {Requirement(line).name for line in PROJECT["dependency-groups"]["build"]}
    assert tools <= versions("build", "3.11").keys()
    assert {Requirement(line).name for line in PROJECT["build-system"]["requires"]} <= tools


def test_this_environment_is_the_lock():
    """What `make test` runs in: every locked package in its locked version."""
    found = versions("dev", default_environment()["python_full_version"])
    assert {name: version(name) for name in found} == found
