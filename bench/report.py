"""The figures, tables and plots of docs/performance.md: `python -m dfssm.bench.report`, after `make bench-peers`.

Makes the bundles of BUNDLES, runs `dfssm bench` for every point of POINTS that FOLDER/figures.json lacks, and prints
the tables. So a run that was ended goes on where it was. With --docs they go into docs/performance.md, with the plots.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from dfssm.opset.files import write_file
from dfssm.opset.markdown import filled

from .report_text import plots, tables

SIZES = ("130m", "370m", "780m", "1.3b", "2.7b")
STATES = {"fp32": "fp32", "fp16": "1.3b", "int8": "int8"}
STATES |= {deferred: deferred for deferred in ("fp16-deferred", "int8-deferred")}
"""Form of the state -> the bundle with it."""

BUNDLES: dict[str, tuple[str, list[str]]] = {size: (size, []) for size in SIZES}
BUNDLES |= {of: ("1.3b", ["--state-dtype", state]) for state, of in STATES.items() if of not in SIZES}
BUNDLES |= {"avx2": ("1.3b", ["--isa", "avx2"])}
"""Name -> size of the model, options of dfcompile."""

QUICK = ["--rounds", "5", "--tokens", "24", "--prompt", "64"]
PEERS = ["--rounds", "3", "--tokens", "24", "--prompt", "512", "--peer", "llama.cpp", "--peer", "stock-ort"]
FULL = ["--rounds", "5", "--prompt", "512", "--batch", "8", "--ops"]

POINTS: dict[str, tuple[str, list[str]]] = {
    "peers": ("1.3b", PEERS),
    **{f"{name}, {n} threads": (name, [*FULL, "--threads", str(n)]) for name in ("1.3b", "avx2") for n in (2, 1)},
    **{f"size {size}": (size, QUICK) for size in SIZES},
    **{f"state {state}": (of, QUICK) for state, of in STATES.items()},
    "batches": ("1.3b", [*QUICK, *(word for batch in (1, 2, 4, 8) for word in ("--batch", str(batch)))]),
    **{f"prompt {n}": ("1.3b", ["--rounds", "5", "--tokens", "4", "--prompt", str(n)]) for n in (8, 32, 128, 512)},
    **{f"busy {threads}": ("1.3b", [*QUICK, "--busy", "2", "--threads", str(threads)]) for threads in (1, 2)},
}
"""Name -> bundle, options of `dfssm bench`."""


def bundle(name: str, folder: Path) -> Path:
    """The bundle of this name in `folder`, made where it is not there."""
    size, options = BUNDLES[name]
    model, made = folder / f"{size}.pt", folder / name.replace(" ", "-")
    if not model.exists():
        _command("dfssm", "init", "--preset", f"mamba2-{size}", "--seed", "0", "-o", str(model))
    if not made.exists():
        _command("dfcompile", str(model), "--target", "ort-cpu", "-o", str(made), *options)
    return made


def measure(name: str, folder: Path) -> dict[str, Any]:
    """What `dfssm bench --json` prints for a point; that of an ISA runs its kernels."""
    of, options = POINTS[name]
    isa = {"DFSSM_ISA": "avx2"} if of.startswith("avx2") else {}
    return json.loads(_command("dfssm", "bench", str(bundle(of, folder)), *options, "--json", **isa))


def _command(name: str, *arguments: str, **environment: str) -> str:
    command = [str(Path(sys.executable).with_name(name)), *arguments]
    click.echo(" ".join([name, *arguments]), err=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    if done.returncode:
        sys.exit(done.returncode)  # it said why
    return done.stdout


@click.command(help=__doc__)
@click.option(
    "--folder", type=click.Path(path_type=Path), default="build/bench", help="Of models, bundles and figures."
)
@click.option("--only", multiple=True, metavar="WORD", help="Only the points whose name has it; repeatable.")
@click.option("--again", is_flag=True, help="Measure what figures.json has, too.")
@click.option("--make", is_flag=True, help="Only make their bundles.")
@click.option("--docs", type=click.Path(path_type=Path), help="The folder of performance.md, to be filled.")
def main(folder: Path, only: tuple[str, ...], again: bool, make: bool, docs: Path | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "figures.json"
    figures = json.loads(file.read_text()) if file.exists() else {}
    for name in POINTS:
        if (only and not any(word in name for word in only)) or (name in figures and not again):
            continue
        if make:
            bundle(POINTS[name][0], folder)
        else:
            figures[name] = measure(name, folder)
            write_file(file, json.dumps(figures, indent=1) + "\n")
    written = tables(figures)
    if docs:
        plots(figures, docs / "performance.svg")
        page = docs / "performance.md"
        write_file(page, filled(page.read_text(), written))
    else:
        click.echo("\n\n".join(written.values()))


if __name__ == "__main__":
    main()
