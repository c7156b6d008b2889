"""`dfssm init` and `dfssm convert`: students without training."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dfssm.model import PACKAGES
from dfssm.opset import paths
from dfssm.opset.errors import DfssmError
from dfssm.opset.extras import require
from dfssm.targets.bundle import TOKENIZER

from .options import json_option, megabytes, print_result

output_option = click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(),
    metavar="FILE",
    help="model.pt or .safetensors.",
)
planes_option = click.option(
    "--planes", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Binary planes."
)
rank_option = click.option(
    "--rank", type=click.IntRange(0), default=16, show_default=True, metavar="R", help="Of the correction."
)


@click.command()
@click.option("--preset", metavar="NAME", help="A published shape: mamba2-130m to mamba2-2.7b.")
@click.option("--config", type=click.Path(), metavar="FILE", help="A JSON file of a shape.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="S")
@rank_option
@planes_option
@output_option
@json_option
def init(preset, config, seed, rank, planes, output, as_json) -> None:
    """Write a random student of a real shape, for benchmarks and tests."""
    if (preset is None) == (config is None):
        raise click.UsageError("Give either --preset or --config.")
    if config is not None:
        config = paths.file(config, "a JSON file of a shape, as in docs/format.md", paths.CONFIG)
    output = paths.output_file(output)
    require(PACKAGES)
    from dfssm.model.checkpoint import save_student
    from dfssm.model.config import preset as named
    from dfssm.model.convert import init_student

    student = init_student(_read_config(config) if config else named(preset), seed, rank, planes)
    save_student(output, *student)
    print_result(_report(output, *student), as_json, _text)


@click.command()
@click.argument("teacher", type=click.Path())
@rank_option
@planes_option
@output_option
@json_option
def convert(teacher, rank, planes, output, as_json) -> None:
    """Make a student of TEACHER without data: signs, scales, and a low rank of what they leave.

    TEACHER is a folder or file of a Mamba-2 checkpoint (Hugging Face or mamba_ssm). Its tokenizer.json, where there is
    one, is put beside FILE, for dfcompile to find; one that is there already stays.
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
    tokenizer, beside = teacher / TOKENIZER, output.with_name(TOKENIZER)
    if tokenizer.is_file() and not beside.exists():
        write_file(beside, tokenizer.read_bytes())
    print_result(_report(output, *student), as_json, _text)


def _read_config(path: Path):
    from dfssm.model.config import Mamba2Config

    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DfssmError(f"{path} cannot be read as JSON ({error}): give a config as in docs/format.md") from None
    return Mamba2Config.from_dict(values)


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
        f"{result['output']}: {megabytes(result['bytes'])}, {config['n_layer']} layers of "
        f"{config['d_model']}, rank {config['rank']}, planes {config['planes']}"
    )
