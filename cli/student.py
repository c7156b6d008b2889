"""`dfssm init` and `dfssm convert`: students without training."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dfssm.model import PACKAGES
from dfssm.opset import paths
from dfssm.opset.errors import DfssmError
from dfssm.opset.extras import require
from dfssm.opset.numbers import require_memory
from dfssm.opset.reading import read_file, read_text
from dfssm.targets import chat
from dfssm.targets.bundle import TOKENIZER

from .options import SEED, json_option, megabytes, print_result, whole

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
@rank_option
@planes_option
@output_option
@json_option
def convert(teacher, rank, planes, output, as_json) -> None:
    """Make a 1-bit student of TEACHER without training.

    A weight becomes its sign, times a per-row scale; a low-rank correction is fitted to the residual. TEACHER is the
    folder of a Mamba-2 checkpoint (Hugging Face or mamba_ssm). Its tokenizer.json, if it has one, is copied to the
    folder of FILE, where dfcompile finds it, with its chat template; existing files are kept.
    """
    teacher = paths.teacher(teacher)
    output = paths.output_file(output, teacher)
    require(PACKAGES)
    from dfssm.model.checkpoint import save_student
    from dfssm.model.convert import convert as convert_teacher
    from dfssm.model.hf_import import load_teacher
    from dfssm.opset.files import write_file

    student = convert_teacher(load_teacher(teacher), rank, planes)
    save_student(output, *student)
    tokenizer = teacher / TOKENIZER
    if tokenizer.is_file() and output.is_file():  # nothing lies beside a device
        for source in (tokenizer, *chat.beside(tokenizer)):
            if not (copy := output.with_name(source.name)).exists():
                write_file(copy, read_file(source))
    print_result(_report(output, *student), as_json, _text)


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
    config = result["config"]
    return (
        f"{result['output']}: {megabytes(result['bytes'])}, {config['n_layer']} layers, "
        f"d_model {config['d_model']}, rank {config['rank']}, planes {config['planes']}"
    )
