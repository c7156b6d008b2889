"""The figures, tables and plots of docs/performance.md: `python -m dfssm.bench.report`, after `make bench-peers`.

Makes the bundles of BUNDLES, runs `dfssm bench` for every one of `points` that FOLDER/figures.json lacks, and prints
the tables. So a run that was ended goes on where it was. With --docs they go into docs/performance.md, with the plots:
into the places of this machine's instruction set, those of other machines stay.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from dfssm.base.files import write_file
from dfssm.base.markdown import filled
from dfssm.runtime.machine import instruction_sets

from .plot import plots
from .report_text import STATES, isa_of, tables

SIZES = ("130m", "370m", "780m", "1.3b", "2.7b")
OTHER_STATES = tuple(state for state in STATES if state != "fp16")
"""Forms of the state with a bundle of their own, of the same name; fp16 is the default."""

BUNDLES: dict[str, tuple[str, list[str]]] = {size: (size, []) for size in SIZES}
BUNDLES |= {state: ("1.3b", ["--state-dtype", state]) for state in OTHER_STATES}
BUNDLES |= {"avx2": ("1.3b", ["--isa", "avx2"])}
"""Name -> size of the model, options of dfcompile."""

QUICK = ["--rounds", "3", "--tokens", "24", "--prompt", "64"]
PEERS = ["--rounds", "3", "--tokens", "24", "--prompt", "512", "--peer", "llama.cpp", "--peer", "stock-ort"]
FULL = ["--rounds", "5", "--prompt", "512", "--ops"]

Points = dict[str, tuple[str, list[str]]]
"""Name -> bundle, options of `dfssm bench`."""


def points(isas: list[str]) -> Points:
    """Those of a CPU with these instruction sets: AVX2 has points of its own where it is not the best. Of the size, the
    state and the prompt of "1.3b, 2 threads" there is none.
    """
    kernels = ("1.3b", "avx2") if "avx2" in isas[:-1] else ("1.3b",)
    threads = {1: ["--threads", "1"], 2: ["--threads", "2"]}
    batches = ["--batch", "2", "--batch", "4", "--batch", "8"]
    return {
        "peers": ("1.3b", PEERS),
        **{f"{name}, 2 threads": (name, [*FULL, *batches, *threads[2]]) for name in kernels},
        **{f"{name}, 1 threads": (name, [*FULL, "--batch", "8", *threads[1]]) for name in kernels},
        **{f"state {state}, 2 threads": (state, [*QUICK, "--batch", "8", *threads[2]]) for state in OTHER_STATES},
        **{f"state {state}, 1 threads": (state, [*QUICK, *threads[1]]) for state in OTHER_STATES},
        **{f"busy {n}": ("1.3b", [*QUICK, "--busy", "2", *given]) for n, given in threads.items()},
        **{f"prompt {n}": ("1.3b", ["--rounds", "3", "--tokens", "4", "--prompt", str(n)]) for n in (8, 32, 128)},
        **{f"size {size}": (size, QUICK) for size in SIZES if size != "1.3b"},
    }


def bundle(name: str, folder: Path) -> Path:
    """The bundle of this name in `folder`, made where it is not there."""
    size, options = BUNDLES[name]
    model, made = folder / f"{size}.pt", folder / name.replace(" ", "-")
    if not model.exists():
        _command("dfssm", "init", "--preset", f"mamba2-{size}", "--seed", "0", "-o", str(model))
    if not made.exists():
        # Not verified here: `dfssm bench` checks what a bundle computes in the run that it times.
        _command("dfcompile", str(model), "--target", "ort-cpu", "--no-verify", "-o", str(made), *options)
    return made


def measure(of: str, options: list[str], folder: Path) -> dict[str, Any]:
    """What `dfssm bench --json` prints for a point; that of an ISA runs its kernels."""
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
    for name, (of, options) in points(instruction_sets()).items():
        if (only and not any(word in name for word in only)) or (name in figures and not again):
            continue
        if make:
            bundle(of, folder)
        else:
            figures[name] = measure(of, options, folder)
            write_file(file, json.dumps(figures, indent=1) + "\n")
    written = tables(figures)
    if docs:
        isa, page = isa_of(figures), docs / "performance.md"
        text = filled(page.read_text(), written, of=isa)
        plots(figures, docs / f"performance-{isa}.svg")
        write_file(page, text)
    else:
        click.echo("\n\n".join(written.values()))


if __name__ == "__main__":
    main()
