"""`dfssm compare`: does the bundle compute what the student computes?"""

from __future__ import annotations

import click

from dfssm.model import PACKAGES
from dfssm.opset import paths
from dfssm.opset.extras import require

from .options import bundle_argument, json_option, print_result, progress_bar, table, trust_option


@click.command()
@bundle_argument
@click.argument("model", type=click.Path())
@click.option("--tokens", type=click.IntRange(2), default=64, show_default=True, metavar="N", help="Tokens to run.")
@trust_option
@json_option
def compare(bundle: str, model: str, tokens: int, as_json: bool) -> None:
    """Compare BUNDLE with the torch student in MODEL. Exits 1 when an output is off.

    The bundle runs as it is, most tokens as one prompt and the last ones step by step. The student's layers
    get what the bundle's layers got, so an error shows in the layer where it arises.
    """
    of_bundle, of_model = paths.bundle(bundle), paths.student(model)
    require(PACKAGES, {"compile": ["onnx", "polygraphy"]})
    from dfssm.verify.bundle import compare_bundle

    with progress_bar("compare") as progress:
        result = compare_bundle(of_bundle, of_model, tokens, progress)
    print_result(result, as_json, _text)
    if not result["passed"]:
        raise click.exceptions.Exit(1)


def _text(result: dict) -> str:
    lines = [f"{result['tokens']} tokens; errors as shares of the largest expected value", ""]
    rows = [["output", "max", "allowed", "typical", "allowed", ""]]
    for name, found in _by_kind(result["outputs"]).items():
        rows.append([name, *_figures(found), "ok" if found["passed"] else "FAILED"])
    lines += [table(rows, right={1, 2, 3, 4}), "", "layers, max:"]
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
    lines += [f"typical error of the worst channel {typical:.1e}, allowed {allowed:.1e}", ""]
    if not result["identical"]:
        lines.append("the graph as shipped gives other outputs than the same graph with its layers' values shown")
    lines.append("passed" if result["passed"] else "FAILED")
    return "\n".join(lines)


def _figures(found: dict) -> list[str]:
    typical = ["", ""]
    if found["typical_rel"] is not None:
        typical = [f"{found[key]:.1e}" for key in ("typical_rel", "typical_tolerance")]
    return [f"{found['max_rel']:.1e}", f"{found['tolerance']:.1e}", *typical]


def _by_kind(outputs: dict[str, dict]) -> dict[str, dict]:
    """Of the states of all layers, those that failed and the worst of each kind."""
    shown = {name: found for name, found in outputs.items() if "." not in name}
    kinds = dict.fromkeys(name.split(".")[0] for name in outputs if "." in name)
    for kind in kinds:
        of_kind = {name: found for name, found in outputs.items() if name.startswith(f"{kind}.")}
        worst = max(of_kind, key=lambda name: of_kind[name]["max_rel"] / of_kind[name]["tolerance"])
        shown |= {name: found for name, found in of_kind.items() if not found["passed"] or name == worst}
    return shown
