"""`dfssm analyze`: the knowledge study."""

from __future__ import annotations

from pathlib import Path

import click

from dfssm.analysis import PACKAGES
from dfssm.base import paths
from dfssm.base.extras import require
from dfssm.model import PACKAGES as OF_MODEL

from .options import json_option, print_result, progress_bars, table, trust_option, whole


@click.command()
@click.argument("model", metavar="TEACHER|MODEL|BUNDLE", type=click.Path())
@click.option("--against", type=click.Path(), metavar="TEACHER", help="Also study this teacher, and compare with it.")
@click.option("--prompts", type=click.Path(), metavar="FILE", help="CSV with the columns prompt, answer, category, "
              "template; without it 445 prompts of ours in 19 categories.")  # fmt: skip
@click.option("-o", "--output", required=True, type=click.Path(), metavar="DIR", help="Folder for the report.")
@click.option("--draws", type=whole(10, 10000), default=100, metavar="N", help="Shuffles of the labels, and draws of "
              "the prompts for intervals.")  # fmt: skip
@click.option("--tokenizer", type=click.Path(), metavar="FILE", help="Use this tokenizer.json instead of the model's.")
@trust_option
@json_option
def analyze(model, against, prompts, output, draws, tokenizer, as_json) -> None:
    """Study what a model keeps where in its layers (docs/study.md).

    Of a teacher, a student, or a bundle that was compiled with --taps: how categories of prompts separate layer by
    layer, where the answers come from, and which layers hold them. Each figure stands beside its null. Hidden states
    are kept in DIR/states and used again.
    """
    for path in filter(None, (model, against)):
        paths.find(path, "teacher", "student", "bundle")
    require(PACKAGES, OF_MODEL)
    from dfssm.analysis.run import analyze as run

    with progress_bars() as progress:
        result = run(model, output, against, prompts, tokenizer, draws, progress)
    print_result(result, as_json, lambda found: _text(found, Path(output)))


def _text(result: dict, output: Path) -> str:
    rows = [[f"{name}", f"{seconds:.1f} s"] for name, seconds in result["seconds"].items()]
    lines = [table(rows, right={1}), ""]
    for study in result["studies"].values():
        lines += [f"{study['title']}: {study['says']}", f"  null: {study['null']}"]
    answers = result["answers"]
    lines += [
        "",
        f"{result['count']} prompts; {answers['one_token']} answers are one token",
        f"{output / 'report.html'}",
    ]
    return "\n".join(lines)
