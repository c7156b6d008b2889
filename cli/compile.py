"""`dfcompile`: a bundle from a student."""

from __future__ import annotations

import platform
from collections.abc import Callable

import click

from dfssm.compiler.pipeline import Request, compile_model
from dfssm.compiler.triton import BUNDLE, FORMS
from dfssm.targets import TARGETS, get_target

from .options import json_option, megabytes, print_result, progress_bars, table, whole

NEAR = 0.1
"""Share of what fp16 can hold, from which on states are warned of: a text may be longer than the verification's."""


def _options_of_targets(command: Callable[..., None]) -> Callable[..., None]:
    """Adds a flag for every option that some target declares; one that is not given is None or False."""
    declared = [(target, option) for target in TARGETS for option in get_target(target).OPTIONS]
    for target, option in reversed(declared):  # as decorators are applied
        is_flag, is_path = option.default is False, option.default is None
        default = option.default_text or ("" if is_flag or is_path else option.default)
        help = f"{target}: {option.help}" + (f"  [default: {default}]" if default else "")
        kind = click.Path() if is_path else whole(1) if type(option.default) is int else str
        form = {"is_flag": True} if is_flag else {"type": kind, "metavar": option.metavar}
        command = click.option(option.flag, help=help, **form)(command)
    return command


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", type=click.Path())
@click.option(
    "--target",
    required=True,
    metavar="NAME",
    help=" ".join(f"{name}: {get_target(name).SUMMARY}." for name in TARGETS),
)
@click.option(
    "-o", "--output", type=click.Path(), metavar="DIR", help="The bundle to write.  [default: ./MODEL-TARGET]"
)
@click.option(
    "--state-dtype",
    metavar="TYPE",
    help="Store the SSM state as fp32, fp16 or int8; as int8-deferred or the like, written for every eighth token.  "
    "[default: by target]",
)
@click.option(
    "--tokenizer", type=click.Path(), metavar="FILE", help="A tokenizer.json.  [default: the one beside MODEL, if any]"
)
@click.option(
    "--verify/--no-verify", default=True, help="Compare the bundle with the PyTorch model.  [default: verify]"
)
@click.option("--taps", is_flag=True, help="Also write a graph that shows the hidden states, for `dfssm analyze`.")
@click.option(
    "--emit",
    type=click.Choice(list(FORMS)),
    default=BUNDLE,
    show_default=True,
    help="A bundle, or a model repository for Triton Inference Server with the bundle in it.",
)
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@_options_of_targets
@click.version_option(package_name="dfssm")
@json_option
def command(as_json: bool, **options) -> None:
    """Compile MODEL (model.pt or model.safetensors) into a bundle: a folder that `dfssm run` and Engine.load open."""
    given = {option.name: options.pop(option.name) for name in TARGETS for option in get_target(name).OPTIONS}
    of_target = {name: value for name, value in given.items() if value is not None and value is not False}
    with progress_bars() as progress:
        report = compile_model(Request(**options, options=of_target), progress)
    print_result(report.to_dict(), as_json, _text)


def _memory(memory: dict) -> str:
    """What an engine takes of a GPU."""
    parts = {"weights": "weights", "states": "states", "activations": "between the layers", "logits": "logits"}
    told = [f"{megabytes(memory[key])} {name}" for key, name in parts.items() if memory[key] is not None]
    total = "" if memory["total"] is None else f" {megabytes(memory['total'])}:"
    rows = f"{memory['rows']} sequence{'s' if memory['rows'] > 1 else ''}"
    return f"memory of the GPU with {rows}:{total} {', '.join(told)}"


def _text(report: dict) -> str:
    passes = [[p["name"], f"{p['seconds']:.2f} s", f"peak {megabytes(p['peak_rss_bytes'])}"] for p in report["passes"]]
    lines = [table(passes, right={1, 2})]
    verification = report["verification"]
    if "why_not" in verification:
        lines.append(f"the engine was not run: {verification['why_not']}")
        verification = verification["graph"]
    if verification["passed"]:
        name, worst = max(verification["outputs"].items(), key=lambda item: item[1]["max_rel"] / item[1]["tolerance"])
        lines.append(
            f"verified against PyTorch, op by op, over {verification['tokens']} + {verification['steps']} tokens; "
            f"worst: {name}, {worst['max_rel']:.1e} of its largest value ({worst['tolerance']:.1e} allowed)"
        )
        if (states := verification["states"]) and states["share"] > NEAR:
            lines.append(
                f"warning: states of layer {states['layer']} reach {states['share']:.0%} of what fp16 can hold within "
                f"{states['tokens']} tokens: longer texts may saturate them; --state-dtype fp32 has room"
            )
    else:
        lines.append("not verified (--no-verify)")
    if engine := report["engine"]:
        for name, nodes in engine["refused"].items():
            lines += [f"{name} not applied at {node}: {why}" for node, why in nodes.items()]
        sm = ", ".join(map(str, engine["sm"]))
        lines.append(f"built by {engine['builder']} {engine['version']} ({engine['why']}) for SM {sm}")
        lines.append(_memory(engine["memory"]))
    if report["machine"] not in (None, platform.machine()):
        lines.append(f"for {report['machine']}, verified with the kernels of this machine: `dfssm verify` it there")
    lines.append(
        f"{report['output']}: {megabytes(report['bytes'])}, target {report['target']}, {report['state_dtype']} states"
    )
    return "\n".join(lines)
