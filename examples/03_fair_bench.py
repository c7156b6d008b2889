"""The fair bench: what one bit costs where the teacher cannot overfit, with the tables of docs/results.md.

python examples/03_fair_bench.py --only facts

Each row is kept in FOLDER as JSON once it is measured: a run that was ended goes on where it was, within a row from its
last checkpoint. docs/results.md says what the rows are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from dfssm.base import paths
from dfssm.base.extras import lacking
from dfssm.base.files import write_file
from dfssm.base.markdown import filled
from dfssm.cli.options import THREADS, json_option, print_result, whole
from dfssm.cli.process import run
from dfssm.distill import PACKAGES

if message := lacking(PACKAGES):  # torch, which is imported next
    raise SystemExit(f"{Path(__file__).name}: error: {message}")

import torch

from dfssm.eval.fair import facts, recall, rows, text

SECTIONS: dict[str, tuple[Callable, Callable]] = {
    "facts": (facts.facts_rows, facts.facts_table),
    "capacity": (facts.capacity_rows, facts.capacity_table),
    "recall": (recall.recall_rows, recall.recall_table),
    "text": (text.text_rows, text.text_table),
}
"""Name -> its rows, of a folder and seeds; the table of what was found."""


@click.command(help=__doc__.replace("\n\npython", "\n\n\b\npython"), context_settings={"show_default": True})
@click.option("--folder", type=click.Path(), default="build/fair", metavar="DIR", help="Of rows and their models.")
@click.option("--only", multiple=True, type=click.Choice(list(SECTIONS)), help="Only this section. Repeatable.")
@click.option("--seed", "seeds", multiple=True, type=whole(0, 2**31), default=(0, 1, 2), help="Repeatable.")
@click.option("--text", "files", multiple=True, type=click.Path(), metavar="PATH", help="Of the section text: "
              "text, JSON lines or parquet files, or folders of them, 30 MB or more. Repeatable.")  # fmt: skip
@click.option("--measured", is_flag=True, help="Run nothing: only what the folder has.")
@click.option("--docs", type=click.Path(), metavar="FILE", help="Fill the tables of this page; that "
              "of text is not run without --text.")  # fmt: skip
@click.option("--threads", type=THREADS, default=1, metavar="N", help="CPU threads.")
@json_option
def fair_bench(folder, only, seeds, files, measured, docs, threads, as_json):
    folder = paths.output_folder(folder)
    page = docs and paths.file(docs, "the page to fill, docs/results.md")
    if "text" in only and not files:
        raise click.UsageError("The section text needs --text.")
    torch.set_num_threads(threads)
    found: rows.Found = {}
    for name, (make, _) in SECTIONS.items():
        planned = make(folder, seeds, files) if name == "text" else make(folder, seeds)
        if measured or (only and name not in only):
            found |= rows.read(planned, folder)
        else:
            found |= rows.run(planned, folder, lambda line: click.echo(line, err=True))
    made = {name: table(found) for name, (_, table) in SECTIONS.items()}
    if page:
        write_file(page, filled(page.read_text(), made))
    print_result({"rows": found}, as_json, lambda _: "\n\n".join(made.values()))


if __name__ == "__main__":
    run(fair_bench, Path(__file__).name)
