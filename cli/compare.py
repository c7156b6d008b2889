"""`dfssm compare`: a bundle against the student in PyTorch."""

from __future__ import annotations

import click

from dfssm.base import paths
from dfssm.base.extras import require
from dfssm.model import PACKAGES
from dfssm.model.text import packages, text_files

from .options import bundle_argument, json_option, print_result, progress_bar, table, trust_option, whole

TOKENS = 64
"""That are run, unless the caller says otherwise."""


@click.command()
@bundle_argument
@click.argument("model", type=click.Path(), required=False)
@click.option("--teacher", type=click.Path(), help="Compare with this Mamba-2 checkpoint, in place of MODEL.")
@click.option("--data", multiple=True, type=click.Path(), metavar="PATH", help="With --teacher: text to run, files or "
              "folders; without it random tokens. Repeatable.")  # fmt: skip
@click.option("--tokens", type=whole(2, 4096), default=TOKENS, metavar="N", help="Number of tokens to run.")
@trust_option
@json_option
def compare(
    bundle: str, model: str | None, teacher: str | None, data: tuple[str, ...], tokens: int, as_json: bool
) -> None:
    """Compare BUNDLE with its student in PyTorch, or a bundle or student with its teacher.

    MODEL is the student (model.pt or .safetensors) that the bundle was compiled from. Most tokens are run as one
    prompt, the last ones step by step. Each PyTorch layer gets the inputs of the bundle's layer, so that an error shows
    in the layer that makes it. Of a TensorRT engine logits and states are compared. Exits with 1 if an error exceeds
    its tolerance.

    With --teacher, BUNDLE may also be a student. Both models read the same tokens; the errors of the discretised A, of
    the scan's outputs and of the states after each token are printed for each layer.
    """
    if (model is None) == (teacher is None):
        raise click.UsageError("Give either MODEL or --teacher.")
    if data and teacher is None:
        raise click.UsageError("--data is for --teacher.")
    if teacher is not None:
        _compare_teacher(bundle, teacher, data, tokens, as_json)
        return
    of_bundle, of_model = paths.bundle(bundle), paths.student(str(model))
    require(PACKAGES, {"compile": ["onnx", "polygraphy"]})
    from dfssm.verify.bundle import compare_bundle

    with progress_bar("compare") as progress:
        result = compare_bundle(of_bundle, of_model, tokens, progress)
    print_result(result, as_json, _text)
    if not result["passed"]:
        raise click.exceptions.Exit(1)


def _compare_teacher(path: str, teacher: str, data: tuple[str, ...], tokens: int, as_json: bool) -> None:
    _, of_model = paths.find(path, "bundle", "student")
    of_teacher = paths.teacher(teacher)
    require(PACKAGES, {"compile": ["onnx", "onnx-ir"], "": packages(text_files(data))})
    from dfssm.verify.teacher import compare_teacher

    with progress_bar("compare") as progress:
        result = compare_teacher(of_model, of_teacher, data, tokens, progress)
    print_result(result, as_json, _text_of_teacher)


def _text_of_teacher(result: dict) -> str:
    octaves = result["layers"][0]["state"]["by_tokens"]
    shown = list(octaves)[-1:] if len(octaves) < 4 else list(octaves)[:: max(1, len(octaves) // 4)]
    rows = [["layer", "A", "A, largest", "y", "state", *(f"to token {last}" for last in shown)]]
    for i, layer in enumerate(result["layers"]):
        A, y, state = (layer[name] for name in ("decay", "y", "state"))
        by_tokens = [f"{state['by_tokens'][last]:.3f}" for last in shown]
        rows.append([str(i), *(f"{v:.4f}" for v in (A["rms_rel"], A["max_abs"])), f"{y['rms_rel']:.3f}",
                     f"{state['rms_rel']:.3f}", *by_tokens])  # fmt: skip
    tokens = f"{result['tokens']} tokens" + ("" if result["data"] else " at random")
    lines = [
        f"{tokens}; rms errors relative to the teacher's rms; largest: the largest difference",
        "",
        table(rows, right=set(range(1, len(rows[0])))),
        "",
        "A: exp(-exp(A_log) d) of each head and token; y: output of the scan; state: after each token, and after those",
        "of the second half before the token that is named.",
    ]
    return "\n".join(lines)


def _text_of_engine(result: dict) -> str:
    rows = [["output", "max error", "rms error", "allowed", ""]]
    for name, found in _by_kind(result["outputs"], "rms_rel").items():
        figures = [f"{found[key]:.1e}" for key in ("max_rel", "rms_rel", "tolerance")]
        rows.append([name, *figures, "ok" if found["passed"] else "FAILED"])
    lines = [
        f"{result['tokens']} tokens; errors relative to the largest expected value, or rms to rms",
        "",
        table(rows, right={1, 2, 3}),
        "",
        "An engine shows no values inside its layers: each call of the student begins from the states that the engine",
        "stored, and the rms error is allowed that float noise brings about in a call. To compare the same model layer",
        "by layer, compile it with --target ort-cpu.",
        "",
        "passed" if result["passed"] else "FAILED",
    ]
    return "\n".join(lines)


def _text(result: dict) -> str:
    if not result["layers"]:
        return _text_of_engine(result)
    lines = [f"{result['tokens']} tokens; errors relative to the largest expected value", ""]
    rows = [["output", "max error", "allowed", "typical error", "allowed", ""]]
    for name, found in _by_kind(result["outputs"]).items():
        rows.append([name, *_figures(found), "ok" if found["passed"] else "FAILED"])
    lines += [table(rows, right={1, 2, 3, 4}), "", "max error by layer ('!': above the allowed one)"]
    layers: dict[str, dict] = {}
    for name, found in result["layers"].items():
        layer, tap = name.rsplit(".", 1)
        layers.setdefault(layer, {})[tap] = found
    first = next(iter(layers.values()))
    rows = [["layer", *first]]
    for layer, found in layers.items():
        rows.append([layer, *(f"{d['max_rel']:.1e}{'' if d['passed'] else ' !'}" for d in found.values())])
    rows.append(["allowed", *(f"{d['tolerance']:.1e}" for d in first.values())])
    lines.append(table(rows, right=set(range(1, len(first) + 1))))
    typical = max(found["typical_rel"] or 0.0 for found in result["layers"].values())
    allowed = next(iter(first.values()))["typical_tolerance"]
    lines += [f"typical error of the worst channel: {typical:.1e} ({allowed:.1e} allowed)", ""]
    if not result["identical"]:
        lines.append("the shipped graph and the same graph with its inner values exposed give different outputs")
    lines.append("passed" if result["passed"] else "FAILED")
    return "\n".join(lines)


def _figures(found: dict) -> list[str]:
    typical = ["", ""]
    if found["typical_rel"] is not None:
        typical = [f"{found[key]:.1e}" for key in ("typical_rel", "typical_tolerance")]
    return [f"{found['max_rel']:.1e}", f"{found['tolerance']:.1e}", *typical]


def _by_kind(outputs: dict[str, dict], error: str = "max_rel") -> dict[str, dict]:
    """Of the states of all layers, those that failed and the worst of each kind."""
    shown = {name: found for name, found in outputs.items() if "." not in name}
    kinds = dict.fromkeys(name.split(".")[0] for name in outputs if "." in name)
    for kind in kinds:
        of_kind = {name: found for name, found in outputs.items() if name.startswith(f"{kind}.")}
        worst = max(of_kind, key=lambda name: of_kind[name][error] / of_kind[name]["tolerance"])
        shown |= {name: found for name, found in of_kind.items() if not found["passed"] or name == worst}
    return shown
