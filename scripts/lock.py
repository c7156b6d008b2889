"""Makes the lock anew: `make lock` (or python scripts/lock.py), with `uv` on PATH.

One resolution of everything that pyproject.toml names, for every Python of PYTHONS on Linux. From it comes a
requirements file with hashes for each of SETS, in requirements/: each a subset of dev.txt. No index is named in them:
pip asks those it is configured for. torch is not in them (requirements/torch.txt).
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements"
PYTHONS = ">=3.11,<3.15"

# File -> what of pyproject.toml it holds, and a line about it.
SETS = {
    "runtime": (["--no-default-groups"], "What it takes to run a bundle."),
    "compile": (["--extra=compile"], "Runtime, and what it takes to compile a model."),
    "distill": (["--extra=distill"], "Runtime, and what it takes to train a student."),
    "chat": (["--extra=chat"], "Runtime, and what renders chat templates."),
    "eval": (["--extra=eval"], "Runtime, and lm-evaluation-harness."),
    "trt": (["--extra=trt"], "Runtime, and TensorRT-RTX."),
    "analysis": (["--extra=analysis"], "Runtime, and what `dfssm analyze` draws with."),
    "serve": (["--extra=serve"], "Runtime, and an HTTP server."),
    "ray": (["--extra=ray"], "That, and Ray Serve."),
    "build": (["--only-group=build"], "What builds the native part."),
    "dev": (["--extra=dev", "--group=build"], "All of the above but Ray Serve, and what tests and lint take."),
}

EXPORT = ["--frozen", "--no-emit-project", "--no-emit-package=torch", "--no-header", "--no-annotate"]

HEADER = """\
# {about} Made by `make lock`; do not edit.
# Install with pip --no-deps: complete. Tested with Python 3.11; resolved for 3.12, 3.13 and 3.14 too, not run there.
"""

# uv must not take the dependencies of the CUDA build into the lock, which the package index alone knows. Those of
# torch's CPU build are the ones that all builds have; what a CUDA build needs besides comes with it.
TORCH_DEPENDENCIES = [
    "filelock",
    "fsspec>=0.8.5",
    "jinja2",
    "networkx>=2.5.1",
    "setuptools>=77.0.3",
    "sympy>=1.13.3",
    "typing-extensions>=4.10.0",
]


def torch_version() -> str:
    """The version that requirements/torch.txt pins."""
    return re.search(r"^torch==(\S+)$", (REQUIREMENTS / "torch.txt").read_text(), re.MULTILINE)[1]


def project() -> str:
    """pyproject.toml with what uv is to know besides."""
    text = (ROOT / "pyproject.toml").read_text()
    text, count = re.subn(r'requires-python = "[^"]+"', f'requires-python = "{PYTHONS}"', text)
    if count != 1:
        raise SystemExit("lock: pyproject.toml has no line requires-python")
    return f"""{text}
[tool.uv]
# Newer ones hold others back: ml-dtypes, and what lm-eval draws its tables with.
constraint-dependencies = ["torch=={torch_version()}", "tritonclient<2.70", "python-dateutil<3"]
environments = ["sys_platform == 'linux'"]

[[tool.uv.dependency-metadata]]
name = "torch"
version = "{torch_version()}"
requires-dist = {TORCH_DEPENDENCIES}
"""


def main() -> None:
    """Resolve, then write every file of requirements/ but torch.txt."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{ROOT / '.venv/bin'}") or shutil.which("uv")
    if not uv:
        raise SystemExit("lock: uv is not installed: pip install uv")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pyproject.toml").write_text(project())

        def run(*arguments: str) -> str:
            command = [uv, "--project", folder, "--quiet", *arguments]
            return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

        run("lock")
        for name, (chosen, about) in SETS.items():
            lines = run("export", *EXPORT, *chosen)
            # The marker that all have says nothing: this is Linux.
            lines = lines.replace(" and sys_platform == 'linux'", "").replace(" ; sys_platform == 'linux'", "")
            (REQUIREMENTS / f"{name}.txt").write_text(HEADER.format(about=about) + lines)
            print(f"requirements/{name}.txt: {len(re.findall(r'^[a-z]', lines, re.MULTILINE))} packages")


if __name__ == "__main__":
    main()
