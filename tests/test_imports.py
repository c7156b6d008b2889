"""Who may import whom, that the linters really see a breach, and what a command loads before it has work."""

import os
import pkgutil
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import dfssm

ROOT = Path(__file__).resolve().parents[1]
PARTS = sorted(path.name for path in (ROOT / "dfssm").iterdir() if path.is_symlink())

# import-linter in a process that knows only the tree it stands in: an editable install would answer first.
LINT = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__]
from importlinter.cli import lint_imports_command
lint_imports_command(["--no-cache"])
"""


def python(code: str, *args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(cwd), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def lint_tree(tmp_path_factory) -> Path:
    """A copy of the Python tree as an importable `dfssm`, with the project's lint configuration."""
    root = tmp_path_factory.mktemp("lint")
    shutil.copytree(ROOT / "dfssm", root / "dfssm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def test_the_tree_keeps_the_import_contracts(lint_tree):
    result = python(LINT, cwd=lint_tree)
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("opset/packing.py", "import dfssm.model", "Imports go down this list"),
        ("model/config.py", "from dfssm.targets import TARGETS", "know no target"),
        ("export/graph.py", "import dfssm.runtime", "Imports go down this list"),
        ("runtime/engine.py", "import dfssm.verify", "Imports go down this list"),
        ("verify/graph.py", "import dfssm.compiler", "Imports go down this list"),
        ("verify/graph.py", "import dfssm.bench", "Imports go down this list"),
        ("targets/session.py", "from dfssm.model import config", "does not know how it was made"),
        ("runtime/engine.py", "def late():\n    import torch", "does not know how it was made"),
        ("runtime/state.py", "import onnx", "where onnx is not installed"),
        ("runtime/state.py", "import dfssm.compiler", "Imports go down this list"),
        ("eval/text.py", "import dfssm.bench", "Imports go down this list"),
        ("opset/reference.py", "import onnxruntime", "NumPy and onnx only"),
    ],
)
def test_a_breach_is_found(lint_tree, module, line, contract):
    file = lint_tree / "dfssm" / module
    text = file.read_text()
    file.write_text(f"{text}\n\n{line}\n")
    try:
        result = python(LINT, cwd=lint_tree)
    finally:
        file.write_text(text)
    assert result.returncode == 1, result.stdout
    broken = [report for report in result.stdout.splitlines() if report.endswith("BROKEN")]
    assert any(contract in report for report in broken), result.stdout


@pytest.mark.parametrize("part", ["cli", "compiler"])
def test_a_slow_import_at_the_top_of_a_command_is_found(part):
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", f"{part}/new.py", "-"]
    top = subprocess.run(command, cwd=ROOT, input="import torch\n\nx = torch\n", capture_output=True, text=True)
    assert "TID253" in top.stdout
    late = "def f():\n    import torch\n\n    return torch\n"
    assert subprocess.run(command, cwd=ROOT, input=late, capture_output=True, text=True).returncode == 0


def test_every_module_imports():
    names = [
        info.name
        for part in PARTS
        for info in pkgutil.walk_packages(import_module(f"dfssm.{part}").__path__, f"dfssm.{part}.")
    ]
    assert len(names) > len(PARTS)
    for name in names:
        import_module(name)


def test_the_parts_are_relative_links_to_folders_beside_the_package():
    for part in PARTS:
        assert os.readlink(ROOT / "dfssm" / part) == f"../{part}" and (ROOT / part / "__init__.py").is_file()
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"dfssm"}
    assert packages == set(PARTS), "each folder of Python code is a part"


def test_the_package_offers_its_api_lazily():
    from dfssm.base.errors import DfssmError
    from dfssm.runtime import Engine

    assert dfssm.Engine is Engine and dfssm.DfssmError is DfssmError and dfssm.__version__ == version("dfssm")
    with pytest.raises(AttributeError, match="module 'dfssm' has no attribute 'engine'"):
        dfssm.engine  # noqa: B018


@pytest.mark.parametrize(
    "module",
    ["dfssm", "dfssm.cli.main", "dfssm.cli.compile", "dfssm.runtime", "dfssm.eval.perplexity", "dfssm.verify"],
)
def test_commands_start_light(module):
    code = f"import sys, {module}\nprint(*(m for m in ('torch', 'onnx', 'transformers') if m in sys.modules))"
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""


def test_a_bundle_runs_without_what_made_it(tiny_bundle):
    """Only the core dependencies: torch, onnx and the rest of the extra `compile` cannot be imported."""
    result = python(
        """
import sys
ABSENT = {"torch", "onnx", "onnx_ir", "polygraphy", "transformers"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from dfssm.runtime import Engine
engine = Engine.load(sys.argv[1], threads=1)
print(engine.prefill([1, 2, 3], engine.new_state(1)).shape)
""",
        str(tiny_bundle),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("(1, ")


def test_what_runs_a_bundle_leaves_out_what_takes_memory():
    """importlib.metadata takes 2.5 MB, tokenizers 3.3: for those who ask about packages, or have text."""
    heavy = ("importlib.metadata", "tokenizers")
    result = python(f"import sys, dfssm.runtime\nprint(*(m for m in {heavy} if m in sys.modules))")
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr
