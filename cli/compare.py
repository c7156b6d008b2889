"""`dfssm compare`: a bundle against the student in PyTorch."""

from __future__ import annotations

import click

from dfssm.model import PACKAGES
from dfssm.opset import paths
from dfssm.opset.extras import require

from .options import bundle_argument, json_option, print_result, progress_bar, table, trust_option, whole


@click.command()
@bundle_argument
@click.argument("model", type=click.Path())
@click.option("--tokens", type=whole(2, 4096), default=64, metavar="N", help="Number of tokens to run.")
@trust_option
@json_option
def compare(bundle: str, model: str, tokens: int, as_json: bool) -> None:
    """Compare BUNDLE with its student in PyTorch.

    MODEL is the student (model.pt or .safetensors) that the bundle was compiled from. Most tokens are run as one
    prompt, the last ones step by step. Each PyTorch layer gets the inputs of the bundle's layer, so that an error shows
    in the layer that makes it. Of a TensorRT engine logits and states are compared. Exits with 1 if an error exceeds
    its tolerance.
    """
    of_bundle, of_model = paths.bundle(bundle), paths.student(model)
    require(PACKAGES, {"compile": ["onnx", "polygraphy"]})
    from dfssm.verify.bundle import compare_bundle

    with progress_bar("compare") as progress:
        result = compare_bundle(of_bundle, of_model, tokens, progress)
    print_result(result, as_json, _text)
    if not result["passed"]:
        raise click.exceptions.Exit(1)


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
