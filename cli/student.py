"""`dfssm init` and `dfssm convert`: students without training."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import click
from click.core import ParameterSource

from dfssm.base import paths
from dfssm.base.errors import DfssmError
from dfssm.base.extras import require
from dfssm.base.files import temporary_folder
from dfssm.base.numbers import require_memory
from dfssm.base.reading import read_file, read_text
from dfssm.model import PACKAGES
from dfssm.model.text import packages, text_files
from dfssm.targets import chat
from dfssm.targets.bundle import TOKENIZER

from .options import (
    SEED,
    THREADS,
    Duration,
    json_option,
    megabytes,
    print_result,
    progress_bar,
    real,
    spread,
    table,
    whole,
)

REFINE_BATCH = 4  # windows a step: with few tokens, more steps are worth more than larger ones

output_option = click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(),
    metavar="FILE",
    help="The student to write: model.pt or .safetensors.",
)
planes_option = click.option(
    "--planes", type=whole(1, 8), default=1, metavar="N", help="Binary planes: about N bits per weight."
)
rank_option = click.option(
    "--rank", type=whole(0, 4096), default=16, metavar="R", help="Rank of the int8 low-rank correction; 0: none."
)


@click.command()
@click.option("--preset", metavar="NAME", help="A published shape, from mamba2-130m to mamba2-2.7b.")
@click.option("--config", type=click.Path(), metavar="FILE", help="A config as JSON (docs/format.md).")
@click.option("--seed", type=SEED, default=0, metavar="S", help="Random seed of the weights.")
@rank_option
@planes_option
@output_option
@json_option
def init(preset, config, seed, rank, planes, output, as_json) -> None:
    """Write a student with random weights, for benchmarks and tests."""
    if (preset is None) == (config is None):
        raise click.UsageError("Give either --preset or --config.")
    if config is not None:
        config = paths.file(config, "a config as JSON, as in docs/format.md", paths.CONFIG)
    output = paths.output_file(output, config)
    require(PACKAGES)
    from dfssm.model.checkpoint import save_student
    from dfssm.model.config import DFSSMConfig
    from dfssm.model.config import preset as named
    from dfssm.model.convert import init_student

    teacher = _read_config(config) if config else named(preset)
    _require_memory(DFSSMConfig.from_teacher(teacher, rank, planes))
    student = init_student(teacher, seed, rank, planes)
    save_student(output, *student)
    print_result(_report(output, *student), as_json, _text)


@click.command()
@click.argument("teacher", type=click.Path())
@click.option("--data", multiple=True, type=click.Path(), metavar="PATH", help="Text to calibrate on: text, JSON lines "
              "or parquet files, or a folder of them. Repeatable.")  # fmt: skip
@click.option("--tokens", type=whole(2), default=2**17, metavar="N", help="Tokens of --data, spread evenly over it.")
@click.option("--window", type=whole(2, 2**20), default=512, metavar="N", help="Tokens read from an empty state.")
@click.option("--refine", type=Duration(), metavar="TIME", help="Then train for so long: 300s, 5m or 1.5h.")
@rank_option
@planes_option
@click.option("--budget", type=real(0.001, 1_000_000), metavar="MB", help="Choose rank and planes of each "
              "projection, for at most so many megabytes of weights.")  # fmt: skip
@click.option(
    "--tokenizer", type=click.Path(), metavar="FILE", help="Use this tokenizer.json instead of the teacher's."
)
@click.option("--threads", type=THREADS, metavar="N", help="CPU threads.  [default: by PyTorch]")
@output_option
@json_option
def convert(teacher, data, tokens, window, refine, rank, planes, budget, tokenizer, threads, output, as_json) -> None:
    """Make a student of TEACHER without training, or with a little.

    TEACHER is the folder of a Mamba-2 checkpoint (Hugging Face or mamba_ssm). A weight becomes its sign, times a
    per-row scale; a low-rank correction is fitted to the residual. With --data, each layer is fitted to what the
    teacher computes on a little text, which takes minutes and is much better. --refine goes on from there as dfssm
    distill does, on all of the text. --budget measures what each projection costs in quality and gives bytes to those
    that need them most. The tokenizer.json, if there is one, is copied to the folder of FILE, where
    dfcompile finds it, with its chat template; existing files are kept.
    """
    given = click.get_current_context().get_parameter_source
    for name in ("rank", "planes"):
        if budget is not None and given(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--budget chooses the {name} of each projection: leave out --{name}.")
    for name in ("tokens", "window", "refine", "budget"):
        if not data and given(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} is for a calibration: give --data too.")
    teacher = paths.teacher(teacher)
    source = (
        paths.file(tokenizer, "the teacher's own with --tokenizer", TOKENIZER) if tokenizer else teacher / TOKENIZER
    )
    texts = text_files(data)
    output = paths.output_file(output, teacher, source, *texts)
    require(PACKAGES, {"": packages(texts)})
    import torch

    from dfssm.base.files import write_file
    from dfssm.model.checkpoint import save_student
    from dfssm.model.convert import convert as convert_teacher
    from dfssm.model.hf_import import load_teacher

    if threads:
        torch.set_num_threads(threads)
    calibration = None
    if refine:
        student, calibration = _refined(teacher, data, source, tokens, window, rank, planes, budget, refine)
    elif data:
        student, calibration = _calibrated(teacher, data, source, tokens, window, rank, planes, budget)
    else:
        student = convert_teacher(load_teacher(teacher, widen=False), rank, planes)
    save_student(output, *student)
    if source.is_file() and output.is_file():  # nothing lies beside a device
        for file, name in ((source, TOKENIZER), *((file, file.name) for file in chat.beside(source))):
            if not (copy := output.with_name(name)).exists():
                write_file(copy, read_file(file))
    print_result(_report(output, *student) | {"calibration": calibration}, as_json, _text)


def _calibrated(teacher, data, tokenizer, tokens, window, rank, planes, budget) -> tuple:
    """Configuration and tensors of a student that is calibrated on text, and what the report has of that."""
    import torch

    from dfssm.distill.data import open_tokenizer, sample
    from dfssm.model.budget import choose
    from dfssm.model.calibrate import calibrate
    from dfssm.model.hf_import import load_teacher

    model = load_teacher(teacher, widen=False)
    config = model.config
    found, ends = open_tokenizer(tokenizer, config)
    model.config = dataclasses.replace(config, eos_token_id=ends)  # which the student takes over
    windows = torch.from_numpy(sample(data, found, ends[0], config.vocab_size, tokens, window))
    begin = time.perf_counter()
    sensitivity: dict[str, float] = {}
    if budget is not None:
        with progress_bar("budget") as progress:
            chosen, sensitivity = choose(model, windows, budget * 1e6, progress)
        rank, planes = chosen.rank, chosen.planes
    with progress_bar("calibrate") as progress:
        student, tensors, errors = calibrate(model, windows, rank, planes, progress)
    return (student, tensors), _calibration(begin, windows.numel(), window, errors, sensitivity)


def _calibration(begin: float, tokens: int, window: int, errors: dict, sensitivity: dict) -> dict:
    """What the report says of it."""
    seconds = round(time.perf_counter() - begin, 3)
    return {"tokens": tokens, "window": window, "seconds": seconds, "errors": errors, "sensitivity": sensitivity}


def _refined(teacher, data, tokenizer, tokens, window, rank, planes, budget, seconds) -> tuple:
    """As _calibrated, and then trained for so many seconds."""
    import torch

    from dfssm.distill.distributed import Ranks
    from dfssm.distill.recipe import RECIPES
    from dfssm.distill.run import Job, distill
    from dfssm.distill.trainer import Schedule
    from dfssm.model.checkpoint import load_student_tensors

    never = 2**31
    recipe = dataclasses.replace(
        RECIPES["binary"],
        rank=rank,
        planes=planes,
        init="calibrated",
        init_tokens=max(window, tokens),
        budget=budget or 0.0,
    )
    schedule = Schedule(
        never, REFINE_BATCH, REFINE_BATCH, window, save_every=never, evaluate_every=never, seconds=seconds
    )
    begin = time.perf_counter()
    with temporary_folder("--refine") as folder:
        job = Job(teacher, data, folder, recipe, schedule, held_out=0.0, tokenizer=tokenizer)
        result = distill(job, Ranks(0, 1, torch.device("cpu")))
        student = load_student_tensors(folder / result["model"])  # mapped: it outlives the folder
    return student, _calibration(begin, result["tokens"], window, {}, {})


def _read_config(path: Path):
    from dfssm.model.config import Mamba2Config

    try:
        values = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DfssmError(f"{path} cannot be read as JSON ({error}): give a config as in docs/format.md") from None
    return Mamba2Config.from_dict(values)


def _require_memory(config) -> None:
    """DfssmError where the weights of a student would not go into the memory of this machine."""
    from dfssm.model.ledger import model_bytes

    require_memory("the student", sum(model_bytes(config.to_dict()).values()), "make it smaller")


def _report(output: Path, config, tensors: dict) -> dict:
    return {
        "output": str(output),
        "bytes": output.stat().st_size,
        "config": config.to_dict(),
        "tensors": len(tensors),
    }


def _text(result: dict) -> str:
    from dfssm.model.config import PROJECTIONS, DFSSMConfig

    config, found = result["config"], result.get("calibration")
    text = (
        f"{result['output']}: {megabytes(result['bytes'])}, {config['n_layer']} layers, "
        f"d_model {config['d_model']}, rank {spread(config['rank'])}, planes {spread(config['planes'])}"
        + (f"; calibrated on {found['tokens']:,} tokens in {found['seconds']:.0f} s" if found else "")
    )
    if (student := DFSSMConfig.from_dict(config)).alike:
        return text
    cells = [f"{planes} plane{'s' * (planes > 1)}, rank {rank}" for rank, planes in student.scaffolds]
    layers = zip(*(cells[i :: len(PROJECTIONS)] for i in range(len(PROJECTIONS))), strict=True)
    rows = [["layer", *PROJECTIONS], *([str(i), *layer] for i, layer in enumerate(layers))]
    return f"{text}\n{table(rows)}"
