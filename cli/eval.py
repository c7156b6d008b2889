"""`dfssm eval`: perplexity and tasks."""

from __future__ import annotations

import math

import click
from tqdm import tqdm

from dfssm.opset.extras import require

from .options import json_option, print_result, table, trust_option

model_argument = click.argument("model", metavar="MODEL", type=click.Path())
tokenizer_option = click.option(
    "--tokenizer", type=click.Path(), metavar="FILE", help="A tokenizer.json other than the model's."
)
device_option = click.option("--device", metavar="NAME", help="Of torch, for teacher and student: cpu or cuda.")


@click.group(name="eval")
def evaluate() -> None:
    """Measure a teacher, a student or a bundle: perplexity, tasks."""


@evaluate.command()
@model_argument
@click.option(
    "--data",
    required=True,
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="Text, JSON lines, parquet, or a folder of them; may be given again.",
)
@click.option("--window", default=1024, show_default=True, metavar="N", help="Tokens the model reads at once.")
@click.option("--stride", default=512, show_default=True, metavar="N", help="From one window to the next.")
@click.option("--tokens", type=click.IntRange(1), metavar="N", help="Score the first N tokens only.")
@click.option(
    "--chunk",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    metavar="N",
    help="Tokens scored by one run; 1 rounds a narrow state after each, as decoding does.",
)
@click.option(
    "--reference",
    type=click.Path(),
    metavar="MODEL",
    help="What MODEL should equal, as a student its teacher: give the divergence from it.",
)
@tokenizer_option
@device_option
@trust_option
@json_option
def perplexity(model, data, window, stride, tokens, chunk, reference, tokenizer, device, as_json) -> None:
    """Perplexity of MODEL on text, over strided windows.

    MODEL is a checkpoint folder of a teacher, a student's model.pt or .safetensors, or a bundle.
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
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N questions of each task.")
@click.option(
    "--data",
    type=click.Path(),
    metavar="DIR",
    help="Folder of local questions; without it the harness downloads.",
)
@tokenizer_option
@device_option
@trust_option
@json_option
def tasks(model, names, limit, data, tokenizer, device, as_json) -> None:
    """Scores of MODEL in tasks, by lm-evaluation-harness.

    MODEL is a checkpoint folder of a teacher, a student's model.pt or .safetensors, or a bundle.
    """
    from dfssm.eval.suite import run_tasks

    names = list(dict.fromkeys(filter(None, map(str.strip, names.split(",")))))
    if not names:
        raise click.UsageError("Give --tasks at least one name.")
    print_result(run_tasks(model, names, data, limit, tokenizer, device), as_json, _tasks_text)


def _perplexity_text(result: dict) -> str:
    lines = [
        f"{result['model']} ({result['kind']}): perplexity {result['perplexity']:.4f} on {result['tokens']} tokens, "
        f"{result['bits_per_byte']:.4f} bits a byte",
        f"windows of {result['window']}, stride {result['stride']}, {result['bytes']} bytes",
    ]
    if against := result["reference"]:
        lines += [
            f"{against['model']} ({against['kind']}): perplexity {against['perplexity']:.4f}, the model's is "
            f"{against['ratio']:.4f} times that",
            f"divergence from it {against['kl']:.5f} ± {against['kl_stderr']:.5f} nats a token, the same "
            f"likeliest token {against['same_top']:.2%}",
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
