"""The knowledge study where knowledge is known by construction: a teacher of random facts, its students, their bundle.

python examples/06_study.py

A teacher learns 1,024 facts by heart (docs/results.md), students of 1 and 2 planes are distilled from it, and the 1-bit
one is compiled. Each is studied on the same prompts: FOLDER/reports/NAME/report.html. What FOLDER has is kept.
"""

from __future__ import annotations

from pathlib import Path

import click

from dfssm.analysis import PACKAGES as OF_ANALYSIS
from dfssm.base import paths
from dfssm.base.extras import lacking
from dfssm.base.files import write_file
from dfssm.base.markdown import table
from dfssm.cli.options import THREADS, json_option, print_result, progress_bars, whole
from dfssm.cli.process import run
from dfssm.distill import PACKAGES
from dfssm.export import PACKAGES as OF_EXPORT

if message := lacking(PACKAGES, OF_ANALYSIS, OF_EXPORT):  # torch, which is imported next
    raise SystemExit(f"{Path(__file__).name}: error: {message}")

import torch

from dfssm.analysis.facts import facts_prompts
from dfssm.analysis.prompts import to_csv
from dfssm.analysis.run import analyze
from dfssm.compiler.pipeline import Request, compile_model
from dfssm.eval.fair.facts import Plan, rows_of
from dfssm.eval.fair.facts_language import Facts
from dfssm.eval.fair.rows import run as run_rows
from dfssm.eval.fair.train import Student, Teacher

PLAN = Plan(
    side=16,
    share=0.9,
    teacher=Teacher(n_layer=4, tokens=1_500_000, lr=3e-3),
    students=(Student(share=0.25), Student(planes=2, share=0.25)),
)
SEED, NAME = 0, "study"


def models(folder: Path, say=lambda line: None) -> dict[str, Path]:
    """Train, distil and compile what is not there yet: name of a report -> the model."""
    rows = rows_of(folder, NAME, PLAN, SEED, PLAN.students)
    for name, figures in run_rows(rows, folder, say).items():
        say(f"{name}: {figures['known']:.1%} of the facts recalled")
    found = {"teacher": folder / NAME / "teacher" / "teacher"}
    found |= {f"student-{s.planes}-plane": folder / NAME / s.name / "student" / paths.STUDENT for s in PLAN.students}
    found["bundle"] = folder / "bundle"
    if not found["bundle"].exists():
        compile_model(Request(found["student-1-plane"], "ort-cpu", found["bundle"], taps=True))
    return found


def survival(results: dict[str, dict]) -> str:
    """What of the teacher's curves each model keeps, as a Markdown table: correlations, random weights in brackets."""
    beside = {name: result["correlations"] for name, result in results.items() if "correlations" in result}
    curves = next(iter(beside.values()))

    def cell(of: dict) -> str:
        ours, chance = ("constant" if value is None else f"{value:.2f}" for value in of.values())
        return f"{ours} ({chance})"

    lines = [[curve, *(cell(found[curve]) for found in beside.values())] for curve in curves]
    return table(["correlation with the teacher's curve", *beside], lines)


@click.command(help=__doc__.replace("\n\npython", "\n\n\b\npython"), context_settings={"show_default": True})
@click.option("--folder", type=click.Path(), default="build/study", metavar="DIR", help="Of models and reports.")
@click.option("--draws", type=whole(10, 10000), default=100, metavar="N", help="As of `dfssm analyze`.")
@click.option("--threads", type=THREADS, default=1, metavar="N", help="CPU threads.")
@json_option
def study(folder, draws, threads, as_json):
    folder = paths.output_folder(folder)
    torch.set_num_threads(threads)
    found = models(folder, lambda line: click.echo(line, err=True))
    prompts = folder / "prompts.csv"
    write_file(prompts, to_csv(facts_prompts(Facts(PLAN.side, PLAN.share, SEED))))
    (folder / "reports").mkdir(exist_ok=True)
    results = {}
    for name, model in found.items():
        against = None if name == "teacher" else found["teacher"]
        with progress_bars() as progress:
            results[name] = analyze(model, folder / "reports" / name, against, prompts, draws=draws, progress=progress)
    print_result(results, as_json, survival)


if __name__ == "__main__":
    run(study, Path(__file__).name)
