"""`dfssm distill`: train a 1-bit student from a teacher."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import click

from dfssm.base import paths
from dfssm.base.errors import DfssmError
from dfssm.base.extras import Needs, require
from dfssm.distill import PACKAGES, PREFIX
from dfssm.model.text import packages, text_files
from dfssm.targets.bundle import TOKENIZER

from .options import SEED, THREADS, json_option, print_result, real, table, whole


def recipe_options(command):
    """An option for each ingredient of a recipe: its default is that of the recipe named with --recipe."""
    from dfssm.distill.recipe import RECIPES, Recipe

    for field in reversed(dataclasses.fields(Recipe)):
        name, known = field.name.replace("_", "-"), field.metadata
        usual, *others = ((recipe, getattr(values, field.name)) for recipe, values in RECIPES.items())
        shown = [_shown(usual[1])] + [f"{recipe}: {_shown(value)}" for recipe, value in others if value != usual[1]]
        text = f"{known['help']}  [default: {'; '.join(shown)}]"
        if field.type == "bool":
            command = click.option(f"--{name}/--no-{name}", default=None, help=text)(command)
        elif "choices" in known:
            command = click.option(f"--{name}", type=click.Choice(known["choices"]), help=text)(command)
        else:
            kind = whole if field.type == "int" else real
            command = click.option(f"--{name}", type=kind(*known["range"]), metavar="X", help=text)(command)
    return command


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _count(
    name: str, default: int | None, help: str, metavar: str = "N", least: int = 1, most: int = 2**31
) -> Callable:
    """An option that takes a whole number."""
    return click.option(name, type=whole(least, most), default=default, metavar=metavar, help=help)


@click.command()
@click.argument("teacher", type=click.Path())
@click.option("--data", required=True, multiple=True, metavar="PATH", help="Training text: text, JSON lines or parquet "
              "files, a folder of them, or hf:NAME[:CONFIG][@SPLIT]. Repeatable.")  # fmt: skip
@click.option("-o", "--output", required=True, type=click.Path(), metavar="DIR", help="Folder to write to.")
@click.option("--recipe", "recipe_name", type=click.Choice(["binary", "paper"]), default="binary",
              help="Sets the defaults of --rank to --state-dtype; paper: as published.")  # fmt: skip
@_count("--total-tokens", 32_000_000, "Tokens to train on.", most=10**15)
@recipe_options
@_count("--tokens", 512, "Tokens in a window.", least=2, most=2**20)
@_count("--batch", 8, "Windows per step, on all devices together.", most=2**20)
@_count("--micro-batch", None, "Windows per pass on a device.  [default: all of its share]", most=2**20)
@click.option("--seed", type=SEED, default=0, metavar="S", help="Random seed.")
@click.option("--held-out", type=real(0, 0.5), default=0.02, metavar="SHARE",
              help="Share of each file, from its end, that is held out.")  # fmt: skip
@_count("--held-out-documents", 1000, "Documents that are held out of a stream (hf:), its first ones.", least=0)
@_count("--held-out-tokens", 2**17, "Evaluate on at most N of the held-out tokens, spread over all.")
@click.option("--init-from", type=click.Path(), metavar="MODEL",
              help="Start at this model.pt, with its rank and planes: of a conversion or another run.")  # fmt: skip
@click.option(
    "--tokenizer", type=click.Path(), metavar="FILE", help="Use this tokenizer.json instead of the teacher's."
)
@click.option("--device", metavar="NAME", help="PyTorch device: cpu or cuda.  [default: cuda where there is a GPU]")
@click.option("--threads", type=THREADS, metavar="N", help="CPU threads.  [default: by PyTorch]")
@_count("--top-k", 0, "Run the teacher once, in advance, and store its K most likely tokens; 0: run it in training.",
        metavar="K", least=0)  # fmt: skip
@click.option("--recompute", is_flag=True, help="Activation checkpointing: less memory, a third more time.")
@click.option("--compile", "compiled", is_flag=True, help="Compile the layers with torch.compile.")
@_count("--log-every", 10, "Steps from one line of log.jsonl to the next.", "STEPS")
@_count("--save-every", 200, "Steps from one checkpoint to the next.", "STEPS")
@_count("--keep", 2, "Checkpoints to keep.")
@_count("--evaluate-every", 200, "Steps from one held-out perplexity to the next.", "STEPS")
@click.option("--best", is_flag=True, help="Of the steps that were evaluated, take the student of least held-out KL "
              "divergence, not the last one.")  # fmt: skip
@click.option("--sample", "samples", multiple=True, metavar="TEXT", help="At each evaluation let the student continue "
              "TEXT; log.jsonl and the report have what it wrote. Repeatable.")  # fmt: skip
@click.option("--tensorboard", is_flag=True, help="Also log to DIR/tensorboard.")
@click.option("--wandb", metavar="PROJECT", help="Also log to this project of Weights & Biases.")
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint in DIR; with --curve wsd also to more "
              "--total-tokens.")  # fmt: skip
@click.option("--plan", "only_plan", is_flag=True, help="Only print an estimate of memory and time.")
@_count("--devices", 1, "Number of devices, for --plan.", most=2**20)
@_count("--range-test", 0, "Only try learning rates: N steps at rates from 1e-5 to 1; writes the loss at each to "
        "DIR/rates.html and rates.json, and suggests --lr.", least=0)  # fmt: skip
@json_option
def distill(teacher, data, output, recipe_name, as_json, only_plan, range_test, **options) -> None:
    """Train a 1-bit student of TEACHER by distillation.

    TEACHER is the folder of a Mamba-2 checkpoint, the student is DIR/model.pt. Runs on one device, or under torchrun
    on many.
    """
    from dfssm.distill.recipe import RECIPES, Recipe

    teacher = paths.teacher(teacher)
    output = paths.output_folder(output, teacher)
    given = {name: options.pop(name) for name in _names(Recipe)}
    recipe = dataclasses.replace(RECIPES[recipe_name], **{k: v for k, v in given.items() if v is not None})
    if only_plan:
        print_result(_plan(teacher, recipe, options), as_json, lambda found: "\n".join(found["lines"]))
        return
    if (tokenizer := options["tokenizer"]) is None:
        tokenizer = teacher / TOKENIZER
    if options["init_from"] is not None:
        options["init_from"] = paths.student(options["init_from"])
    options["tokenizer"] = paths.file(tokenizer, "the teacher's own with --tokenizer", TOKENIZER)
    require(*_needs(data, options["tensorboard"], options["wandb"]))
    import torch

    if options["threads"]:
        torch.set_num_threads(options["threads"])

    from dfssm.distill.distributed import ranks
    from dfssm.distill.run import Job
    from dfssm.distill.run import distill as run
    from dfssm.distill.trainer import Schedule

    with ranks(options["device"]) as those:
        step = options["batch"] * options["tokens"]
        if options["batch"] % those.world:
            raise DfssmError(f"batch is {options['batch']} windows; give a multiple of the {those.world} ranks")
        schedule = Schedule(
            steps=-(-options["total_tokens"] // step),
            micro_batch=options["micro_batch"] or options["batch"] // those.world,
            **{name: options[name] for name in options.keys() & _names(Schedule) - {"micro_batch"}},
        )
        shared = options.keys() & _names(Job)
        job = Job(teacher, data, output, recipe, schedule, **{name: options[name] for name in shared})
        if range_test:
            from dfssm.distill import rates

            print_result(rates.range_test(job, those, range_test), as_json, lambda found: _rates(found, output))
            return
        result = run(job, those, options["resume"], lambda line: click.echo(line, err=True))
        if those.first:
            print_result(result | {"output": str(output)}, as_json, _text)


def _needs(data: tuple[str, ...], tensorboard: bool, wandb: str | None) -> list[Needs]:
    """The packages that a run takes."""
    files = text_files([name for name in data if not name.startswith(PREFIX)])
    of_data = packages(files) + ["datasets"] * any(name.startswith(PREFIX) for name in data)
    return [PACKAGES, {"distill": of_data, "": ["tensorboard"] * tensorboard + ["wandb"] * (wandb is not None)}]


def _names(kind: type) -> set[str]:
    """Of the fields of a dataclass."""
    return {field.name for field in dataclasses.fields(kind)}


def _plan(teacher: Path, recipe, options: dict) -> dict:
    from dfssm.distill.plan import Options, plan
    from dfssm.model.hf_config import read_config

    world = int(os.environ.get("WORLD_SIZE", options["devices"]))
    found = plan(
        read_config(teacher / "config.json")[0],
        Options(
            rank=recipe.rank,
            planes=recipe.planes,
            windows=options["micro_batch"] or max(1, options["batch"] // world),
            tokens=options["tokens"],
            batch=options["batch"],
            total=options["total_tokens"],
            checkpointing=options["recompute"],
            hidden=recipe.hidden > 0,
            teacher=not options["top_k"],
            soft=recipe.anneal != "none" or recipe.hard == "levels",
            world=world,
        ),
    )
    return {"memory": found.memory, "total": found.total, "lines": found.lines()}


def _rates(found: dict, output: Path) -> str:
    return (
        f"{output}: least loss at a rate of {found['least']:.2g}, after {len(found['rates'])} steps; "
        f"suggested: --lr {found['suggested']:g}"
    )


def _text(result: dict) -> str:
    found = result["perplexity"]
    if not found:
        return f"{result['output']}: {result['tokens']:,} tokens in {result['seconds']:.0f} s, no held-out text"
    rows = [["", "perplexity", "/ teacher's", "KL from teacher" if result["kl"] else ""]]
    for name, value in found.items():
        kl = f"{result['kl'][name]:.4f}" if name in result["kl"] else ""
        rows.append([name, f"{value:.3f}", f"{value / found['teacher']:.3f}", kl])
    head = f"{result['output']}: {result['tokens']:,} tokens in {result['seconds']:.0f} s\n"
    return head + table(rows, right={1, 2, 3})
