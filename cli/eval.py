"""`dfssm eval`: perplexity and tasks."""

from __future__ import annotations

import math
import sys

import click
from tqdm import tqdm

from dfssm.base.extras import require

from .options import json_option, print_result, table, trust_option, whole

model_argument = click.argument("model", metavar="MODEL", type=click.Path())
tokenizer_option = click.option(
    "--tokenizer", type=click.Path(), metavar="FILE", help="Use this tokenizer.json instead of the model's."
)
device_option = click.option("--device", metavar="NAME", help="PyTorch device of a teacher or student: cpu or cuda.")


@click.group(name="eval")
def evaluate() -> None:
    """Evaluate a teacher, a student or a bundle."""


@evaluate.command()
@model_argument
@click.option(
    "--data",
    required=True,
    multiple=True,
    type=click.Path(),
    metavar="PATH",
    help="Text, JSON lines or parquet, or a folder of such files. Repeatable.",
)
@click.option("--window", type=whole(2, 2**20), default=1024, metavar="N", help="Tokens in a window.")
@click.option("--stride", type=whole(1, 2**20), default=512, metavar="N", help="Tokens from one window to the next.")
@click.option("--tokens", type=whole(1, 2**40), metavar="N", help="Score only the first N tokens.")
@click.option(
    "--chunk",
    type=whole(1, 2**20),
    default=64,
    metavar="N",
    help="Tokens scored in one call. 1: fp16 and int8 states are rounded after every token, as in decoding.",
)
@click.option("--reference", type=click.Path(), metavar="MODEL", help="Also measure the KL divergence from this model.")
@tokenizer_option
@device_option
@trust_option
@json_option
def perplexity(model, data, window, stride, tokens, chunk, reference, tokenizer, device, as_json) -> None:
    """Measure the perplexity of MODEL on text, over strided windows.

    MODEL is a teacher (the folder of a Mamba-2 checkpoint), a student (model.pt or .safetensors) or a bundle.
    """
    from dfssm.eval.perplexity import measure, require_stride
    from dfssm.eval.scorer import locate, open_scorer, packages
    from dfssm.eval.text import read_text
    from dfssm.model.text import packages as packages_of_text
    from dfssm.model.text import text_files

    require_stride(window, stride)
    models = [model] if reference is None else [model, reference]
    kinds = [locate(path, tokenizer)[0] for path in models]
    require(packages(*kinds), {"": packages_of_text(text_files(data))})
    scorer = open_scorer(model, tokenizer, device)
    wanted = None if reference is None else open_scorer(reference, tokenizer, device)
    text = read_text(data, scorer, tokens)
    with tqdm(total=len(text.ids) - 1, desc="perplexity", unit="tok", disable=None, leave=False) as bar:
        found = measure(scorer, text, window, stride, bar.update, wanted, chunk)
    keys = ("perplexity", "tokens", "nats", "bytes", "bits_per_byte", "window", "stride", "chunk")
    result = {key: getattr(found, key) for key in keys} | {"model": str(model), "kind": scorer.kind, "reference": None}
    if wanted and found.against:
        theirs = math.exp(found.against.nats / found.tokens)
        result["reference"] = {
            **{"model": str(reference), "kind": wanted.kind, "perplexity": theirs, "ratio": found.perplexity / theirs},
            **{key: getattr(found.against, key) for key in ("kl", "kl_stderr", "same_top")},
        }
    print_result(result, as_json, _perplexity_text)


@evaluate.command()
@model_argument
@click.option("--tasks", "names", required=True, metavar="NAME,...", help="Tasks of lm-evaluation-harness.")
@click.option("--limit", type=whole(1), metavar="N", help="Ask only the first N questions of each task.")
@click.option(
    "--data",
    type=click.Path(),
    metavar="DIR",
    help="Folder with the questions (docs/eval.md); else they are downloaded.",
)
@tokenizer_option
@device_option
@trust_option
@json_option
def tasks(model, names, limit, data, tokenizer, device, as_json) -> None:
    """Score MODEL on tasks of lm-evaluation-harness.

    MODEL is a teacher (the folder of a Mamba-2 checkpoint), a student (model.pt or .safetensors) or a bundle.
    """
    from dfssm.eval.suite import run_tasks

    names = list(dict.fromkeys(filter(None, map(str.strip, names.split(",")))))
    if not names:
        raise click.UsageError("Give --tasks at least one name.")
    print_result(run_tasks(model, names, data, limit, tokenizer, device), as_json, _tasks_text)


@evaluate.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[lm_eval's arguments]")
def harness(arguments) -> None:
    """Run the command lm_eval with our `--model dfssm`."""
    from dfssm.eval.suite import PACKAGES

    require(PACKAGES)
    from lm_eval.__main__ import cli_evaluate

    import dfssm.eval.harness  # noqa: F401 (registers the model type)

    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()


def _perplexity_text(result: dict) -> str:
    lines = [
        f"{result['model']} ({result['kind']}): perplexity {result['perplexity']:.4f}"
        + (f", {result['bits_per_byte']:.4f} bits per byte" if result["bytes"] else ""),
        f"{result['tokens']} tokens, {result['bytes']} bytes, windows of {result['window']}, stride {result['stride']}",
    ]
    if against := result["reference"]:
        lines += [
            f"reference {against['model']} ({against['kind']}): perplexity {against['perplexity']:.4f}, "
            f"ratio {against['ratio']:.4f}",
            f"KL divergence from it {against['kl']:.5f} ± {against['kl_stderr']:.5f} nats per token, same most likely "
            f"token {against['same_top']:.2%}",
        ]
    return "\n".join(lines)


def _tasks_text(result: dict) -> str:
    rows = [["task", "metric", "value", "", "questions"]]
    for name, task in result["tasks"].items():
        for metric, found in task["metrics"].items():
            error = "" if found["stderr"] is None else f"± {found['stderr']:.4f}"
            count = f"{task['count']} of {task['available']}"
            rows.append([name, metric, f"{found['value']:.4f}", error, count])
    head = f"{result['model']} ({result['kind']}), lm-eval {result['harness']}"
    return "\n".join([head, table(rows, right={2})])
