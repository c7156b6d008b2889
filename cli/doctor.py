"""`dfssm doctor`: what this machine has, what is used, and what is missing."""

from __future__ import annotations

import os

import click

from dfssm.base.extras import lacking

from .options import json_option, megabytes, print_result, table

_USES = {
    "run": "run bundles, eval perplexity of them",
    "compile": "compile for ort-cpu and onnx",
    "train": "distill",
    "evaluate": "eval tasks (of a bundle)",
    "tensorrt_build": "compile for trt",
    "tensorrt_run": "run trt bundles",
}


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show what works on this machine, and what is missing.

    Exits with 1 if no target is usable.
    """
    result = examine()
    print_result(result, as_json, _text)
    if not any(target["usable"] for target in result["targets"].values()):
        raise click.exceptions.Exit(1)


def examine() -> dict:
    """The findings, as in docs/json.md."""
    from dfssm.runtime.machine import instruction_sets, machine, packages
    from dfssm.targets import TARGETS, get_target

    probes = {name: get_target(name).probe() for name in TARGETS}
    return {
        "machine": machine(),
        "packages": packages(),
        "isas": instruction_sets(),
        "environment": {
            name: os.environ.get(name) for name in ("DFSSM_ISA", "DFSSM_ORT_LIBRARY", "DFSSM_TRT_LIBRARY", "DFSSM_LOG")
        },
        "targets": {
            name: {"usable": probe.usable, "uses": probe.uses, "why_not": probe.why_not or None}
            for name, probe in probes.items()
        },
        "usable_for": {
            name: {"usable": not why_not, "why_not": why_not or None} for name, why_not in _why_not(probes).items()
        },
    }


def _why_not(probes: dict) -> dict[str, str]:
    """Use -> what it lacks here, and the command that mends it; "" where it lacks nothing."""
    from dfssm.compiler.pipeline import PACKAGES as OF_COMPILER
    from dfssm.distill import PACKAGES as OF_TRAINING
    from dfssm.eval.suite import PACKAGES as OF_TASKS
    from dfssm.targets import get_target

    cpu = probes["ort-cpu"].why_not
    return {
        "run": get_target("ort-cpu").why_not_run(),
        "compile": lacking(*OF_COMPILER) or cpu,
        "train": lacking(OF_TRAINING),
        "evaluate": lacking(OF_TASKS) or cpu,
        "tensorrt_build": lacking(*OF_COMPILER, probes["trt"].needs) or probes["trt"].why_not,
        "tensorrt_run": get_target("trt").why_not_run(),
    }


def _text(result: dict) -> str:
    machine = result["machine"]
    memory = machine["memory_bytes"]
    rows = [
        ["CPU", f"{machine['cpu']}, {machine['cores']} usable cores"],
        ["memory", megabytes(memory) if memory else "unknown"],
        ["system", f"{machine['system']}, Python {machine['python']}"],
        ["kernels", ", ".join(result["isas"]) or "none: the native part of dfssm is not installed"],
        ["packages", ", ".join(f"{name} {found or 'missing'}" for name, found in result["packages"].items())],
    ]
    rows += [[name, value] for name, value in result["environment"].items() if value is not None]
    lines = [table(rows), ""]
    for name, target in result["targets"].items():
        uses = ", ".join(f"{part} {value}" for part, value in target["uses"].items())
        lines.append(f"target {name}: " + (f"usable ({uses})" if target["usable"] else f"no: {target['why_not']}"))
    rows = [
        [f"  {_USES[name]}", "yes" if use["usable"] else f"no: {use['why_not']}"]
        for name, use in result["usable_for"].items()
    ]
    lines += ["", "can be used to", table(rows)]
    return "\n".join(lines)
